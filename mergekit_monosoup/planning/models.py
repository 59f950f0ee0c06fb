"""The models that a recipe names, read once each."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_monosoup.checkpoint.headers import Checkpoint, is_local, read_folder
from mergekit_monosoup.checkpoint.hub import read_hub
from mergekit_monosoup.errors import ConfigurationError, InputError
from mergekit_monosoup.planning.adapters import touched_tensors
from mergekit_monosoup.planning.problems import Problems, short, short_path
from mergekit_monosoup.planning.recipe import Recipe, model_uses

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_LONGEST = 1000
_ADDRESS = re.compile(
    r"(https?|hf)://(([\w.-]*\.)?(huggingface\.co|hf\.co|hf-mirror\.com)/(models/)?)?", re.I
)


@dataclass(frozen=True)
class Reference:
    """A model as mergekit reads it: path[@revision][+adapter]."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    override: str | None = None

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{model}+{self.adapter}" if self.adapter else model


def parse_reference(value: Any) -> Reference:
    """Read a model's name.

    Raises:
        ConfigurationError: not a name that mergekit could read.
    """
    if isinstance(value, dict):
        model, lora, override = (value.get(key) for key in ("model", "lora", "override_architecture"))
        parts = [_path(model), _path(lora), override]
        if parts[0] and all(part is None or isinstance(part, str) for part in parts):
            return replace(parse_reference(parts[0]), adapter=parts[1], override=override)
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{short(value)} does not name a model; write a folder or a Hub id")
    if len(value) > _LONGEST:
        count = len(value)
        raise ConfigurationError(f"a model's name is {count} characters long; write a folder or a Hub id")
    if address := _ADDRESS.match(value):
        parts = [part for part in re.split(r"[/?#]", value[address.end() :]) if part]
        revision = parts[3] if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "commit") else None
        hub = address[2] or address[1].lower() == "hf"
        known = "/".join(parts[:2]) + (f"@{revision}" if revision else "")
        raise ConfigurationError(
            f"{short(value)} is an address; write the id of the model"
            + (f": {known}" if hub and _HUB_ID.fullmatch("/".join(parts[:2])) else " (user/name)")
        )
    parts = value.split("+")
    if len(parts) > 2 or any(part.count("@") > 1 for part in parts):
        raise ConfigurationError(f"model {short(value)} cannot be read; write path[@revision][+adapter]")
    path, _, revision = parts[0].partition("@")
    return Reference(path, revision or None, parts[1] if len(parts) == 2 else None)


def _path(value: Any) -> Any:
    """Return a path in mergekit's short form where it is in the long one; other values as they are."""
    if not isinstance(value, dict):
        return value
    path, revision = value.get("path"), value.get("revision")
    if not isinstance(path, str) or not isinstance(revision, (str, type(None))):
        return value
    return f"{path}@{revision}" if revision else path


def read_models(recipe: Recipe, problems: Problems) -> dict[str, Checkpoint]:
    """Read every model of a recipe; those that cannot be read become problems at their line."""
    models: dict[str, Checkpoint] = {}
    failed: set[str] = set()
    for use in model_uses(recipe):
        line = recipe.line(*use.path)
        try:
            reference = parse_reference(use.name)
        except ConfigurationError as error:
            problems.error(str(error), line)
            continue
        name = str(reference)
        if name in models or name in failed:
            continue
        try:
            models[name] = read_model(reference)
        except InputError as error:
            problems.error(str(error), line)
            failed.add(name)
            continue
        for note in models[name].notes:
            problems.warning(note, line)
    return models


def read_model(reference: Reference) -> Checkpoint:
    """Read one model's configuration and headers.

    Raises:
        InputError: it cannot be read; says why and what to do.
    """
    name = str(reference)
    if is_local(reference.path):
        folder = Path(reference.path)
        if folder.is_file():
            raise InputError(f"model {name} is a file; name the folder that it lies in")
        checkpoint = read_folder(name, folder)
    elif _looks_local(reference.path):
        raise InputError(
            f"model folder {short_path(reference.path)} does not exist{_neighbour(reference.path)}"
        )
    else:
        try:
            checkpoint = read_hub(name, reference.path, reference.revision)
        except InputError as error:
            raise InputError(f"{error}{_neighbour(reference.path)}") from error
    if reference.override:
        config = {**checkpoint.config, "architectures": [reference.override]}
        checkpoint = replace(checkpoint, config=config)
    if reference.adapter:
        _check_adapter(reference.adapter)
        touched = touched_tensors(name, reference.adapter, checkpoint)
        checkpoint = replace(checkpoint, adapter=reference.adapter, touched=touched)
    return checkpoint


def _check_adapter(path: str) -> None:
    folder = Path(path.partition("@")[0])
    # Names come from recipes: of one that is too long for any file, Path.exists raises.
    if os.path.exists(folder) and not (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} has no adapter_config.json; is it a PEFT adapter?")
    if not os.path.exists(folder) and _looks_local(str(folder)):
        raise InputError(f"adapter folder {short_path(str(folder))} does not exist{_neighbour(str(folder))}")


def _looks_local(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or _HUB_ID.fullmatch(path) is None


def _neighbour(path: str) -> str:
    """Return a hint at a folder of a similar name."""
    if path.startswith("~"):
        return "; mergekit does not expand ~, so write the path in full"
    wanted = Path(path)
    try:
        names = [entry.name for entry in wanted.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(wanted.name, names, n=1, cutoff=0.6)
    return f"; did you mean {wanted.parent / close[0]}?" if close else ""
