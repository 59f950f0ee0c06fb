"""Updates of low numerical rank: a tall factor in float64, and what is left of the update without it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_monosoup.spectral.certify import Doubt, is_certain, root_error
from mergekit_monosoup.spectral.crew import crew
from mergekit_monosoup.spectral.eigen import DenseEigen, VectorSource
from mergekit_monosoup.spectral.gram import gram_decomposition
from mergekit_monosoup.spectral.sources import Rotated, Stacked
from mergekit_monosoup.spectral.split import Split
from mergekit_monosoup.spectral.update import Block, MatrixUpdate

# Relative norm of what is left up to which it does not matter how well its own directions are known.
_HARMLESS = 1e-4


def by_factor(update: MatrixUpdate, rough: Tensor, split: Split) -> tuple[Tensor, VectorSource] | None:
    """Return singular values and directions of an update of low numerical rank, or None where in doubt.

    With Q `[small, q]` spanning the singular directions above the noise, dW = (dW Q) Q^T + R. The
    singular values of dW Q are found in float64; ||R||_F, computed and not estimated, bounds all the
    others and the error made by leaving them out. A noise threshold asks for the others themselves: they are
    the singular values of R, found from a Gram matrix of its own.

    Args:
        update: the matrix.
        rough: `[small, q]`, float64, about the span of Q.
        split: the rule that is going to be applied.

    Returns:
        The values that were found, `[q]` or more, descending, float64, and where their directions come from.
    """

    # One step of subspace iteration: float32 vectors leave up to 1e-5 of dW outside their span.
    def powered(span: tuple[int, int]) -> Tensor:
        delta = update.block(*span, dtype=torch.float64).delta
        return delta.T @ (delta @ rough)

    leading, _ = torch.linalg.qr(crew().sum(powered, update.spans()))

    def projected(span: tuple[int, int]) -> Tensor:
        """Return the Gram matrix of the factor, and behind it ||R||_F^2."""
        delta = update.block(*span, dtype=torch.float64).delta
        factor = delta @ leading
        rest = (delta - factor @ leading.T).square().sum()
        return torch.cat([(factor.T @ factor).flatten(), rest[None]])

    q = leading.shape[1]
    sums = crew().sum(projected, update.spans())
    rest = float(sums[-1])
    eigen = DenseEigen(sums[:-1].view(q, q))
    found = eigen.values.flip(0).clamp(min=0).sqrt()
    source = Rotated(leading, eigen)
    if split.threshold(*update.shape) is not None:
        return _above_noise(update, leading, found, rest, source, split)
    others = update.small - q
    padded = torch.cat([found, found.new_zeros(others)])
    missing = torch.full((others,), math.sqrt(rest / others), dtype=torch.float64, device=found.device)
    doubt = Doubt(torch.cat([_left_out(found, rest), missing]), torch.zeros_like(padded))
    return (found, source) if is_certain(padded, doubt, split, update.shape) else None


def _left_out(found: Tensor, rest: float) -> Tensor:
    return (rest / found).clamp(max=math.sqrt(rest))


def _above_noise(
    update: MatrixUpdate, leading: Tensor, found: Tensor, rest: float, source: VectorSource, split: Split
) -> tuple[Tensor, VectorSource] | None:
    threshold = split.threshold(*update.shape)
    if threshold is None:
        return None
    kept = threshold.without_rounding(found)
    if math.sqrt(rest) <= max(update.shape) * torch.finfo(torch.float64).eps * float(found[0]):
        # What float64 cannot tell from rounding is no noise: the rank itself is low.
        return kept, source
    remainder = replace(Remainder(update.base, update.tuned, update.weights), span=leading)
    remainder = replace(remainder, line_axis=update.line_axis, lines=update.lines)

    if math.sqrt(rest) > _HARMLESS * float(found.norm()):
        return None

    # Squared, what directions inside and outside of the span have in common moves values to second order.
    def coupling(span: tuple[int, int]) -> Tensor:
        whole = update.block(*span, dtype=torch.float64).delta
        return remainder.block(*span, dtype=torch.float64).delta.T @ (whole @ leading)

    shared = float(crew().sum(coupling, update.spans()).square().sum())
    for dtype in (torch.float32, torch.float64):
        part = gram_decomposition(remainder, dtype)
        if part is None:
            return None
        # R has lost the directions in the span: as many of its values are zero.
        count = len(part.values) - len(found)
        others = part.values[:count] / part.scale
        gap = float(found[-1] ** 2 - others[0] ** 2) if count > 0 else 0.0
        if gap <= 0:
            return None
        shift = part.doubt.shift[:count] / part.scale + root_error(others, shared / gap)
        doubt = Doubt(
            torch.cat([_left_out(found, rest), shift]),
            torch.cat([torch.zeros_like(found), part.doubt.spread[:count] / part.scale]),
            part.doubt.relative,
        )
        values = torch.cat([found, others])
        if is_certain(values, doubt, split, update.shape):
            return values, Stacked(count, part.eigen, part.live, source)
    return None


@dataclass(frozen=True)
class Remainder(MatrixUpdate):
    """dW (1 - Q Q^T), with `span` = Q `[small, q]`, float64; formed in float64 whatever is asked for."""

    span: Tensor | None = None

    def block(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Block:
        """Return what is left of dW between `start` and `stop` of the longer side."""
        delta = super().block(start, stop, torch.float64).delta
        if self.span is not None:
            delta = delta - (delta @ self.span) @ self.span.T
        return Block(None, delta.to(dtype or self.dtype).contiguous(), False)
