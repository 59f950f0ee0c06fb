"""A recipe with the line numbers of its keys, and the check of its shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.planning.plain_yaml import load_yaml
from mergekit_monosoup.planning.problems import Problems, nearest, short

Path = tuple[str | int, ...]

# The keys of mergekit.config.MergeConfiguration and of the models inside it.
TOP_KEYS = frozenset(
    {
        "base_model",
        "chat_template",
        "dtype",
        "merge_method",
        "models",
        "modules",
        "out_dtype",
        "parameters",
        "slices",
        "tokenizer",
        "tokenizer_source",
    }
)
MODEL_KEYS = frozenset({"model", "parameters"})
SOURCE_KEYS = frozenset({"model", "layer_range", "parameters"})
SLICE_KEYS = frozenset({"sources", "base_model", "residual_weight", "parameters"})
MODULE_KEYS = frozenset({"slices", "models", "parameters"})
TOKENIZER_KEYS = frozenset({"source", "tokens", "pad_to_multiple_of"})
CONDITION_KEYS = frozenset({"filter", "value"})
DTYPES = frozenset({"bfloat16", "float16", "float32", "float64"})


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe; `lines` gives the line of each key and list entry by its path."""

    text: str
    data: dict[str, Any]
    lines: Mapping[Path, int]

    def line(self, *path: str | int) -> int | None:
        """Return the line of a path, or that of its nearest ancestor that has one."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


@dataclass(frozen=True)
class ModelUse:
    """A place where the recipe names a model."""

    path: Path
    name: Any
    parameters: Mapping[str, Any]


def read_recipe(text: str, problems: Problems) -> Recipe:
    """Parse a recipe and note keys that are given twice.

    Raises:
        ConfigurationError: not YAML, not a single mapping, or not meant to be read at all.
    """
    node, data = load_yaml(text)
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigurationError(
            "the recipe is not a mapping of keys such as merge_method: and models:; recipes with "
            "several documents are run by mergekit-multi"
        )
    lines: dict[Path, int] = {}
    for path, line in _marks(node, ()):
        if path in lines:
            problems.error(f"{short(path[-1])} is given twice; only the last one counts", line)
        lines[path] = line
    return Recipe(text, data, lines)


def _marks(node: yaml.Node, path: Path) -> Iterator[tuple[Path, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                below = (*path, str(key.value))
                yield below, key.start_mark.line + 1
                yield from _marks(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _marks(item, (*path, index))


def check_shape(recipe: Recipe, problems: Problems) -> None:
    """Note unknown keys and values of the wrong kind, from the top to the models' entries."""
    data = recipe.data
    _check_keys(recipe, data, (), TOP_KEYS, problems)
    if not isinstance(data.get("merge_method"), str):
        problems.error("the recipe names no method; add merge_method: monosoup", recipe.line("merge_method"))
    kinds = [key for key in ("models", "slices", "modules") if data.get(key)]
    if len(kinds) != 1:
        found = f"it has {' and '.join(kinds)}" if kinds else "it has none of them"
        second = recipe.line(kinds[1]) if len(kinds) > 1 else None
        problems.error(f"a recipe needs exactly one of models:, slices: and modules:; {found}", second)
    if data.get("tokenizer") and data.get("tokenizer_source"):
        problems.error("give either tokenizer: or tokenizer_source:, not both", recipe.line("tokenizer"))
    for key in ("dtype", "out_dtype"):
        value = data.get(key)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            problems.error(
                f"{key} is {short(value)}; it must be one of {', '.join(sorted(DTYPES))}", recipe.line(key)
            )
    if isinstance(data.get("tokenizer"), dict):
        _check_keys(recipe, data["tokenizer"], ("tokenizer",), TOKENIZER_KEYS, problems)
    _check_outputs(recipe, data, (), problems)
    if not isinstance(data.get("modules"), (dict, type(None))):
        problems.error("modules must be a mapping of module names", recipe.line("modules"))
    for name, module in _mapping(data.get("modules")).items():
        path = ("modules", name)
        if _check_keys(recipe, module, path, MODULE_KEYS, problems):
            _check_outputs(recipe, module, path, problems)


