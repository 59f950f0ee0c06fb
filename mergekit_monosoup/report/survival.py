"""What is left of edits after storage, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

# Mean share of the edits below which one is warned.
LEAST = 0.8


def survival_sentence(survivals: Sequence[float | None], *, ahead: bool = False) -> str | None:
    """Return what is left of the edits of several tensors; None where none was measured.

    Args:
        survivals: <E', E> / <E, E> of the tensors.
        ahead: the merge is still to come.
    """
    known = [survival for survival in survivals if survival is not None]
    if not known:
        return None
    verb = "would be" if ahead else "is"
    return (
        f"Of what the edit changes in the fine-tuned weights, {fmean(known):.0%} {verb} in the written ones "
        f"(mean of {len(known)} tensors, from {min(known):.0%} to {max(known):.0%}); changes below half "
        "a spacing of the stored dtype may round back."
    )


def lost_to_rounding(survivals: Sequence[float], *, ahead: bool = False) -> str | None:
    """Return a warning of edits that come out of storage weaker than intended, None where they do not.

    Args:
        survivals: <E', E> / <E, E> of the tensors.
        ahead: the merge is still to come.
    """
    if not survivals or fmean(survivals) >= LEAST:
        return None
    verb = "will be" if ahead else "is"
    return (
        f"of what the edit changes in the fine-tuned weights, {fmean(survivals):.0%} {verb} left after "
        f"rounding (mean of {len(survivals)} tensors, the least {min(survivals):.0%}): changes below half a "
        "spacing of the stored dtype round back. Set `rounding: stochastic` to keep all of it on average, or "
        "`out_dtype: float32` to keep it exactly"
    )
