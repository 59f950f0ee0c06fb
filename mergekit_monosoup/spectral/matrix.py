"""How a weight tensor is read as one matrix or a stack of matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["auto", "flatten", "stack"]
ViewKind = Literal["vector", "matrix", "flattened", "squeezed", "stack"]

# Stacks by name: fused experts, also those whose module calls them `weight` (Granite, JetMoE), and a
# stack of output heads (CSM).
_STACKED = re.compile(r"expert|moe|\b(?:in|out)put_linear\.weight$|\bcodebooks_head\.weight$")
# `weight` of a module, and the direction that weight normalisation keeps in its place.
_MODULE_WEIGHT = re.compile(r"(?:^|\.)(?:weight|weight_v|weight\.original1)$")
# Biases of several experts or heads; position tables that are called biases are none.
_BIASES = re.compile(r"(?<!position_)(?<!attention_)bias$")
# XLNet keeps its projections as [model, heads, head width]: linear layers with a split output axis.
_SPLIT_LINEAR = re.compile(r"\brel_attn\.[qkvor]$")


@dataclass(frozen=True)
class MatrixView:
    """How one tensor is read: what `kind` of weight it is, and the shape `[matrices, rows, columns]`.

    kind: `vector` (not decomposed), `matrix` (two axes, as it is), `flattened` (the first axis
    against all others), `squeezed` (axes of length one dropped) or `stack` (one matrix for each
    entry of the leading axis).
    """

    kind: ViewKind
    shape: tuple[int, int, int]

    @property
    def decomposes(self) -> bool:
        """Whether there is a matrix to decompose."""
        return self.kind != "vector"

    def of(self, tensor: Tensor) -> Tensor:
        """Return the tensor as `[matrices, rows, columns]`; a copy only where strides force one."""
        return tensor.reshape(self.shape)


def choose_view(shape: tuple[int, ...], name: str | None = None, matrix: Layout = "auto") -> MatrixView:
    """Say how a tensor of this shape and name is read as matrices.

    - fewer than two axes, three or more of which at most one is longer than one, no entries, or two
      axes and a name that ends in `bias` (one bias for each expert or head): a vector;
    - two axes: `[out, in]` as it is. GPT-2 stores `[in, out]`; the transpose has the same singular
      values, and the edit of the transpose is the transpose of the edit;
    - three or more axes, the `weight` of a module: a convolution `[out, in / groups, k, ...]`,
      flattened to `[out, in / groups * k * ...]`, as the MonoSoup authors' code does; depthwise
      filters are `[channels, k * k]`. Fused experts that are named so are the exception;
    - three axes otherwise: a stack `[experts, out, in]`; positional tables `[1, n, d]` lose their
      axes of length one and become a matrix.

    Args:
        shape: shape of the weight.
        name: full name of the parameter; without it, three axes are a stack.
        matrix: `flatten` or `stack` (the leading axes are matrices, the last two their rows and
            columns) instead of this rule.
    """
    if len(shape) < 2 or 0 in shape:
        return MatrixView("vector", (1, 1, prod(shape)))
    if len(shape) == 2:
        biases = matrix == "auto" and name is not None and _BIASES.search(name)
        return MatrixView("vector" if biases else "matrix", (1, shape[0], shape[1]))
    if matrix == "stack":
        return _stack(shape)
    if matrix == "flatten":
        return _flattened(shape)
    longer = tuple(length for length in shape if length > 1)
    if len(longer) < 2:
        return MatrixView("vector", (1, 1, prod(shape)))
    if len(shape) == 3 and (shape[0] > 1 if name is None else _STACKED.search(name)):
        return _stack(shape)
    if name is not None and (_MODULE_WEIGHT.search(name) or _SPLIT_LINEAR.search(name)):
        return _flattened(shape)
    if len(longer) == 2:
        return MatrixView("squeezed", (1, longer[0], longer[1]))
    return _stack(longer) if len(longer) == 3 else _flattened(longer)


def _flattened(shape: tuple[int, ...]) -> MatrixView:
    return MatrixView("flattened", (1, shape[0], prod(shape[1:])))


def _stack(shape: tuple[int, ...]) -> MatrixView:
    return MatrixView("stack", (prod(shape[:-2]), shape[-2], shape[-1]))
