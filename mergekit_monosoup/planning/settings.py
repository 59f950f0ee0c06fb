"""Parameters of a recipe: their check, and their value for one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_monosoup.planning.catalogue import Method, Parameter
from mergekit_monosoup.planning.problems import Problems, nearest, short
from mergekit_monosoup.planning.recipe import CONDITION_KEYS, TOP_KEYS, Path, Recipe, parameter_blocks
from mergekit_monosoup.spectral.rule import SplitRule

# In recipes that people share, but of earlier releases of mergekit, or of another place in a recipe.
_SHARED = frozenset({"consensus_method", "embed_slerp", "majority_sign_method", "random_seed", *TOP_KEYS})
# Of methods that decide once for the whole model.
_ONE_VALUE = frozenset({"layers", "score", "threshold"})


def check_parameters(
    recipe: Recipe, method: Method, methods: Mapping[str, Method], problems: Problems
) -> None:
    """Note parameters that the method does not have, that it would not see, or of a wrong value.

    What another method knows is left over from another recipe and does no harm: mergekit ignores it. What
    nobody knows, or what looks like a slip, is an error for our methods.
    """
    given: set[str] = set()
    for path, block, of_model in parameter_blocks(recipe):
        if block is None:
            continue
        if not isinstance(block, dict):
            problems.error("parameters: must be a mapping of names to values", recipe.line(*path))
            continue
        for name, setting in block.items():
            where = (*path, str(name))
            parameter = method.parameters.get(str(name))
            if parameter is None:
                message = f"merge method {method.name!r} has no parameter {short(name)}"
                if name in _SHARED or any(name in other.parameters for other in methods.values()):
                    problems.warning(f"{message}, which is ignored", recipe.line(*where))
                elif method.ours:
                    problems.error(message + nearest(str(name), method.parameters), recipe.line(*where))
                else:
                    problems.warning(
                        f"{message}, which is ignored{nearest(str(name), method.parameters)}",
                        recipe.line(*where),
                    )
                continue
            given.add(parameter.name)
            if of_model and parameter.scope == "shared":
                message = (
                    f"parameter {name!r} belongs to the whole recipe; mergekit ignores it under a model: "
                    "move it to the top-level parameters:"
                )
                (problems.error if method.ours else problems.warning)(message, recipe.line(*where))
            _check_setting(recipe, where, parameter, setting, problems)
    _check_single_values(recipe, method, problems)
    for name, parameter in method.parameters.items():
        if parameter.required and name not in given:
            problems.error(
                f"merge method {method.name!r} needs the parameter {name!r}; add it under parameters:",
                recipe.line("merge_method"),
            )


def _check_single_values(recipe: Recipe, method: Method, problems: Problems) -> None:
    """Note what a method that decides once for the whole model would find to differ between its tensors."""
    if method.name != "sfgs":
        return
    scored: dict[str, bool] = {}
    for path, block, of_model in parameter_blocks(recipe):
        block = block if isinstance(block, dict) else {}
        for name in _ONE_VALUE & block.keys():
            if not _is_single(block[name]):
                problems.error(
                    f"parameter {name!r} is to be one value, without filter or gradient: the decision is "
                    "taken once for the whole model",
                    recipe.line(*path, name),
                )
        if of_model and "slices" not in path:
            model = recipe.data["models"][path[1]].get("model") if path[0] == "models" else None
            if model is not None and model != recipe.data.get("base_model"):
                scored[str(model)] = block.get("score") is not None
    if any(scored.values()) and not all(scored.values()):
        missing = ", ".join(model for model, known in scored.items() if not known)
        problems.error(
            f"parameter 'score' is missing for {missing}; give every fine-tuned model a score, or none and "
            "list them best first",
            recipe.line("models"),
        )


def _is_single(setting: Any) -> bool:
    values = setting if isinstance(setting, list) else [setting]
    plain = [item.get("value") if isinstance(item, dict) else item for item in values]
    everywhere = not isinstance(setting, (dict, list)) or any(
        not isinstance(item, dict) or item.get("filter") in (None, "*") for item in values
    )
    return everywhere and all(not isinstance(v, list) and v == plain[0] for v in plain)


def _check_setting(
    recipe: Recipe, path: Path, parameter: Parameter, setting: Any, problems: Problems
) -> None:
    """Check a scalar, a gradient, or a list of conditions."""
    if isinstance(setting, dict):
        _check_condition(recipe, path, parameter, setting, problems)
    elif isinstance(setting, list) and any(isinstance(item, dict) for item in setting):
        for index, item in enumerate(setting):
            where = (*path, index)
            if isinstance(item, dict):
                _check_condition(recipe, where, parameter, item, problems)
            else:
                problems.error(
                    f"parameter {parameter.name!r} mixes values with filters; write "
                    f"`- value: {short(item)}` for all other tensors",
                    recipe.line(*where),
                )
    elif isinstance(setting, list):
        if not setting:
            problems.error(f"parameter {parameter.name!r} is an empty list", recipe.line(*path))
        for index, item in enumerate(setting):
            _check_scalar(recipe, (*path, index), parameter, item, problems)
    else:
        _check_scalar(recipe, path, parameter, setting, problems)


def _check_condition(
    recipe: Recipe, path: Path, parameter: Parameter, condition: Mapping[str, Any], problems: Problems
) -> None:
    for key in condition:
        if key not in CONDITION_KEYS:
            problems.error(
                f"unknown key {short(key)} in parameter {parameter.name!r}"
                + nearest(str(key), CONDITION_KEYS),
                recipe.line(*path, str(key)),
            )
    if not isinstance(condition.get("filter"), (str, type(None))):
        problems.error(
            f"the filter {short(condition['filter'])} of parameter {parameter.name!r} is no text; write part "
            "of the names of tensors in quotation marks",
            recipe.line(*path, "filter"),
        )
    if "value" not in condition:
        problems.error(f"a condition of parameter {parameter.name!r} has no value:", recipe.line(*path))
        return
    value = condition["value"]
    if value == []:
        problems.error(f"parameter {parameter.name!r} is an empty list", recipe.line(*path, "value"))
    for item in value if isinstance(value, list) else [value]:
        _check_scalar(recipe, (*path, "value"), parameter, item, problems)


def _check_scalar(recipe: Recipe, path: Path, parameter: Parameter, value: Any, problems: Problems) -> None:
    if value is None:
        message = f"parameter {parameter.name!r} has no value; leave it out to use its default"
    elif not isinstance(value, (bool, int, float, str)):
        message = f"parameter {parameter.name!r} is {short(value)}; it must be {parameter.allowed}"
    else:
        message = parameter.refuse(value) or ""
    if message:
        problems.error(message, recipe.line(*path))


def check_filters(recipe: Recipe, tensors: Sequence[str], problems: Problems) -> None:
    """Warn of filters that no tensor's name contains: nothing would tell their writer."""
    for path, block, _ in parameter_blocks(recipe):
        for name, setting in (block if isinstance(block, dict) else {}).items():
            conditions = setting if isinstance(setting, list) else [setting]
            for index, condition in enumerate(conditions):
                text = condition.get("filter") if isinstance(condition, dict) else None
                if isinstance(text, str) and text != "*" and not any(text in t for t in tensors):
                    where = (*path, str(name), index) if isinstance(setting, list) else (*path, str(name))
                    problems.warning(
                        f"filter {short(text)} of parameter {name!r} matches no tensor of the output",
                        recipe.line(*where),
                    )


