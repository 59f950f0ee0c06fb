"""`mergekit-monosoup complete`."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_monosoup.cli.failure import reported_errors


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--from", "source", required=True, metavar="MODEL", help="Fine-tuned model: folder or Hub id.")
@click.option("--quiet", is_flag=True, help="Do not list the files.")
def complete(folder: Path, source: str, quiet: bool) -> None:
    """Bring the files beside the weights of MODEL into the merged model OUT.

    Stock mergekit copies configuration, tokenizer and generation settings from the base. This replaces them
    by those of the fine-tuned checkpoint: configuration (put right where the weights in OUT differ),
    generation settings, tokenizer and chat templates, processors, custom code (copied, never run), modules.
    The weights stay as they are.
    """
    from mergekit_monosoup.merging.completing import complete as bring

    with reported_errors():
        names = bring(folder, source)
    if not quiet:
        for name in names:
            click.echo(f"  {name}")
        click.echo(f"Brought {len(names)} files into {folder}")
