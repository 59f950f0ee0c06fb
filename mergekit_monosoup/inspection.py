"""Look at updates without writing a model."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from torch import Tensor

from mergekit_monosoup.checkpoint.float8 import FLOAT8, dequantise, missing_scale
from mergekit_monosoup.checkpoint.headers import unreadable_pickle
from mergekit_monosoup.checkpoint.lineage import BaseWatch
from mergekit_monosoup.checkpoint.scales import is_scale, scale_name
from mergekit_monosoup.errors import NonFiniteError, ShapeMismatchError
from mergekit_monosoup.lora.adapted import AdaptedLoader, adapted_loader
from mergekit_monosoup.lora.exact import same_base, update_of
from mergekit_monosoup.report.figures import change
from mergekit_monosoup.report.measure import edit_fields, frobenius_norm, tensor_record
from mergekit_monosoup.report.rounding import expected_survival, sample
from mergekit_monosoup.report.schema import Action, SpectrumCurve, TensorRecord
from mergekit_monosoup.spectral.analysis import Analysis, analyse_update, spectrum_points
from mergekit_monosoup.spectral.matrix import choose_view
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split


class Inspection:
    """The updates of one or more fine-tuned checkpoints, tensor by tensor.

    Several checkpoints are averaged first, as the merge method does, and the cosines between their
    updates are noted.
    """

    def __init__(self, base: str, finetuned: Sequence[str], *, cache_dir: str | None = None) -> None:
        """Open the checkpoints (Hub models are downloaded).

        Raises:
            InputError: a checkpoint cannot be read.
        """
        self.names = [base, *finetuned]
        self._loaders = [_loader(name, cache_dir) for name in self.names]
        self._watch = BaseWatch()
        self._message: str | None = None

    @property
    def folders(self) -> list[Path]:
        """Where the checkpoints lie."""
        adapted = [adapted_loader(loader) for loader in self._loaders]
        bases = [Path(loader.index.base_path) for loader in self._loaders]
        return [bases[i] if loader is None else loader.folder for i, loader in enumerate(adapted)]

    @property
    def tensors(self) -> list[str]:
        """Names that all checkpoints share."""
        shared = set.intersection(*(set(loader.index.tensor_paths) for loader in self._loaders))
        held = self._loaders[0].index.tensor_paths
        return [name for name in held if name in shared and not is_scale(name, held)]

    @property
    def missing(self) -> list[str]:
        """Names that some of the checkpoints lack."""
        held = [loader.index.tensor_paths for loader in self._loaders]
        every = {name for names in held for name in names if not is_scale(name, names)}
        return sorted(every - set(self.tensors))

    def records(
        self,
        energies: Sequence[float] = (),
        select: Callable[[str], bool] = lambda _: True,
        device: str = "cpu",
        split: Split = EFFECTIVE_RANK,
        mixing: Mixing = "monosoup",
    ) -> Iterator[TensorRecord]:
        """Yield the record of each tensor that is selected.

        Args:
            energies: further thresholds R to split by.
            select: which tensors to look at, by name.
            device: where to decompose.
            split, mixing: of the record itself.

        Raises:
            InputError: shapes differ, or a tensor holds NaN, infinity or integers where numbers belong.
        """
        for name in self.tensors:
            if select(name):
                yield self._record(name, device, energies, split, mixing)

    @property
    def base_message(self) -> str | None:
        """What the tensors seen so far say against the base, None where nothing does."""
        return self._message

    def _record(
        self, name: str, device: str, energies: Sequence[float], split: Split, mixing: Mixing
    ) -> TensorRecord:
        stored = [
            _stored(loader, name, model, device)
            for loader, model in zip(self._loaders, self.names, strict=True)
        ]
        shape = tuple(stored[0].shape)
        if any(tuple(tensor.shape) != shape for tensor in stored):
            raise ShapeMismatchError(
                f"tensor {name}: shapes differ: "
                + ", ".join(f"{n} {list(t.shape)}" for n, t in zip(self.names, stored, strict=True))
            )
        if not all(tensor.is_floating_point() for tensor in stored):
            return TensorRecord(
                tensor=name,
                shape=shape,
                dtype=str(stored[0].dtype).removeprefix("torch."),
                action="copied",
                reason="not floating-point",
                method="inspect",
            )
        updates = [self._update(i, name, stored) for i in range(1, len(stored))]
        mean = updates[0] if len(updates) == 1 else torch.stack(updates).mean(0)
        view = choose_view(shape, name)
        matrix = view.decomposes
        if matrix:
            for label, tensor in zip(self.names[1:], stored[1:], strict=True):
                self._look_at_base(name, label, stored[0], tensor)
        analysis = analyse_update(mean, energies, view, split, mixing) if matrix else None
        action: Action = "edited" if matrix else ("kept" if len(updates) == 1 else "averaged")
        record = tensor_record(
            name,
            stored[0],
            stored[1:],
            action=action,
            reason="" if matrix else "not a matrix",
            edit=analysis.record if analysis else None,
            update_norm=frobenius_norm(mean),
            method="inspect",
            spectrum=_curve(analysis),
            sweep=_sweep(analysis),
            cosines=self._cosines(updates),
        )
        share = change(record)
        if share is None or record.update_norm is None or len(updates) > 1:
            return record
        survival = expected_survival(stored[1], share * record.update_norm)
        return record.model_copy(update={"edit_survival": survival})

    def _update(self, index: int, name: str, stored: Sequence[Tensor]) -> Tensor:
        """Return the update of one checkpoint; of an adapter on the base, by its factors."""
        loader, base = self._loaders[index], stored[0]
        if isinstance(loader, AdaptedLoader) and same_base(loader.base_model, self.names[0]):
            exact = update_of(loader.placement.change_of(name), base)
            if exact is not None:
                return exact.materialise(base if base.dtype == torch.float64 else base.float())
        return _update(name, self.names[index], base, stored[index])

    def _look_at_base(self, name: str, label: str, base: Tensor, finetuned: Tensor) -> None:
        if self._watch.has_seen_enough(label):
            return
        w0, w1 = (sample(tensor).double().cpu().numpy() for tensor in (base, finetuned))
        found = self._watch.see(self.names[0], label, name, w0, w1)
        self._message = self._message or found

    def _cosines(self, updates: Sequence[Tensor]) -> dict[str, float | None]:
        labels = _short_names(self.names[1:])
        found: dict[str, float | None] = {}
        norms = [frobenius_norm(update) for update in updates]
        for i, j in combinations(range(len(updates)), 2):
            scale = norms[i] * norms[j]
            inner = float(torch.dot(updates[i].flatten().double(), updates[j].flatten().double()))
            found[f"{labels[i]} / {labels[j]}"] = inner / scale if scale else None
        return found


def _loader(name: str, cache_dir: str | None) -> LazyTensorLoader:
    reference = ModelReference.parse(name)
    base = reference.model_copy(update={"lora": None})
    try:
        loader = base.lazy_loader(cache_dir=cache_dir, lazy_unpickle=True)
    except pickle.UnpicklingError as error:
        raise unreadable_pickle(Path(name), error) from error
    return loader if reference.lora is None else AdaptedLoader.open(reference, base, loader)


def _stored(loader: LazyTensorLoader, name: str, model: str, device: str) -> Tensor:
    """Return a tensor as it is stored, float8 times its scale."""
    tensor: Tensor = loader.get_tensor(name, device=device)
    if tensor.dtype not in FLOAT8:
        return tensor
    scale = scale_name(name, loader.index.tensor_paths)
    if scale is None:
        raise missing_scale(name, tensor.dtype, f" of {model}")
    return dequantise(tensor, loader.get_tensor(scale, device=device), name)


def _update(tensor: str, model: str, base: Tensor, finetuned: Tensor) -> Tensor:
    wide = torch.float64 if torch.float64 in (base.dtype, finetuned.dtype) else torch.float32
    update = finetuned.to(wide) - base.to(wide)
    if not bool(torch.isfinite(update).all()):
        raise NonFiniteError(
            f"tensor {tensor}: the update of {model} holds NaN or infinity; the checkpoint or its base is "
            "damaged, or training diverged"
        )
    return update


def _curve(analysis: Analysis | None) -> SpectrumCurve | None:
    if analysis is None or not analysis.singular_values:
        return None
    # Of a stack of experts, the first one stands for all.
    index, value, energy = spectrum_points(analysis.singular_values[0])
    return SpectrumCurve(index=tuple(index), value=tuple(value), energy=tuple(energy))


def _sweep(analysis: Analysis | None) -> dict[str, dict[str, float]]:
    names = ("k", "p_k", "rho", "cos_alpha", "lambda_low", "lambda_high")
    if analysis is None or not analysis.singular_values:
        return {}
    return {
        f"{energy:g}": {name: edit_fields(record)[name] for name in names}
        for energy, record in analysis.fixed.items()
    }


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the last part of each path, or the whole of them where those are not distinct."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)
