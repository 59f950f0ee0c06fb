"""Reduction, eigenvalues, single vectors and their transformation, against NumPy's dense solver."""

from __future__ import annotations

import numpy as np
import pytest
import spectra
import torch
from scipy.linalg import lapack

from mergekit_monosoup.spectral.crew import at_work, torch_threads
from mergekit_monosoup.spectral.kernels import tridiagonal
from mergekit_monosoup.spectral.kernels.compiled import tridiagonal_form
from mergekit_monosoup.spectral.kernels.eigen import TridiagonalEigen
from mergekit_monosoup.spectral.kernels.reflectors import Reflectors
from mergekit_monosoup.spectral.kernels.tridiagonal import SymmetricTridiagonal

KINDS = (
    "random",
    "wilkinson",
    "identity",
    "second difference",
    "decoupled",
    "twins",
    "graded",
    "zero",
    "negative",
    "gram",
)


def tridiagonal_matrix(kind, n):
    rng = np.random.default_rng(n)
    off = rng.standard_normal(n - 1)
    if kind == "gram":
        factor = rng.standard_normal((2 * n, n)) * np.logspace(0, -3, n)
        _, diagonal, off, _, _ = lapack.dsytrd(np.asfortranarray(factor.T @ factor), lower=1)
        return diagonal, off
    decoupled, twins = off.copy(), off.copy()
    decoupled[n // 2 - 1] = 0
    # Two equal halves side by side: every eigenvalue twice.
    half = rng.standard_normal(n - n // 2)
    twins[n // 2 - 1] = 0
    twins[n // 2 :] = twins[: (n - 1) - n // 2]
    return {
        "random": (rng.standard_normal(n), off),
        "wilkinson": (np.abs(np.arange(n) - n / 2), np.ones(n - 1)),
        "identity": (np.ones(n), np.zeros(n - 1)),
        "second difference": (np.full(n, 2.0), -np.ones(n - 1)),
        "decoupled": (rng.standard_normal(n), decoupled),
        "twins": (np.concatenate([half, half])[-n:], twins),
        "graded": (np.logspace(0, -12, n), 0.1 * np.logspace(0, -12, n)[:-1]),
        "zero": (np.zeros(n), np.zeros(n - 1)),
        "negative": (-np.ones(n), -np.abs(off)),
    }[kind]


@pytest.mark.parametrize("n", [4, 5, 8, 63, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_eigenpairs(kind, n):
    diagonal, off = tridiagonal_matrix(kind, n)
    before = diagonal.copy(), off.copy()
    dense = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    eigen = SymmetricTridiagonal(diagonal, off)
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
    """Gram matrices in float32 reach from 1e-28 to 1e34; beyond float64's squares the dense solver helps."""
    diagonal, off = tridiagonal_matrix("gram", 80)
    scale = 10.0**exponent
    plain, scaled = SymmetricTridiagonal(diagonal, off), SymmetricTridiagonal(diagonal * scale, off * scale)
    assert np.allclose(scaled.values, plain.values * scale, rtol=1e-9, atol=0)
    # Signs are free.
    assert np.allclose(np.abs(scaled.vectors(20, 60)), np.abs(plain.vectors(20, 60)), atol=1e-5)


def test_small_eigenvalues_keep_their_size():
    """Graded matrices: eigenvalues far below the largest are not lost in its rounding alone."""
    diagonal, off = np.array([1e8, 1.0, 1.0, 1.0, 1e-6]), np.array([0.1, 0.1, 0.0, 0.0])
    assert SymmetricTridiagonal(diagonal, off).values[0] == pytest.approx(1e-6, rel=1e-6)


def test_vectors_of_near_equal_values_are_orthogonal():
    """Wilkinson's matrix has pairs of eigenvalues that agree in all digits."""
    diagonal, off = tridiagonal_matrix("wilkinson", 201)
    vectors = SymmetricTridiagonal(diagonal, off).vectors(150, 201).astype(np.float64)
    assert np.abs(vectors.T @ vectors - np.eye(51)).max() <= 1e-6


@pytest.mark.parametrize("distance", [1e-7, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14, 1e-16])
def test_neighbours_at_any_distance_are_orthogonal(distance):
    """From far apart to equal in all digits: single vectors, made orthogonal, or found together."""
    rng = np.random.default_rng(3)
    values = np.sort(rng.uniform(0, 1, 120))
    values[61], values[62] = values[60] + distance, values[60] + 2 * distance
    basis = spectra.orthonormal(rng, 120, 120)
    _, diagonal, off, _, _ = lapack.dsytrd(np.asfortranarray((basis * values) @ basis.T), lower=1)
    vectors = SymmetricTridiagonal(diagonal, off).vectors(40, 100).astype(np.float64)
    assert np.abs(vectors.T @ vectors - np.eye(60)).max() <= 2e-6
    dense = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    projector = vectors @ vectors.T
    assert np.abs(dense @ projector - projector @ dense).max() <= 1e-6


def test_most_vectors_are_found_one_by_one(monkeypatch):
    monkeypatch.setattr(tridiagonal, "eigh_tridiagonal", None)
    for kind in ("random", "second difference", "gram"):
        SymmetricTridiagonal(*tridiagonal_matrix(kind, 200)).vectors(50, 150)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "panel"), [(1, 16), (2, 16), (33, 16), (130, 16), (300, 32), (257, 8)])
def test_reduction_and_reflectors(dtype, n, panel):
    rng = np.random.default_rng(n)
    matrix = rng.standard_normal((n, n))
    matrix = matrix + matrix.T
    form = np.asfortranarray(np.tril(matrix).astype(dtype))
    diagonal, off, factors = tridiagonal_form(form, panel)
    reduced = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    q = np.asfortranarray(np.eye(n, dtype=dtype))
    Reflectors(form, factors).apply(q)
    precision = np.finfo(dtype).eps * n
    assert np.abs(q.T @ q - np.eye(n)).max() <= 4 * precision
    assert np.abs(q @ reduced @ q.T - matrix).max() <= 10 * precision * np.abs(matrix).max()


def test_directions_that_need_no_reflector():
    """A factor of zero stands for no reflection: a matrix that is tridiagonal already."""
    form = np.asfortranarray(np.diag(np.arange(1.0, 41.0)).astype(np.float32))
    diagonal, off, factors = tridiagonal_form(form, 16)
    assert not off.any()
    assert not factors.any()
    q = np.asfortranarray(np.eye(40, dtype=np.float32))
    Reflectors(form, factors).apply(q)
    assert np.array_equal(q, np.eye(40))
    assert np.array_equal(diagonal, np.arange(1, 41))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_do_not_depend_on_the_number_of_threads(threads, dtype):
    factor = torch.randn(700, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = (factor.T @ factor).to(dtype)
    with torch_threads(threads), at_work(gram.device, 1 << 20):
        eigen = TridiagonalEigen(gram.clone())
        vectors = eigen.vectors(100, 300).double()
    exact, _ = torch.linalg.eigh(gram.double())
    assert torch.allclose(eigen.values, exact, atol=float(3e-7 * exact[-1]))
    assert torch.allclose(vectors.T @ vectors, torch.eye(200, dtype=torch.float64), atol=2e-6)
    residual = gram.double() @ vectors - vectors * eigen.values[100:]
    assert float(residual.abs().max()) <= 1e-6 * float(exact[-1])
