"""`mergekit-monosoup inspect`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mergekit_monosoup.cli.failure import reported_errors
from mergekit_monosoup.cli.html import html_option, write_html
from mergekit_monosoup.cli.on_ray import ray_options
from mergekit_monosoup.cluster.connection import RayOptions

if TYPE_CHECKING:
    from mergekit_monosoup.inspection import Inspection
    from mergekit_monosoup.report.schema import TensorRecord
    from mergekit_monosoup.spectral.mixing import Mixing


@click.command()
@click.argument("base", metavar="BASE|ADAPTER")
@click.argument("finetuned", nargs=-1)
@click.option(
    "--energy",
    "energies",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True),
    metavar="R",
    help="Split by the energy threshold R as well; repeatable, and free: one decomposition serves all.",
)
@click.option(
    "--split",
    type=click.Choice(["effective_rank", "energy", "donoho_gavish"]),
    default="effective_rank",
    show_default=True,
    help="Rule of the main table; `energy` is R = 0.8.",
)
@click.option(
    "--threshold-scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor on the Donoho-Gavish threshold.",
)
@click.option("--dg-hard", is_flag=True, help="What dg_hard would do: that split, the rest dropped.")
@click.option("--filter", "part", default="", metavar="TEXT", help="Only tensors whose name contains TEXT.")
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Folder for PNG figures.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a report.")
@html_option
@click.option("--device", default="cpu", show_default=True, help="Where to decompose.")
@click.option("--cache-dir", help="Where Hub models are downloaded to.")
@ray_options
@click.option("-v", "--verbose", is_flag=True, help="One line per tensor as it is done.")
@click.option("--quiet", is_flag=True, help="No progress bar and no table.")
def inspect(
    base: str,
    finetuned: tuple[str, ...],
    energies: tuple[float, ...],
    split: Any,
    threshold_scale: float,
    dg_hard: bool,
    part: str,
    plot: Path | None,
    json_file: Path | None,
    html: Path | None,
    device: str,
    cache_dir: str | None,
    cluster: RayOptions | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Analyse the updates from BASE to FINETUNED as the merge would, without writing a model.

    BASE and FINETUNED are folders or Hub ids. Several fine-tuned checkpoints are averaged first, and the
    cosines between their updates are reported.

    With ADAPTER alone, a PEFT adapter or a .safetensors file of LoRA factors, its modules are analysed: their
    effective rank against the nominal one, and what a smaller rank would lose.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
    if not finetuned:
        from mergekit_monosoup.cli.inspect_adapter import inspect_adapter
        from mergekit_monosoup.inspected import Question
        from mergekit_monosoup.spectral.split import Split

        if cluster is not None:
            raise click.UsageError("an adapter is looked at in this process; leave --ray out")
        with reported_errors():
            rule = Split("donoho_gavish" if dg_hard else split, threshold_scale=threshold_scale)
            asked = Question(energies, split=rule, mixing="high" if dg_hard else "monosoup")
            inspect_adapter(base, asked, part, plot, json_file, html, quiet)
        return
    from mergekit_monosoup.inspected import Question
    from mergekit_monosoup.inspection import Inspection
    from mergekit_monosoup.merging.progress import progress
    from mergekit_monosoup.report.inputs import InputHashes
    from mergekit_monosoup.report.recorder import Recorder, new_header
    from mergekit_monosoup.report.schema import InputModel
    from mergekit_monosoup.spectral.split import Split

    with reported_errors():
        rule = Split("donoho_gavish" if dg_hard else split, threshold_scale=threshold_scale)
        mixing: Mixing = "high" if dg_hard else "monosoup"
        inspection = Inspection(base, finetuned, cache_dir=cache_dir)
        chosen = [name for name in inspection.tensors if part in name]
        if not chosen:
            raise click.ClickException(f"no tensor of both models has {part!r} in its name")
        roles: list[Literal["base", "finetuned"]] = ["base"]
        roles += ["finetuned" for _ in finetuned]
        models = list(zip(inspection.names, roles, inspection.folders, strict=True))
        with progress(len(chosen), "Inspecting", quiet=quiet, unit=" tensors") as bar:
            recorder = Recorder(
                new_header(method="inspect", device=device),
                json_file,
                hashes=InputHashes(models) if json_file else None,
            )
            with recorder:
                question = Question(energies, device, rule, mixing)
                for record in inspection.records(chosen, question, bar.tensor, cluster):
                    recorder.add(record)
        _tell(inspection, recorder.records, energies, quiet)
        if plot is not None:
            draw(recorder.records, plot)
        if html is not None:
            from mergekit_monosoup.report.page.content import merge_page
            from mergekit_monosoup.report.page.public import public_name

            inputs = tuple(InputModel(model=name, role=role) for name, role, _ in models)
            header = recorder.header.model_copy(update={"inputs": recorder.header.inputs or inputs})
            title = " and ".join(public_name(name) for name in finetuned)
            write_html(merge_page(header, recorder.records, title), html)
    if json_file is not None:
        click.echo(f"Wrote {json_file}")


def draw(records: list[TensorRecord], folder: Path) -> None:
    """Draw the figures of records and say which files there are."""
    from mergekit_monosoup.report.plots import write_plots

    written = write_plots(records, folder)
    for file in written:
        click.echo(f"Wrote {file}")
    if not written:
        click.echo("warning: no figure drawn; the updates hold nothing to draw", err=True)


def _tell(
    inspection: Inspection, records: list[TensorRecord], energies: tuple[float, ...], quiet: bool
) -> None:
    from mergekit_monosoup.report.survival import lost_to_rounding
    from mergekit_monosoup.report.table import records_table, sorted_records, sweep_table

    ordered = sorted_records(records, "tensor")
    if not quiet:
        click.echo(records_table(ordered))
        if energies:
            click.echo(f"\n{sweep_table(ordered, [f'{energy:g}' for energy in energies])}")
    message = lost_to_rounding([r.edit_survival for r in records if r.edit_survival is not None], ahead=True)
    if message is not None:
        click.echo(f"warning: {message}", err=True)
    if inspection.missing:
        click.echo(
            f"warning: {len(inspection.missing)} tensors are not in all models: "
            + ", ".join(inspection.missing[:5]),
            err=True,
        )
    if (message := inspection.base_message) is not None:
        click.echo(f"warning: {message}", err=True)
