"""Stacks of equal small matrices (experts, filter banks), decomposed many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.spectral.certify import gram_doubt, is_certain, product_error
from mergekit_monosoup.spectral.split import Split
from mergekit_monosoup.spectral.update import device_entries

# Above this size the time of one decomposition dwarfs that of calling it.
LARGEST_SMALL_SIDE = 128
_CPU_ENTRIES = 1 << 20


def batches(shape: tuple[int, int, int], device: torch.device) -> Iterator[slice]:
    """Yield parts of a stack `[matrices, rows, columns]` that are worked on together."""
    entries = _CPU_ENTRIES if device.type == "cpu" else device_entries()
    step = max(1, entries // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def stacked_update(base: Tensor | None, tuned: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return dW of a part of a stack in float32."""
    parts = [t.float() if base is None else t.float() - base.float() for t in tuned]
    return sum((p * w for p, w in zip(parts[1:], weights[1:], strict=True)), parts[0] * weights[0])


class BatchedSpectra:
    """Spectra of equal matrices `[matrices, rows, columns]`, by Gram matrices in float64.

    Args:
        delta: the updates, float32.

    Raises:
        NonFiniteError: NaN or infinity in an update.
    """

    def __init__(self, delta: Tensor) -> None:
        peaks = delta.abs().amax(dim=(1, 2)).double()
        if not bool(torch.isfinite(peaks).all()):
            raise NonFiniteError("an update holds NaN or infinity")
        self._shape = delta.shape[1], delta.shape[2]
        self._wide = delta.shape[1] < delta.shape[2]
        # Powers of two, so that no square leaves the range of float64.
        scales = torch.exp2(-torch.frexp(peaks).exponent.double())
        exact = delta.double() * scales[:, None, None]
        gram = exact @ exact.mT if self._wide else exact.mT @ exact
        values, vectors = torch.linalg.eigh(gram)
        self._vectors: Tensor = vectors
        # One copy for all decisions of the batch.
        self._values: Tensor = (values.flip(1).clamp(min=0).sqrt() / scales[:, None]).cpu()
        self._diagonal = (gram.diagonal(dim1=1, dim2=2) / scales[:, None] ** 2).cpu()

    def values(self, index: int) -> Tensor:
        """Return the singular values of one matrix, `[r]`, descending, float64 on the CPU."""
        return self._values[index]

    def decides(self, index: int, split: Split) -> bool:
        """Say whether split and coefficients of one matrix are beyond doubt."""
        values = self._values[index]
        doubt = gram_doubt(values, self._diagonal[index], product_error(torch.float64))
        return is_certain(values, doubt, split, self._shape)

    def apply(self, delta: Tensor, factors: Tensor) -> Tensor:
        """Return sum_i f_i s_i u_i v_i^T for every matrix.

        Args:
            delta: the updates, float32 `[matrices, rows, columns]`.
            factors: f `[matrices, r]`, for descending singular values.
        """
        f = factors.flip(1).to(self._vectors)
        mixed = ((self._vectors * f[:, None, :]) @ self._vectors.mT).to(delta.dtype)
        return mixed @ delta if self._wide else delta @ mixed
