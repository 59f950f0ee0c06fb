"""Collect what `gpu.py` needs beside torch and transformers, as wheels for a machine without a network."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "annotated-types",
    "filelock",
    "immutables",
    "mergekit",
    "peft",
    "psutil",
    "pydantic",
    "pydantic-core",
    "pytest-timeout",
    "threadpoolctl",
    "typing-extensions",
    "typing-inspection",
)
PLATFORMS = ("2_28", "2_27", "2_17")


def main() -> None:
    """Download the wheels, in the versions of constraints.txt, for Linux on x86-64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the wheels go; give it to `gpu.py --wheels`")
    parser.add_argument("--python", default="3.12", help="of the machine with the card")
    options = parser.parse_args()
    pins = {
        line.split("==")[0]: line.split(";")[0].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    # Without their requirements: torch and transformers are there, in builds that suit the card.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", options.python, "--implementation", "cp", "--dest", str(options.folder)]
    for platform in (
        *(f"manylinux_{p}_x86_64" for p in PLATFORMS),
        "manylinux2014_x86_64",
        "manylinux1_x86_64",
    ):
        command += ["--platform", platform]
    subprocess.run([*command, *(pins.get(package, package) for package in PACKAGES)], check=True)


if __name__ == "__main__":
    main()
