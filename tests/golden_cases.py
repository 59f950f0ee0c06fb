"""The outputs of the authors' own layer function, and the one place where ours differ."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FILE = Path(__file__).parent / "goldens" / "official.safetensors"
RULES = {"auto": None, "energy0.8": 0.8, "energy0.9": 0.9}
CASES = tuple(
    f"{shape}.{kind}"
    for shape in ("24x24", "16x40", "40x16", "12x6x3x3")
    for kind in ("gauss", "power", "lowrank")
)
# The authors take cos alpha as the root of 1 - P_k, and divide by the energy plus this to
# get P_k. At k = r, where cos alpha is 0, that is 4e-8; elsewhere it is far below 1e-12.
EPSILON = 1e-12
KEPT_WHOLE = {("12x6x3x3.gauss", "auto")}


@functools.cache
def load_goldens() -> dict[str, np.ndarray]:
    """All tensors of the file."""
    return load_file(FILE)


def load_case(case: str, rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W0, W1 and the authors' output, freed of their epsilon where it reaches 1e-12."""
    tensors = load_goldens()
    w0, w1, edited = (tensors[f"{case}.{key}"] for key in ("w0", "w1", rule))
    if (case, rule) in KEPT_WHOLE:
        dw = w1 - w0
        energy = float((dw**2).sum())
        edited = edited + math.sqrt(1.0 - energy / (energy + EPSILON)) * dw
    return w0, w1, edited
