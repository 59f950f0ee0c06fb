"""What the threads of BLAS do between two calls: sleep, or keep a core busy.

OpenBLAS lets its idle threads spin for 2^28 clock ticks, a tenth of a second, before they sleep. While they
do, threads of another kind (`crew`) get but a fraction of their cores.

Imports the standard library alone, and scipy only where it is asked how its threads behave.
"""

from __future__ import annotations

import os
import sys
import time
from functools import cache

VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
# A fifth of a millisecond: longer than the pauses within one decomposition, which a waking thread would cost.
_EXPONENT = "19"
_PAUSE = 1e-2


def let_threads_sleep() -> None:
    """Ask OpenBLAS to let idle threads sleep soon, unless the user has said what to do or it runs already."""
    if "scipy.linalg" not in sys.modules:
        os.environ.setdefault(VARIABLE, _EXPONENT)


@cache
def threads_sleep() -> bool:
    """Say whether the threads of scipy's BLAS sleep when there is nothing to do, as they are seen to.

    They are given something to do, and the processor time of the whole process is read while its calling
    thread sleeps. Another busy thread in the process makes the answer no, which costs time alone.
    """
    import numpy as np
    from scipy.linalg import blas

    matrix = np.zeros((512, 512), np.float32, order="F")
    for _ in range(3):
        blas.sgemm(1.0, matrix, matrix)
        before = time.process_time()
        time.sleep(_PAUSE)
        if time.process_time() - before < _PAUSE / 2:
            return True
    return False
