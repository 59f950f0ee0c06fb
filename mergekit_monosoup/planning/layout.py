"""From a recipe's blocks to output slices, and from those to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from mergekit_monosoup.checkpoint.classes import architecture_name, are_kin, class_name
from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.layout import Layout, Weight, common_layout, vocabulary_axis
from mergekit_monosoup.checkpoint.naming import weight_names
from mergekit_monosoup.errors import ConfigurationError, InputError
from mergekit_monosoup.planning.architecture import (
    Architecture,
    UnknownArchitectureError,
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
        _check_kinds(recipe, models, allow_crimes, method.ours, problems)
        if problems.errors:
            return []
        base = base_of(recipe, models)
        ordered = in_order(recipe, models)
        # Recipes of slices and modules speak of the parts of mergekit's definition.
        by_name = not (allow_crimes or recipe.data.get("slices") or recipe.data.get("modules"))
        planner = TensorPlanner(recipe, method, None, Problems(), truncate_embeddings, ordered)
        unknown, lost = None, {}
        if allow_crimes or len({class_name(model) for model in ordered}) == 1:
            try:
                planner.architecture = architecture = _architecture(recipe, models, problems)
            except UnknownArchitectureError as error:
                unknown = str(error)
            else:
                if architecture is not None:
                    _plan_modules(recipe, models, architecture, planner, planner.problems)
                    lost = {checkpoint.name: planner.lost(checkpoint) for checkpoint in ordered}
                    if not (planner.lacking or planner.some_lack or any(lost.values())):
                        return _taken_over(planner, problems)
                    unknown = _misfit(planner, ordered, architecture.name) if by_name else None
                    if by_name and unknown is None:
                        return _taken_over(planner, problems)
        elif not by_name:
            raise InputError("checkpoints of different classes cannot be merged by slices or modules")
        layout = None
        if by_name and all(model.shapes_known for model in ordered):
            axes = planner.vocabulary_axes
            layout = common_layout(ordered, base, axes, strict=not method.ours)
        if planner.architecture is not None and layout is None:
            _report_lost(lost, problems)
            return _taken_over(planner, problems)
        named = TensorPlanner(recipe, method, None, problems, truncate_embeddings, ordered)
        return _plan_by_name(named, recipe, models, unknown, layout)
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


def _misfit(planner: TensorPlanner, models: Sequence[Checkpoint], label: str) -> str | None:
    # Slow to import, and only checkpoints that do not fit lead here.
    from mergekit_monosoup.checkpoint.coverage import misfit

    found = misfit(cast("Any", planner.asked), models, label)
    return found[0] if found is not None else None


def _plan_by_name(
    planner: TensorPlanner,
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    reason: str | None,
    layout: Layout | None,
) -> list[PlannedTensor]:
    """Plan the tensors that the headers name; `reason` says why not those of mergekit's definition."""
    problems = planner.problems
    for note in layout.notes if layout is not None else ():
        problems.warning(note)
    if reason is not None and not (layout is not None and layout.notes):
        how = (
            "tensors are taken by their names in the files instead"
            if layout is not None
            else "this plan goes by the names in the headers, and the merge may fail"
        )
        problems.warning(f"{reason}; {how}")
    if layout is not None:
        weights = layout.weights
    else:
        every = dict.fromkeys(name for model in models.values() for name in weight_names(model))
        weights = tuple(Weight(name, vocabulary_axis(name), optional=True) for name in every)
    for part, _ in _slices(recipe, recipe.data, (), models, None, problems):
        planner.plan_names(part, weights)
    return planner.planned


def base_of(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Checkpoint | None:
    """Return the base of a recipe, None where it names none."""
    value = recipe.data.get("base_model")
    return models.get(str(parse_reference(value))) if value is not None else None


def in_order(recipe: Recipe, models: Mapping[str, Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints of a recipe, the fine-tuned ones as they are listed and the base last."""
    base = base_of(recipe, models)
    listed = dict.fromkeys(str(parse_reference(use.name)) for use in model_uses(recipe))
    ordered = [models[name] for name in listed if models[name] is not base]
    return ordered if base is None else [*ordered, base]


def _check_kinds(
    recipe: Recipe, models: Mapping[str, Checkpoint], allow_crimes: bool, ours: bool, problems: Problems
) -> None:
    lines = {str(parse_reference(use.name)): recipe.line(*use.path) for use in model_uses(recipe)}
    kinds = {name: architecture_name(checkpoint) for name, checkpoint in models.items()}
    first = next(iter(models))
    for name, kind in kinds.items():
        # Heads may differ where the base tells which tensors are new.
        if not allow_crimes and kind != kinds[first] and not (ours and are_kin(models[name], models[first])):
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
    if any(checkpoint.renamed for checkpoint in models.values()):
        # mergekit would infer from the names in the files.
        return None
    if all(checkpoint.folder is not None for checkpoint in models.values()):
        return inferred_architecture(list(models.values()), base_of(recipe, models))
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
    base = base_of(recipe, models)
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


def _whole(checkpoint: Checkpoint, parameters: Mapping[str, Any] | None, module: Any) -> Source:
    return Source(checkpoint, 0, module.layers(checkpoint) if module is not None else 0, parameters)
