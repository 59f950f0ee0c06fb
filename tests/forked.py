"""Our command in processes of its own, each forked from one that has imported everything already.

A signal hits a real process, its exit status and what it prints are real, and what imports cost is paid once
a session. Python's own fork server is a fresh interpreter: nothing of the tests' process is in it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

_FORK = multiprocessing.get_context("forkserver")
# Imported once; a module that is missing here is left to whoever asks for it.
_FORK.set_forkserver_preload(
    [
        "mergekit_monosoup.cli.merge",
        "mergekit_monosoup.merging.run",
        "mergekit_monosoup.methods.monosoup",
        "mergekit_monosoup.lora.adapter",
        "transformers.models.qwen3.modeling_qwen3",
        "peft",
        "ray",
    ]
)


class Command:
    """A command that runs, with as much of `subprocess.Popen` as the tests ask for."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Start `mergekit-monosoup` with some arguments, after `before` in the new process."""
        self._said = tempfile.TemporaryDirectory(prefix="forked-")
        self._outputs = [Path(self._said.name) / name for name in ("stdout", "stderr")]
        for output in self._outputs:
            output.touch()
        words = [str(argument) for argument in arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        self.args = words
        self._process = _FORK.Process(
            target=_command, args=(words, self._outputs, str(cwd or Path.cwd()), environment, before)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def said(self) -> str:
        return self._outputs[0].read_text()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; what was printed and what was said of errors."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        stdout, stderr = (output.read_text() for output in self._outputs)
        return stdout, stderr


def run_command(*arguments: str | Path, **how) -> subprocess.CompletedProcess[str]:
    """Run `mergekit-monosoup` to its end."""
    command = Command(*arguments, **how)
    stdout, stderr = command.communicate()
    return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)


def _command(
    arguments: list[str],
    outputs: list[Path],
    cwd: str,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, output in enumerate(outputs, start=1):
        opened = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    # A shell starts what runs in its background deaf to it, and all of its children are.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import tqdm

    from mergekit_monosoup.cli import main

    # tqdm shares a lock among forked processes, which one that was killed never gives back.
    tqdm.tqdm.set_lock(threading.RLock())
    if before is not None:
        before()
    main(arguments, prog_name="mergekit-monosoup")
