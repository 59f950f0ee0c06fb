"""From a recipe's blocks to output slices, and from those to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.naming import misfit, shared_names, weight_names
from mergekit_monosoup.errors import ConfigurationError, InputError
from mergekit_monosoup.planning.architecture import (
    Architecture,
    UnknownArchitectureError,
    architecture_name,
    inferred_architecture,
    json_architecture,
)
from mergekit_monosoup.planning.catalogue import Method
from mergekit_monosoup.planning.models import parse_reference
from mergekit_monosoup.planning.planned import OutputSlice, PlannedTensor, Source
from mergekit_monosoup.planning.problems import Problems, nearest, short
from mergekit_monosoup.planning.recipe import Recipe, model_uses
from mergekit_monosoup.planning.tensors import TensorPlanner


def plan_tensors(
    recipe: Recipe,
    method: Method,
    models: Mapping[str, Checkpoint],
    problems: Problems,
    *,
    allow_crimes: bool = False,
    truncate_embeddings: bool = False,
) -> list[PlannedTensor]:
    """Return the tensors of the output in mergekit's order; what stands in the way is noted.

    Args:
        recipe, method: what to do.
        models: the input checkpoints by name.
        problems: takes the findings.
        allow_crimes, truncate_embeddings: options of mergekit.
    """
    try:
        _check_kinds(recipe, models, allow_crimes, problems)
        if problems.errors:
            return []
        try:
            architecture = _architecture(recipe, models, problems)
            unknown = None
        except UnknownArchitectureError as error:
            architecture, unknown = None, str(error)
        planner = TensorPlanner(recipe, method, architecture, Problems(), truncate_embeddings)
        if architecture is not None:
            _plan_modules(recipe, models, architecture, planner, planner.problems)
            lost = {checkpoint.name: planner.lost(checkpoint) for checkpoint in models.values()}
            if not (planner.lacking or any(lost.values())):
                return _taken_over(planner, problems)
        # Recipes of slices and modules speak of the parts of mergekit's definition.
        by_name = not (allow_crimes or recipe.data.get("slices") or recipe.data.get("modules"))
        if architecture is not None:
            if by_name:
                unknown = misfit(planner.asked, list(models.values()), architecture.name)
            if unknown is None or shared_names(list(models.values())) is None:
                _report_lost(lost if unknown or not by_name else {}, problems)
                return _taken_over(planner, problems)
        named = TensorPlanner(recipe, method, architecture, problems, truncate_embeddings)
        return _plan_by_name(named, recipe, models, unknown, planner.vocabulary_axes)
    except (InputError, ConfigurationError) as error:
        problems.error(str(error))
        return []


def _taken_over(planner: TensorPlanner, problems: Problems) -> list[PlannedTensor]:
    problems.add(planner.problems)
    return planner.planned


def _report_lost(lost: Mapping[str, Sequence[str]], problems: Problems) -> None:
    """Warn of tensors that no task reads: mergekit drops them without a word."""
    for name, tensors in lost.items():
        if tensors:
            listed = ", ".join(tensors[:3]) + (", ..." if len(tensors) > 3 else "")
            count = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
            problems.warning(
                f"{count} of {name} will not be in the output ({listed}): neither "
                "mergekit's definition of the architecture nor the layers chosen have them"
            )


def _plan_by_name(
    planner: TensorPlanner,
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    reason: str | None,
    axes: Mapping[str, int | None],
) -> list[PlannedTensor]:
    """Plan the tensors that the headers name; `reason` says why not those of mergekit's definition."""
    problems = planner.problems
    names = shared_names(list(models.values()))
    if reason is not None:
        how = (
            "tensors are taken by their names in the files instead"
            if names is not None
            else "this plan goes by the names in the headers, and the merge may fail"
        )
        problems.warning(f"{reason}; {how}")
    for part, _ in _slices(recipe, recipe.data, (), models, None, problems):
        order = list(models.values())
        columns = [order.index(source.checkpoint) for source in part.sources]
        if names is None:
            every = dict.fromkeys(n for s in part.sources for n in weight_names(s.checkpoint))
            rows = [(name,) * len(columns) for name in every]
        else:
            rows = [tuple(row[column] for column in columns) for row in names]
        planner.plan_names(part, rows, axes)
    return planner.planned


def _check_kinds(
    recipe: Recipe, models: Mapping[str, Checkpoint], allow_crimes: bool, problems: Problems
) -> None:
    lines = {str(parse_reference(use.name)): recipe.line(*use.path) for use in model_uses(recipe)}
    kinds = {name: architecture_name(checkpoint) for name, checkpoint in models.items()}
    first = next(iter(models))
    for name, kind in kinds.items():
        if kind != kinds[first] and not allow_crimes:
            problems.error(
                f"{name} is a {kind} and {first} a {kinds[first]}; models of different architectures "
                "cannot be merged",
                lines.get(name),
            )


