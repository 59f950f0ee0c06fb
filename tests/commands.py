"""Run mergekit's own commands: as real processes, and in this process where speed matters."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click.testing
import torch
import yaml
from checkpoints import load_tensors

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = {
    "mergekit-yaml": "mergekit.scripts.run_yaml",
    "mergekit-multi": "mergekit.scripts.multimerge",
    "mergekit-pytorch": "mergekit.scripts.merge_raw_pytorch",
}


def installed() -> bool:
    """Whether this environment has the package, and with it the start-up hook."""
    try:
        importlib.metadata.distribution("mergekit-monosoup")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def command_line(name: str) -> list[str]:
    """A command of mergekit: the installed script, or its module with our methods registered."""
    if installed():
        return [str(Path(sys.executable).with_name(name))]
    code = f"import mergekit_monosoup as m; m.register(); from {ENTRY_POINTS[name]} import main; "
    return [sys.executable, "-c", code + "main()"]


def run(
    command: list[str], cwd: Path, env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command offline in a fresh process; its output is in the result, and in a failure."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert not check or done.returncode == 0, f"{command} -> {done.returncode}\n{done.stdout}"
    return done


def write_config(folder: Path, *documents: dict[str, Any]) -> Path:
    """Write YAML documents into a file of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"config{len(list(folder.glob('config*.yml')))}.yml"
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return file


def forget_loaders() -> None:
    """Drop what a process keeps for its life: mergekit's loaders and their options."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

    LoaderCache().loaders.clear()
    SimpleLoaderCache().loaders.clear()


def invoke(name: str, *arguments: str | Path) -> click.testing.Result:
    """Run a command of mergekit in this process, catching what it raises."""
    module = importlib.import_module(ENTRY_POINTS[name])
    forget_loaders()
    try:
        return click.testing.CliRunner().invoke(module.main, [str(a) for a in arguments])
    finally:
        forget_loaders()


def succeed(name: str, *arguments: str | Path) -> click.testing.Result:
    """Like `invoke`, and an error of the command is an error here, with its traceback."""
    result = invoke(name, *arguments)
    if result.exception is not None:
        raise result.exception
    return result


def recipe(base: Path | str | None, *tuned: Path | str, **keys: Any) -> dict[str, Any]:
    """A MonoSoup configuration for `mergekit-yaml`."""
    config: dict[str, Any] = {"merge_method": "monosoup"}
    if base is not None:
        config["base_model"] = str(base)
    if tuned:
        config["models"] = [{"model": str(model)} for model in tuned]
    return {**config, **keys}


def merge(folder: Path, config: dict[str, Any], *options: str) -> dict[str, torch.Tensor]:
    """Merge by `mergekit-yaml` in this process into `folder`/out, and load what it wrote."""
    out = folder / "out"
    succeed("mergekit-yaml", write_config(folder, config), out, *options)
    return load_tensors(out)


def our_command(folder: Path, config: dict[str, Any], *options: str) -> click.testing.Result:
    """Run `mergekit-monosoup merge` in this process into `folder`/out."""
    from mergekit_monosoup.cli import main

    forget_loaders()
    arguments = ["merge", str(write_config(folder, config)), str(folder / "out"), *options]
    try:
        return click.testing.CliRunner().invoke(main, arguments)
    finally:
        forget_loaders()


def our_merge(folder: Path, config: dict[str, Any], *options: str) -> dict[str, torch.Tensor]:
    """Merge by `mergekit-monosoup merge`, after a plan that must agree with it, and load what it wrote."""
    from mergekit_monosoup.planning.plan import PlanOptions, make_plan
    from mergekit_monosoup.report.reader import read_report

    plan = make_plan(yaml.safe_dump(config, sort_keys=False), PlanOptions(costs=False))
    assert not plan.problems.errors, plan.problems.errors
    result = our_command(folder, config, "--no-copy-tokenizer", "--quiet", *options)
    assert result.exit_code == 0, result.output
    tensors = load_tensors(folder / "out")
    written = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    assert {t.tensor: (t.shape, t.dtype) for t in plan.tensors} == written
    if plan.method.ours:
        done = {r.tensor: (r.shape, r.action) for r in read_report(folder / "out").records}
        assert {t.tensor: (t.shape, t.action) for t in plan.tensors} == done
    return tensors


def refuse(folder: Path, config: dict[str, Any], *options: str) -> BaseException:
    """Expect the merge to fail without leaving anything that looks finished; the exception."""
    out = folder / "out"
    result = invoke("mergekit-yaml", write_config(folder, config), out, *options)
    assert result.exception is not None, f"the merge was not refused:\n{result.output}"
    assert not isinstance(result.exception, SystemExit), result.output
    assert_nothing_finished(out)
    return result.exception


def assert_nothing_finished(out: Path) -> None:
    """No complete set of weights: neither one file, nor an index, nor shards named n of n."""
    left = sorted(path.name for path in out.glob("*")) if out.exists() else []
    finished = [
        name
        for name in left
        if name in ("model.safetensors", "pytorch_model.bin", "config.json")
        or name.endswith(".index.json")
        or "-of-" in name
    ]
    assert not finished, f"{out} looks like a finished model: {left}"
