"""Which precision matrix products have on an accelerator, and which one is worth its time there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from mergekit_monosoup.spectral.process_setting import ProcessSetting

# Side of the products that are timed: large enough for their rate, a tenth of a second on the slowest cards.
_TIMED = 2048
# How many times as long products in float64 may take. A Gram matrix is one of them beside a decomposition in
# float64 that takes ten times as long, and one in float32 that leaves k in doubt is followed by a second one.
_WORTHWHILE = 4.0


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
_LOADING = threading.Lock()


def load_linear_algebra(device: torch.device) -> None:
    """Have torch load its decompositions for a CUDA device, which it does at the first call.

    Two threads whose first calls come at the same time make it fail ("lazy wrapper should be called at most
    once").
    """
    if device.type == "cuda":
        with _LOADING:
            _load_once()


@cache
def _load_once() -> None:
    torch.linalg.eigh(torch.eye(2, device="cuda"))


def float64_pays(device: torch.device) -> bool:
    """Say whether Gram matrices are formed in float64 at once: on cards whose float64 units are not few.

    Measured once a device, in products of both precisions. Cards for computing centres multiply as fast in
    float64 as in full float32, others thirty to sixty times as slowly.
    """
    return device.type not in ("cpu", "mps") and _ratio(device) <= _WORTHWHILE


@cache
def _ratio(device: torch.device) -> float:
    """Return the time of a product in float64 over that in float32."""

    def seconds(dtype: torch.dtype) -> float:
        factor = torch.ones(_TIMED, _TIMED, dtype=dtype, device=device)
        best = float("inf")
        # The first one loads the library.
        for _ in range(3):
            start = time.perf_counter()
            # Reading an entry waits for the product.
            float((factor @ factor)[0, 0])
            best = min(best, time.perf_counter() - start)
        return best

    with full_float32(device):
        return seconds(torch.float64) / seconds(torch.float32)
