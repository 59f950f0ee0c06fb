"""Model Stock's ratio at small updates: mergekit's `model_stock` beside our `model_stock_stable`.

Two updates with a cosine of exactly 1/2, so t = 2 c / (1 + c) = 2/3, from a base of the updates' own
size. The ratio is read off the merged tensor: <W - W0, dW> / <dW, dW> with dW the mean update.

Run `python benchmarks/stock_precision.py`: prints the table of docs/soups.md.
"""

from __future__ import annotations

import torch
from mergekit.merge_methods.api import merge_tensors
from torch import Tensor

SHAPES = ((1024,), (256, 256))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1e-3, 1e-4, 1e-5)
METHODS = ("model_stock", "model_stock_stable")


def triangle(shape: tuple[int, ...], dtype: torch.dtype, size: float) -> list[Tensor]:
    """Return W0, W1 and W2 in `dtype`; the updates have `size` per entry and cosine 1/2."""
    count = torch.Size(shape).numel()
    noise = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shared, first, second = torch.linalg.qr(noise).Q.T * count**0.5
    base = noise[:, 0].mul(size).to(dtype)
    updates = [size * (shared + own) / 2**0.5 for own in (first, second)]
    return [t.to(dtype).reshape(shape) for t in (base, *(base.double() + dw for dw in updates))]


def measured_ratio(method: str, tensors: list[Tensor]) -> float:
    """Return the t that a merge method has applied."""
    merged = merge_tensors(tensors, method, base_index=0)
    base, *finetuned = (tensor.double() for tensor in tensors)
    mean = sum(finetuned) / len(finetuned) - base
    return float(((merged.double() - base) * mean).sum() / (mean * mean).sum())


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| shape | dtype | update | `model_stock` | `model_stock_stable` |",
        "|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for dtype in DTYPES:
            for size in SIZES:
                tensors = triangle(shape, dtype, size)
                ratios = (f"{measured_ratio(method, tensors):.3f}" for method in METHODS)
                name, label = str(dtype).removeprefix("torch."), " x ".join(map(str, shape))
                lines.append(f"| {label} | {name} | {size:.0e} | {' | '.join(ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from mergekit_monosoup.registry import register

    register()
    print(table())
