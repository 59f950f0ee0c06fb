"""The page of `align`: how the updates of several checkpoints lie to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_monosoup.alignment.stored import Alignment
from mergekit_monosoup.alignment.summary import AlignmentSummary
from mergekit_monosoup.report.page.content import Page
from mergekit_monosoup.report.page.public import public_name
from mergekit_monosoup.report.page.tensors import MOST_ROWS, Column, Table, as_written

# Pairs that are still told apart, in columns and in histograms.
_MOST_PAIRS = 15


def alignment_page(
    base: str, names: Sequence[str], threshold: float, alignment: Alignment, summary: AlignmentSummary
) -> Page:
    """Return the page.

    Args:
        base: as the command names it.
        names: short ones of the checkpoints, in their order.
        threshold: of the similarity-filtered greedy soup.
        alignment, summary: what was measured, and what follows from it.
    """
    names = [public_name(name) for name in names]
    pairs = list(summary.pairs)[:_MOST_PAIRS]
    labels = {pair: f"{names[pair[0]]}, {names[pair[1]]}" for pair in pairs}
    selection = summary.selection
    sentences = [
        f"The updates of {len(names)} checkpoints from {public_name(base)} were compared in "
        f"{len(alignment.names)} tensors.",
        f"sfgs, at threshold {threshold:g}, takes {len(selection.taken)} of them: "
        + ", ".join(names[i] for i in selection.taken)
        + ".",
    ]
    if alignment.skipped:
        left_out = ", ".join(f"{count} {reason}" for reason, count in alignment.skipped.items())
        sentences.append(f"Tensors left out: {left_out}.")
    if len(summary.pairs) > _MOST_PAIRS:
        sentences.append(f"Below are the first {_MOST_PAIRS} of {len(summary.pairs)} pairs.")
    return Page(
        title=f"{len(names)} fine-tunes of {public_name(base)}",
        subtitle="How their updates lie to each other",
        sentences=sentences,
        numbers=[
            ("checkpoints", str(len(names))),
            ("tensors", f"{len(alignment.names):,}"),
            *(
                (f"median ratio of Model Stock, {angle}", f"{spread.median:.3f}")
                for angle, spread in summary.ratio_spreads().items()
                if not math.isnan(spread.median)
            ),
        ],
        table=_table(alignment, summary, labels),
        data={
            "averages": {
                "names": names,
                "values": [[_known(value) for value in row] for row in summary.averages()],
            },
            "cosines": {
                labels[pair]: [as_written(value, 4) for value in summary.pairs[pair]]
                for pair in pairs
                if summary.pairs[pair]
            }
            or None,
        },
    )


def _table(alignment: Alignment, summary: AlignmentSummary, labels: dict[tuple[int, int], str]) -> Table:
    columns = [
        Column("tensor", "name in the checkpoints", number=False),
        *(Column(f"cos {label}", "cosine of the two updates") for label in labels.values()),
        *(Column(f"ratio, {angle}", "Model Stock: 1 the average, 0 the base") for angle in summary.ratios),
    ]
    rows: list[list[str]] = []
    values: list[list[float | str | None]] = []
    matrices = alignment.cosines.tolist()[:MOST_ROWS]
    for number, (name, cosines) in enumerate(zip(alignment.names, matrices, strict=False)):
        figures = [cosines[i][j] for i, j in labels] + [ratios[number] for ratios in summary.ratios.values()]
        known = [_known(figure) for figure in figures]
        rows.append([name, *("" if figure is None else f"{figure:.4f}" for figure in known)])
        values.append([name, *known])
    return Table(columns, rows, values, [[] for _ in rows], len(alignment.names))


def _known(value: float) -> float | None:
    """Return a figure to four places, NaN as None and minus zero as zero."""
    return None if math.isnan(value) else round(value, 4) + 0.0
