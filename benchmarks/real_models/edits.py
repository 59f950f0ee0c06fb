"""The candidates of one fine-tuned checkpoint, as weights in float32."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergekit_monosoup import edit_state_dict
from mergekit_monosoup.spectral.mixing import mixing_coefficients
from mergekit_monosoup.spectral.split import effective_rank, rank_index

StateDict = dict[str, Tensor]

ALPHAS = (0.5, 0.7, 1.0)
WISE_FT = tuple(i / 10 for i in range(1, 11))
STAR = 0.4
_SPLITS: dict[str, dict[str, Any]] = {
    "MonoSoup": {},
    "MonoSoup R=0.8": {"energy": 0.8},
    "MonoSoup, noise split": {"split": "donoho_gavish"},
}
_ABLATIONS = {"rho only": "decay", "cos alpha only": "alignment", "uniform": "uniform", "high only": "high"}
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Candidate:
    """Weights to score: their name, their kind, and their factor where they lie on a curve."""

    label: str
    family: str
    make: Callable[[], StateDict] = field(repr=False)
    alpha: float | None = None


@dataclass
class Pair:
    """A base with a fine-tuned checkpoint; `early` is the checkpoint after a quarter of the steps."""

    base: StateDict
    tuned: StateDict
    early: StateDict
    _parts: dict[Any, Any] = field(default_factory=dict)
    _spectra: dict[str, tuple[Tensor, Tensor, bool]] = field(default_factory=dict)

    def parts(self, tensor: str, rule: str, find: Callable[[], Any]) -> Any:
        """Keep the parts of updates, as `edit_state_dict` asks for."""
        if (tensor, rule) not in self._parts:
            self._parts[tensor, rule] = find()
        return self._parts[tensor, rule]

    def edited(self, method: str = "monosoup", **parameters: Any) -> StateDict:
        """Edit by the package."""
        return dict(edit_state_dict(self.base, self.tuned, method=method, parts=self, **parameters).weights)

    def mixed(self, factor: float) -> StateDict:
        """Interpolate every tensor (Wise-FT, arXiv 2109.01903)."""
        return self.scaled(lambda name, update: factor * update)

    def scaled(self, change: Callable[[str, Tensor], Tensor]) -> StateDict:
        """Change every update."""
        return {name: w0 + change(name, self.tuned[name] - w0) for name, w0 in self.base.items()}

    def spectral(self, factors: Callable[[str, Tensor, tuple[int, ...]], Tensor]) -> StateDict:
        """Multiply the singular values of each matrix' update; other tensors stay as fine-tuned.

        Args:
            factors: of name, singular values (float64, descending) and shape.
        """

        def change(name: str, update: Tensor) -> Tensor:
            if update.ndim != 2 or not bool(update.any()):
                return update
            vectors, values, wide = self._spectrum(name, update)
            kept = (vectors * factors(name, values, tuple(update.shape)).float()) @ vectors.mT
            return kept @ update if wide else update @ kept

        return self.scaled(change)

    def _spectrum(self, name: str, update: Tensor) -> tuple[Tensor, Tensor, bool]:
        if name not in self._spectra:
            wide = update.shape[0] < update.shape[1]
            double = update.double()
            squares, vectors = torch.linalg.eigh(double @ double.mT if wide else double.mT @ double)
            order = squares.argsort(descending=True)
            values = squares[order].clamp_min(0).sqrt()
            self._spectra[name] = vectors[:, order].float(), values, wide
        return self._spectra[name]


def candidates(pair: Pair, short: bool = False) -> Iterator[Candidate]:
    """Yield what is scored beside base and fine-tuned checkpoint, in the order of DESIGN.md."""
    for factor in WISE_FT if not short else (0.5, 1.0):
        yield Candidate(f"Wise-FT {factor:g}", "Wise-FT", lambda f=factor: pair.mixed(f), factor)
    alphas = (1.0,) if short else ALPHAS
    for label, how in _SPLITS.items():
        for alpha in alphas:
            yield Candidate(
                _with(label, alpha), label, lambda h=how, a=alpha: pair.edited(alpha=a, **h), alpha
            )
    for alpha in alphas:
        yield Candidate(
            _with("DG-Hard", alpha), "DG-Hard", lambda a=alpha: pair.edited("dg_hard", alpha=a), alpha
        )
    for label, how in (("MonoSoup", {}), ("MonoSoup R=0.8", {"energy": 0.8})):
        yield Candidate(f"norm of {label}, no SVD", "controls", lambda h=how: norm_control(pair, **h))
    yield Candidate(f"STAR {STAR:g}", "controls", lambda: pair.spectral(star))
    if short:
        return
    for label, mixing in _ABLATIONS.items():
        yield Candidate(f"MonoSoup, {label}", "ablations", lambda m=mixing: pair.edited(mixing=m))
    for low, high in ((0.1, 0.9), (0.5, 0.5)):
        yield Candidate(f"LiNeS ({low}, {high})", "LiNeS", lambda a=low, b=high: lines(pair, a, b))
    yield from _storage(pair)
    yield from _search(pair)


def _with(label: str, alpha: float) -> str:
    return label if alpha == 1 else f"{label}, alpha {alpha:g}"


def _storage(pair: Pair) -> Iterator[Candidate]:
    stored = Pair(_as_bfloat16(pair.base), _as_bfloat16(pair.tuned), pair.early)
    yield Candidate("fine-tuned, stored in bfloat16", "storage", lambda: stored.tuned)
    yield Candidate("MonoSoup of bfloat16", "storage", stored.edited)
    half = {name: tensor.bfloat16() for name, tensor in stored.base.items()}
    tuned = {name: tensor.bfloat16() for name, tensor in stored.tuned.items()}
    for rounding in ("nearest", "stochastic"):

        def write(how: str = rounding) -> StateDict:
            return dict(edit_state_dict(half, tuned, rounding=how).weights)

        yield Candidate(f"MonoSoup of and in bfloat16, {rounding}", "storage", write)


def _search(pair: Pair) -> Iterator[Candidate]:
    yield Candidate("swapped coefficients", "search", lambda: pair.spectral(swapped))
    yield Candidate("split at the noise of storage", "search", lambda: by_storage(pair, mixed_above))
    yield Candidate("optimal shrinkage", "search", lambda: by_storage(pair, shrunk))
    yield Candidate("early checkpoint as the base", "search", lambda: from_early(pair))
    for label, ends in (("falling", (1.0, 0.5)), ("rising", (0.5, 1.0))):
        yield Candidate(f"MonoSoup {label} over depth", "search", lambda e=ends: over_depth(pair, *e))


def norm_control(pair: Pair, **how: Any) -> StateDict:
    """Shrink each update to the norm that MonoSoup leaves it."""
    edited = pair.edited(**how)

    def change(name: str, update: Tensor) -> Tensor:
        norm = update.norm()
        return update if norm == 0 else update * ((edited[name] - pair.base[name]).norm() / norm)

    return pair.scaled(change)


def star(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Keep the leading share of the nuclear norm, scaled to the whole of it (arXiv 2502.10339)."""
    sums = values.cumsum(0)
    kept = int((sums < STAR * sums[-1]).sum()) + 1
    factors = torch.zeros_like(values)
    factors[:kept] = sums[-1] / sums[kept - 1]
    return factors


