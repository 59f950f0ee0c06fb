"""Float64 reference of the methods that MonoSoup is compared with, from their formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray


def cosine(a: Array, b: Array) -> float:
    """Cosine of the angle between two tensors, 0 where either is zero."""
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    size_a, size_b = np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0)
    if size_a == 0 or size_b == 0:
        return 0.0
    a, b = a / size_a, b / size_b
    return float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


def model_stock_ratio(updates: Sequence[Array], angle: str = "mean_angle", bounded: bool = True) -> float:
    """Model Stock's t = N c / (1 + (N - 1) c), kept in [0, 1] unless `bounded` is false.

    c is the cosine of the mean angle, or the mean of the cosines, over all pairs.
    """
    n = len(updates)
    cosines = [cosine(a, b) for a, b in itertools.combinations(updates, 2)]
    if angle == "mean_angle":
        c = math.cos(math.fsum(math.acos(value) for value in cosines) / len(cosines))
    elif angle == "mean_cosine":
        c = math.fsum(cosines) / len(cosines)
    else:
        raise ValueError(f"unknown angle {angle!r}")
    if bounded:
        # c <= 0 means disagreement, which reverts to the pre-trained weights. Beyond the
        # pole at -1 / (N - 1) the raw ratio turns positive again, so c is cut, not t.
        c = max(c, 0.0)
    return n * c / (1.0 + (n - 1) * c)


def model_stock(
    w0: Array,
    ws: Sequence[Array],
    *,
    angle: str = "mean_angle",
    bounded: bool = True,
    filter_wise: bool = False,
) -> Array:
    """W = t mean(W_i) + (1 - t) W0, with one t per tensor or one per output row."""
    w0 = np.asarray(w0, np.float64)
    updates = [np.asarray(w, np.float64) - w0 for w in ws]
    mean = sum(updates) / len(updates)
    if not filter_wise or w0.ndim < 2:
        return w0 + model_stock_ratio(updates, angle, bounded) * mean
    # [out, in], [out, in, h, w], and a stack [E, out, in] whose rows are E * out.
    rows = w0.shape[0] * w0.shape[1] if w0.ndim == 3 else w0.shape[0]
    views = [update.reshape(rows, -1) for update in updates]
    t = [model_stock_ratio([v[row] for v in views], angle, bounded) for row in range(rows)]
    return w0 + (np.array(t)[:, None] * mean.reshape(rows, -1)).reshape(w0.shape)


def sfgs(
    base: Mapping[str, Array],
    candidates: Sequence[Mapping[str, Array]],
    threshold: float,
    *,
    scores: Sequence[float] | None = None,
    layers: str = "matrices",
) -> tuple[list[int], dict[int, float]]:
    """Similarity-Filtered Greedy Soup: indices taken in order, average cosine of each tried.

    One decision for the whole model; the first candidate is always in the soup. A tensor
    whose update is zero on either side does not count.
    """
    order = list(range(len(candidates)))
    if scores is not None:
        order.sort(key=lambda index: -scores[index])
    names = [name for name in base if layers == "all" or np.ndim(base[name]) >= 2]
    updates = [
        {name: np.asarray(model[name], np.float64) - base[name] for name in names} for model in candidates
    ]
    taken, averages = [order[0]], {}
    for index in order[1:]:
        cosines = []
        for name in names:
            soup = sum(updates[member][name] for member in taken) / len(taken)
            if soup.any() and updates[index][name].any():
                cosines.append(cosine(updates[index][name], soup))
        averages[index] = math.fsum(cosines) / len(cosines) if cosines else 0.0
        if averages[index] > threshold:
            taken.append(index)
    return taken, averages


def soup_of(base: Mapping[str, Array], models: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """W0 + mean of the updates, for every tensor."""
    return {
        name: w0 + sum(np.asarray(m[name], np.float64) - w0 for m in models) / len(models)
        for name, w0 in base.items()
    }


def uniform_soup(ws: Sequence[Array]) -> Array:
    """Mean of the weights."""
    return np.mean([np.asarray(w, np.float64) for w in ws], axis=0)


def wise_ft(w0: Array, w1: Array, a: float) -> Array:
    """Wise-FT: (1 - a) W0 + a W1."""
    return (1.0 - a) * np.asarray(w0, np.float64) + a * np.asarray(w1, np.float64)


def lines_factor(block: int | None, blocks: int, a: float, b: float) -> float:
    """LiNeS: a + b l / (L - 1) for block l of L, and a for everything outside the blocks."""
    return a if block is None else a + b * block / (blocks - 1)


def lines(w0: Array, w1: Array, block: int | None, blocks: int, a: float, b: float) -> Array:
    """The weight whose update LiNeS has scaled by the depth of its block."""
    w0 = np.asarray(w0, np.float64)
    return w0 + lines_factor(block, blocks, a, b) * (np.asarray(w1, np.float64) - w0)
