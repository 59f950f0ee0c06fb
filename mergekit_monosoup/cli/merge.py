"""`mergekit-monosoup merge`."""

from __future__ import annotations

from pathlib import Path

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_monosoup.cli.failure import reported_errors
from mergekit_monosoup.cli.on_ray import ray_options
from mergekit_monosoup.cluster.connection import RayOptions


@click.command(cls=PrettyPrintHelp)
@click.argument("config_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out_path", type=click.Path(file_okay=False, path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace what OUT_PATH holds once the merge is done.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted merge has left.")
@click.option("--restart", is_flag=True, help="Delete what an interrupted merge has left, and begin again.")
@click.option("--force-base", is_flag=True, help="Merge although the values say that the base is none.")
@click.option(
    "--report/--no-report",
    default=True,
    show_default=True,
    help="Write monosoup_report.jsonl, and monosoup_report.html to look at (our methods).",
)
@click.option(
    "--files-from",
    metavar="MODEL",
    help="Model whose configuration, tokenizer and other files go beside the weights; `base`, or a folder or "
    "Hub id. [default: the recipe's first fine-tuned model]",
)
@ray_options
@add_merge_options
def merge(
    config_file: Path,
    out_path: Path,
    overwrite: bool,
    resume: bool,
    restart: bool,
    force_base: bool,
    report: bool,
    files_from: str | None,
    cluster: RayOptions | None,
    merge_options: MergeOptions,
) -> None:
    """Run the merge recipe CONFIG_FILE and write the model to OUT_PATH.

    Takes the recipes and options of mergekit-yaml, works offline with local models, and makes the checks
    of `plan` before anything is downloaded. The model is made in OUT_PATH.partial and takes its place
    when it is whole and on the disk; after an interruption, `--resume` goes on with what is there.
    """
    from mergekit_monosoup.merging.run import RunOptions, merge_to_folder
    from mergekit_monosoup.planning.plain_yaml import read_text
    from mergekit_monosoup.registry import register

    merge_options.apply_global_options()
    if resume and restart:
        raise click.UsageError("--resume goes on with what --restart deletes; pass one of them")
    with reported_errors():
        register()
        merge_to_folder(
            read_text(config_file),
            out_path,
            merge_options,
            RunOptions(overwrite, resume, restart, force_base, report, cluster, files_from),
        )
    if not merge_options.quiet:
        click.echo(f"Wrote {out_path}")
