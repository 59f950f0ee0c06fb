"""The section that a merge adds to its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_monosoup.report.figures import by_change
from mergekit_monosoup.report.page.render import PAGE_NAME
from mergekit_monosoup.report.reader import FILE_NAME
from mergekit_monosoup.report.schema import ReportHeader, TensorRecord
from mergekit_monosoup.report.survival import survival_sentence
from mergekit_monosoup.report.table import summary

_ROWS = 5
_ABOUT = {
    "monosoup": (
        "MonoSoup ([arXiv 2602.09689](https://arxiv.org/abs/2602.09689)) splits the update that fine-tuning "
        "made to each weight matrix into its leading singular directions and the rest, and scales the two "
        "parts by coefficients read off the update's own spectrum. It needs the base model alone: no data, "
        "no training, and nothing to tune."
    ),
    "dg_hard": (
        "DG-Hard ([arXiv 2605.20296](https://arxiv.org/abs/2605.20296)) keeps those singular directions of "
        "the update that fine-tuning made to each weight matrix whose singular value is above the noise, and "
        "drops the others. The threshold is that of Gavish and Donoho "
        "([arXiv 1305.5870](https://arxiv.org/abs/1305.5870)) for noise of unknown level, which is estimated "
        "from the median singular value. It needs the base model alone: no data and no training."
    ),
    "model_stock_stable": (
        "Model Stock ([arXiv 2403.19522](https://arxiv.org/abs/2403.19522)) moves the average of several "
        "fine-tuned checkpoints towards their base, by a ratio that follows from the angle between their "
        "updates. Here the ratio is computed in float32 whatever the checkpoints' dtype."
    ),
    "sfgs": (
        "A similarity-filtered greedy soup "
        "([arXiv 2602.09689](https://arxiv.org/abs/2602.09689)) averages those fine-tuned checkpoints whose "
        "updates point the same way as the soup so far. It needs no data for the choice."
    ),
}


def card_section(header: ReportHeader, records: Sequence[TensorRecord], figures: Sequence[Path]) -> str:
    """Return the section: method, strongest and weakest edits, figures, versions.

    Args:
        header, records: of the merge's report.
        figures: pictures, by their paths relative to the card.
    """
    parts = ["### What was done"]
    if header.method in _ABOUT:
        parts.append(_ABOUT[header.method])
    parts.append(
        f"{summary(records)} (of computation). All figures by tensor are in `{FILE_NAME}`, "
        f"and to look at in `{PAGE_NAME}`."
    )
    if (left := survival_sentence([r.edit_survival for r in records])) is not None:
        parts.append(left)
    ranked = by_change(records)
    if ranked:
        shown = ranked if len(ranked) <= 2 * _ROWS else [*ranked[:_ROWS], *ranked[-_ROWS:]]
        rows = [
            f"| {'strong' if i < (len(shown) + 1) // 2 else 'weak'} | `{r.tensor}` | {r.k:g} of {r.r} "
            f"| {r.lambda_high:.3f} | {r.lambda_low:.3f} | {_relative(r)} | {value:.1%} |"
            for i, (value, r) in enumerate(shown)
        ]
        parts.append(
            "The strongest and the weakest edits, by the share of the update that they take away:\n\n"
            "| edit | tensor | k | λ_high | λ_low | ‖ΔW‖ / ‖W0‖ | taken away |\n"
            "|---|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    parts += [f"![{path.stem.replace('_', ' ')}]({path.as_posix()})" for path in figures]
    parts.append(
        "Versions: " + ", ".join(f"{name} {version}" for name, version in header.versions.items()) + "."
    )
    return "\n\n".join(parts) + "\n"


def _relative(record: TensorRecord) -> str:
    return "-" if record.relative_update is None else f"{record.relative_update:.2e}"
