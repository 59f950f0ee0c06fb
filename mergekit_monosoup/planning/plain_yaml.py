"""Read YAML that somebody else wrote: plain data of a bounded size, or a sentence on what is wrong."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import yaml

from mergekit_monosoup.checkpoint.documents import first_line
from mergekit_monosoup.errors import ConfigurationError

# A recipe with settings of its own for each of a thousand tensors stays well below these.
_LONGEST = 1_000_000
_MOST_NODES = 50_000
_DEEPEST = 50
# Control characters, and halves of surrogate pairs: in no name of a file, and a terminal obeys some of them.
_UNPRINTABLE = frozenset({"Cc", "Cs"})
_WHITE = frozenset("\t\n\r")


def read_text(file: Path) -> str:
    """Return the text of a recipe.

    Raises:
        ConfigurationError: far too long, or not UTF-8.
    """
    with file.open("rb") as stream:
        raw = stream.read(_LONGEST + 1)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not a recipe: it is not text in UTF-8") from error
    return text.replace("\r\n", "\n")


# libyaml's, where PyYAML has it: ten times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _refuse_large(text: str) -> None:
    """Stop at the first value too many, and before anything is nested too deeply for what reads it."""
    values = depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if values > _MOST_NODES:
            raise _too_many(event.start_mark.line + 1 if event.start_mark else 1)
        if depth > _DEEPEST:
            raise _too_deep()


def load_yaml(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a YAML document and the data that they stand for.

    Aliases are counted as often as they would be written out, before that happens.

    Raises:
        ConfigurationError: not YAML, more than one document, objects, or of a size that cannot be meant.
    """
    if len(text) > _LONGEST:
        raise ConfigurationError(f"the recipe is longer than {_LONGEST:,} characters; is it one?")
    try:
        _refuse_large(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _measure(node, {}, 0)
        return node, loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(_said(error)) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"the recipe is not valid YAML: {first_line(error)}") from error
    except RecursionError as error:
        raise _too_deep() from error
    # What PyYAML's constructors of numbers and dates raise for texts that only look like one.
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"the recipe holds a value that cannot be read ({first_line(error)}); put texts in quotes"
        ) from error


def _measure(node: yaml.Node, sizes: dict[int, int | None], depth: int) -> int:
    """Return the number of nodes below and with this one, every alias written out."""
    if depth > _DEEPEST:
        raise _too_deep()
    known = sizes.get(id(node), 0)
    if known is None:
        raise ConfigurationError(f"line {node.start_mark.line + 1}: an alias stands inside its own anchor")
    if known:
        return known
    sizes[id(node)] = None
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _refuse_unprintable(node)
    elif isinstance(node, yaml.CollectionNode):
        pairs = isinstance(node, yaml.MappingNode)
        for child in (part for pair in node.value for part in pair) if pairs else node.value:
            size += _measure(child, sizes, depth + 1)
            if size > _MOST_NODES:
                raise _too_many(child.start_mark.line + 1)
    sizes[id(node)] = size
    return size


def _refuse_unprintable(node: yaml.ScalarNode) -> None:
    text = node.value
    if text.isprintable():
        return
    for character in text:
        if character not in _WHITE and unicodedata.category(character) in _UNPRINTABLE:
            raise ConfigurationError(
                f"line {node.start_mark.line + 1}: a text holds the control character "
                f"U+{ord(character):04X}; remove it"
            )


def _too_many(line: int) -> ConfigurationError:
    return ConfigurationError(
        f"line {line}: the recipe has more than {_MOST_NODES:,} values, its aliases written out; is it one?"
    )


def _too_deep() -> ConfigurationError:
    return ConfigurationError(f"the recipe is nested more than {_DEEPEST} levels deep; is it one?")


def _said(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}: " if mark is not None else ""
    if "single document" in str(error.context):
        return (
            f"{where}a second document begins; a recipe is one mapping of keys such as merge_method: and "
            "models:, and recipes with several documents are run by mergekit-multi"
        )
    if "constructor for the tag" in str(error.problem):
        tag = str(error.problem).partition("'")[2].rpartition("'")[0]
        return f"{where}the tag {tag[:80]!r} asks for an object; a recipe holds plain values only"
    problem = " ".join(filter(None, (error.context, error.problem)))
    return f"{where}the recipe is not valid YAML: {' '.join(problem.split())[:200]}"
