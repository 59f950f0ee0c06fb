"""Virtual environments of their own for the tests, without the network and without pip inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

from mergekit_monosoup.spectral import idle

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mergekit_monosoup"
STARTUP = ROOT / "startup"
OPT_OUT = "MERGEKIT_MONOSOUP_AUTOLOAD"


def dependency_folders() -> list[Path]:
    """Where the packages of the running interpreter lie."""
    entries = (Path(entry) for entry in sys.path if entry)
    return [e for e in entries if e.name in ("site-packages", "dist-packages") and e.is_dir()]


class Environment:
    """A virtual environment that holds nothing but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")
        # Asked without -S, under which a virtual environment reports the folders of its base.
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(self.run("-c", code).stdout.strip())
        assert self.site.is_relative_to(folder), f"{self.site} lies outside {folder}"

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python in a fresh process, away from the settings of this one."""
        ours = (OPT_OUT, idle.VARIABLE)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k not in ours}
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=cwd or self.folder,
            env={**inherited, "PATH": str(self.bin), **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def output(self, *arguments: str | Path, **variables: str) -> str:
        """Run as `run` does, insist on success and silence, and return standard output."""
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()

    def see(self, *folders: Path) -> None:
        """Append folders to sys.path, without running the start-up files in them."""
        with open(self.site / "zz_dependencies.pth", "a") as file:
            file.writelines(f"{folder}\n" for folder in folders)

    def add_hook(self) -> None:
        """Put the start-up files where the wheel puts them."""
        for file in STARTUP.iterdir():
            shutil.copy(file, self.site)

    def add_package(self) -> Path:
        """Put a copy of the package into the site directory, to be damaged at will."""
        copy = self.site / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        return copy

    def files(self) -> list[str]:
        """Everything that lies in the environment, caches and folders included."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))


def link_all(folder: Path, sources: Iterable[Path], but: tuple[str, ...] = ()) -> Path:
    """Fill a folder with links to all that is in the others, but for some names; start-up files stay out."""
    folder.mkdir()
    for source in sources:
        for entry in source.iterdir():
            link = folder / entry.name
            left_out = entry.name.endswith((".pth", ".start")) or entry.name.startswith(
                ("mergekit_monosoup", "__pycache__", *but)
            )
            if not left_out and not link.exists():
                link.symlink_to(entry)
    return folder
