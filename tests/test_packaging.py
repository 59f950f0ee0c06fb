"""Real installations: the stock commands know our methods, and uninstalling leaves nothing."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from commands import ENTRY_POINTS
from environments import ROOT, Environment, dependency_folders

from mergekit_monosoup.cli import installation

pytestmark = pytest.mark.slow

# As the console scripts do it, short of running the command.
LOOK = """
import {module}
from mergekit import merge_methods
print("monosoup" in [method.spec.name for method in merge_methods.registered_methods()])
"""


def pip(environment: Environment, *arguments: str) -> None:
    """Let the pip of this interpreter work on another environment, without the network."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(environment.python),
        "--disable-pip-version-check",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def known(environment: Environment, module: str) -> bool:
    """Whether `monosoup` is known to a fresh process that has imported a module of mergekit."""
    done = environment.run("-c", LOOK.format(module=module))
    assert done.returncode == 0, done.stderr
    assert "mergekit-monosoup" not in done.stderr
    return done.stdout.split()[-1] == "True"


@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["plain", "editable"])
def test_install_use_uninstall(tmp_path, options):
    environment = Environment(tmp_path / "environment")
    environment.see(*dependency_folders())
    before = environment.files()

    pip(environment, "install", "--no-index", "--no-deps", "--no-build-isolation", *options, str(ROOT))
    for name in ("mergekit_monosoup.pth", "mergekit_monosoup.start"):
        assert (environment.site / name).read_bytes() == (ROOT / "startup" / name).read_bytes()
    assert (environment.site / "mergekit_monosoup").exists() is not bool(options)
    with ThreadPoolExecutor() as threads:  # each of them waits for a process
        found = dict(
            zip(ENTRY_POINTS, threads.map(partial(known, environment), ENTRY_POINTS.values()), strict=True)
        )
    assert found == dict.fromkeys(ENTRY_POINTS, True)
    if not options:
        done = environment.run(environment.bin / "mergekit-monosoup", "doctor", "--json")
        report = json.loads(done.stdout)
        assert (done.returncode, report["ok"]) == (0, True), report
        assert report["versions"]["mergekit-monosoup"] == declared("version")

    pip(environment, "uninstall", "--yes", "mergekit-monosoup")
    assert environment.files() == before
    assert not known(environment, "mergekit.merge_methods")


def test_entry_points_are_those_of_the_stock_commands():
    scripts = importlib.metadata.distribution("mergekit").entry_points.select(group="console_scripts")
    assert {e.name: e.value for e in scripts if e.name in ENTRY_POINTS} == {
        command: f"{module}:main" for command, module in ENTRY_POINTS.items()
    }


def test_doctor_requires_the_mergekit_that_the_package_requires():
    assert declared("requirement") == installation.MERGEKIT_REQUIREMENT


def declared(what: str) -> str:
    """What pyproject.toml says; by patterns, as Python 3.10 has no reader of TOML."""
    pattern = {"version": r'^version = "(.+)"$', "requirement": r'^    "(mergekit[<>=].*)",$'}[what]
    (found,) = re.findall(pattern, (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    return found
