"""`mergekit-monosoup lora`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from mergekit_monosoup.cli.edit_options import Rank, edit_options
from mergekit_monosoup.cli.failure import reported_errors

if TYPE_CHECKING:
    from mergekit_monosoup.lora.editing import AdapterOptions, ModuleRecord


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.argument("out", type=click.Path(path_type=Path))
@edit_options
@click.option(
    "--rank",
    type=Rank(),
    metavar="[R|auto]",
    help="Write a smaller adapter: of this rank, keeping this share of the energy (0.95), or `auto` for the "
    "split index of each module. Left out: the rank of the input; for several adapters, the sum.",
)
@click.option("--base", help="Base model (folder or Hub id): edits what is stored whole, and checks names.")
@click.option(
    "--strict", is_flag=True, help="Refuse files that hold anything but plain LoRA, instead of keeping it."
)
@click.option("--overwrite", is_flag=True, help="Replace what OUT holds.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors and warnings only.")
def lora(
    adapters: tuple[str, ...],
    out: Path,
    energy: float | None,
    split: Any,
    threshold_scale: float,
    mixing: Any,
    alpha: float,
    rank: Any,
    base: str | None,
    strict: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Edit a LoRA adapter by its factors; the base model is not needed.

    ADAPTER is the folder or Hub id (or id@revision) of a PEFT adapter, or a .safetensors file of diffusers,
    kohya's scripts or OneTrainer; several are averaged before the edit. OUT becomes the folder, or the file,
    of the edited adapter, of the same rank, scaling, names and dtype.
    """
    from mergekit_monosoup.checkpoint.output import refuse_occupied
    from mergekit_monosoup.lora.adapter import read_adapter
    from mergekit_monosoup.lora.base import BaseModel
    from mergekit_monosoup.lora.editing import AdapterOptions, edit_adapters
    from mergekit_monosoup.lora.writer import write_adapter
    from mergekit_monosoup.spectral.split import Split

    with reported_errors():
        options = AdapterOptions(Split(split, energy, threshold_scale), mixing, alpha, rank)
        if files := _single_files(adapters, out):
            if base is not None:
                raise click.UsageError(
                    "--base is for PEFT adapters; a single file is edited without its base"
                )
            _edit_files(files, out, options, strict, overwrite, quiet)
            return
        if strict:
            raise click.UsageError(
                "--strict is for single files; PEFT adapters that are not plain are refused"
            )
        refuse_occupied(out, overwrite)
        read = [read_adapter(source) for source in adapters]
        lookup = BaseModel(base) if base else None
        if lookup is not None:
            for adapter in read:
                lookup.check(adapter)
        edited = edit_adapters(read, options, lookup)
        write_adapter(edited, read, options, out, overwrite=overwrite)
    for key in edited.kept:
        reason = "the base has no tensor of that name and shape" if base else "give --base to edit it"
        click.echo(f"Warning: {key} is stored whole and was kept as it is; {reason}.", err=True)
    _tell(edited.records, out, quiet)


def _single_files(adapters: tuple[str, ...], out: Path) -> list[Path]:
    """Return the inputs where they are single files, an empty list where they are PEFT adapters."""
    files = [Path(name) for name in adapters if Path(name).suffix == ".safetensors" or Path(name).is_file()]
    if files and len(files) < len(adapters):
        folder = next(name for name in adapters if Path(name) not in files)
        raise click.UsageError(f"{files[0]} is a single file and {folder} is not; average one kind at a time")
    if not files and out.suffix == ".safetensors":
        raise click.UsageError(f"OUT is a file, {out}, and ADAPTER is not; a folder is edited into a folder")
    return files


def _edit_files(
    files: list[Path], out: Path, options: AdapterOptions, strict: bool, overwrite: bool, quiet: bool
) -> None:
    from mergekit_monosoup.lora.single_file_edit import edit_files

    edited = edit_files(files, out, options, strict=strict, overwrite=overwrite)
    for kind, count in Counter(edited.kept.values()).items():
        key = next(key for key, its in edited.kept.items() if its == kind)
        what = f"are not plain LoRA but {kind}" if kind else "are not LoRA by any name known here"
        click.echo(f"Warning: {count} tensors {what} and were kept as they are, such as {key}.", err=True)
    _tell(edited.records, out, quiet)


def _tell(records: Sequence[ModuleRecord], out: Path, quiet: bool) -> None:
    moved = [record.edit for record in records if record.edit.matrices]
    if moved and all(edit.lambda_high == 1 and edit.cos_alpha == 0 for edit in moved):
        click.echo(
            "Warning: the split keeps all directions of every module (k = r), so the adapter is as it was; a "
            "lower energy threshold divides them, such as --energy 0.8.",
            err=True,
        )
    if not quiet:
        _summarise(records)
        click.echo(f"Wrote {out}")


def _summarise(records: Sequence[ModuleRecord]) -> None:
    changed = [r for r in records if r.edit.matrices]
    click.echo(f"{len(records)} modules, {len(records) - len(changed)} of them without any update")
    if not changed:
        return
    for label, values in (
        ("rank", [float(r.rank) for r in changed]),
        ("effective rank", [r.edit.effective_rank for r in changed]),
        ("split index k", [float(r.edit.k) for r in changed]),
        ("lambda_high", [r.edit.lambda_high for r in changed]),
        ("lambda_low", [r.edit.lambda_low for r in changed]),
        ("error of the smaller rank", [r.truncation_error for r in changed]),
    ):
        if label.startswith("error") and not any(values):
            continue
        click.echo(f"  {label:<26} mean {fmean(values):.4g}, from {min(values):.4g} to {max(values):.4g}")
