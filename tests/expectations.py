"""What a merged checkpoint must hold, by the float64 reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import oracle
import torch
from rounding import as_float64, assert_correctly_rounded

Tensors = Mapping[str, torch.Tensor]
Settings = Callable[[str], dict[str, Any]]

# Relative to max|dW|: what a float32 checkpoint may be off by, and what a bfloat16 or float16
# one may be off by where W0 and the edited update cancel.
FLOAT32_TOLERANCE = 5e-5
CANCELLATION = 5e-6


def depth(name: str, layers: int) -> float:
    """mergekit's position of a tensor along a gradient: 0 to 1 over the layers, 0 outside."""
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) / (layers - 1) if found else 0.0


def interpolate(values: Sequence[float], t: float) -> float:
    """A gradient of numbers at position t."""
    return float(np.interp(t, np.linspace(0, 1, len(values)), values))


def step(values: Sequence[Any], t: float) -> Any:
    """A gradient of names or switches at position t: they are chosen, not mixed."""
    return values[int(t * (len(values) - 1))]


def assert_merged(
    actual: Tensors,
    base: Tensors,
    tuned: Sequence[Tensors],
    settings: Settings | dict[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    """All tensors are there, in their dtype, with the values of the reference.

    `dtype` is what mergekit converts the inputs to as it reads them, `out_dtype` what it
    converts results to as it writes them; by default tensors keep the dtype that they have.
    """
    assert set(actual) == set(base)
    right = total = 0
    for name, w0 in base.items():
        inputs = [w0, *(tensors[name] for tensors in tuned)]
        if dtype is not None:
            inputs = [tensor.to(dtype) for tensor in inputs]
        options = settings(name) if callable(settings) else (settings or {})
        exact = oracle.monosoup_weight(*split(inputs), **options)
        stored = out_dtype or reduce(torch.promote_types, (tensor.dtype for tensor in inputs))
        counted = assert_tensor(actual[name], exact, inputs, stored, name)
        right, total = right + counted[0], total + counted[1]
    assert right >= 0.999 * total, f"{total - right} of {total} entries not correctly rounded"


def split(inputs: Sequence[torch.Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    """W0 and the list of W1, as float64 arrays."""
    first, *others = (as_float64(tensor) for tensor in inputs)
    return first, others


def assert_tensor(
    actual: torch.Tensor,
    exact: np.ndarray,
    inputs: Sequence[torch.Tensor],
    stored: torch.dtype,
    name: str = "tensor",
) -> tuple[int, int]:
    """One tensor against the reference, at the tolerance of its dtype.

    Returns (entries that are correctly rounded, entries), (0, 0) for float32.
    """
    w0, w1s = split(inputs)
    largest = max(np.abs(w1 - w0).max(initial=0.0) for w1 in w1s)
    if stored != torch.float32:
        wide = any(tensor.dtype == torch.float32 for tensor in inputs)
        floor = (FLOAT32_TOLERANCE if wide else CANCELLATION) * largest
        return assert_correctly_rounded(actual, exact, stored, label=name, floor=floor)
    assert actual.dtype == stored, f"{name}: {actual.dtype}, not {stored}"
    assert tuple(actual.shape) == exact.shape, f"{name}: {tuple(actual.shape)}"
    error = np.abs(as_float64(actual) - exact).max(initial=0.0)
    assert error <= FLOAT32_TOLERANCE * largest, f"{name}: off by {error / largest:.2e} of max|dW|"
    return 0, 0
