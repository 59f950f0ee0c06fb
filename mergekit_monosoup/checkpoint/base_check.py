"""Refuse a merge whose base is none, from the values that mergekit has at hand before it begins."""

from __future__ import annotations

from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from mergekit_monosoup.checkpoint.headers import read_folder
from mergekit_monosoup.checkpoint.lineage import Relation, unrelated
from mergekit_monosoup.checkpoint.values import check_base
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.methods.reporting import relation_of

_SAMPLED_TENSORS = 9


def check_bases(config: MergeConfiguration) -> None:
    """Look at sampled values of all checkpoints of a recipe, which mergekit has at hand by now.

    Raises:
        InputError: the base may not be the base.
    """
    base = config.base_model
    if base is None:
        return
    for model in config.referenced_models():
        message = None if model == base else _base_message(base, model)
        if message is not None:
            raise InputError(f"{message}, or pass --force-base to merge all the same")


def _base_message(base: ModelReference, model: ModelReference) -> str | None:
    """Sample the files that mergekit has at hand by now; whole tensors only where they are pickled."""
    loaders = [LoaderCache().get(reference) for reference in (base, model)]
    if all(loader.index.is_safetensors for loader in loaders):
        folders = [Path(loader.index.base_path) for loader in loaders]
        one, two = (
            read_folder(str(reference), folder)
            for reference, folder in zip((base, model), folders, strict=True)
        )
        return check_base(one, two)
    names = [name for name in loaders[0].index.tensor_paths if name in loaders[1].index.tensor_paths]
    relations: list[Relation] = []
    step = max(1, len(names) // (4 * _SAMPLED_TENSORS))
    for name in names[step // 2 :: step]:
        w0, w1 = (loader.get_tensor(name) for loader in loaders)
        found = relation_of(name, w0, w1) if w0.ndim > 1 and w0.is_floating_point() else None
        if found is not None:
            relations.append(found)
        if len(relations) == _SAMPLED_TENSORS:
            break
    return unrelated(str(base), str(model), relations)
