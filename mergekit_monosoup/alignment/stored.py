"""The geometry of whole checkpoints, read tensor by tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mergekit_monosoup.alignment.inner import inner_products
from mergekit_monosoup.alignment.selection import Layers
from mergekit_monosoup.errors import MissingTensorError, NonFiniteError

if TYPE_CHECKING:
    from mergekit.common import ModelReference

# A checkpoint: the names of its tensors, and a function that loads one.
Stored = tuple[Sequence[str], Callable[[str], Tensor]]
Refine = Callable[[str, list[Tensor]], list[Tensor]]


class Loader(Protocol):
    """What is used of mergekit's `LazyTensorLoader`."""

    index: Any

    def get_tensor(self, key: str) -> Tensor:
        """Return one tensor."""


@dataclass
class Alignment:
    """The inner products of the updates, tensor by tensor.

    `products` and `cosines` are float64 `[tensors, N, N]` in the order of `names`; see
    `InnerProducts`. `skipped` counts the base's tensors that were left out, by reason.
    """

    names: tuple[str, ...]
    products: Tensor
    cosines: Tensor
    skipped: Counter[str] = field(default_factory=Counter)


def loader_for(model: ModelReference) -> Loader:
    """Return the loader that mergekit itself reads this checkpoint with.

    `mergekit-pytorch` names files and has a cache of its own; everything else names folders or
    repositories. Both caches are filled before the first tensor is merged, so that a worker thread
    finds the loader there: the options of `LoaderCache` are known to the main thread only.
    """
    # Imported here: it brings transformers, which a mere registration must not.
    from mergekit.io.tasks import LoaderCache

    path = model.model.path
    if os.path.isfile(path):
        from mergekit_monosoup.host import raw_loader

        raw: Loader = raw_loader(path)
        return raw
    loader: Loader = LoaderCache().get(model)
    return loader


def align_loaders(
    base: Loader,
    finetuned: Sequence[Loader],
    layers: Layers,
    device: str | torch.device = "cpu",
    refine: Refine | None = None,
    names: Sequence[str] | None = None,
) -> Alignment:
    """Read base and fine-tuned checkpoints once, side by side, and return their alignment.

    A tensor counts if every checkpoint stores it under the base's name, in the base's shape, as
    floating-point numbers; of these, `matrices` keeps the ones with two or more axes. At no time is
    more than one tensor of each checkpoint in memory.

    With `names`, only these of the base's tensors are looked at, and there may be none that counts; `joined`
    puts such parts together.

    Raises:
        MissingTensorError: the checkpoints have no such tensor in common.
        NonFiniteError: an update holds NaN or infinity.
    """

    def load(loader: Loader) -> Callable[[str], Tensor]:
        # By way of the CPU: the loader opens a shard for a device, and mergekit reads on from there.
        return lambda name: loader.get_tensor(name).to(device)

    # Shard by shard: going back and forth would open the files again and again.
    paths = base.index.tensor_paths
    ordered = sorted(paths if names is None else names, key=lambda name: (paths[name], name))
    checkpoints = [(loader.index.tensor_paths, load(loader)) for loader in finetuned]
    part = _aligned((ordered, load(base)), checkpoints, layers, refine)
    return part if names is not None else _found(part, layers)


def align(
    base: Stored, finetuned: Sequence[Stored], layers: Layers, refine: Refine | None = None
) -> Alignment:
    """Return the alignment of checkpoints that are given by their names and a way to load them.

    Args:
        base, finetuned: the checkpoints.
        layers: which tensors count.
        refine: given a name and its tensors, base first, returns better ones to compare.

    Raises:
        MissingTensorError, NonFiniteError: as `align_loaders`.
    """
    return _found(_aligned(base, finetuned, layers, refine), layers)


def joined(parts: Sequence[Alignment], layers: Layers = "matrices") -> Alignment:
    """Return the alignment of checkpoints from those of parts of their tensors, in the order of their names.

    Raises:
        MissingTensorError: as `align_loaders`.
    """
    skipped = sum((part.skipped for part in parts), Counter())
    held = [part for part in parts if part.names]
    names = [name for part in held for name in part.names]
    order = sorted(range(len(names)), key=names.__getitem__)
    none = torch.empty(0, device="cpu")
    products = torch.cat([part.products for part in held])[order] if held else none
    cosines = torch.cat([part.cosines for part in held])[order] if held else none
    return _found(Alignment(tuple(names[i] for i in order), products, cosines, skipped), layers)


def _aligned(base: Stored, finetuned: Sequence[Stored], layers: Layers, refine: Refine | None) -> Alignment:
    skipped: Counter[str] = Counter()
    names, products, cosines = [], [], []
    for name, tensors in _comparable(base, finetuned, layers, skipped):
        if refine is not None:
            tensors = refine(name, tensors)
        try:
            found = inner_products(tensors[0], tensors[1:])
        except NonFiniteError as error:
            raise NonFiniteError(f"tensor {name}: {error}") from error
        names.append(name)
        products.append(found.values)
        cosines.append(found.cosines)
    none = torch.empty(0, device="cpu")
    return Alignment(
        tuple(names),
        torch.cat(products) if products else none,
        torch.cat(cosines) if cosines else none,
        skipped,
    )


def _found(alignment: Alignment, layers: Layers) -> Alignment:
    if not alignment.names:
        raise MissingTensorError(
            "base and fine-tuned checkpoints store no tensor of the same name and shape "
            f"{'with two or more axes ' if layers == 'matrices' else ''}that could be compared "
            f"({_counted(alignment.skipped)}); store them in the same layout, check that they share a base, "
            "or set `layers: all` where there are only vectors"
        )
    return alignment


def _comparable(
    base: Stored, finetuned: Sequence[Stored], layers: Layers, skipped: Counter[str]
) -> Iterator[tuple[str, list[Tensor]]]:
    names, load = base
    for name in names:
        if not all(name in others for others, _ in finetuned):
            skipped["not in every checkpoint"] += 1
            continue
        tensors = [load(name)]
        if layers == "matrices" and tensors[0].ndim < 2:
            continue
        tensors += [load_other(name) for _, load_other in finetuned]
        if any(tensor.shape != tensors[0].shape for tensor in tensors):
            skipped["of different shapes"] += 1
        elif not all(tensor.is_floating_point() for tensor in tensors):
            skipped["not floating-point"] += 1
        else:
            yield name, tensors


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none of any kind"
