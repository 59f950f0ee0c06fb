"""Model Stock's interpolation ratio."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Angle = Literal["mean_angle", "mean_cosine"]


def model_stock_ratio(cosines: Tensor, *, angle: Angle = "mean_angle", bounded: bool = True) -> Tensor:
    """Return t = N c / (1 + (N - 1) c), the share of the average of N >= 2 checkpoints.

    W = t mean(W_i) + (1 - t) W0 (arXiv 2403.19522, section 4). For N > 2, c is the cosine of the mean
    of the pairs' angles (`mean_angle`, the Model Stock authors) or the mean of their cosines
    (`mean_cosine`, mergekit). At the pole c = -1 / (N - 1) the unbounded ratio is 0.

    Args:
        cosines: float64 `[..., N, N]`; only what lies above the diagonal is read.
        angle: how the pairs are averaged.
        bounded: keep t in [0, 1]. Disagreement, c <= 0, gives 0: beyond the pole the raw ratio
            turns positive again, so c is cut and not t.

    Returns:
        t, float64 `[...]`.
    """
    count = cosines.shape[-1]
    first, second = torch.triu_indices(count, count, offset=1, device=cosines.device).unbind()
    pairs = cosines[..., first, second]
    c = pairs.clamp(-1, 1).acos().mean(-1).cos() if angle == "mean_angle" else pairs.mean(-1)
    if bounded:
        c = c.clamp(min=0)
    denominator = 1 + (count - 1) * c
    pole = denominator == 0
    return torch.where(pole, 0.0, count * c / torch.where(pole, 1.0, denominator))
