"""What makes an edit fast on the CPU: routines of BLAS and LAPACK that torch has no name for.

Half of a symmetric product, the reduction to tridiagonal form in narrow panels, and single eigenvectors. One
door, `serve`: where it is closed, torch's products and `torch.linalg.eigh` do the same work in about twice
the time, and this folder is not needed. `benchmarks/kernels.py` compares the two.
"""

from __future__ import annotations

import os

import torch

from mergekit_monosoup.spectral.kernels.compiled import PROBLEMS

# Set to `torch`, it closes the door.
VARIABLE = "MERGEKIT_MONOSOUP_KERNELS"


def serve(device: torch.device) -> bool:
    """Say whether the routines of this folder do the work on a device."""
    return device.type == "cpu" and why_not() is None


def why_not() -> str | None:
    """Return why torch does the work on the CPU, None where it does not."""
    if os.environ.get(VARIABLE) == "torch":
        return f"{VARIABLE} is set"
    return PROBLEMS[0] if PROBLEMS else None
