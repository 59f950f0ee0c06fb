"""Whether the inputs and the output of a recipe suit its method, each other, and this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint
from mergekit_monosoup.checkpoint.output import left_behind, occupied, too_small
from mergekit_monosoup.checkpoint.storage import refused_checkpoint
from mergekit_monosoup.planning.catalogue import Method
from mergekit_monosoup.planning.models import parse_reference
from mergekit_monosoup.planning.problems import Problems, short
from mergekit_monosoup.planning.recipe import Recipe, model_uses

_TOKENIZER_FILES = (
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def check_inputs(
    recipe: Recipe, method: Method, models: Mapping[str, Checkpoint], problems: Problems
) -> None:
    """Note inputs that do not suit the method, or each other.

    Args:
        recipe, method: what to do.
        models: the input checkpoints by name.
        problems: takes the findings.
    """
    _check_numbers(recipe, method, problems)
    if method.ours:
        for checkpoint in models.values():
            message = refused_checkpoint(checkpoint)
            if message is not None:
                problems.error(message)
    _check_tokenizer(recipe, models, problems)


def _check_numbers(recipe: Recipe, method: Method, problems: Problems) -> None:
    """Check base and number of inputs against what the method asks for."""
    data = recipe.data
    line = recipe.line("merge_method")
    named = [str(parse_reference(use.name)) for use in model_uses(recipe)]
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
        _check_slices(recipe, method, problems)
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


def _check_slices(recipe: Recipe, method: Method, problems: Problems) -> None:
    """Check each output slice as mergekit hands it to a method."""
    owners: list[tuple[tuple[str | int, ...], Any]] = [((), recipe.data)]
    owners += [(("modules", name), owner) for name, owner in (recipe.data.get("modules") or {}).items()]
    for path, owner in owners:
        for index, part in enumerate(owner.get("slices") or []):
            line = recipe.line(*path, "slices", index)
            value = part.get("base_model") or recipe.data.get("base_model")
            base = str(parse_reference(value)) if value is not None else None
            if method.base == "required" and base is None:
                problems.error(
                    f"merge method {method.name!r} needs base_model:, and this slice has none", line
                )
                continue
            others = {str(parse_reference(source["model"])) for source in part.get("sources") or []} - {base}
            if method.min_non_base is not None and len(others) < method.min_non_base:
                problems.error(
                    f"merge method {method.name!r} needs at least {method.min_non_base} models besides the "
                    f"base; this slice has {len(others)}",
                    line,
                )


def _check_tokenizer(recipe: Recipe, models: Mapping[str, Checkpoint], problems: Problems) -> None:
    """Note a tokenizer that the recipe asks for and that is not there."""
    data = recipe.data
    key = "tokenizer" if data.get("tokenizer") else "tokenizer_source"
    asked = data.get(key)
    if not asked:
        return
    source = asked.get("source") if isinstance(asked, dict) else asked
    base = data.get("base_model")
    wanted = [str(parse_reference(base))] if base is not None else list(models)[:1]
    if source not in (None, "union", "base"):
        wanted.append(str(parse_reference(source)))
    for name in wanted:
        checkpoint = models.get(name)
        folder = checkpoint.beside if checkpoint is not None else Path(name)
        known = folder is not None and os.path.isdir(folder)
        if known and folder is not None and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
            problems.error(
                f"{key}: asks for the tokenizer of {name}, which has none ({folder / 'tokenizer.json'}); "
                "leave it out, or name a model that has one",
                recipe.line(key),
            )
    template = data.get("chat_template")
    if isinstance(template, str) and not _is_template(template):
        problems.error(
            f"chat_template is {short(template)}; it must be auto, a template of mergekit's, or a text in "
            "Jinja",
            recipe.line("chat_template"),
        )


def _is_template(text: str) -> bool:
    """Say whether mergekit takes a text for a template: a name of its own, or long and with a brace."""
    if text == "auto":
        return True
    if "{" in text:
        return len(text) >= 20
    spec = find_spec("mergekit")
    folders = spec.submodule_search_locations if spec is not None else None
    known = Path(folders[0]) / "_data" / "chat_templates" if folders else Path()
    return len(text) < 256 and "\n" not in text and (known / f"{Path(text).name}.jinja").is_file()


def check_output(
    out: Path,
    needed: float,
    models: Mapping[str, Checkpoint],
    problems: Problems,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Note an output folder that is taken, cannot be written to, or is on too small a disk."""
    left = None if resume else left_behind(out)
    for message in (occupied(out, overwrite=overwrite), left, too_small(out, needed)):
        if message is not None:
            problems.error(message)
    above = out.absolute()
    while not above.exists():
        above = above.parent
    if not os.access(above, os.W_OK | os.X_OK):
        problems.error(f"folder {above} cannot be written to; choose another output folder")
    for checkpoint in models.values():
        if checkpoint.folder is not None and out.exists() and checkpoint.folder.resolve() == out.resolve():
            problems.error(f"output {out} is the folder of the input {checkpoint.name}; choose another one")
