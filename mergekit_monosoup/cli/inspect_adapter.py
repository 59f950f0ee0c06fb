"""`mergekit-monosoup inspect ADAPTER`."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import click

from mergekit_monosoup.cli.html import write_html
from mergekit_monosoup.cli.inspect import draw

if TYPE_CHECKING:
    from mergekit_monosoup.inspected import Question
    from mergekit_monosoup.report.schema import TensorRecord


def inspect_adapter(
    source: str,
    question: Question,
    part: str,
    plot: Path | None,
    json_file: Path | None,
    html: Path | None,
    quiet: bool,
) -> None:
    """Analyse the modules of an adapter, and write what is asked for; see `inspect` for the options."""
    from mergekit_monosoup.adapter_inspection import AdapterInspection, adapter_table
    from mergekit_monosoup.errors import AdapterError
    from mergekit_monosoup.report.inputs import InputHashes
    from mergekit_monosoup.report.recorder import Recorder, new_header
    from mergekit_monosoup.report.table import sorted_records

    if Path(source).is_dir() and not (Path(source) / "adapter_config.json").is_file():
        raise AdapterError(
            f"{source} is no adapter (it has no adapter_config.json); give the fine-tuned checkpoint too to "
            "analyse its updates from that base, or the .safetensors file of a LoRA"
        )
    inspection = AdapterInspection.open(source)
    chosen = [name for name in inspection.modules if part in name]
    if not chosen:
        raise click.ClickException(f"no module of {source} has {part!r} in its name")
    hashes = InputHashes([(source, "finetuned", inspection.place)]) if json_file else None
    recorder = Recorder(new_header(method="inspect", device="cpu"), json_file, hashes=hashes)
    with recorder:
        for record in inspection.records(chosen, question):
            recorder.add(record)
    if not quiet:
        click.echo(adapter_table(sorted_records(recorder.records, "tensor")))
        _summarise(recorder.records)
    if plot is not None:
        draw(recorder.records, plot)
    if html is not None:
        from mergekit_monosoup.report.page.content import merge_page
        from mergekit_monosoup.report.page.public import public_name

        write_html(merge_page(recorder.header, recorder.records, public_name(source)), html)
    if json_file is not None:
        click.echo(f"Wrote {json_file}")


def _summarise(records: list[TensorRecord]) -> None:
    moved = [r for r in records if r.effective_rank is not None]
    idle = [r for r in records if r.reason == "zero update"]
    kept = [r for r in records if r.action == "kept"]
    if moved:
        ranks = fmean(r.figures["nominal_rank"] or 0.0 for r in moved)
        found = fmean(r.effective_rank or 0.0 for r in moved)
        click.echo(f"{len(moved)} modules: rank {ranks:.4g} and effective rank {found:.4g} on average")
    if idle:
        click.echo(f"{len(idle)} modules without any update, such as {idle[0].tensor}")
    if kept:
        click.echo(f"{len(kept)} tensors that are no factors, such as {kept[0].tensor} ({kept[0].reason})")
