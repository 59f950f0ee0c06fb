"""The edit of LoRA files: one, or the average of several, module by module from file to file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from mergekit_monosoup.checkpoint.headers import StoredTensor
from mergekit_monosoup.checkpoint.streamed_file import Slot, refuse_taken, streamed
from mergekit_monosoup.errors import AdapterError, ConfigurationError, NonFiniteError, ShapeMismatchError
from mergekit_monosoup.lora.editing import AdapterOptions, ModuleRecord
from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors, mean_of, rank_for, truncate
from mergekit_monosoup.lora.single_file import (
    SETTINGS,
    FilePair,
    SingleFile,
    configured_scaling,
    has_settings,
    read_single_file,
    settings_for,
)
from mergekit_monosoup.spectral.crew import at_work, crew

# Bytes of factors that are worked on at a time: few beside a file, many beside a module.
_AT_A_TIME = 32_000_000
# What programs compare the tensors of a file with; an edited file has other tensors.
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class EditedFile:
    """What was done to each module, and which tensors were left as they were (key: what they belong to)."""

    records: tuple[ModuleRecord, ...]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class _Planned:
    """A module of the result: what it is in each file that has it, and the form it is written in.

    `same_form` says that B alone changes: rank, A and core stay bit for bit. `settings` is the file whose
    settings the result has.
    """

    module: str
    sources: tuple[tuple[SingleFile, FilePair], ...]
    rank: int
    same_form: bool
    settings: SingleFile

    @property
    def first(self) -> tuple[SingleFile, FilePair]:
        """The file that gives the result its keys, dtypes and alpha."""
        return self.sources[0]

    @property
    def scaling(self) -> float:
        """Scaling that the result's alpha and settings give the module, which they do by its rank."""
        _, pair = self.first
        if pair.alpha is not None:
            return pair.scaling * pair.rank / self.rank or 1.0
        return configured_scaling(self.settings, self.module, self.rank) or 1.0


def edit_files(
    paths: Sequence[Path],
    out: Path,
    options: AdapterOptions,
    *,
    strict: bool = False,
    overwrite: bool = False,
) -> EditedFile:
    """Edit a LoRA file, or the average of several, into a file of the same names, order and dtypes.

    Every pair of factors is edited as `edit_factors` does, c = alpha / rank of the file; several files are
    averaged with equal weights, their factors side by side. A Tucker core (`lora_mid`) stays where the rank
    stays, and is multiplied into A where it changes. What is not plain LoRA is copied bit for bit.

    Args:
        paths: `.safetensors` files of one trade and model.
        out: the file to write; whole, or not at all.
        options: see `AdapterOptions`. A `rank` above that of some modules leaves those as they are.
        strict: refuse what is not plain LoRA.
        overwrite: replace `out`.

    Raises:
        ConfigurationError: `out` cannot be taken, or the asked rank is above that of all modules.
        AdapterError: see `read_single_file`; files that share no module, or differ in what is copied.
        NonFiniteError: NaN or infinity in a factor, or a result that its dtype cannot hold.
    """
    refuse_taken(out, paths, overwrite=overwrite)
    files = [read_single_file(path, strict=strict) for path in paths]
    _refuse_strangers(files)
    planned = {p.module: p for p in _planned(files, options)}
    slots = _slots(files, planned)
    records: list[ModuleRecord] = []
    with streamed(out, slots, _metadata(files, planned, options)) as stream:
        for key in files[0].kept:
            stream.write(key, *files[0].read(key))
        for batch in _batches(list(planned.values())):
            for record, tensors in _in_parallel(batch, options, len(files)):
                records.append(record)
                for key, tensor in tensors.items():
                    stream.write(key, tensor)
    return EditedFile(tuple(records), files[0].kept)


