"""What `mergekit-monosoup doctor` finds out: the facts behind each route, without printing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mergekit_monosoup.autoload import OPT_OUT_VARIABLE, opted_out
from mergekit_monosoup.cli.installation import (
    MERGEKIT_REQUIREMENT,
    OURS,
    STARTUP_FILES,
    installation_of,
    installed_version,
    interpreter_of,
    own_mergekit_yaml,
    site_directories,
    supported,
    with_startup_file,
)

_TIMEOUT_SECONDS = 600
_ANSWER = "mergekit-monosoup-doctor:"

# For a fresh interpreter that starts as the stock commands do. A console script has no '' on
# sys.path, so that a folder named mergekit in the working directory does not count.
_PROBE = f"""
import json, sys
hooks = [f for f in sys.meta_path if type(f).__module__ == "mergekit_monosoup.autoload"]
answer = dict(hook=bool(hooks), ours=[], error=None)
sys.path[:] = [entry for entry in sys.path if entry != ""]
try:
    from mergekit.merge_methods import registered_methods
    answer["ours"] = [
        m.spec.name for m in registered_methods() if type(m).__module__.startswith("mergekit_monosoup")
    ]
except BaseException as error:
    answer["error"] = type(error).__name__ + ": " + str(error)
print("\\n{_ANSWER}" + json.dumps(answer))
"""


@dataclass(frozen=True)
class Problem:
    """Why a route does not work, and what to do about it."""

    reason: str
    remedy: str


@contextlib.contextmanager
def fresh_interpreter() -> Iterator[subprocess.Popen[str] | None]:
    """Start the probe with those switches of this interpreter that decide about start-up files.

    Yields:
        The running process for `startup_problems`, or None where no interpreter can be started.
    """
    switches = [
        f"-{letter}"
        for letter, on in (
            ("I", sys.flags.isolated),
            ("S", sys.flags.no_site),
            ("s", sys.flags.no_user_site),
            ("E", sys.flags.ignore_environment),
        )
        if on
    ]
    try:
        probe = subprocess.Popen(
            [sys.executable, *switches, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except (OSError, ValueError, TypeError):  # no such file, an empty name, None
        yield None
        return
    with probe:
        try:
            yield probe
        finally:
            probe.kill()


def startup_problems(probe: subprocess.Popen[str] | None) -> list[Problem]:
    """Say why the process from `fresh_interpreter` did not know our methods; empty if it did."""
    if probe is None:
        return [
            Problem(
                f"no fresh interpreter could be started as {sys.executable!r}",
                "run this command with the Python that is to run mergekit",
            )
        ]
    by_hand = f"{sys.executable} -X importtime -c 'import mergekit.merge_methods'"
    try:
        out, err = probe.communicate(timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return [
            Problem(
                f"a fresh interpreter did not import mergekit within {_TIMEOUT_SECONDS} s",
                f"see where it hangs: {by_hand}",
            )
        ]
    _, found, text = out.rpartition(f"\n{_ANSWER}")
    if not found:
        last = _one_line((err.strip() or "no message").splitlines()[-1])
        return [
            Problem(
                f"a fresh interpreter ended with status {probe.returncode} on importing mergekit: {last}",
                f"see its whole message: {by_hand}",
            )
        ]
    answer: dict[str, Any] = json.loads(text)
    if answer["ours"]:
        return []
    told = re.search(rf"^{OURS}: .*? \((.*)\); \w+ goes on", err, re.MULTILINE)
    cause = told and told.group(1)
    problems = [] if answer["hook"] else [_hook_problem(cause)]
    if opted_out():
        setting = f"{OPT_OUT_VARIABLE}={os.environ[OPT_OUT_VARIABLE]}"
        problems.append(Problem(f"{setting} is set in the environment", f"unset {OPT_OUT_VARIABLE}"))
    if answer["error"]:
        problems.append(_import_problem(answer["error"]))
    elif not problems:
        silent = "the start-up hook ran, but another import hook loads mergekit.merge_methods before it"
        problems.append(_import_problem(cause or silent))
    return problems


def _hook_problem(cause: str | None) -> Problem:
    """Say why a fresh interpreter has not run our start-up file to its end."""
    pip = f"{sys.executable} -m pip install"
    otherwise = "or use `mergekit-monosoup merge` instead of mergekit-yaml"
    if sys.flags.no_site:
        return Problem(
            "Python was started with -S and runs no start-up files", f"start it without -S, {otherwise}"
        )
    processed = site_directories()
    here = with_startup_file(processed)
    if here:
        return Problem(
            f"the start-up file in {here[0]} had no effect: {cause or 'Python skipped it'}",
            f"{pip} --force-reinstall --no-deps {OURS} (a file that Python skips is hidden or unreadable)",
        )
    install = f"{pip} {OURS} (into a site directory of this Python), {otherwise}"
    elsewhere = with_startup_file([*sys.path, site.getusersitepackages()])
    if elsewhere:
        return Problem(
            f"the start-up file lies in {elsewhere[0]}, which is no site directory of this Python (as "
            "after pip install --target, or with the user site switched off), so Python does not run it",
            install,
        )
    return Problem(
        f"{STARTUP_FILES[0]} is in no site directory of this Python ({', '.join(processed)}): this "
        "package runs from an archive or a source folder, or the file has been deleted",
        install,
    )


def attempt(*steps: Callable[[], object]) -> list[Problem]:
    """Take the steps in this process and explain the first error; empty if there is none."""
    # This process's own hook must not warn as well, nor an import write into `--json`.
    before = os.environ.get(OPT_OUT_VARIABLE)
    os.environ[OPT_OUT_VARIABLE] = "0"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for step in steps:
                step()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the diagnosis
        return [_import_problem(f"{type(error).__name__}: {error}")]
    finally:
        if before is None:
            del os.environ[OPT_OUT_VARIABLE]
        else:
            os.environ[OPT_OUT_VARIABLE] = before
    return []


def register_here() -> None:
    """Register our methods in this process."""
    importlib.import_module("mergekit_monosoup.registry").register()


def import_merge() -> None:
    """Import what `mergekit-monosoup merge` needs, without running it."""
    importlib.import_module("mergekit_monosoup.cli.merge")
    importlib.import_module("mergekit_monosoup.merging.run")


def _import_problem(error: str) -> Problem:
    """Turn the text of an import or registration error into cause and remedy."""
    pip = f"{sys.executable} -m pip install"
    error = _one_line(error)
    missing = re.match(r"ModuleNotFoundError: No module named '([^']+)'", error)
    name = missing.group(1) if missing else ""
    version = installed_version("mergekit")
    if name == "mergekit":
        return Problem("mergekit is not installed", f"{pip} '{MERGEKIT_REQUIREMENT}'")
    if version is not None and not supported(version):
        return Problem(
            f"mergekit {version} is installed, this package needs {MERGEKIT_REQUIREMENT} ({error})",
            f"{pip} '{MERGEKIT_REQUIREMENT}'",
        )
    top = name.partition(".")[0]
    if top not in ("", "mergekit", "mergekit_monosoup"):
        return Problem(f"{top} is not installed", f"{pip} {'pyyaml' if top == 'yaml' else top}")
    if error.startswith("RegistrationError: "):  # brings its own remedy
        reason, _, remedy = error.partition("; ")
        return Problem(reason, remedy)
    return Problem(error, f"{pip} --upgrade {OURS} '{MERGEKIT_REQUIREMENT}'")


def path_problems() -> list[Problem]:
    """Say whether the `mergekit-yaml` that a shell finds belongs to another Python."""
    found = shutil.which("mergekit-yaml")
    owner = found and interpreter_of(found)
    if not found or not owner or installation_of(owner) == installation_of(sys.executable):
        return []
    own = own_mergekit_yaml()
    return [
        Problem(
            f"mergekit-yaml on PATH ({found}) belongs to another Python, {owner}",
            f"call {own}" if own else f"{owner} -m pip install {OURS}, or correct PATH",
        )
    ]


def notes() -> list[str]:
    """Return what stands in no route's way but should be known."""
    found = []
    own = own_mergekit_yaml()
    if own and shutil.which("mergekit-yaml") is None:
        found.append(f"mergekit-yaml is not on PATH; call it as {own}")
    folders = with_startup_file(site_directories())
    if len(folders) > 1:
        found.append(
            f"start-up files lie in several site directories ({', '.join(folders)}); they do no harm, "
            f"but each needs its own `pip uninstall {OURS}`"
        )
    for folder in folders:
        if not any(importlib.metadata.distributions(name=OURS, path=[folder])):
            files = " and ".join(STARTUP_FILES)
            found.append(
                f"no {OURS} is installed beside the start-up files in {folder}; delete {files} there"
            )
    version = installed_version("mergekit")
    if version is not None and not supported(version):
        found.append(f"mergekit {version} is outside the supported range {MERGEKIT_REQUIREMENT}")
    with contextlib.suppress(ImportError):
        from mergekit_monosoup.spectral.kernels import why_not

        reason = why_not()
        if reason is not None:
            found.append(f"edits on the CPU are left to torch, and take about twice as long: {reason}")
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
