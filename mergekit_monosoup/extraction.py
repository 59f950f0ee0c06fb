"""A full fine-tune as an adapter of its base: the edited update in truncated factors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_monosoup.errors import AdapterError, ConfigurationError, NonFiniteError, ParameterError
from mergekit_monosoup.inspection import Inspection
from mergekit_monosoup.lora.editing import Rank
from mergekit_monosoup.lora.extracted import ExtractedAdapter, Form, Parts, settings_of
from mergekit_monosoup.lora.hollow import hollow_model
from mergekit_monosoup.lora.placement import NameMap
from mergekit_monosoup.report.rounding import storage_noise
from mergekit_monosoup.spectral.crew import at_work
from mergekit_monosoup.spectral.edit import EditOptions, edit_weight
from mergekit_monosoup.spectral.matrix import choose_view
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split
from mergekit_monosoup.spectral.threshold import omega
from mergekit_monosoup.spectral.truncation import EditedSpectrum, truncated_edit

Outcome = Literal["factors", "whole", "unchanged", "left out"]


@dataclass(frozen=True)
class ExtractOptions:
    """What of a fine-tune is kept, and at which rank.

    `rank` is a number; a share of the edited energy above the noise of storage, in (0, 1]; or `auto`: the
    directions that the split counts as high and that lie above that noise. `plain` leaves the update
    unedited. `factors_only` leaves out what would have to be stored whole.
    """

    rank: Rank = "auto"
    split: Split = EFFECTIVE_RANK
    mixing: Mixing = "monosoup"
    alpha: float = 1.0
    plain: bool = False
    factors_only: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ParameterError(f"alpha is {self.alpha}; it must be a finite number >= 0")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ParameterError(f"rank is {self.rank}; it must be at least 1")
        if isinstance(self.rank, float) and not 0 < self.rank <= 1:
            raise ParameterError(f"rank is {self.rank}; as a share of the energy it must be in (0, 1]")


@dataclass(frozen=True)
class TensorOutcome:
    """What became of the update of one tensor.

    `norm` is ||dW*||_F of the edited update, `error` the part of it that the adapter lacks, relative; `noise`
    the share of ||dW||_F^2 that storing the fine-tune has added; `above_noise` the number of its singular
    values above that noise. None where a figure has no meaning.
    """

    tensor: str
    outcome: Outcome
    norm: float
    error: float
    rank: int | None = None
    k: int | None = None
    effective_rank: float | None = None
    lambda_high: float | None = None
    lambda_low: float | None = None
    noise: float | None = None
    above_noise: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Extracted:
    """An adapter ready to be written, and what became of each tensor."""

    adapter: ExtractedAdapter
    settings: dict[str, Any]
    outcomes: tuple[TensorOutcome, ...]

    @property
    def error(self) -> float:
        """||dW* - adapter||_F / ||dW*||_F over all tensors."""
        lost = math.hypot(*(o.error * o.norm for o in self.outcomes))
        return lost / norm if (norm := math.hypot(*(o.norm for o in self.outcomes))) else 0.0

    @property
    def noise(self) -> float:
        """Share of the squared norm of all factored updates that is rounding of storage, by their norms."""
        factored = [o for o in self.outcomes if o.noise is not None]
        total = math.fsum(o.norm**2 for o in factored)
        return math.fsum((o.noise or 0.0) * o.norm**2 for o in factored) / total if total else 0.0


def extract(
    base: str,
    finetuned: str,
    options: ExtractOptions,
    *,
    cache_dir: str | None = None,
    seen: Callable[[str], None] = lambda name: None,
) -> Extracted:
    """Return the update of a full fine-tune as an adapter, tensor by tensor.

    Args:
        base, finetuned: folders or Hub ids.
        options: see `ExtractOptions`.
        cache_dir: of the Hub.
        seen: called with the name of each tensor that is done.

    Raises:
        ConfigurationError: an input carries an adapter itself, or the two are the same.
        InputError: a checkpoint cannot be read, or tensors have other shapes or hold NaN.
    """
    for name in (base, finetuned):
        if ModelReference.parse(name).lora is not None:
            raise ConfigurationError(f"{name} is an adapter already; `mergekit-monosoup lora` edits it")
    inspection = Inspection(base, [finetuned], cache_dir=cache_dir)
    model = hollow_model(ModelReference.parse(base), torch.bfloat16)
    work = _Work(inspection, Parts(model), NameMap(model), options)
    outcomes = list(work.outcomes(seen))
    if not work.adapter.ranks and not work.adapter.whole:
        raise AdapterError(
            f"no update of {finetuned} from {base} is left for an adapter; are they the same checkpoint, or "
            "is all of the update rounding?"
        )
    source = os.path.abspath(base) if os.path.isdir(base) else base
    architecture = (getattr(model.config, "architectures", None) or [""])[0]
    config = work.adapter.config(work.parts, source, architecture)
    return Extracted(work.adapter, settings_of(config), tuple(outcomes))


class _Work:
    def __init__(self, inspection: Inspection, parts: Parts, names: NameMap, options: ExtractOptions) -> None:
        self.parts, self.adapter = parts, ExtractedAdapter()
        self._inspection, self._options = inspection, options
        self._names = {name: names.resolve(name) for name in inspection.tensors}

    def outcomes(self, seen: Callable[[str], None]) -> Iterator[TensorOutcome]:
        later: list[tuple[str, Form]] = []
        for name, known in self._names.items():
            if known is not None and self.parts.is_repeated(known):
                continue
            form = "nothing" if known is None else self.parts.form(known)
            if form in ("linear", "transposed", "convolution", "embedding"):
                yield self._factored(name, str(known), form)
                seen(name)
            else:
                later.append((name, form))
        # By then it is known which layers have factors, and which modules have changed.
        for name, form in self._with_siblings(later):
            yield self._stored_whole(name, self._names[name], form)
            seen(name)
        for name in self._inspection.missing:
            yield TensorOutcome(name, "left out", 0.0, 0.0, reason="not in both checkpoints")

    def _with_siblings(self, later: Sequence[tuple[str, Form]]) -> list[tuple[str, Form]]:
        """Put the parameters of one module next to each other."""
        return sorted(later, key=lambda item: (item[0].rpartition(".")[0], item[0]))

    def _factored(self, name: str, known: str, form: Form) -> TensorOutcome:
        w0, w1 = self._inspection.stored(name)
        options = self._options
        dw = _update(name, w0, w1)
        noise, size = storage_noise(w0, w1)
        rows, columns = dw.shape[0], dw.numel() // dw.shape[0]
        # Known noise: below, a direction brings in more of it than of the update (arXiv 1305.5870, eq. 11).
        short, long = sorted((rows, columns))
        floor = math.sqrt(noise / dw.numel()) * math.sqrt(long) * omega(short / long)

        def rank(spectrum: EditedSpectrum) -> int:
            if isinstance(options.rank, int):
                return options.rank
            above = spectrum.above(floor)
            if isinstance(options.rank, float):
                return spectrum.rank_keeping(options.rank, above)
            return min(spectrum.k, above)

        with at_work(torch.device("cpu"), dw.numel()):
            found = truncated_edit(
                dw.reshape(rows, columns),
                rank,
                split=options.split,
                mixing=None if options.plain else options.mixing,
                alpha=options.alpha,
            )
        if found is None:
            return TensorOutcome(name, "unchanged", 0.0, 0.0)
        record, c = found.record, found.record.coefficients
        left, right = found.left.to(w1.dtype), found.right.to(w1.dtype)
        kept = left.shape[1]
        error = found.error
        if kept:
            self.adapter.add_factors(known.rpartition(".")[0], form, left, right, tuple(dw.shape[2:]))
            rounded = left.float() @ right.float() - found.left @ found.right
            error = math.hypot(error, float(rounded.norm()) / found.norm) if found.norm else 0.0
        return TensorOutcome(
            name,
            "factors" if kept else "left out",
            found.norm,
            error,
            kept,
            record.k,
            record.effective_rank,
            1.0 if options.plain else c.lambda_high,
            1.0 if options.plain else c.lambda_low,
            min(noise / size, 1.0) if size else None,
            found.spectrum.above(floor),
            "" if kept else "all of it is rounding of storage",
        )

    def _stored_whole(self, name: str, known: str | None, form: Form) -> TensorOutcome:
        w0, w1 = self._inspection.stored(name)
        dw = _update(name, w0, w1) if w1.is_floating_point() else (w1 != w0).float()
        norm = float(dw.norm())
        if form == "nothing" or known is None:
            outcome: Outcome = "left out" if norm else "unchanged"
            return TensorOutcome(
                name, outcome, norm, 1.0 if norm else 0.0, reason="no layer that peft adapts"
            )
        module = known.rpartition(".")[0]
        own = self.parts.own(module)
        if not norm and (form == "bias" or not self._has_changed(own)):
            return TensorOutcome(name, "unchanged", 0.0, 0.0)
        if self._options.factors_only:
            return TensorOutcome(name, "left out", norm, 1.0, reason="it would be stored whole")
        stored, error, edit = self._edited(name, w0, w1)
        if form == "tied":
            self.adapter.add_tied(self.parts.aliases(known), stored)
        else:
            self.adapter.add_whole(known, form, stored)
        return TensorOutcome(name, "whole", edit, error)

    def _has_changed(self, parameters: Sequence[str]) -> bool:
        held = {known: name for name, known in self._names.items()}
        return any(not torch.equal(*self._inspection.stored(held[p])) for p in parameters if p in held)

    def _edited(self, name: str, w0: Tensor, w1: Tensor) -> tuple[Tensor, float, float]:
        """Return the edited weight, and the error and norm of its update: rounding is all that it lacks."""
        if not w1.is_floating_point():
            return w1, 0.0, 0.0
        options, view = self._options, choose_view(tuple(w0.shape), name)
        wide0, wide1 = w0.float(), w1.float()
        if options.plain or not view.decomposes:
            weight = torch.lerp(wide0, wide1, options.alpha)
        else:
            edit = EditOptions(options.split, options.mixing, options.alpha)
            with at_work(torch.device("cpu"), w0.numel()):
                weight, _ = edit_weight(wide0, [wide1], options=edit, view=view)
        stored = weight.to(w1.dtype)
        norm = float((weight - wide0).norm())
        return stored.contiguous(), float((stored.float() - weight).norm()) / norm if norm else 0.0, norm


def _update(name: str, base: Tensor, tuned: Tensor) -> Tensor:
    dw = tuned.float() - base.float()
    if not bool(torch.isfinite(dw).all()):
        raise NonFiniteError(f"tensor {name}: the update holds NaN or infinity; training diverged")
    return dw
