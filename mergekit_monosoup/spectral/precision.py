"""Which precision float32 matrix products have on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mergekit_monosoup.spectral.process_setting import ProcessSetting


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Form float32 products in float32, not TF32, while a spectrum is computed.

    TF32 keeps 10 bits of each factor: an error near 5e-4 lambda_1 in every eigenvalue would drown
    the small singular values. The setting is global in torch, so it is changed only when the user
    has lowered it and restored when the last thread is done. Applying the edit is left to the
    user's own setting (torch.set_float32_matmul_precision; full float32 unless changed): its error is
    relative to dW, about 5e-4 |dW| with TF32, below a tenth of bf16's spacing where
    ||dW|| < 0.1 ||W0||.
    """
    if device.type == "cpu":
        yield
        return
    with _HIGHEST:
        yield


def _raise_precision() -> Callable[[], object]:
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


_HIGHEST = ProcessSetting(_raise_precision)
