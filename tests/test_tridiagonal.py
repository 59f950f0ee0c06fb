"""The last step of divide and conquer, done for the wanted vectors alone, against NumPy's dense solver."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import lapack

from mergekit_monosoup.spectral.tridiagonal import TornEigen

KINDS = (
    "random",
    "wilkinson",
    "identity",
    "second difference",
    "decoupled",
    "graded",
    "zero",
    "negative",
    "gram",
)


def tridiagonal(kind, n):
    rng = np.random.default_rng(n)
    off = rng.standard_normal(n - 1)
    if kind == "gram":
        factor = rng.standard_normal((2 * n, n)) * np.logspace(0, -3, n)
        _, diagonal, off, _, _ = lapack.dsytrd(np.asfortranarray(factor.T @ factor), lower=1)
        return diagonal, off
    decoupled = off.copy()
    decoupled[n // 2 - 1] = 0
    return {
        "random": (rng.standard_normal(n), off),
        "wilkinson": (np.abs(np.arange(n) - n / 2), np.ones(n - 1)),
        "identity": (np.ones(n), np.zeros(n - 1)),
        "second difference": (np.full(n, 2.0), -np.ones(n - 1)),
        "decoupled": (rng.standard_normal(n), decoupled),
        "graded": (np.logspace(0, -12, n), 0.1 * np.logspace(0, -12, n)[:-1]),
        "zero": (np.zeros(n), np.zeros(n - 1)),
        "negative": (-np.ones(n), -np.abs(off)),
    }[kind]


@pytest.mark.parametrize("n", [4, 5, 8, 63, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_eigenpairs(kind, n):
    diagonal, off = tridiagonal(kind, n)
    before = diagonal.copy(), off.copy()
    dense = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    eigen = TornEigen(diagonal, off)
    size = max(np.abs(dense).max(), 1e-300)
    assert np.all(np.diff(eigen.values) >= 0)
    assert np.abs(eigen.values - np.linalg.eigvalsh(dense)).max() <= 1e-14 * size * np.sqrt(n)
    for start, stop in ((0, n), (n // 3, n // 2 + 1), (n - 1, n), (0, 1), (n // 2, n // 2)):
        vectors = eigen.vectors(start, stop).astype(np.float64)
        assert vectors.shape == (n, stop - start)
        residual = dense @ vectors - vectors * eigen.values[start:stop]
        assert np.abs(residual).max(initial=0) <= 1e-6 * size
        assert np.abs(vectors.T @ vectors - np.eye(stop - start)).max(initial=0) <= 1e-6
    assert np.array_equal(diagonal, before[0])
    assert np.array_equal(off, before[1])


@pytest.mark.parametrize("exponent", [-300, -24, 24, 300])
def test_any_magnitude(exponent):
    diagonal, off = tridiagonal("gram", 80)
    plain, scaled = TornEigen(diagonal, off), TornEigen(diagonal * 10.0**exponent, off * 10.0**exponent)
    assert np.allclose(scaled.values, plain.values * 10.0**exponent, rtol=1e-9, atol=0)
    # Signs are free.
    assert np.allclose(np.abs(scaled.vectors(20, 60)), np.abs(plain.vectors(20, 60)), atol=1e-5)


def test_small_eigenvalues_keep_their_size():
    """Graded matrices: eigenvalues far below the largest are not lost in its rounding alone."""
    diagonal, off = np.array([1e8, 1.0, 1.0, 1.0, 1e-6]), np.array([0.1, 0.1, 0.0, 0.0])
    assert TornEigen(diagonal, off).values[0] == pytest.approx(1e-6, rel=1e-6)


def test_vectors_of_near_equal_values_are_orthogonal():
    """Wilkinson's matrix has pairs of eigenvalues that agree in all digits."""
    diagonal, off = tridiagonal("wilkinson", 201)
    vectors = TornEigen(diagonal, off).vectors(150, 201).astype(np.float64)
    assert np.abs(vectors.T @ vectors - np.eye(51)).max() <= 1e-6
