"""The split without eigenvectors: eigenvalues alone, and a spectral projector from matrix products.

Newton and Schulz's iteration of fifth order drives every eigenvalue of (G - mu) to its sign, with mu
between the two eigenvalues at the split, so that (1 + sign) / 2 is the projector on the leading subspace
(Higham, Functions of Matrices, 2008, chapter 5). An eigenvalue at the distance d from mu grows by 15/8 in
each step, three products: the number of steps is the logarithm of ||G - mu|| / d, and in the middle of a
spectrum of n values d is a fraction of ||G|| / n. The projector is compared with the eigenvectors' one.
"""

from __future__ import annotations

import math

import common
import numpy as np
import torch
from cases import pair
from common import Table, in_turn
from scipy.linalg import blas, lapack

from mergekit_monosoup.spectral.crew import at_work
from mergekit_monosoup.spectral.kernels.eigen import TridiagonalEigen
from mergekit_monosoup.spectral.split import split_index

KINDS = ("gaussian", "tuned")
ROWS, COLUMNS = 3072, 1024
LARGEST_STEPS = 60
# What the edit asks of its subspace, as a share of ||dW||.
ASKED = 1e-4


def main() -> None:
    """Find the projector in both ways, compare, and time them in turn."""
    options = common.arguments(__doc__ or "").parse_args()
    rows, columns = (ROWS // 4, COLUMNS // 4 + 8) if options.quick else (ROWS, COLUMNS)
    names = (
        "update",
        "precision",
        "k",
        "d / ||G||",
        "products",
        "error / ||dW||",
        "ms",
        "eigenvectors ms",
        "ratio",
    )
    note = (
        "error: ||(P' - P) dW||_F / ||dW||_F, P from a float64 SVD; an edit asks for 1e-4. Milliseconds from "
        "the Gram matrix to the projector or to the basis of its smaller side, eigenvalues included in both; "
        "without an error below 1e-4 the time is that of a failure"
    )
    table = Table(f"projectors from products, {rows} x {columns}", names, note=note)
    figures = {}
    for kind in KINDS:
        base, tuned = pair(kind, rows, columns, torch.bfloat16)
        dw = (tuned.double() - base.double()).numpy()
        _, exact, right = np.linalg.svd(dw, full_matrices=False)
        k = split_index(torch.from_numpy(exact), None)
        for dtype in (np.float32, np.float64):
            gram = np.asfortranarray((dw.T @ dw).astype(dtype))
            projector, products, gap = _projector(gram, k)
            leading = right[:k].T
            error = np.linalg.norm(dw @ projector - (dw @ leading) @ leading.T) / np.linalg.norm(dw)
            times = in_turn(
                {
                    "products": lambda gram=gram, k=k: _projector(gram, k),
                    "eigenvectors": lambda gram=gram, k=k: _basis(gram, k),
                },
                1 if options.quick else 3,
            )
            ratio = times["products"] / times["eigenvectors"]
            precision = np.dtype(dtype).name
            # Float64 is the check of the iteration: without rounding it finds the split.
            if dtype == np.float64:
                assert error < ASKED, f"the iteration did not find the split: {error}"
            milliseconds = [1e3 * times[name] for name in ("products", "eigenvectors")]
            table.add(kind, precision, k, gap, products, float(error), *milliseconds, ratio)
            figures[f"products over eigenvectors, {kind}, {precision}"] = ratio
            figures[f"error of the projector, {kind}, {precision}"] = float(error)
    common.report("projector", options, [table], figures)


def _values(gram: np.ndarray) -> np.ndarray:
    """Return the eigenvalues alone, ascending, float64."""
    reduce = lapack.ssytrd if gram.dtype == np.float32 else lapack.dsytrd
    _, diagonal, off, _, info = reduce(gram, lower=1, lwork=64 * len(gram))
    values, failed = lapack.dsterf(diagonal.astype(np.float64), off.astype(np.float64))
    assert info == failed == 0
    return values


def _projector(gram: np.ndarray, k: int) -> tuple[np.ndarray, int, float]:
    """Return the projector on the leading k directions, the products it took, and d / ||G||."""
    n = len(gram)
    values = _values(gram)
    above, below = values[n - k], values[n - k - 1]
    middle = (above + below) / 2
    reach = max(values[-1] - middle, middle - values[0])
    distance = (above - below) / 2
    product = blas.ssymm if gram.dtype == np.float32 else blas.dsymm
    x = np.asfortranarray((gram - middle * np.eye(n, dtype=gram.dtype)) / gram.dtype.type(reach))
    products = 0
    # Enough steps for the eigenvalue next to the split to grow to 1, and three to settle there.
    steps = min(LARGEST_STEPS, math.ceil(math.log(reach / max(distance, 1e-300)) / math.log(15 / 8)) + 3)
    for _ in range(steps):
        square = product(1.0, x, x)
        inner = 3 / 8 * product(1.0, square, square) - 10 / 8 * square
        inner[np.diag_indices(n)] += 15 / 8
        x = product(1.0, x, np.asfortranarray(inner))
        products += 3
    return (x.astype(np.float64) + np.eye(n)) / 2, products, distance / values[-1]


def _basis(gram: np.ndarray, k: int) -> torch.Tensor:
    n = len(gram)
    with at_work(torch.device("cpu"), gram.size):
        eigen = TridiagonalEigen(torch.from_numpy(gram.copy(order="F").T))
        return eigen.vectors(0, n - k) if n - k < k else eigen.vectors(n - k, n)


if __name__ == "__main__":
    main()
