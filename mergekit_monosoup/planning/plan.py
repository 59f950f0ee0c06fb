"""A plan: everything that can be known of a merge before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.lineage import can_check, check_base
from mergekit_monosoup.checkpoint.naming import with_common_names
from mergekit_monosoup.checkpoint.output import free_bytes, occupied, too_small
from mergekit_monosoup.errors import (
    AdapterError,
    ConfigurationError,
    InputError,
    UnsupportedAdapterError,
)
from mergekit_monosoup.planning.catalogue import Method, find_method
from mergekit_monosoup.planning.estimate import Estimate, calibrate, estimate
from mergekit_monosoup.planning.layout import in_order, plan_tensors
from mergekit_monosoup.planning.models import parse_reference, read_models
from mergekit_monosoup.planning.planned import PlannedTensor
from mergekit_monosoup.planning.problems import Problems, nearest
from mergekit_monosoup.planning.recipe import Recipe, check_shape, model_uses, read_recipe
from mergekit_monosoup.planning.settings import check_filters, check_parameters

DEFAULT_SHARD_BYTES = 5e9


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says beside the recipe."""

    out: Path | None = None
    overwrite: bool = False
    allow_crimes: bool = False
    truncate_embeddings: bool = False
    shard_bytes: float = DEFAULT_SHARD_BYTES
    costs: bool = True
    """Whether to calibrate and estimate."""


@dataclass(frozen=True)
class Plan:
    """What the merge will do, what stands in its way, and what it costs."""

    problems: Problems
    method: Method | None
    models: Mapping[str, Checkpoint]
    tensors: Sequence[PlannedTensor]
    estimate: Estimate | None
    free_bytes: float
    base_messages: Sequence[str]
    """What the sampled values say against the base; empty where nothing does."""

    @property
    def output_bytes(self) -> float:
        """Size of the output's weights."""
        return sum(tensor.write_bytes for tensor in self.tensors)


def make_plan(text: str, options: PlanOptions | None = None) -> Plan:
    """Plan a recipe.

    Args:
        text: the recipe's YAML.
        options: of the command line.

    Raises:
        ConfigurationError: the recipe is not a YAML mapping.
    """
    options = options or PlanOptions()
    problems = Problems()
    recipe = read_recipe(text, problems)
    check_shape(recipe, problems)
    method = _method(recipe, problems)
    if method is not None:
        check_parameters(recipe, method, problems)
    models: dict[str, Checkpoint] = {}
    tensors: list[PlannedTensor] = []
    messages: list[str] = []
    # Without a sound recipe, further findings would only be its echoes.
    if not problems.errors and method is not None:
        models = read_models(recipe, problems)
        _check_inputs(recipe, method, problems)
        if not problems.errors:
            models = _with_common_names(recipe, models, options, problems)
        if not problems.errors:
            tensors = plan_tensors(
                recipe,
                method,
                models,
                problems,
                allow_crimes=options.allow_crimes,
                truncate_embeddings=options.truncate_embeddings,
            )
            check_filters(recipe, [tensor.tensor for tensor in tensors], problems)
            messages = _check_bases(recipe, models, method)
    _check_adapters(models, problems)
    where = options.out or Path.cwd()
    free = free_bytes(where)
    if options.out is not None:
        needed = sum(tensor.write_bytes for tensor in tensors)
        for message in (
            occupied(options.out, overwrite=options.overwrite),
            too_small(options.out, needed),
        ):
            if message is not None:
                problems.error(message)
    cost = estimate(tensors, options.shard_bytes, calibrate()) if tensors and options.costs else None
    return Plan(problems, method, models, tensors, cost, free, messages)


def _method(recipe: Recipe, problems: Problems) -> Method | None:
    name = recipe.data.get("merge_method")
    if not isinstance(name, str):
        return None
    method, known = find_method(name)
    if method is None:
        problems.error(f"unknown merge method {name!r}{nearest(name, known)}", recipe.line("merge_method"))
    return method


