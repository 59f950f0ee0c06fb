"""Modules with weights of their own in sub-folders (sentence-transformers), as the merge will treat them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_monosoup.checkpoint.companions import weight_folders, weights_in
from mergekit_monosoup.checkpoint.headers import Checkpoint, StoredTensor, bytes_per_entry, header_of
from mergekit_monosoup.checkpoint.layout import Weight
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.planning.catalogue import Method
from mergekit_monosoup.planning.layout import base_of, in_order
from mergekit_monosoup.planning.planned import OutputSlice, PlannedTensor, Source
from mergekit_monosoup.planning.problems import Problems
from mergekit_monosoup.planning.recipe import Recipe
from mergekit_monosoup.planning.tensors import TensorPlanner


def plan_modules(
    recipe: Recipe, method: Method, models: Mapping[str, Checkpoint], problems: Problems
) -> list[PlannedTensor]:
    """Return the tensors of the modules of the first fine-tuned model, named `2_Dense/linear.weight`.

    Args:
        recipe, method: what to do.
        models: the input checkpoints by name.
        problems: takes modules that cannot be read.
    """
    ordered = in_order(recipe, models)
    folder = ordered[0].beside
    planned: list[PlannedTensor] = []
    for module in weight_folders(folder) if folder is not None else ():
        try:
            held = [found for model in ordered if (found := _module_of(model, module)) is not None]
        except InputError as error:
            problems.error(str(error))
            continue
        found_here = _plan_module(module, held, recipe, method, models, problems)
        # As the report names them; filters see a point in the place of the stroke.
        planned += [replace(t, tensor=f"{module}/{t.tensor[len(module) + 1 :]}") for t in found_here]
    return planned


def _module_of(model: Checkpoint, module: str) -> Checkpoint | None:
    """Return the weights of a module as a checkpoint of their own, None where the model has none."""
    file = weights_in(model.beside / module) if model.beside is not None else None
    if file is None:
        return None
    tensors = {f"{module}.{key}": replace(t, name=f"{module}.{key}") for key, t in header_of(file).items()}
    return Checkpoint(model.name, model.config, tensors, file.parent)


def _plan_module(
    module: str,
    held: Sequence[Checkpoint],
    recipe: Recipe,
    method: Method,
    models: Mapping[str, Checkpoint],
    problems: Problems,
) -> list[PlannedTensor]:
    base_model = base_of(recipe, models)
    base = next((one for one in held if base_model is not None and one.name == base_model.name), None)
    own = held[0].tensors
    if method.ours and base is None:
        problems.warning(f"module {module} keeps the weights of {held[0].name}: the base does not have it")
        return [_kept(t, "the base does not have it", recipe) for t in own.values()]
    shared = {
        n for n, t in own.items() if all(n in o.tensors and o.tensors[n].shape == t.shape for o in held)
    }
    sources = tuple(Source(one, 0, 0, None) for one in held)
    planner = TensorPlanner(recipe, method, None, problems, models=held)
    planner.plan_names(
        OutputSlice(sources, base, None, None), [Weight(name) for name in own if name in shared]
    )
    planned = {tensor.tensor: tensor for tensor in planner.planned}
    return [
        planned.get(name) or _kept(tensor, "another model lacks it in this shape", recipe)
        for name, tensor in own.items()
    ]


def _kept(tensor: StoredTensor, why: str, recipe: Recipe) -> PlannedTensor:
    wanted = recipe.data.get("out_dtype") or recipe.data.get("dtype")
    dtype = str(wanted).removeprefix("torch.") if wanted and tensor.is_floating else tensor.dtype
    size = tensor.size * bytes_per_entry(tensor.dtype)
    return PlannedTensor(
        tensor.name, "kept", tensor.shape, dtype, "", why, read_bytes=size, inputs=1,
        write_bytes=tensor.size * bytes_per_entry(dtype),
    )  # fmt: skip
