"""`python -m mergekit_monosoup`: the command where no console script is installed."""

from mergekit_monosoup.cli import main

main(prog_name="mergekit-monosoup")
