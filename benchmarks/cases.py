"""The matrices that are benchmarked, the authors' algorithm, and the float64 check of every result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import common  # noqa: F401 - makes the package importable from a checkout
import torch
from torch import Tensor

from mergekit_monosoup.spectral import EditRecord

# The matrices of one of the 28 layers of Qwen3-0.6B: shape -> how many.
LAYERS = 28
LAYER_MATRICES = {
    "q_proj": ((2048, 1024), 1),
    "k_proj, v_proj": ((1024, 1024), 2),
    "o_proj": ((1024, 2048), 1),
    "gate_proj, up_proj": ((3072, 1024), 2),
    "down_proj": ((1024, 3072), 1),
}
EMBEDDING = (151_936, 1024)

KINDS = {
    "gaussian": "independent normal entries, 3 % of the norm of W0",
    "tuned": "rank 16 over a power law i^-1/2, 1 % of the norm of W0, as fine-tuning leaves it",
    "power": "power law 1/i, 1 % of the norm of W0",
    "lora": "rank 16, 1 % of the norm of W0",
    "spiked": "rank 24, falling to 1/16, over independent noise of half its size, 1 % of the norm of W0",
}
COEFFICIENT_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 5e-5


def pair(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return W0 and W1 `[rows, columns]`, rounded to `dtype`; the update is one of KINDS before that."""
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.empty(rows, columns).normal_(std=0.02, generator=generator).to(dtype)
    dw = _update(kind, rows, columns, generator)
    share = 0.03 if kind == "gaussian" else 0.01
    dw *= share * 0.02 * math.sqrt(dw.numel()) / float(dw.norm())
    return w0, dw.add_(w0).to(dtype)


def _update(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "gaussian":
        return normal(rows, columns)
    if kind == "spiked":
        head = (normal(rows, 24) * torch.logspace(0, -4, 24, base=2.0)) @ normal(24, columns)
        return head / head.std() + normal(rows, columns) / 2
    rank = min(16 if kind == "lora" else rows, rows, columns)
    i = torch.arange(1.0, rank + 1)
    spectrum = {"lora": torch.ones(rank), "power": 1 / i, "tuned": i**-0.5 * torch.where(i <= 16, 4.0, 1.0)}
    return (normal(rows, rank) * spectrum[kind]) @ normal(rank, columns)


@dataclass(frozen=True)
class Reference:
    """What a full thin SVD says: the weight before it is rounded, k and lambda_low."""

    weight: Tensor
    k: int
    lambda_low: float


def full_svd(base: Tensor, tuned: Tensor, dtype: torch.dtype = torch.float32) -> Reference:
    """MonoSoup as its authors compute it: the full thin SVD, both parts formed, mixed and added.

    In float32 this is what is compared with; in float64 it is the check.
    """
    dw = tuned.to(dtype) - base.to(dtype)
    left, s, right = torch.linalg.svd(dw, full_matrices=False)
    p = s / s.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    k = max(1, min(math.ceil(float(entropy.exp())), len(s)))
    high = (left[:, :k] * s[:k]) @ right[:k]
    low = dw - high
    rho = float((s[k] / s[0]) ** 2) if k < len(s) else 0.0
    cos_alpha = float((s[k:].square().sum() / s.square().sum()).sqrt())
    lambda_low = rho + (1 - rho) * cos_alpha
    return Reference(base.to(dtype) + (1 - lambda_low) * high + lambda_low * low, k, lambda_low)


def check(result: Tensor, record: EditRecord, base: Tensor, tuned: Tensor) -> Reference:
    """Compare an edit with the float64 SVD.

    Raises:
        AssertionError: another k, lambda_low off by more than 1e-4, or an entry that is off by more
            than half a spacing of its dtype and 5e-5 of max |dW|.
    """
    exact = full_svd(base, tuned, torch.float64)
    assert record.k == exact.k, f"k is {record.k}, not {exact.k}"
    off = abs(record.lambda_low - exact.lambda_low)
    assert off <= COEFFICIENT_TOLERANCE, f"lambda_low is off by {off}"
    largest = float((tuned.double() - base.double()).abs().max())
    error = (result.double() - exact.weight).abs()
    excess = float((error - half_spacing(exact.weight, result.dtype)).max()) / largest
    assert excess <= WEIGHT_TOLERANCE, f"an entry is off by {excess} of max |dW| beyond rounding"
    return exact


def half_spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far a value may be moved by being rounded to `dtype`."""
    exponent = torch.frexp(x)[1] - 1
    return torch.ldexp(torch.full_like(x, torch.finfo(dtype).eps / 2), exponent)


def counted(rows: int, columns: int, k: float) -> dict[str, float]:
    """Return the floating-point operations of an exact edit by the Gram matrix, by step.

    Half of the symmetric product, m n^2; 9 n^3 for the eigen-decomposition; 4 m n c to project on the
    smaller side of the split and back.
    """
    m, n = max(rows, columns), min(rows, columns)
    c = min(k, n - k)
    return {"gram": m * n**2, "eigen": 9 * n**3, "project": 4 * m * n * c}


def moved_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Return the bytes of an edit: W0 and W1 read twice, the result written once."""
    return 5 * rows * columns * dtype.itemsize
