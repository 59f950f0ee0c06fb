"""The whole path on a device that is not there: placement, hidden copies, waits of the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("on_foreign_device.py")


@pytest.mark.slow
def test_everything_stays_on_the_device():
    """In a process of its own: a registered device is there for everybody."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", FILE]
    done = subprocess.run(command, cwd=FILE.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
