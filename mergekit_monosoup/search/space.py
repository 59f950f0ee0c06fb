"""What is searched: parameters, their ranges, and the recipe that values of them make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_monosoup.errors import ConfigurationError

Values = dict[str, Any]
Recipe = dict[str, Any]
By = Literal["depth", "module", "layer-group", "fisher"]

PLAIN = "plain"
# What a split by its name is in a recipe. `plain` is Wise-FT: nothing is split.
_SPLITS: dict[str, dict[str, Any]] = {
    "effective_rank": {},
    "energy 0.5": {"energy": 0.5},
    "energy 0.8": {"energy": 0.8},
    "energy 0.95": {"energy": 0.95},
    "donoho_gavish": {"split": "donoho_gavish"},
    PLAIN: {"edit": False},
}
_MIXINGS = ("monosoup", "alignment", "decay", "uniform", "high")
_SCALES = (0.5, 1.0, 2.0)
# Words in the names of tensors, in the spelling of various architectures.
_MODULES = {
    "attention": ("self_attn", "attention", "attn"),
    "mlp": ("mlp", "feed_forward", "ffn", "intermediate", "experts"),
    "embeddings": ("embed", "wte", "lm_head"),
}
GROUPS = 4


@dataclass(frozen=True)
class Range:
    """The values of one parameter: choices, or numbers from `low` to `high`, by powers where `log`."""

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False


@dataclass(frozen=True)
class Space:
    """Parameters to search, and what a recipe becomes by values of them.

    Args:
        ranges: by name.
        apply: returns the recipe with the values in it, as a new one.
        first: values to try before any other, in order.
        plain: the values at which a candidate is Wise-FT with a factor; absent: none are.
        factor: the factor of values that are Wise-FT, None for others.
    """

    ranges: Mapping[str, Range]
    apply: Callable[[Recipe, Values], Recipe]
    first: tuple[Values, ...] = ()
    plain: Callable[[float], Values] | None = None
    factor: Callable[[Values], float | None] = lambda _: None


def default_space(
    recipe: Recipe, by: By | None = None, tensors: Sequence[str] = (), guess: Sequence[float] = ()
) -> Space:
    """Return the space of a method that edits one update: strength, split and mixing.

    Args:
        recipe: the user's.
        by: what else the strength depends on: `depth` (a line from the first layer to the last), `module`
            (factors of attention, MLP and embeddings), `layer-group` (four factors along the depth) or
            `fisher` (these, with one more point to begin with).
        tensors: names in the checkpoints, for `module`.
        guess: the factors of that point.

    Raises:
        ConfigurationError: nothing is known of the method's parameters.
    """
    method = str(recipe.get("merge_method"))
    ranges = {"alpha": Range(low=0.0, high=1.2)}
    first: list[Values]
    if method == "monosoup":
        ranges |= {"split": Range(tuple(_SPLITS)), "mixing": Range(_MIXINGS)}
        points = [("effective_rank", 1.0), ("energy 0.8", 1.0), ("effective_rank", 0.7), (PLAIN, 0.6)]
        points += [("energy 0.8", 0.7), ("effective_rank", 0.5)]
        first = [{"alpha": alpha, "split": split, "mixing": "monosoup"} for split, alpha in points]
    elif method == "dg_hard":
        ranges |= {"split": Range((*(f"threshold {scale:g}" for scale in _SCALES), PLAIN))}
        points = [("threshold 1", 1.0), ("threshold 1", 0.7), (PLAIN, 0.6), ("threshold 1", 0.5)]
        first = [{"alpha": alpha, "split": split} for split, alpha in points]
    else:
        raise ConfigurationError(
            f"nothing is known of what to search for merge method {method!r}; describe it in a file and "
            "pass it by --space"
        )
    factors = _factors(by, tensors)
    ranges |= {name: Range(low=0.0, high=1.5) for name in factors}
    first = [values | dict.fromkeys(factors, 1.0) for values in first]
    if guess:
        first.insert(1, first[0] | dict(zip(factors, guess, strict=True)))

    def apply(whole: Recipe, values: Values) -> Recipe:
        result = copy.deepcopy(whole)
        parameters = dict(result.get("parameters") or {})
        split = str(values["split"])
        rest = {"energy", "split", "threshold_scale", "mixing", "alpha"}
        parameters = {name: value for name, value in parameters.items() if name not in rest}
        parameters["alpha"] = _strength(by, factors, values)
        if method == "dg_hard":
            _, _, scale = split.partition(" ")
            parameters |= {"edit": False} if split == PLAIN else {"threshold_scale": float(scale)}
        else:
            parameters |= _SPLITS[split]
            if split != PLAIN:
                parameters["mixing"] = values["mixing"]
        result["parameters"] = parameters
        return result

    def plain(factor: float) -> Values:
        values = {"alpha": factor, "split": PLAIN, **dict.fromkeys(factors, 1.0)}
        return values | ({"mixing": "monosoup"} if method == "monosoup" else {})

    def factor(values: Values) -> float | None:
        even = all(values[name] == 1 for name in factors)
        return float(values["alpha"]) if values["split"] == PLAIN and even else None

    return Space(ranges, apply, tuple(first), plain, factor)


def _factors(by: By | None, tensors: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the names of further factors, for `module` with the words that their tensors' names hold."""
    if by == "depth":
        return {"first layer": (), "last layer": ()}
    if by in ("layer-group", "fisher"):
        return {f"layers {i + 1} of {GROUPS}": () for i in range(GROUPS)}
    if by == "module":
        found = {
            name: tuple(word for word in words if any(word in tensor for tensor in tensors))
            for name, words in _MODULES.items()
        }
        return {name: words for name, words in found.items() if words}
    return {}


