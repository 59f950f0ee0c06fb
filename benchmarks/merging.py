"""Whole merges as processes of their own: recipes, command, checkpoints. Imports nothing heavy."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from common import Run, run_child

HELPER = Path(__file__).with_name("checkpoints.py")
OPTIONS = ("--no-copy-tokenizer", "--quiet")
OURS = (sys.executable, "-m", "mergekit_monosoup", "merge")


def write_checkpoints(folder: Path, layers: int, vocabulary: int, tuned: int = 1) -> None:
    """Write a base and fine-tuned checkpoints in the shape of Qwen3-0.6B."""
    run_child([sys.executable, HELPER, "write", folder, str(layers), str(vocabulary), str(tuned)])


def verify(folder: Path, merged: Path, method: str, largest: int) -> int:
    """Check a merge against float64; return the number of tensors compared."""
    command = [
        sys.executable,
        HELPER,
        "verify",
        folder / "base",
        folder / "tuned1",
        merged,
        method,
        str(largest),
    ]
    return int(run_child(command).output.split()[-1])


def methods() -> list[str]:
    """Return the names of the methods that this version of the package registers."""
    return run_child([sys.executable, HELPER, "methods"]).output.split("\n")[-2].split()


def recipe(folder: Path, method: str, tuned: int = 1) -> dict[str, Any]:
    """Return a configuration for `mergekit-yaml`; JSON is YAML."""
    models: list[dict[str, Any]] = [{"model": str(folder / f"tuned{i}")} for i in range(1, tuned + 1)]
    config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "linear":
        models.insert(0, {"model": str(folder / "base")})
        for model in models:
            model["parameters"] = {"weight": 1.0}
    else:
        config["base_model"] = str(folder / "base")
    return {**config, "models": models}


def merge(
    folder: Path, config: dict[str, Any], *options: str, keep: Path | None = None, ours: bool = False
) -> Run:
    """Run a configuration in a fresh process and drop what it wrote, unless it is kept.

    By `mergekit-yaml`, or by our own command.
    """
    out = keep or folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    file = folder / "config.yml"
    file.write_text(json.dumps(config), encoding="utf-8")
    try:
        return run_child([*(OURS if ours else command()), file, out, *OPTIONS, *options])
    finally:
        if keep is None:
            shutil.rmtree(out, ignore_errors=True)


def command() -> list[str]:
    """Return the stock command; without the start-up hook, its module with our methods registered."""
    if hook_is_installed():
        return [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    code = "import mergekit_monosoup as m; m.register(); from mergekit.scripts.run_yaml import main; main()"
    return [sys.executable, "-c", code]


def hook_is_installed() -> bool:
    """Say whether this environment has the package itself, and with it the start-up hook."""
    try:
        metadata.distribution("mergekit-monosoup")
    except metadata.PackageNotFoundError:
        return False
    return True
