"""How a weight tensor is read as one matrix or a stack of matrices."""

from __future__ import annotations

from torch import Tensor


def is_matrix_like(shape: tuple[int, ...]) -> bool:
    """Say whether a tensor of this shape is decomposed at all.

    Tensors with fewer than two axes (biases, norms, scalars) and tensors without entries are not.
    """
    return len(shape) >= 2 and 0 not in shape


def matrix_view(tensor: Tensor) -> Tensor:
    """Read a weight as a stack of matrices.

    - linear `[out, in]`: one matrix, as it is;
    - stack of experts `[experts, out, in]`: `experts` matrices;
    - convolution `[out, in, k, ...]` with four or more axes: one matrix `[out, in * k * ...]`.

    Args:
        tensor: weight or update with at least two axes.

    Returns:
        A view (a copy only where strides force one) of shape `[matrices, rows, columns]`.
    """
    if tensor.ndim == 3:
        return tensor
    return tensor.reshape(1, tensor.shape[0], -1)