def _coefficients(values: Tensor, kept: int) -> tuple[float, float]:
    """Return lambda_low and lambda_high of MonoSoup for a split after `kept` directions."""
    found = mixing_coefficients(values, kept, "monosoup")
    return found.lambda_low, found.lambda_high


def swapped(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Weaken strong directions by lambda_low and weak ones by lambda_high, split at the effective rank."""
    kept = rank_index(effective_rank(values), len(values))
    low, high = _coefficients(values, kept)
    return torch.cat([torch.full((kept,), low), torch.full((len(values) - kept,), high)]).double()


Rule = Callable[[Tensor, tuple[int, ...], float], Tensor]


def by_storage(pair: Pair, rule: Rule) -> StateDict:
    """Edit by the noise that storing in bfloat16 adds, whose size is known and not estimated."""
    stored = Pair(_as_bfloat16(pair.base), _as_bfloat16(pair.tuned), pair.early)
    sigmas = {}
    for name, tensor in stored.tuned.items():
        if tensor.ndim == 2:
            # Rounding errors are uniform over a spacing.
            _, exponents = torch.frexp(tensor)
            # bfloat16 has 8 bits of which the first is not stored: neighbours are 2^(e - 8) apart.
            spacings = torch.where(tensor == 0, 0.0, torch.exp2(exponents.double() - 8))
            sigmas[name] = float(spacings.square().mean().div(12).sqrt())

    def factors(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        return rule(values, shape, sigmas[name])

    return stored.spectral(factors)


def mixed_above(values: Tensor, shape: tuple[int, ...], sigma: float) -> Tensor:
    """MonoSoup's coefficients, split at the largest singular value of pure noise, sigma (sqrt m + sqrt n)."""
    edge = sigma * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    kept = int((values > edge).sum())
    if kept in (0, len(values)):
        return torch.ones_like(values)
    low, high = _coefficients(values, kept)
    return torch.cat([torch.full((kept,), high), torch.full((len(values) - kept,), low)]).double()


def shrunk(values: Tensor, shape: tuple[int, ...], sigma: float) -> Tensor:
    """Optimal shrinkage for the Frobenius loss (Gavish & Donoho, arXiv 1405.7511, eq. 7) with known sigma."""
    longer = max(shape)
    beta = min(shape) / longer
    y = values / (sigma * math.sqrt(longer))
    inside = (y.square() - beta - 1).square() - 4 * beta
    best = inside.clamp_min(0).sqrt() / y.clamp_min(1e-300)
    best = torch.where(y > 1 + math.sqrt(beta), best, torch.zeros_like(best))
    return best / y.clamp_min(1e-300)


def from_early(pair: Pair) -> StateDict:
    """Edit what the last three quarters of the steps did."""
    return dict(edit_state_dict(pair.early, pair.tuned).weights)


def over_depth(pair: Pair, first: float, last: float) -> StateDict:
    """MonoSoup with a strength that changes linearly over the layers; outside of them it is the mean."""
    deepest = max(int(match[1]) for name in pair.base if (match := _LAYER.search(name)))

    def alpha(name: str) -> float:
        match = _LAYER.search(name)
        return (first + last) / 2 if match is None else first + (last - first) * int(match[1]) / deepest

    return pair.edited(alpha=alpha)


def lines(pair: Pair, a: float, b: float) -> StateDict:
    """Scale block l of L by a + b l / (L - 1), everything else by a (LiNeS, arXiv 2410.17146)."""
    deepest = max(int(match[1]) for name in pair.base if (match := _LAYER.search(name)))

    def change(name: str, update: Tensor) -> Tensor:
        match = _LAYER.search(name)
        return update * (a if match is None else a + b * int(match[1]) / deepest)

    return pair.scaled(change)


def _as_bfloat16(weights: Mapping[str, Tensor]) -> StateDict:
    return {name: tensor.bfloat16().float() for name, tensor in weights.items()}
