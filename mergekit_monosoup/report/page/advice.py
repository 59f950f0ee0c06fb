"""What is worth a look in the records of a merge, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from mergekit_monosoup.report.schema import ZERO_UPDATE, TensorRecord
from mergekit_monosoup.report.survival import LEAST, lost_to_rounding
from mergekit_monosoup.report.table import remark

# Of the norm of an update: above it, its smaller directions are rounding.
ROUNDING = 1 / 3
# ||dW|| / ||W0|| of unrelated weights of one size is sqrt(2); at 1, cos(W0, W1) is 1/2.
_UNRELATED = 1.0


@dataclass(frozen=True)
class Finding:
    """One thing worth a look.

    Args:
        text: what it is and what to do.
        group: the group of tensors it is about, a key of `GROUPS`; None where it is about all.
    """

    text: str
    group: str | None = None


def _rounding(record: TensorRecord) -> bool:
    return record.rounding_share is not None and record.rounding_share > ROUNDING


def _whole(record: TensorRecord) -> bool:
    edited = record.action == "edited" and record.reason != ZERO_UPDATE
    full = record.k is not None and record.r is not None and record.k >= record.r
    return edited and (full or record.cos_alpha == 0)


def _lost(record: TensorRecord) -> bool:
    return record.edit_survival is not None and record.edit_survival < LEAST


def _unmoved(record: TensorRecord) -> bool:
    return record.reason == ZERO_UPDATE


def _left(record: TensorRecord) -> bool:
    # Methods that average, and edit nothing, say by figures of their own what they did.
    return record.action != "edited" and len(record.shape) > 1 and not record.figures


#: groups of tensors that findings are about: how they are called, and who belongs to them
GROUPS: dict[str, tuple[str, Callable[[TensorRecord], bool]]] = {
    "rounding": ("rounding share above a third", _rounding),
    "whole": ("nothing below the split (k = r)", _whole),
    "lost": (f"less than {LEAST:.0%} of the edit left", _lost),
    "unmoved": ("without an update", _unmoved),
    "left": ("matrices that were not edited", _left),
}


def findings(records: Sequence[TensorRecord], *, ahead: bool = False) -> list[Finding]:
    """Return what a reader should look at, the gravest first; nothing where all is as it should be.

    Args:
        records: of a report.
        ahead: nothing has been written yet.
    """
    held = {group: [r for r in records if belongs(r)] for group, (_, belongs) in GROUPS.items()}
    spectra = [r for r in records if r.action == "edited"]
    found = [*_base(records)]
    note = remark(records)
    if note is not None:
        found.append(Finding(f"{note[:1].upper()}{note[1:]}."))
    if held["rounding"]:
        found.append(
            Finding(
                f"In {_of(held['rounding'], records)}, more than a third of the update's norm is rounding of "
                "the stored weights. What is small in such an update is noise, and its split says little of "
                "what was learned. Merge from float32 weights or from an adapter's factors, if they exist.",
                "rounding",
            )
        )
    # Where it holds for all, the remark has said it.
    if held["whole"] and (note is None or len(held["whole"]) < len(spectra)):
        found.append(
            Finding(
                f"In {_of(held['whole'], spectra)}, the split keeps every direction (k = r, or the rank of "
                "an adapter), so the update stays as it is. This happens to flat spectra; `energy: 0.8` "
                "divides them.",
                "whole",
            )
        )
    lost = lost_to_rounding([r.edit_survival for r in records if r.edit_survival is not None], ahead=ahead)
    if lost is not None:
        found.append(Finding(f"{lost[:1].upper()}{lost[1:]}.", "lost"))
    if held["unmoved"] and note is None:
        found.append(
            Finding(
                f"{_of(held['unmoved'], records)} hold the values of the base: fine-tuning did not touch "
                "them.",
                "unmoved",
            )
        )
    if held["left"]:
        reasons = Counter(r.reason or r.action for r in held["left"]).most_common(3)
        listed = "; ".join(f"{count} of them: {reason}" for reason, count in reasons)
        found.append(
            Finding(f"{_of(held['left'], records)} are matrices and were not edited ({listed}).", "left")
        )
    return found


def _base(records: Sequence[TensorRecord]) -> list[Finding]:
    sizes = [r.relative_update for r in records if r.relative_update is not None and len(r.shape) > 1]
    if not sizes or median(sizes) < _UNRELATED:
        return []
    return [
        Finding(
            f"The update is as large as the weights it starts from (median ‖ΔW‖ / ‖W0‖ {median(sizes):.2f}; "
            "weights of two separate trainings have about 1.41). The base may be the wrong one: name the "
            "checkpoint that the fine-tuning started from."
        )
    ]


def _of(some: Sequence[TensorRecord], every: Sequence[TensorRecord]) -> str:
    return f"{len(some)} of {len(every)} tensors"