def _check_inputs(recipe: Recipe, method: Method, problems: Problems) -> None:
    """Check base and number of inputs against what the method asks for."""
    data = recipe.data
    line = recipe.line("merge_method")
    named = [str(parse_reference(use.name)) for use in model_uses(recipe) if _readable(use.name)]
    base = data.get("base_model")
    sliced = bool(data.get("slices") or data.get("modules"))
    if method.base == "required" and base is None and not sliced:
        problems.error(
            f"merge method {method.name!r} needs the checkpoint that the fine-tuning started from; add it "
            "as `base_model:`",
            line,
        )
        return
    if sliced:
        return
    listed = [str(parse_reference(entry["model"])) for entry in data.get("models") or []]
    doubled = {name for name in listed if listed.count(name) > 1}
    for name in sorted(doubled):
        index = len(listed) - 1 - listed[::-1].index(name)
        problems.error(f"model {name} is listed twice", recipe.line("models", index))
    base_name = str(parse_reference(base)) if base is not None and method.base != "ignored" else None
    distinct = set(named) if method.base != "ignored" else set(listed)
    others = distinct - {base_name}
    if method.base == "required" and not others:
        problems.error(
            f"merge method {method.name!r} needs at least one fine-tuned checkpoint besides base_model; "
            "add it under `models:`",
            recipe.line("models"),
        )
    for what, count, low, high in (
        ("models", len(distinct), method.min_inputs, method.max_inputs),
        ("models besides the base", len(others), method.min_non_base, method.max_non_base),
    ):
        if low is not None and count < low and others:
            problems.error(f"merge method {method.name!r} needs at least {low} {what}; it has {count}", line)
        if high is not None and count > high:
            problems.error(f"merge method {method.name!r} takes at most {high} {what}; it has {count}", line)


def _with_common_names(
    recipe: Recipe, models: Mapping[str, Checkpoint], options: PlanOptions, problems: Problems
) -> dict[str, Checkpoint]:
    if options.allow_crimes:
        return dict(models)
    ordered = in_order(recipe, models)
    value = recipe.data.get("base_model")
    base = models[str(parse_reference(value))] if value is not None else None
    try:
        renamed, notes = with_common_names(ordered, base)
    except InputError as error:
        problems.error(str(error))
        return dict(models)
    for note in notes:
        problems.warning(note)
    by_name = {model.checkpoint.name: model.checkpoint for model in renamed}
    return {name: by_name[name] for name in models}


def _readable(value: Any) -> bool:
    try:
        parse_reference(value)
    except ConfigurationError:
        return False
    return True


def _check_bases(recipe: Recipe, models: Mapping[str, Checkpoint], method: Method) -> list[str]:
    value = recipe.data.get("base_model")
    if value is None or method.base != "required":
        return []
    base = models[str(parse_reference(value))]
    messages = []
    for checkpoint in models.values():
        if checkpoint is not base and can_check([base, checkpoint]):
            message = check_base(base, checkpoint)
            if message is not None:
                messages.append(message)
    return messages


def _check_adapters(models: Mapping[str, Checkpoint], problems: Problems) -> None:
    """Warn of local adapters that are not read beside their base but merged by peft first."""
    for name, checkpoint in models.items():
        folder = Path(checkpoint.adapter or "")
        if checkpoint.adapter is None or not folder.is_dir():
            continue
        # Not before an adapter is met: it brings peft.
        from mergekit_monosoup.lora.adapter import read_config
        from mergekit_monosoup.lora.variants import refuse_nonlinear

        try:
            refuse_nonlinear(read_config(str(folder), folder), str(folder))
        except UnsupportedAdapterError:
            problems.warning(
                f"the adapter of {name} is not linear LoRA: peft merges it into a copy of the whole base, "
                "which is removed in the end"
            )
        except AdapterError as error:
            problems.error(str(error))
