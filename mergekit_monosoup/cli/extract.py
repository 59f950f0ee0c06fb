"""`mergekit-monosoup extract`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_monosoup.cli.edit_options import Rank, edit_options
from mergekit_monosoup.cli.failure import reported_errors

if TYPE_CHECKING:
    from mergekit_monosoup.extraction import Extracted

_SHOWN = 5


@click.command()
@click.argument("base")
@click.argument("finetuned")
@click.argument("out", type=click.Path(path_type=Path))
@edit_options
@click.option(
    "--rank",
    type=Rank(),
    metavar="[R|auto|SHARE]",
    default="auto",
    show_default=True,
    help="Rank of each layer: R; the smallest that keeps this share (0.95) of the energy above the noise of "
    "storage; or `auto`, the directions that the split counts as high and that lie above that noise.",
)
@click.option("--plain", is_flag=True, help="Take the update as it is, without the edit.")
@click.option(
    "--factors-only",
    is_flag=True,
    help="Leave out what would be stored whole (norms, biases, tied embeddings), as vLLM asks.",
)
@click.option("--cache-dir", help="Where Hub models are downloaded to.")
@click.option("--overwrite", is_flag=True, help="Replace what OUT holds.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors and warnings only.")
def extract(
    base: str,
    finetuned: str,
    out: Path,
    energy: float | None,
    split: Any,
    threshold_scale: float,
    mixing: Any,
    alpha: float,
    rank: Any,
    plain: bool,
    factors_only: bool,
    cache_dir: str | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Make a PEFT adapter of a full fine-tune: the edited update, cut off at a rank.

    BASE and FINETUNED are folders or Hub ids; OUT becomes the folder of an adapter of BASE.
    """
    from mergekit_monosoup.checkpoint.output import refuse_occupied
    from mergekit_monosoup.extraction import ExtractOptions
    from mergekit_monosoup.extraction import extract as extract_adapter
    from mergekit_monosoup.extraction_folder import write_extracted
    from mergekit_monosoup.merging.progress import progress
    from mergekit_monosoup.spectral.split import Split

    with reported_errors():
        rule = Split(split, energy, threshold_scale)
        options = ExtractOptions(rank, rule, mixing, alpha, plain, factors_only)
        refuse_occupied(out, overwrite)
        with progress(0, "Extracting", quiet=quiet, unit=" tensors") as bar:
            extracted = extract_adapter(
                base, finetuned, options, cache_dir=cache_dir, seen=lambda name: bar.advance(name, 1)
            )
        write_extracted(extracted, base, finetuned, options, out, overwrite=overwrite)
    for reason, count in Counter(o.reason for o in extracted.outcomes if o.outcome == "left out").items():
        name = next(o.tensor for o in extracted.outcomes if o.reason == reason)
        click.echo(f"Warning: {count} tensors were left out ({reason}), such as {name}.", err=True)
    if not quiet:
        _summarise(extracted)
        click.echo(f"Wrote {out}")


def _summarise(extracted: Extracted) -> None:
    from mergekit_monosoup.checkpoint.output import gigabytes

    counts = Counter(o.outcome for o in extracted.outcomes)
    click.echo(", ".join(f"{counts[kind]} {kind}" for kind in ("factors", "whole", "unchanged", "left out")))
    ranks = sorted(extracted.adapter.ranks.values())
    sizes = extracted.adapter.bytes()
    if ranks:
        click.echo(
            f"  rank                       mean {sum(ranks) / len(ranks):.4g}, from {ranks[0]} to {ranks[-1]}"
        )
    click.echo(f"  factors, stored whole      {gigabytes(sizes['factors'])}, {gigabytes(sizes['whole'])}")
    click.echo(f"  rounding in the updates    {extracted.noise:.2%} of their squared norm")
    click.echo(f"  error, of the edited norm  {extracted.error:.2%} in all; the largest parts of it:")
    worst = sorted(extracted.outcomes, key=lambda o: o.error * o.norm, reverse=True)[:_SHOWN]
    for outcome in worst:
        click.echo(f"    {outcome.error:7.2%} of {outcome.norm:.4g}  {outcome.tensor}")
