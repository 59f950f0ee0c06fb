"""What the threads of BLAS do between two calls: sleep, or keep a core busy.

OpenBLAS lets its idle threads spin for 2^28 clock ticks, a tenth of a second, before they sleep. While they
do, threads of another kind (`crew`) get but a fraction of their cores.

Imports the standard library alone.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
# A fifth of a millisecond: longer than the pauses within one decomposition, which a waking thread would cost.
_EXPONENT = "19"
# About two milliseconds.
_SHORT = 22


def let_threads_sleep() -> None:
    """Ask OpenBLAS to let idle threads sleep soon, unless the user has said what to do or it runs already."""
    if "scipy.linalg" not in sys.modules:
        os.environ.setdefault(VARIABLE, _EXPONENT)


def threads_sleep() -> bool:
    """Say whether the threads of scipy's BLAS sleep when there is nothing to do, going by the variable."""
    said = os.environ.get(VARIABLE, "")
    return said.isdecimal() and 0 < int(said) <= _SHORT
