"""`mergekit-monosoup align`."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_monosoup.cli.failure import reported_errors
from mergekit_monosoup.cli.html import html_option, write_html

if TYPE_CHECKING:
    from mergekit_monosoup.alignment.stored import Alignment
    from mergekit_monosoup.alignment.summary import AlignmentSummary


@click.command()
@click.argument("base")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--threshold", type=click.FloatRange(-1, 1), help="Threshold of sfgs.  [default: that of sfgs]")
@click.option("--score", "scores", type=float, multiple=True, help="One a checkpoint, in their order.")
@click.option("--layers", type=click.Choice(["matrices", "all"]), default="matrices", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every tensor, instead of tables.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw into this file (PNG, PDF)."
)
@html_option
@click.option("--device", default="cpu", show_default=True, help="Where to compute.")
@click.option(
    "--lora-merge-cache", type=click.Path(file_okay=False), help="For adapters that peft has to merge."
)
@click.option("--transformers-cache", type=click.Path(file_okay=False), help="For models of the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a checkpoint.")
def align(
    base: str,
    checkpoints: tuple[str, ...],
    threshold: float | None,
    scores: tuple[float, ...],
    layers: Any,
    as_json: bool,
    plot: Path | None,
    html: Path | None,
    device: str,
    **loading: Any,
) -> None:
    """Show how the updates of CHECKPOINTS, fine-tuned from BASE, lie to each other.

    Prints the average cosine of each pair, its spread over the tensors, which checkpoints sfgs would
    take, and Model Stock's ratios. Reads every file once. Names are those of mergekit recipes:
    folders, models of the Hub, base+lora, or single weight files. An adapter's update is taken from its
    factors.
    """
    from mergekit_monosoup.alignment.selection import DEFAULT_THRESHOLD
    from mergekit_monosoup.alignment.summary import summarize

    if len(checkpoints) < 2:
        raise click.UsageError("give the base and at least two checkpoints fine-tuned from it")
    if scores and len(scores) != len(checkpoints):
        raise click.UsageError(f"give --score once a checkpoint: {len(checkpoints)} times, or not at all")
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    with reported_errors():
        if plot is not None:
            # Before the reading, which may take minutes.
            from mergekit_monosoup.cli import align_plot
        alignment = _measure((base, *checkpoints), layers, device, loading)
        summary = summarize(
            alignment.products, alignment.cosines, threshold=threshold, scores=list(scores) or None
        )
        names = _short_names(checkpoints)
        if plot is not None:
            align_plot.draw(summary, names, plot)
        if html is not None:
            from mergekit_monosoup.report.page.alignment import alignment_page

            write_html(alignment_page(base, names, threshold, alignment, summary), html, quiet=as_json)
    if as_json:
        click.echo(json.dumps(_as_json(base, checkpoints, threshold, alignment, summary), indent=2))
    else:
        click.echo(_as_text(base, checkpoints, names, threshold, alignment, summary))


def _measure(names: tuple[str, ...], layers: Any, device: str, loading: dict[str, Any]) -> Alignment:
    """Read base and checkpoints, adapters by their factors as a merge does."""
    from mergekit.common import ModelReference
    from mergekit.config import InputModelDefinition, MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    from mergekit_monosoup.alignment.stored import align_loaders, loader_for
    from mergekit_monosoup.checkpoint.quantized import refuse_quantized_checkpoint
    from mergekit_monosoup.merging.adapters import adapters_opened, stored_model
    from mergekit_monosoup.methods.merge import Merge
    from mergekit_monosoup.methods.sfgs import refinement

    options = MergeOptions(**loading)
    LoaderCache().setup(options)
    models = [ModelReference.parse(name) for name in names]
    inputs = [InputModelDefinition(model=model) for model in models[1:]]
    config = MergeConfiguration(merge_method="sfgs", base_model=models[0], models=inputs)
    with tempfile.TemporaryDirectory() as folder, adapters_opened(config, options, Path(folder) / "merged"):
        loaders = [loader_for(model) for model in models]
        for model in models:
            refuse_quantized_checkpoint(stored_model(model))
        refine = refinement(models[0], models[1:], Merge(models[0], tuple(models[1:])))
        return align_loaders(loaders[0], loaders[1:], layers, device, refine)


def _short_names(checkpoints: tuple[str, ...]) -> list[str]:
    """Return the last part of each name, numbered where that is not enough to tell them apart."""
    parts = [name.rstrip("/").rsplit("/", 1)[-1] for name in checkpoints]
    counts = Counter(parts)
    return [f"{part} ({i})" if counts[part] > 1 else part for i, part in enumerate(parts, 1)]


def _as_text(
    base: str,
    checkpoints: tuple[str, ...],
    names: list[str],
    threshold: float,
    alignment: Alignment,
    summary: AlignmentSummary,
) -> str:
    numbers = [str(i) for i in range(1, summary.count + 1)]
    chosen = summary.selection
    spread = ["lowest", "quarter", "median", "three q.", "highest", "mean"]
    blocks = [
        [f"base  {base}", *(f"{i:>4}  {name}" for i, name in zip(numbers, checkpoints, strict=True))],
        [
            f"Average cosine of the updates, over {len(alignment.names)} tensors:",
            *_table(numbers, list(zip(numbers, summary.averages(), strict=True))),
        ],
        [
            "Spread of the cosine over the tensors:",
            *_table(
                spread,
                [(f"{i + 1}-{j + 1}", list(asdict(s).values())) for (i, j), s in summary.spreads().items()],
            ),
        ],
        [
            f"sfgs takes {len(chosen.taken)} of {summary.count} at threshold {threshold:g}:",
            *(
                f"  {names[i]}: "
                + (f"average cosine {chosen.averages[i]:.4f}" if i in chosen.averages else "the first")
                + (", taken" if i in chosen.taken else ", left out")
                for i in chosen.order
            ),
        ],
        [
            "Model Stock's ratio over the tensors (1: the average, 0: the base):",
            *_table(spread, [(a, list(asdict(s).values())) for a, s in summary.ratio_spreads().items()]),
        ],
    ]
    if alignment.skipped:
        left_out = ", ".join(f"{count} {reason}" for reason, count in alignment.skipped.items())
        blocks.append([f"Tensors left out: {left_out}"])
    return "\n\n".join("\n".join(block) for block in blocks)


def _table(header: list[str], rows: list[tuple[str, list[float]]]) -> list[str]:
    width = max(len(label) for label, _ in rows)
    lines = [" " * (width + 2) + "".join(f"{title:>10}" for title in header)]
    lines += [f"  {label:>{width}}" + "".join(map(_cell, row)) for label, row in rows]
    return lines


def _cell(value: float) -> str:
    # Minus zero is zero.
    return f"{'none':>10}" if math.isnan(value) else f"{round(value, 4) + 0.0:>10.4f}"


def _as_json(
    base: str,
    checkpoints: tuple[str, ...],
    threshold: float,
    alignment: Alignment,
    summary: AlignmentSummary,
) -> dict[str, Any]:
    selection = summary.selection
    data = {
        "base": base,
        "checkpoints": list(checkpoints),
        "average_cosines": summary.averages(),
        "spread": {f"{i + 1}-{j + 1}": asdict(s) for (i, j), s in summary.spreads().items()},
        "sfgs": {
            "threshold": threshold,
            "order": [checkpoints[i] for i in selection.order],
            "taken": [checkpoints[i] for i in selection.taken],
            "average_cosines": {checkpoints[i]: value for i, value in selection.averages.items()},
        },
        "model_stock": {angle: asdict(spread) for angle, spread in summary.ratio_spreads().items()},
        "tensors": [
            {
                "name": name,
                "cosines": cosines,
                "model_stock": {angle: ratios[i] for angle, ratios in summary.ratios.items()},
            }
            for i, (name, cosines) in enumerate(zip(alignment.names, alignment.cosines.tolist(), strict=True))
        ],
        "skipped": dict(alignment.skipped),
    }
    return _without_nan(data)  # type: ignore[no-any-return]


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not know, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
