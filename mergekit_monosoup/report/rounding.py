"""How much of an update is nothing but the rounding of the fine-tuned weights."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

# Sums over a tensor are estimated from this many of its entries: their relative error is about 1 %.
_SAMPLE = 1 << 13


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """Return the coarsest floating dtype that holds all (sampled) entries of a tensor exactly.

    A checkpoint that was trained and kept in bfloat16 carries bfloat16's rounding even where its file,
    or the recipe's `dtype`, is float32; the values show it.
    """
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float64) or tensor.numel() == 0:
        return tensor.dtype
    values = sample(tensor)
    for coarse in (torch.bfloat16, torch.float16):
        if _holds(coarse, values):
            return coarse
    return tensor.dtype


def storage_noise(base: Tensor, tuned: Tensor) -> tuple[float, float]:
    """Return the expected ||e||_F^2 of e = W1 - (W0 + U), what storing W0 + U as W1 added to the update U.

    The base is where fine-tuning started, with all its digits: its own rounding is no noise. Where W0 is not
    on the grid of W1, or the spacing q of the grid is far below U, e is uniform in [-q/2, q/2] and adds
    q^2 / 12. Where both are on one grid, entries that U moves by less than q/2 come out as they went in:
    then e = -U, which dW no longer shows. U is modelled as normal with standard deviation s in a share p of
    the entries, and zero in the others; s and p are those at which as many entries have moved, and as far,
    as in dW (two moments, by the spacing of each entry).

    Args:
        base, tuned: W0 and W1 of one shape, as they were stored.

    Returns:
        Estimates from a sample, for the whole tensor: ||e||^2 and ||dW||^2. The latter is 0 where nothing in
        the sample has moved.
    """
    if tuned.numel() == 0:
        return 0.0, 0.0
    if base.is_contiguous() != tuned.is_contiguous():
        base, tuned = base.contiguous(), tuned.contiguous()
    w0, w1 = sample(base), sample(tuned)
    dtype = storage_dtype(tuned)
    moves = (w1.double() - w0.double()).abs().cpu().numpy()
    if not moves.any():
        return 0.0, 0.0
    exponents = _spacing_exponents(w1.double().cpu().numpy(), dtype)
    if dtype in (torch.bfloat16, torch.float16) and _holds(dtype, w0):
        noise = _hidden_moves(moves, exponents)
    else:
        noise = float(np.exp2(2.0 * exponents).sum()) / 12
    share = tuned.numel() / len(moves)
    return share * noise, share * float(np.square(moves).sum())


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    return bool((values.to(dtype).to(values.dtype) == values).all())


def _spacing_exponents(values: Any, dtype: torch.dtype) -> Any:
    """Return log2 of the distance of neighbours in a dtype, at each value."""
    info = torch.finfo(dtype)
    digits = round(math.log2(info.eps))
    _, exponents = np.frexp(np.abs(values))
    smallest = round(math.log2(info.smallest_normal))
    return np.where(values == 0, smallest, np.maximum(exponents - 1, smallest)) + digits


def expected_survival(tuned: Tensor, edit_norm: float) -> float | None:
    """Return <E', E> / <E, E> to be expected of an edit E of fine-tuned weights of which E' is stored.

    W1 + E is rounded to the grid that W1 lies on. E is taken for normal, of one standard deviation, and
    independent of the weights.

    Args:
        tuned: W1.
        edit_norm: ||E||_F.
    """
    dtype = storage_dtype(tuned)
    if edit_norm == 0 or tuned.numel() == 0:
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return 1.0
    exponents = _spacing_exponents(sample(tuned).double().cpu().numpy(), dtype)
    steps = _STEPS * (math.log2(edit_norm / math.sqrt(tuned.numel())) - exponents)
    squares, _, noise = _rounded_normal()
    sizes = np.arange(_LOWEST, _HIGHEST + 1)
    # E[d u] = (E[u^2] + E[d^2] - E[(d - u)^2]) / 2, over E[u^2].
    shares = (1 + (squares - noise) / np.exp2(2 * sizes / _STEPS)) / 2
    return float(np.interp(steps, sizes, shares, left=0.0, right=1.0).mean())


# Steps of log2 s in which the moments of rounded normal numbers are tabulated, from s = q / 16 to 4 q; below,
# nothing moves, and above, rounding is uniform.
_STEPS = 8
_LOWEST, _HIGHEST = -4 * _STEPS, 2 * _STEPS


@cache
def _rounded_normal() -> Any:
    """Return E[d^2], P(d != 0) and E[(d - u)^2] of d = u rounded to integers, u normal, over log2 s."""
    s = np.exp2(np.arange(_LOWEST, _HIGHEST + 1) / _STEPS)[:, None]
    steps = np.arange(1, 40)
    t = (steps - 0.5) / s
    beyond = special.erfc(t / math.sqrt(2))
    squares = ((2 * steps - 1) * beyond).sum(1)
    both = (2 * s * np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)).sum(1)
    return np.stack([squares, beyond[:, 0], s[:, 0] ** 2 - 2 * both + squares])


def _hidden_moves(moves: Any, exponents: Any) -> float:
    """Return the sum of E[e^2] over entries of which dW shows `moves`, on grids of spacing 2^exponents."""
    found, places, counts = np.unique(exponents, return_inverse=True, return_counts=True)
    moved = int(np.count_nonzero(moves))
    squares = float(np.square(moves).sum())
    # s lies between what the finest grid with moves asks for and the mean size of a move.
    highest = math.ceil(_STEPS * (math.log2(squares / moved) / 2 + 1))
    lowest = max(highest - 24 * _STEPS, min(highest - 1, _LOWEST + _STEPS * int(exponents[moves > 0].min())))
    grid = np.arange(lowest, highest + 1)
    size = np.exp2(2 * grid / _STEPS)
    place = grid[:, None] - _STEPS * found
    table = _rounded_normal()[:, np.clip(place, 0 + _LOWEST, _HIGHEST) - _LOWEST]
    unit = np.exp2(2.0 * found)
    far, little = place > _HIGHEST, place < _LOWEST
    expected = np.where(far, size[:, None] + unit / 12, np.where(little, 0.0, table[0] * unit)) @ counts
    likely = np.where(far, 1 - 0.4 * np.exp2(-place / _STEPS), np.where(little, 0.0, table[1]))
    hits = likely @ counts
    noise = np.where(far, unit / 12, np.where(little, size[:, None], table[2] * unit))
    # Both grow with s: where they meet what was seen.
    reached = np.divide(expected, hits, out=np.zeros_like(expected), where=hits > 0)
    at = float(np.interp(squares / moved, np.maximum.accumulate(reached), grid))
    share = moved / max(float(np.interp(at, grid, hits)), 1e-300)
    if share > 1:
        # More have moved than that: all of them are touched, and s alone is left to be found.
        at, share = float(np.interp(squares, np.maximum.accumulate(expected), grid)), 1.0
    nearest = round(at) - lowest
    # How many are touched is seen for each spacing by itself where most of those have moved.
    seen = likely[nearest] > 0.5
    own = np.bincount(places, moves > 0) / np.where(seen, likely[nearest], 1.0)
    return float(np.where(seen, own, share * counts) @ noise[nearest])


def sample(tensor: Tensor) -> Tensor:
    """Return evenly spaced entries of a tensor, all of them where there are few."""
    if tensor.numel() <= _SAMPLE:
        return tensor.detach().reshape(-1)
    if tensor.is_contiguous():
        # A stride that shares no factor with the usual widths visits all rows and columns.
        step = tensor.numel() // _SAMPLE
        step += 1 - step % 2
        return tensor.detach().view(-1)[:: max(1, step)]
    return tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLE)]