def value_for(setting: Any, tensor: str, t: float) -> Any:
    """Return a setting's value for one tensor, by mergekit's rules for filters and gradients.

    Args:
        setting: scalar, gradient, condition or list of conditions; already checked.
        tensor: its name.
        t: position along the gradients of its slice, 0 to 1.

    Returns:
        The value; None where no condition applies.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if any(isinstance(item, dict) for item in setting):
        for item in setting:
            text = item.get("filter")
            if text is None or text == "*" or str(text) in tensor:
                return value_for(item.get("value"), tensor, t)
        return None
    if any(isinstance(item, (bool, str)) for item in setting):
        return setting[int(t * (len(setting) - 1))]
    position = t * (len(setting) - 1)
    low = int(position)
    high = min(len(setting) - 1, low + 1)
    return (1 - (position - low)) * setting[low] + (position - low) * setting[high]


def resolve(name: str, sources: Sequence[Mapping[str, Any] | None], tensor: str, t: float) -> Any:
    """Return a parameter's value for one tensor from the blocks that apply to it, nearest first."""
    for block in sources:
        if isinstance(block, dict) and name in block:
            value = value_for(block[name], tensor, t)
            if value is not None:
                return value
    return None


def split_rule(
    method: Method, sources: Sequence[Mapping[str, Any] | None], tensor: str, t: float
) -> SplitRule:
    """Return the rule by which a method of ours splits one tensor's update.

    Raises:
        ParameterError: parameters that belong to different rules.
    """
    split, energy, scale, noise = (
        resolve(name, sources, tensor, t) for name in ("split", "energy", "threshold_scale", "noise")
    )
    if "split" not in method.parameters:
        split = "donoho_gavish"
    return SplitRule(
        split,
        energy if energy is None else float(energy),
        1.0 if scale is None else float(scale),
        noise or "median",
    )