def _refuse_strangers(files: Sequence[SingleFile]) -> None:
    first = files[0]
    for other in files[1:]:
        if not first.pairs.keys() & other.pairs.keys():
            raise AdapterError(
                f"{first.path} and {other.path} have no module in common ({next(iter(first.pairs))} against "
                f"{next(iter(other.pairs))}); are they of one model and one trade?"
            )
        for key in dict.fromkeys([*first.kept, *other.kept]):
            both = key in first.kept and key in other.kept
            if not both or not torch.equal(*first.read(key), *other.read(key)):
                raise AdapterError(
                    f"{key} is not plain LoRA and not the same in {first.path} and {other.path}, so they "
                    "have no average; edit them one by one"
                )


def _planned(files: Sequence[SingleFile], options: AdapterOptions) -> list[_Planned]:
    modules = list(dict.fromkeys(module for file in files for module in file.pairs))
    alone = len(files) == 1
    plans = []
    for module in modules:
        sources = tuple((f, f.pairs[module]) for f in files if module in f.pairs)
        total = sum(pair.rank for _, pair in sources)
        # An alpha of zero switches a module off: that of another file has to do.
        sources = tuple(sorted(sources, key=lambda source: not source[1].scaling))
        plans.append(_Planned(module, sources, total, alone, files[0]))
    wanted = options.rank
    if wanted is None:
        return plans
    largest = max(plan.rank for plan in plans)
    if isinstance(wanted, int) and wanted > largest:
        raise ConfigurationError(
            f"rank {wanted} is larger than that of all modules, at most {largest}; ask for less, or leave "
            "--rank out"
        )

    def rank_of(plan: _Planned) -> int:
        if isinstance(wanted, int):
            return min(wanted, plan.rank)
        edited, record = edit_factors(_mean(plan, len(files)), split=options.split, mixing=options.mixing)
        if wanted == "auto":
            return max((m.k for m in record.matrices), default=1)
        return rank_for(edited, wanted) if wanted is not None else plan.rank

    with at_work(torch.device("cpu")):
        ranks = crew().map(rank_of, plans)
    return [
        replace(plan, rank=rank, same_form=alone and rank == plan.rank)
        for plan, rank in zip(plans, ranks, strict=True)
    ]


def _mean(plan: _Planned, count: int) -> LowRankUpdate:
    """Return the average over all files; one that lacks the module counts as an update of zero."""
    updates = []
    for file, pair in plan.sources:
        update = file.update(pair)
        if not bool(torch.isfinite(update.left).all() & torch.isfinite(update.right).all()):
            raise NonFiniteError(
                f"{file.path}: the factors of {plan.module} hold NaN or infinity; the file is damaged, or "
                "training diverged"
            )
        updates.append(update)
    if count == 1:
        return updates[0]
    try:
        return mean_of(updates, [1 / count] * len(updates), plan.scaling)
    except ShapeMismatchError as error:
        sources = " and ".join(str(file.path) for file, _ in plan.sources)
        raise ShapeMismatchError(f"{plan.module} of {sources}: {error}; are they of one model?") from error


def _edit(plan: _Planned, options: AdapterOptions, count: int) -> tuple[ModuleRecord, dict[str, Tensor]]:
    file, pair = plan.first
    update, record = edit_factors(_mean(plan, count), split=options.split, mixing=options.mixing)
    left, error = update.left * options.alpha, 0.0
    tensors: dict[str, Tensor] = {}
    if plan.same_form:
        others = [key for key in pair.keys if key != pair.up]
        tensors |= zip(others, file.read(*others), strict=True)
    else:
        update = replace(update, left=left)
        if update.rank != plan.rank:
            update, error = truncate(update, plan.rank)
        # Alpha stays: programs divide it by the new rank, and diffusers reads one for all attention modules.
        left = update.left * (update.scaling / plan.scaling)
        if pair.alpha is not None:
            tensors[pair.alpha] = file.read(pair.alpha)[0]
        tensors[pair.down] = _shaped(update.right[0], _down_shape(plan), file.tensors[pair.down])
    up = file.tensors[pair.up]
    tensors[pair.up] = _shaped(left[0], (up.shape[0], plan.rank, *up.shape[2:]), up)
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"{file.path}: the edited {key} leaves the range of {file.tensors[key].dtype}; convert the "
                "file to float32 first"
            )
    return ModuleRecord(plan.module, record, plan.rank, error), tensors


