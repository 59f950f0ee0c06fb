"""Float64 reference of MonoSoup, written from its formulas and from nothing else.

NumPy, with a full `numpy.linalg.svd` for every matrix, and SciPy for one integral: slow, simple, and
without a line in common with the package, so that the two can disagree.

Sources: *Model soups need only one ingredient*, arXiv 2602.09689; for the noise threshold *The Optimal
Hard Threshold for Singular Values is 4/sqrt(3)*, arXiv 1305.5870, and *Spectral
Unforgetting*, arXiv 2605.20296.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq

Array = np.ndarray

MIXINGS = ("monosoup", "decay", "alignment", "uniform", "high", "low")


def effective_rank(s: Array) -> float:
    """exp H of the L1-normalised singular values (Roy & Vetterli 2007)."""
    p = s[s > 0] / s.sum()
    return float(math.exp(-(p * np.log(p)).sum()))


def numerical_rank(s: Array, shape: tuple[int, int]) -> int:
    """How many singular values stand above float64's own noise."""
    return int(np.count_nonzero(s > s[0] * max(shape) * np.finfo(np.float64).eps))


def split_index(s: Array, shape: tuple[int, int], energy: float | None = None) -> int:
    """The split index k: effective rank, or the smallest k that holds the energy R."""
    rank = numerical_rank(s, shape)
    if energy is None:
        return min(max(math.ceil(effective_rank(s[:rank])), 1), rank)
    kept = np.cumsum((s / s[0]) ** 2)
    # The last partial sum is the total itself: R = 1 asks for no more than that.
    return min(int(np.searchsorted(kept, energy * kept[-1], side="left")) + 1, rank)


@lru_cache(maxsize=64)
def median_of_pure_noise(beta: float) -> float:
    """Root of the median of the Marchenko-Pastur law, from its density in x."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(x: float) -> float:
        return math.sqrt((high - x) * (x - low)) / (2 * math.pi * beta * x)

    def above(x: float) -> float:
        return quad(density, x, high, epsabs=1e-12, limit=500)[0] - 0.5

    return math.sqrt(brentq(above, low + 1e-3 * (high - low), high, xtol=1e-14))


def noise_threshold(
    s: Array, shape: tuple[int, int], scale: float = 1.0, noise: str = "median"
) -> tuple[float, float, int]:
    """Noise level, threshold and k of the Donoho-Gavish rule, for all min(shape) singular values."""
    s = np.where(np.arange(len(s)) < numerical_rank(s, shape), s, 0.0)
    beta = min(shape) / max(shape)
    if noise == "median":
        sigma = float(np.median(s)) / median_of_pure_noise(beta)
    else:
        sigma = float(np.sort(s)[: max(1, len(s) // 4)].mean()) / 0.6745
    omega = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    return sigma, scale * omega * sigma, int(np.count_nonzero(s > scale * omega * sigma))


def monosoup_update(
    dw: Array, energy: float | None = None, mixing: str = "monosoup", threshold: dict[str, Any] | None = None
) -> tuple[Array, dict[str, Any]]:
    """Edit one update, a matrix [rows, columns], in float64.

    Returns the edited update and `k`, `effective_rank`, `rho`, `cos_alpha`,
    `lambda_low`, `lambda_high`. A zero update comes back as it is, with `k` = 0. With `threshold`, options
    of `noise_threshold`, k is that of the Donoho-Gavish rule.
    """
    dw = np.asarray(dw, dtype=np.float64)
    if dw.ndim != 2:
        raise ValueError(f"a matrix is needed, not shape {dw.shape}")
    if not dw.any():
        zero = {"k": 0, "effective_rank": 0.0, "rho": 0.0, "cos_alpha": 0.0}
        return dw.copy(), zero | {"lambda_low": 0.0, "lambda_high": 1.0}
    # A power of two changes no digit, and keeps the squares inside float64's range.
    unit = 2.0 ** math.floor(math.log2(np.abs(dw).max()))
    u, s, vt = np.linalg.svd(dw / unit, full_matrices=False)
    noise = (None, None)
    if threshold is None:
        k = split_index(s, dw.shape, energy)
    else:
        *noise, k = noise_threshold(unit * s, dw.shape, **threshold)
    rank = numerical_rank(s, dw.shape)
    rho = float((s[k] / s[0]) ** 2) if k < rank else 0.0
    tail = s[k:rank]
    cos_alpha = float(math.sqrt((tail**2).sum() / (s**2).sum()))
    lambda_high, lambda_low = {
        "monosoup": (None, rho + (1.0 - rho) * cos_alpha),
        "decay": (None, rho),
        "alignment": (None, cos_alpha),
        "uniform": (0.5, 0.5),
        "high": (1.0, 0.0),
        "low": (0.0, 1.0),
    }[mixing]
    if lambda_high is None:
        lambda_high = 1.0 - lambda_low
    # dW_low = dW - dW_high, so that the halves of `uniform`, and a tail that is empty, are
    # exact: half the difference of two neighbours is a tie, which the last bit would decide.
    high = unit * ((u[:, :k] * s[:k]) @ vt[:k]) if k < rank else dw
    edited = lambda_high * high + lambda_low * (dw - high)
    if lambda_high == lambda_low:
        edited = lambda_low * dw
    return edited, {
        "k": k,
        "effective_rank": effective_rank(s[:rank]),
        "rho": rho,
        "cos_alpha": cos_alpha,
        "lambda_low": lambda_low,
        "lambda_high": lambda_high,
        "noise": noise[0],
        "threshold": noise[1],
    }


def per_matrix(function: Callable[[Array], Array], tensor: Array) -> Array:
    """Apply a matrix function through the matrix view of a tensor.

    [out, in] as it is, a stack of experts [E, out, in] as E matrices, a
    convolution [out, in, h, w, ...] as one matrix [out, in*h*w*...].
    """
    if tensor.ndim < 2:
        return tensor
    if tensor.ndim == 3:
        return np.stack([function(matrix) for matrix in tensor])
    return function(tensor.reshape(tensor.shape[0], -1)).reshape(tensor.shape)


def mean_update(w0: Array, w1s: Sequence[Array], weights: Sequence[float] | None = None) -> Array:
    """Weighted mean of the updates, the weights normalised to one."""
    weights = [1.0] * len(w1s) if weights is None else list(weights)
    total = math.fsum(weights)
    dw = np.zeros_like(w0)
    for weight, w1 in zip(weights, w1s, strict=True):
        dw = dw + weight / total * (np.asarray(w1, dtype=np.float64) - w0)
    return dw


def monosoup_weight(
    w0: Array,
    w1s: Sequence[Array],
    *,
    weights: Sequence[float] | None = None,
    energy: float | None = None,
    alpha: float = 1.0,
    mixing: str = "monosoup",
    edit: bool = True,
    min_relative_update: float = 0.0,
    threshold: dict[str, Any] | None = None,
) -> Array:
    """One merged tensor in float64, not yet rounded to its storage dtype."""
    w0 = np.asarray(w0, dtype=np.float64)
    if len(w1s) == 1 and alpha == 1.0 and (not edit or w0.ndim < 2):
        # W0 + (W1 - W0) is W1, without a rounding on the way.
        return np.array(w1s[0], dtype=np.float64)
    dw = mean_update(w0, w1s, weights)
    norm = np.linalg.norm(w0)
    if norm > 0 and np.linalg.norm(dw) / norm < min_relative_update:
        edit = False
    if edit:
        dw = per_matrix(lambda m: monosoup_update(m, energy, mixing, threshold)[0], dw)
    return w0 + alpha * dw
