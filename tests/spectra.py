"""Updates with a chosen spectrum, and what float64 says about them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import oracle
import torch

KINDS = ("gauss", "1/i", "i^-1/2", "spiked", "linear", "low rank", "low rank + noise", "flat")
RANK = 16


def orthonormal(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """`count` orthonormal columns of length `size`."""
    return np.linalg.qr(rng.standard_normal((size, count)))[0]


def singular_values(kind: str, count: int) -> np.ndarray:
    """`count` singular values, descending, of a kind other than `gauss`."""
    i = np.arange(1.0, count + 1)
    return {
        "1/i": 1 / i,
        "i^-1/2": i**-0.5,
        "spiked": np.where(i <= 5, 20.0 + 5 - i, np.linspace(1.0, 0.3, count)),
        "linear": np.linspace(1.0, 0.1, count),
        "low rank": (i <= RANK) / i,
        "low rank + noise": np.where(i <= RANK, 1 / i, 1e-6),
        "flat": np.ones(count),
    }[kind]


@lru_cache(maxsize=64)
def _update(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "gauss":
        return rng.standard_normal((rows, columns))
    count = min(rows, columns)
    left, right = orthonormal(rng, rows, count), orthonormal(rng, columns, count)
    return (left * singular_values(kind, count)) @ right.T


def update(
    kind: str, rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """An update `[rows, columns]` of one of KINDS, rounded to `dtype`; each call gives a copy."""
    return torch.from_numpy(_update(kind, rows, columns, seed).copy()).to(dtype)


def exact(dw: torch.Tensor, energy: float | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Edited update and record of the float64 reference, for the entries as they are stored."""
    return oracle.monosoup_update(dw.double().numpy(), energy)


def error(actual: torch.Tensor, expected: np.ndarray, dw: torch.Tensor) -> float:
    """Largest deviation, in units of max|dW|."""
    return float(np.abs(actual.double().numpy() - expected).max() / dw.double().abs().max())


def split_gap(dw: torch.Tensor, energy: float | None) -> float:
    """(s_k - s_{k+1}) / s_1: where it vanishes, the two sides of the split are not defined."""
    s = np.linalg.svd(dw.double().numpy(), compute_uv=False)
    k = oracle.split_index(s, tuple(dw.shape), energy)
    return 1.0 if k >= oracle.numerical_rank(s, tuple(dw.shape)) else float((s[k - 1] - s[k]) / s[0])