def _shaped(matrix: Tensor, shape: tuple[int, ...], stored: StoredTensor) -> Tensor:
    return matrix.reshape(shape).to(getattr(torch, stored.dtype)).contiguous()


def _down_shape(plan: _Planned) -> tuple[int, ...]:
    """Return the shape of A; a Tucker core that is multiplied into it brings the kernel."""
    file, pair = plan.first
    down = file.tensors[pair.down].shape
    kernel = file.tensors[pair.mid].shape[2:] if pair.mid is not None else down[2:]
    return (plan.rank, down[1], *kernel)


def _slots(files: Sequence[SingleFile], planned: Mapping[str, _Planned]) -> list[Slot]:
    slots: dict[str, Slot] = {}
    for file in files:
        for key, stored in file.tensors.items():
            slots.setdefault(key, Slot(key, stored.shape, stored.dtype))
    for plan in planned.values():
        file, pair = plan.first
        for other, its in plan.sources[1:]:
            if {its.down, its.up, its.alpha} != {pair.down, pair.up, pair.alpha}:
                raise AdapterError(
                    f"{plan.module} is spelled {pair.up} in {file.path} and {its.up} in {other.path}, or has "
                    "an alpha in one of them only; convert them to one spelling"
                )
        if plan.same_form:
            continue
        up = file.tensors[pair.up]
        slots[pair.up] = Slot(pair.up, (up.shape[0], plan.rank, *up.shape[2:]), up.dtype)
        slots[pair.down] = Slot(pair.down, _down_shape(plan), file.tensors[pair.down].dtype)
        for _, its in plan.sources:
            if its.mid is not None:
                slots.pop(its.mid, None)
    return list(slots.values())


def _batches(plans: Sequence[_Planned]) -> Iterator[list[_Planned]]:
    batch: list[_Planned] = []
    held = 0
    for plan in plans:
        stored = [file.tensors[key] for file, pair in plan.sources for key in pair.keys]
        size = sum(Slot(t.name, t.shape, t.dtype).bytes for t in stored)
        if batch and held + size > _AT_A_TIME:
            yield batch
            batch, held = [], 0
        batch.append(plan)
        held += size
    if batch:
        yield batch


def _in_parallel(
    plans: Sequence[_Planned], options: AdapterOptions, count: int
) -> list[tuple[ModuleRecord, dict[str, Tensor]]]:
    with at_work(torch.device("cpu")):
        return crew().map(lambda plan: _edit(plan, options, count), plans)


def _metadata(
    files: Sequence[SingleFile], planned: Mapping[str, _Planned], options: AdapterOptions
) -> dict[str, str]:
    """Return the metadata of the first file, made true of the new tensors, and where these are from."""
    first = files[0]
    metadata = dict(first.metadata)
    for key in _HASHES:
        if key in metadata:
            metadata[f"monosoup.source.{key}"] = metadata.pop(key)
    if not all(plan.same_form for plan in planned.values()):
        ranks = {plan.module: plan.rank for plan in planned.values()}
        if "ss_network_dim" in metadata:
            found = set(ranks.values())
            # As sd-scripts says of files whose modules differ.
            metadata["ss_network_dim"] = str(found.pop()) if len(found) == 1 else "Dynamic"
        if configured := {module: rank for module, rank in ranks.items() if has_settings(first, module)}:
            metadata[SETTINGS] = settings_for(first, configured)
    settings = asdict(options)
    split = settings.pop("split")
    return metadata | {
        "monosoup.version": version("mergekit-monosoup"),
        "monosoup.method": "monosoup (arXiv 2602.09689)",
        "monosoup.inputs": json.dumps([file.path.name for file in files]),
        "monosoup.options": json.dumps({"split": split.pop("name"), **split, **settings}),
    }
