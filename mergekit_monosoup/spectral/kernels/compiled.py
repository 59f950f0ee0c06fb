"""Routines of BLAS and LAPACK that scipy exports to compiled code, called without a lock on the interpreter.

scipy's Python functions hold the interpreter's lock while they compute and lack some routines; these do not,
so that several threads compute at a time (`crew`). Arrays are NumPy's, float32 or float64, two-dimensional,
with contiguous rows or contiguous columns, and nothing is copied.
"""

from __future__ import annotations

import ctypes
import re
import sys
from ctypes import byref, c_char, c_double, c_float, c_int64
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

_LOWER, _PLAIN, _TRANSPOSED = c_char(b"L"), c_char(b"N"), c_char(b"T")


PROBLEMS: list[str] = []
"""Why these routines must not be called, if there is a reason."""

# Pointers in the C declaration that a routine's capsule carries.
_KINDS = {"char *": "c", "int *": "i", "float *": "s", "double *": "d"}
_SCIPYS_OWN = re.compile(r"__pyx_t_\w+_([sd]) \*")


def signature(declaration: str) -> str:
    """Return a letter for each argument of a declaration in C: c(har), i(nt), s(ingle), d(ouble), or ?."""
    inside = re.fullmatch(r"void \((.*)\)", declaration)
    if inside is None:
        return "?"
    arguments = inside.group(1).split(", ")
    return "".join(
        own.group(1) if (own := _SCIPYS_OWN.fullmatch(argument)) else _KINDS.get(argument, "?")
        for argument in arguments
    )


def _routine(module: Any, name: str, arguments: str) -> Any:
    """Return a routine, or note why there is none.

    Args:
        module: of scipy, with declarations and addresses of its routines.
        name: of the routine.
        arguments: its signature.
    """
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    label = ctypes.pythonapi.PyCapsule_GetName
    label.restype, label.argtypes = ctypes.c_char_p, [ctypes.py_object]
    capsule = module.__pyx_capi__.get(name)
    if capsule is None:
        PROBLEMS.append(f"scipy exports no {name}")
        return None
    declared = label(capsule)
    if signature(declared.decode()) != arguments:
        PROBLEMS.append(f"scipy declares {name} as {declared.decode()}")
        return None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arguments))(pointer(capsule, declared))


def _both(module: Any, name: str, arguments: str) -> dict[Any, Any]:
    """Return the routine for float32 and for float64; an `x` of the signature is a number."""
    kinds = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}
    return {
        dtype: _routine(module, letter + name, arguments.replace("x", letter))
        for dtype, letter in kinds.items()
    }


if sys.byteorder != "little":
    PROBLEMS.append("integers have their first byte last")

_GEMM = _both(cython_blas, "gemm", "cciiixxixixxi")
_SYRK = _both(cython_blas, "syrk", "cciixxixxi")
_SYR2K = _both(cython_blas, "syr2k", "cciixxixixxi")
_LATRD = _both(cython_lapack, "latrd", "ciixixxxi")
_SYTD2 = _both(cython_lapack, "sytd2", "cixixxxi")
_STERF = _routine(cython_lapack, "dsterf", "iddi")
_LAR1V = _routine(cython_lapack, "dlar1v", "iii" + "d" * 8 + "iiddii" + "d" * 4)


def _int(value: int) -> Any:
    # Libraries with integers of 32 bits read the first half of it, those with 64 bits all.
    return byref(c_int64(value))


def _number(value: float, dtype: Any) -> Any:
    return byref(c_float(value) if dtype == np.float32 else c_double(value))


