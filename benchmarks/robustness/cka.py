"""Linear CKA: how alike two representations of the same inputs are.

Written out here, because no library on PyPI is kept well enough to depend on for a few lines: torch_cka had
its last release in 2021, pytorch-cka calls itself alpha and knows only the unbiased estimator, ckatorch says
that it is for personal use and brings seaborn. The tests hold this against the HSIC form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two representations.

    CKA = ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F) with centred columns, which is the biased
    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the Gram matrices K = X X^T, L = Y Y^T.
    Kornblith et al. 2019, arXiv 1905.00414, equation 3 and section 3.2.

    Args:
        x: `[samples, features]`, of any floating dtype; computed in float64.
        y: `[samples, other features]`, of the same samples in the same order.

    Returns:
        A number from 0 to 1; not a number where a representation is the same for all samples.

    Raises:
        ValueError: the numbers of samples differ.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"representations are [samples, features] of the same samples: {(*x.shape,)}, {(*y.shape,)}"
        )
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    if max(x.shape[1], y.shape[1]) > len(x):
        # The same three numbers from the Gram matrices, which are smaller.
        k, l = x @ x.T, y @ y.T  # noqa: E741 - the paper's name
        return float((k * l).sum() / (torch.linalg.norm(k) * torch.linalg.norm(l)))
    cross = torch.linalg.norm(x.T @ y) ** 2
    return float(cross / (torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)))


def cka_by_block(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[float]:
    """Return the linear CKA of each block's output in one checkpoint with that in another."""
    return [linear_cka(x, y) for x, y in zip(first, second, strict=True)]