def _check_outputs(recipe: Recipe, owner: Mapping[str, Any], path: Path, problems: Problems) -> None:
    for index, entry in enumerate(_list(recipe, owner, (*path, "models"), problems)):
        _check_entry(recipe, entry, (*path, "models", index), MODEL_KEYS, problems)
    for index, output in enumerate(_list(recipe, owner, (*path, "slices"), problems)):
        below = (*path, "slices", index)
        if not _check_keys(recipe, output, below, SLICE_KEYS, problems):
            continue
        lengths = set()
        for number, source in enumerate(_list(recipe, output, (*below, "sources"), problems)):
            where = (*below, "sources", number)
            if _check_entry(recipe, source, where, SOURCE_KEYS, problems):
                bounds = source.get("layer_range")
                if not _is_range(bounds):
                    problems.error(
                        f"layer_range is {short(bounds)}; it must be two layer numbers [first, end) with "
                        "0 <= first < end",
                        recipe.line(*where, "layer_range"),
                    )
                else:
                    lengths.add(bounds[1] - bounds[0])
        if len(lengths) > 1:
            problems.error(
                "all sources of a slice need the same number of layers; these have "
                + " and ".join(map(str, sorted(lengths))),
                recipe.line(*below),
            )


def _check_entry(recipe: Recipe, entry: Any, path: Path, known: frozenset[str], problems: Problems) -> bool:
    if not _check_keys(recipe, entry, path, known, problems):
        return False
    if not isinstance(entry.get("model"), (str, dict)):
        problems.error("this entry names no model; add model: <folder or Hub id>", recipe.line(*path))
        return False
    return True


def _check_keys(recipe: Recipe, value: Any, path: Path, known: frozenset[str], problems: Problems) -> bool:
    place = ".".join(str(p) for p in path if isinstance(p, str)) or "the recipe"
    if not isinstance(value, dict):
        keys = ", ".join(sorted(known))
        problems.error(f"{place} holds {short(value)} where keys ({keys}) belong", recipe.line(*path))
        return False
    for key in value:
        if key not in known:
            # `name` is what mergekit-multi calls the documents of its recipes.
            hint = " (mergekit-multi knows it)" if not path and key == "name" else nearest(str(key), known)
            problems.error(f"unknown key {short(key)} in {place}{hint}", recipe.line(*path, str(key)))
    return True


def _list(recipe: Recipe, owner: Mapping[str, Any], path: Path, problems: Problems) -> list[Any]:
    value = owner.get(str(path[-1]))
    if value is None:
        return []
    if not isinstance(value, list):
        problems.error(f"{path[-1]} must be a list; begin each entry with '- '", recipe.line(*path))
        return []
    return value


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        and 0 <= value[0] < value[1]
    )


def model_uses(recipe: Recipe) -> Iterator[ModelUse]:
    """Yield every place that names a model, `base_model` first."""
    data = recipe.data
    if data.get("base_model") is not None:
        yield ModelUse(("base_model",), data["base_model"], {})
    owners: list[tuple[Path, Mapping[str, Any]]] = [((), data)]
    owners += [(("modules", name), _mapping(m)) for name, m in _mapping(data.get("modules")).items()]
    for path, owner in owners:
        yield from _entries(owner.get("models"), (*path, "models"))
        for index, output in enumerate(_items(owner.get("slices"))):
            below = (*path, "slices", index)
            if isinstance(output, dict):
                if output.get("base_model") is not None:
                    yield ModelUse((*below, "base_model"), output["base_model"], {})
                yield from _entries(output.get("sources"), (*below, "sources"))


def _entries(entries: Any, path: Path) -> Iterator[ModelUse]:
    for index, entry in enumerate(_items(entries)):
        if isinstance(entry, dict) and entry.get("model") is not None:
            yield ModelUse((*path, index, "model"), entry["model"], _mapping(entry.get("parameters")))


def parameter_blocks(recipe: Recipe) -> Iterator[tuple[Path, Any, bool]]:
    """Yield every `parameters:` block: its path, its value, and whether it belongs to one model."""
    owners: list[tuple[Path, Mapping[str, Any]]] = [((), recipe.data)]
    for name, module in _mapping(recipe.data.get("modules")).items():
        owners.append((("modules", name), _mapping(module)))
    for path, owner in owners:
        yield (*path, "parameters"), owner.get("parameters"), False
        for use in model_uses(Recipe(recipe.text, dict(owner), recipe.lines)):
            if use.path[-1] == "model" and "modules" not in use.path:
                entry = (*path, *use.path[:-1], "parameters")
                yield entry, _at(owner, (*use.path[:-1], "parameters")), True
        for index, output in enumerate(_items(owner.get("slices"))):
            if isinstance(output, dict):
                yield (*path, "slices", index, "parameters"), output.get("parameters"), False


def _at(value: Any, path: Path) -> Any:
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
    return value