def _operand(array: Any) -> tuple[Any, int]:
    """Return whether BLAS reads an array as its transpose, and the distance of its columns (or rows)."""
    rows, columns = array.shape
    down, across = (stride // array.itemsize for stride in array.strides)
    if down == 1 or rows == 1:
        return _PLAIN, max(1, rows, across if columns > 1 else 1)
    if across != 1:
        raise ValueError(f"neither rows nor columns are contiguous: strides {array.strides}")
    return _TRANSPOSED, max(1, columns, down)


def gemm(alpha: float, a: Any, b: Any, beta: float, c: Any) -> None:
    """Set c to alpha a b + beta c."""
    if _operand(c)[0] is _TRANSPOSED:
        a, b, c = b.T, a.T, c.T
    (how_a, next_a), (how_b, next_b), (_, next_c) = _operand(a), _operand(b), _operand(c)
    _GEMM[c.dtype](
        byref(how_a),
        byref(how_b),
        _int(c.shape[0]),
        _int(c.shape[1]),
        _int(a.shape[1]),
        _number(alpha, c.dtype),
        a.ctypes.data,
        _int(next_a),
        b.ctypes.data,
        _int(next_b),
        _number(beta, c.dtype),
        c.ctypes.data,
        _int(next_c),
    )


def syrk(a: Any, c: Any) -> None:
    """Add a a^T to the lower half of c, which has contiguous columns."""
    how, distance = _operand(a)
    _SYRK[c.dtype](
        byref(_LOWER),
        byref(how),
        _int(c.shape[0]),
        _int(a.shape[1]),
        _number(1.0, c.dtype),
        a.ctypes.data,
        _int(distance),
        _number(1.0, c.dtype),
        c.ctypes.data,
        _int(_operand(c)[1]),
    )


def tridiagonal_form(matrix: Any, panel: int) -> tuple[Any, Any, Any]:
    """Reduce a symmetric matrix to tridiagonal form Q^T A Q, as LAPACK's sytrd does, in narrow panels.

    sytrd takes panels of 32 columns, whose small products with the panel cost as much as those with the
    matrix where that is in the cache.

    Args:
        matrix: `[n, n]`, contiguous columns, lower half filled; destroyed. Below its diagonal it holds the
            reflectors that make Q afterwards, all but their leading 1.
        panel: columns that are reduced between two updates of the others.

    Returns:
        Diagonal `[n]`, off-diagonal `[n - 1]`, and the factors `[n - 1]` of the reflectors.
    """
    n, dtype = len(matrix), matrix.dtype
    diagonal, off, factors = np.empty(n, dtype), np.empty(n, dtype), np.empty(n, dtype)
    columns = np.empty((n, panel), dtype, order="F")
    length, width, info = _int(n), _int(panel), c_int64()
    start = 0
    while n - start > 2 * panel:
        stop = start + panel
        _LATRD[dtype](
            byref(_LOWER),
            _int(n - start),
            width,
            matrix[start:, start:].ctypes.data,
            length,
            off[start:].ctypes.data,
            factors[start:].ctypes.data,
            columns.ctypes.data,
            length,
        )
        _SYR2K[dtype](
            byref(_LOWER),
            byref(_PLAIN),
            _int(n - stop),
            width,
            _number(-1.0, dtype),
            matrix[stop:, start:].ctypes.data,
            length,
            columns[panel:].ctypes.data,
            length,
            _number(1.0, dtype),
            matrix[stop:, stop:].ctypes.data,
            length,
        )
        start = stop
    diagonal[:start] = matrix.diagonal()[:start]
    _SYTD2[dtype](
        byref(_LOWER),
        _int(n - start),
        matrix[start:, start:].ctypes.data,
        length,
        diagonal[start:].ctypes.data,
        off[start:].ctypes.data,
        factors[start:].ctypes.data,
        byref(info),
    )
    return diagonal, off[:-1], factors[:-1]


def tridiagonal_values(diagonal: Any, off: Any) -> Any:
    """Return the eigenvalues of a symmetric tridiagonal matrix, ascending, by LAPACK's dsterf.

    Args:
        diagonal, off: `[n]` and `[n - 1]`, float64; left as they are.

    Raises:
        LinAlgError: they were not found.
    """
    values, rest, info = diagonal.copy(), off.copy(), c_int64()
    _STERF(_int(len(values)), values.ctypes.data, rest.ctypes.data, byref(info))
    if info.value != 0:
        raise np.linalg.LinAlgError(f"LAPACK dsterf failed with info = {info.value}")
    return values


class TwistedVector:
    """Eigenvectors of L D L^T one by one, by LAPACK's dlar1v (Dhillon & Parlett, 2004); one for each thread.

    Args:
        d: diagonal of D, `[n]`, positive.
        l: `[n - 1]`, below the diagonal of L, which is 1.
    """

    def __init__(self, d: Any, l: Any) -> None:  # noqa: E741 - its name in the literature
        n = len(d)
        self._kept = d, l, l * d[:-1], l * l * d[:-1]
        self._vector, self._work = np.zeros(n), np.empty(4 * n)
        self._value, self._place = c_double(), c_int64()
        self._scale, self._residual = c_double(), c_double()
        smallest = c_double(np.finfo(np.float64).tiny * max(1.0, float(self._kept[3].max())))
        unused: list[Any] = [c_int64(), c_double(), c_double(), c_double()]
        self._arguments = (
            _int(n),
            _int(1),
            _int(n),
            byref(self._value),
            *(array.ctypes.data for array in self._kept),
            byref(smallest),
            byref(c_double(0.0)),
            self._vector.ctypes.data,
            _int(0),
            byref(unused[0]),
            byref(unused[1]),
            byref(unused[2]),
            byref(self._place),
            byref((c_int64 * 2)()),
            byref(self._scale),
            byref(self._residual),
            byref(unused[3]),
            self._work.ctypes.data,
        )

    def find(self, value: float) -> tuple[Any, float]:
        """Return the eigenvector to an eigenvalue, of norm 1, and the norm of its residual."""
        self._value.value, self._place.value = value, 0
        _LAR1V(*self._arguments)
        return self._vector * self._scale.value, self._residual.value