def _strength(by: By | None, factors: Mapping[str, tuple[str, ...]], values: Values) -> Any:
    alpha = float(values["alpha"])
    if by is None or all(values[name] == 1 for name in factors):
        return alpha
    if by == "module":
        filters = [
            {"filter": word, "value": alpha * values[name]}
            for name, words in factors.items()
            for word in words
        ]
        return [*filters, {"value": alpha}]
    return [alpha * values[name] for name in factors]


def space_of_file(content: Any, recipe: Recipe) -> Space:
    """Return the space that a file describes.

    `parameters:` maps parameters of the recipe to ranges, `models:` maps models of it to such mappings. A
    range is a list of choices, or a mapping with `low` and `high`, and `log: true` or `integer: true`.

    Args:
        content: of the file, as YAML reads it.
        recipe: the user's.

    Raises:
        ConfigurationError: the content is of another form, or names a model that the recipe does not.
    """
    if not isinstance(content, dict) or not content or set(content) - {"parameters", "models"}:
        raise ConfigurationError("--space: the file is a mapping with `parameters:`, `models:` or both")
    listed = [str(entry.get("model")) for entry in recipe.get("models") or []]
    owners: dict[str, tuple[str | None, str]] = {}
    ranges: dict[str, Range] = {}
    for name, entry in _mapping(content.get("parameters"), "parameters").items():
        ranges[str(name)], owners[str(name)] = _range(str(name), entry), (None, str(name))
    for model, block in _mapping(content.get("models"), "models").items():
        if str(model) not in listed:
            raise ConfigurationError(
                f"--space: the recipe lists no model {model!r}; it lists {', '.join(listed)}"
            )
        for name, entry in _mapping(block, str(model)).items():
            label = f"{name} of {model}"
            ranges[label], owners[label] = _range(label, entry), (str(model), str(name))
    if not ranges:
        raise ConfigurationError("--space: the file names no parameter to search")

    def apply(whole: Recipe, values: Values) -> Recipe:
        result = copy.deepcopy(whole)
        for label, value in values.items():
            model, name = owners[label]
            blocks = [result] if model is None else [e for e in result["models"] if str(e["model"]) == model]
            for block in blocks:
                block["parameters"] = {**(block.get("parameters") or {}), name: value}
        return result

    return Space(ranges, apply)


def _mapping(value: Any, name: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigurationError(f"--space: {name}: must be a mapping of names to ranges")
    return value


def _range(name: str, entry: Any) -> Range:
    if isinstance(entry, list) and entry and all(isinstance(e, (bool, int, float, str)) for e in entry):
        return Range(tuple(entry))
    known = {"low", "high", "log", "integer"}
    numbers = isinstance(entry, dict) and {"low", "high"} <= entry.keys() <= known
    if not numbers or not all(isinstance(entry[k], (int, float)) for k in ("low", "high")):
        raise ConfigurationError(
            f"--space: {name}: write a list of choices, or {{low: 0.1, high: 0.9}} with `log: true` or "
            "`integer: true` where wanted"
        )
    low, high, log = float(entry["low"]), float(entry["high"]), bool(entry.get("log", False))
    if not low < high or (log and low <= 0):
        raise ConfigurationError(f"--space: {name}: low must be below high, and above 0 for `log: true`")
    return Range(low=low, high=high, log=log, integer=bool(entry.get("integer", False)))