def _architecture(
    recipe: Recipe, models: Mapping[str, Checkpoint], problems: Problems
) -> Architecture | None:
    """Return the common architecture; None where only the names in the headers are known."""
    first = next(iter(models.values()))
    known = json_architecture(first)
    if known is not None:
        return known
    if all(checkpoint.folder is not None for checkpoint in models.values()):
        base = recipe.data.get("base_model")
        named = models.get(str(parse_reference(base))) if base is not None else None
        return inferred_architecture(list(models.values()), named)
    problems.warning(
        f"mergekit has no definition of {architecture_name(first)}; it will look at the weights after their "
        "download, and this plan goes by the names in the headers"
    )
    return None


def _plan_modules(
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    architecture: Architecture,
    planner: TensorPlanner,
    problems: Problems,
) -> None:
    modules = recipe.data.get("modules")
    if not modules:
        if recipe.data.get("slices") and len(architecture.modules) != 1:
            names = ", ".join(architecture.modules)
            problems.error(
                f"{architecture.name} has several modules ({names}); put slices: under modules:",
                recipe.line("slices"),
            )
            return
        for name in architecture.modules:
            parts = _slices(recipe, recipe.data, (), models, architecture.modules[name], problems)
            if not problems.errors:
                _check_depth(recipe, [part for part, _ in parts], problems)
            if not problems.errors:
                planner.plan_module(name, [part for part, _ in parts], None)
        return
    for name, definition in modules.items():
        if name not in architecture.modules:
            problems.error(
                f"{architecture.name} has no module {short(name)}{nearest(name, architecture.modules)}",
                recipe.line("modules", name),
            )
            continue
        path = ("modules", name)
        parts = _slices(recipe, definition, path, models, architecture.modules[name], problems)
        if not problems.errors:
            planner.plan_module(name, [part for part, _ in parts], definition.get("parameters"))


def _slices(
    recipe: Recipe,
    owner: Mapping[str, Any],
    path: tuple[str | int, ...],
    models: Mapping[str, Checkpoint],
    module: Any,
    problems: Problems,
) -> list[tuple[OutputSlice, int | None]]:
    """Return the output slices of a `models:` or `slices:` block, base included."""
    base_value = recipe.data.get("base_model")
    base = models.get(str(parse_reference(base_value))) if base_value is not None else None
    if owner.get("models"):
        line = recipe.line(*path, "models")
        sources = [
            _whole(models[str(parse_reference(entry["model"]))], entry.get("parameters"), module)
            for entry in owner["models"]
        ]
        if base is not None and all(source.checkpoint is not base for source in sources):
            sources.append(_whole(base, None, module))
        counts = {source.end for source in sources}
        if len(counts) > 1:
            listed = ", ".join(f"{source.checkpoint.name} {source.end}" for source in sources)
            problems.error(f"the models have different numbers of layers: {listed}", line)
        return [(OutputSlice(tuple(sources), base, None, line), line)]
    parts = []
    for index, output in enumerate(owner.get("slices") or []):
        line = recipe.line(*path, "slices", index)
        own = output.get("base_model")
        slice_base = models.get(str(parse_reference(own))) if own is not None else base
        sources = []
        beyond: dict[tuple[int, int], str] = {}
        for entry in output["sources"]:
            checkpoint = models[str(parse_reference(entry["model"]))]
            first, end = entry["layer_range"]
            layers = module.layers(checkpoint) if module is not None else end
            if end > layers:
                beyond.setdefault((end, layers), f"layer_range [{first}, {end}) of {checkpoint.name}")
            sources.append(Source(checkpoint, first, end, entry.get("parameters")))
        for (_, layers), text in beyond.items():
            problems.error(f"{text}, which has {layers} layers", line)
        if slice_base is not None and all(source.checkpoint is not slice_base for source in sources):
            problems.error(
                f"base_model {slice_base.name} is not among the sources of this slice; list it there with "
                "its layer_range",
                line,
            )
        parts.append((OutputSlice(tuple(sources), slice_base, output.get("parameters"), line), line))
    return parts


def _check_depth(recipe: Recipe, parts: Sequence[OutputSlice], problems: Problems) -> None:
    """Note a number of layers that transformers will not save: mergekit changes that number alone."""
    if not recipe.data.get("slices") or not parts:
        return
    source = parts[0].base or parts[0].sources[0].checkpoint
    types = source.config.get("layer_types")
    count = sum(part.sources[0].end - part.sources[0].first for part in parts)
    if isinstance(types, list) and len(types) != count:
        problems.error(
            f"the slices add up to {count} layers and config.json of {source.name} lists the types of "
            f"{len(types)} (layer_types); mergekit does not adapt that list, and transformers refuses to "
            f"save the result: choose slices of {len(types)} layers in all",
            recipe.line("slices"),
        )


def _whole(checkpoint: Checkpoint, parameters: Mapping[str, Any] | None, module: Any) -> Source:
    return Source(checkpoint, 0, module.layers(checkpoint) if module is not None else 0, parameters)
