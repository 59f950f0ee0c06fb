"""The documentation of the commands is what the commands say."""

from __future__ import annotations

import importlib.util

from commands import ROOT


def test_command_line_page_is_current():
    """If this fails, run `python docs/build_cli.py`."""
    spec = importlib.util.spec_from_file_location("build_cli", ROOT / "docs" / "build_cli.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.FILE.read_text("utf-8") == build.page()
