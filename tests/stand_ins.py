"""An environment with the start-up hook, and stand-ins for mergekit in it."""

from __future__ import annotations

import textwrap
from pathlib import Path

from environments import Environment

# Stands in for mergekit where the mechanics of importing are under test: the real one cannot be
# made to fail, or to sit in an archive. Notes its own import.
STAND_IN = """
import sys
events = ["started"]
loader_seen, spec_seen = __loader__, __spec__.loader
def registered(): return events.count("registered")
from mergekit.trouble import trouble
trouble()
events.append("finished")
"""
STAND_IN_REGISTRY = """
def register():
    import mergekit.merge_methods as m
    m.events.append("registered")
"""


def hooked_environment(folder: Path) -> Environment:
    """With the hook and the package, and without mergekit."""
    made = Environment(folder)
    made.add_hook()
    made.add_package()
    return made


def add_stand_ins(environment: Environment) -> None:
    """Put in stand-ins for mergekit and for the registration in it."""
    (environment.site / "mergekit_monosoup" / "registry.py").write_text(STAND_IN_REGISTRY)
    write_stand_in(environment.site)


def write_stand_in(folder: Path) -> None:
    """Write a mergekit that does nothing but note its own import."""
    home = folder / "mergekit" / "merge_methods"
    home.mkdir(parents=True)
    (folder / "mergekit" / "__init__.py").touch()
    (folder / "mergekit" / "trouble.py").write_text("def trouble(): pass\n")
    (home / "__init__.py").write_text(STAND_IN)
    (home / "base.py").touch()


def script(text: str) -> tuple[str, str]:
    """The arguments that make Python run this."""
    return "-c", textwrap.dedent(text)


def only_line(stderr: str) -> str:
    """The one line that we wrote there."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("mergekit-monosoup: ")
    return lines[0]
