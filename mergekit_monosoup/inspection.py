"""Look at updates without writing a model."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import psutil
import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from torch import Tensor

from mergekit_monosoup.checkpoint.float8 import FLOAT8, dequantise, missing_scale
from mergekit_monosoup.checkpoint.headers import header_of, unreadable_pickle
from mergekit_monosoup.checkpoint.lineage import BaseWatch, Relation, relation
from mergekit_monosoup.checkpoint.pinned import pinned, revisions_of
from mergekit_monosoup.checkpoint.scales import is_scale, scale_name
from mergekit_monosoup.cluster.connection import RayOptions
from mergekit_monosoup.errors import NonFiniteError, ShapeMismatchError
from mergekit_monosoup.inspected import Looked, Question, short_names, sweep
from mergekit_monosoup.lora.adapted import AdaptedLoader, adapted_loader
from mergekit_monosoup.lora.exact import same_base, update_of
from mergekit_monosoup.merging.room import Room
from mergekit_monosoup.report.figures import change
from mergekit_monosoup.report.measure import frobenius_norm, tensor_record
from mergekit_monosoup.report.rounding import expected_survival, sample
from mergekit_monosoup.report.schema import Action, TensorRecord
from mergekit_monosoup.spectral.analysis import analyse_update
from mergekit_monosoup.spectral.matrix import choose_view

# Bytes that an entry of an input takes while it is looked at: float32 update, float64 matrix, squares.
_WIDE = 24


class Inspection:
    """The updates of one or more fine-tuned checkpoints, tensor by tensor.

    Several checkpoints are averaged first, as the merge method does, and the cosines between their
    updates are noted.
    """

    def __init__(
        self,
        base: str,
        finetuned: Sequence[str],
        *,
        cache_dir: str | None = None,
        revisions: Mapping[str, str] | None = None,
    ) -> None:
        """Open the checkpoints (Hub models are downloaded).

        Args:
            base, finetuned: folders or Hub ids.
            cache_dir: of the Hub, where it is not the usual one.
            revisions: commits to read models and adapters at, by their names.

        Raises:
            InputError: a checkpoint cannot be read.
        """
        self.names = [base, *finetuned]
        self.cache_dir = cache_dir
        self._loaders = [_loader(name, cache_dir, revisions or {}) for name in self.names]
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
        names: Sequence[str],
        question: Question,
        seen: Callable[[TensorRecord], None] = lambda record: None,
        cluster: RayOptions | None = None,
    ) -> Iterator[TensorRecord]:
        """Yield the records of tensors, in the order of their names.

        Several tensors are looked at at a time, each on one core alone: so the figures are the same to the
        last digit whatever the number of cores, and on a cluster.

        Args:
            names: the tensors, of `tensors`.
            question: what is asked of each.
            seen: called for each record as soon as it is there.
            cluster: where to look at them; absent: in this process.

        Raises:
            InputError: shapes differ, or a tensor holds NaN, infinity or integers where numbers belong.
        """
        if cluster is None:
            found = self._looked(names, question, seen)
        else:
            from mergekit_monosoup.inspection_on_ray import looked_on_ray

            found = looked_on_ray(self, names, question, seen, cluster)
        for looked in found:
            for label, said in looked.relations:
                if not self._watch.has_seen_enough(label):
                    self._message = self._message or self._watch.take(self.names[0], label, said)
            yield looked.record

    @property
    def base_message(self) -> str | None:
        """What the tensors seen so far say against the base, None where nothing does."""
        return self._message

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the base's tensors, as far as headers say them."""
        index = self._loaders[0].index
        if not index.is_safetensors:
            return {}
        headers = [header_of(Path(index.base_path) / shard.filename) for shard in index.shards]
        return {name: held.shape for header in headers for name, held in header.items()}

    def revisions(self) -> dict[str, str]:
        """Return the commits on the Hub that the checkpoints and adapters are read at, by their names."""
        references = [ModelReference.parse(name) for name in self.names]
        paths = [Path(loader.index.base_path) for loader in self._loaders]
        return revisions_of(references, dict(zip(references, paths, strict=True)), self.cache_dir)

    def _looked(
        self, names: Sequence[str], question: Question, seen: Callable[[TensorRecord], None]
    ) -> Iterator[Looked]:
        on_cpu = question.device == "cpu"
        threads = torch.get_num_threads() if on_cpu else 1
        room = Room(psutil.virtual_memory().available // 2)
        pending: deque[Future[Looked]] = deque()
        with ThreadPoolExecutor(threads, "inspect", _one_core if on_cpu else None) as pool:
            try:
                for name in names:
                    pending.append(pool.submit(self.look, name, question, room))
                    if len(pending) > threads:
                        yield _heard(pending.popleft(), seen)
                while pending:
                    yield _heard(pending.popleft(), seen)
            except BaseException:
                # Also when the user interrupts, or nobody wants to know any more.
                room.open()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def look(self, name: str, question: Question, room: Room | None = None) -> Looked:
        """Look at one tensor; from any thread.

        Args:
            name: of the tensor.
            question: what is asked of it.
            room: for what it takes while it is looked at.
        """
        stored = self.stored(name, question.device)
        with room.held(_WIDE * len(stored) * stored[0].numel()) if room is not None else nullcontext():
            return self._look(name, stored, question)

    def stored(self, name: str, device: str = "cpu") -> list[Tensor]:
        """Return a tensor as each checkpoint stores it, base first; float8 times its scale.

        Raises:
            ShapeMismatchError: the shapes differ.
        """
        stored = [
            _stored(loader, name, m, device) for loader, m in zip(self._loaders, self.names, strict=True)
        ]
        if any(tensor.shape != stored[0].shape for tensor in stored):
            raise ShapeMismatchError(
                f"tensor {name}: shapes differ: "
                + ", ".join(f"{n} {list(t.shape)}" for n, t in zip(self.names, stored, strict=True))
            )
        return stored

    def _look(self, name: str, stored: Sequence[Tensor], question: Question) -> Looked:
        shape = tuple(stored[0].shape)
        if not all(tensor.is_floating_point() for tensor in stored):
            copied = TensorRecord(
                tensor=name,
                shape=shape,
                dtype=str(stored[0].dtype).removeprefix("torch."),
                action="copied",
                reason="not floating-point",
                method="inspect",
            )
            return Looked(copied)
        updates = [self._update(i, name, stored) for i in range(1, len(stored))]
        mean = updates[0] if len(updates) == 1 else torch.stack(updates).mean(0)
        view = choose_view(shape, name)
        matrix = view.decomposes
        tuned = zip(self.names[1:], stored[1:], strict=True) if matrix else ()
        relations = tuple((label, _relation(name, stored[0], tensor)) for label, tensor in tuned)
        asked = (question.energies, view, question.split, question.mixing)
        analysis = analyse_update(mean, *asked) if matrix else None
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
            sweep=sweep(analysis),
            cosines=self._cosines(updates),
        )
        share = change(record)
        if share is None or record.update_norm is None or len(updates) > 1:
            return Looked(record, relations)
        survival = expected_survival(stored[1], share * record.update_norm)
        return Looked(record.model_copy(update={"edit_survival": survival}), relations)

    def _update(self, index: int, name: str, stored: Sequence[Tensor]) -> Tensor:
        """Return the update of one checkpoint; of an adapter on the base, by its factors."""
        loader, base = self._loaders[index], stored[0]
        if isinstance(loader, AdaptedLoader) and same_base(loader.base_model, self.names[0]):
            exact = update_of(loader.placement.change_of(name), base)
            if exact is not None:
                return exact.materialise(base if base.dtype == torch.float64 else base.float())
        return _update(name, self.names[index], base, stored[index])

    def _cosines(self, updates: Sequence[Tensor]) -> dict[str, float | None]:
        labels = short_names(self.names[1:])
        found: dict[str, float | None] = {}
        norms = [frobenius_norm(update) for update in updates]
        for i, j in combinations(range(len(updates)), 2):
            scale = norms[i] * norms[j]
            inner = float(torch.dot(updates[i].flatten().double(), updates[j].flatten().double()))
            found[f"{labels[i]} / {labels[j]}"] = inner / scale if scale else None
        return found


def _one_core() -> None:
    torch.set_num_threads(1)


def _heard(looked: Future[Looked], seen: Callable[[TensorRecord], None]) -> Looked:
    found = looked.result()
    seen(found.record)
    return found


def _relation(name: str, base: Tensor, finetuned: Tensor) -> Relation | None:
    w0, w1 = (sample(tensor).double().cpu().numpy() for tensor in (base, finetuned))
    return relation(name, w0, w1)


def _loader(name: str, cache_dir: str | None, revisions: Mapping[str, str]) -> LazyTensorLoader:
    reference = pinned(ModelReference.parse(name), revisions)
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
