"""The largest memory of this process, for code that tests run in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident memory since the process was started, in bytes.

    `ru_maxrss` would count the process that this one was forked from as well.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+([0-9]+)", status)[1]) * 1024
