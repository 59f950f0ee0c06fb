"""What the threads of BLAS do between two calls: sleep, or keep a core busy.

OpenBLAS lets its idle threads spin for 2^28 clock ticks, a tenth of a second, before they sleep. While they
do, threads of another kind (`crew`) get but a fraction of their cores.

Imports the standard library alone, and scipy only where it is asked how its threads behave.
"""

from __future__ import annotations

import os
import sys
import time

VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
# A fifth of a millisecond: longer than the pauses within one decomposition, which a waking thread would cost.
_EXPONENT = "19"
# About two milliseconds.
_SHORT = 22
_PAUSE = 1e-2
_answer: bool | None = None
_attempts = 5


def let_threads_sleep() -> None:
    """Ask OpenBLAS to let idle threads sleep soon, unless the user has said what to do or it runs already."""
    if "scipy.linalg" not in sys.modules:
        os.environ.setdefault(VARIABLE, _EXPONENT)


def threads_sleep() -> bool:
    """Say whether the threads of scipy's BLAS sleep when there is nothing to do, as they are seen to.

    They are given something to do, and the processor time of the whole process is read while its calling
    thread sleeps. Where the process is busy with other things, what the variable says is believed, and it is
    asked again the next few times.
    """
    global _answer, _attempts
    if _answer is None and _attempts > 0:
        _attempts -= 1
        _answer = _seen()
    if _answer is not None:
        return _answer
    said = os.environ.get(VARIABLE, "")
    return said.isdecimal() and 0 < int(said) <= _SHORT


def _seen() -> bool | None:
    import numpy as np
    from scipy.linalg import blas

    if _busy_for() > _PAUSE / 2:
        return None
    matrix = np.zeros((512, 512), np.float32, order="F")
    blas.sgemm(1.0, matrix, matrix)
    return _busy_for() < _PAUSE / 2


def _busy_for() -> float:
    before = time.process_time()
    time.sleep(_PAUSE)
    return time.process_time() - before
