"""The folder of a result: locked, whole or not at all, and put back whatever dies at whatever point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disks import small_disk

from mergekit_monosoup.checkpoint import work_folder as folders
from mergekit_monosoup.checkpoint.output import occupied
from mergekit_monosoup.checkpoint.work_folder import WorkFolder
from mergekit_monosoup.errors import ConfigurationError, OutputError

OLD = {"config.json": "old", "old.txt": "old", "sub/x": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "sub/x": "new", "sub/deeper/y": "new"}


def fill(folder: Path, content=OLD):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def worked(out, journal=True, **options):
    """A work folder with a result in it."""
    work = WorkFolder(out)
    work.open(**options)
    fill(work.path, NEW)
    if journal:
        work.journal.write_text("{}\n")
    return work


def test_a_new_result(tmp_path):
    out = tmp_path / "deeper" / "out"
    work = worked(out)
    assert not out.exists()
    assert work.path.parent == tmp_path / "deeper" / "out.partial"
    work.finish()
    assert content(out) == NEW
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_is_no_result(tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    out.chmod(0o750)
    worked(out).finish()
    assert content(out) == NEW
    assert out.stat().st_mode & 0o777 == 0o750
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_lies_there_is_kept_until_the_end(tmp_path):
    out = tmp_path / "out"
    fill(out)
    with pytest.raises(ConfigurationError, match=r"not empty.*--overwrite"):
        WorkFolder(out).open()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"], (
        "nothing is created where the answer is no"
    )
    work = worked(out, overwrite=True)
    assert content(out) == OLD
    work.finish()
    assert content(out) == NEW
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        WorkFolder(tmp_path / "out").open(overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        WorkFolder(tmp_path / "out" / "below").open()


def test_a_leftover_is_named_and_kept(tmp_path):
    out = tmp_path / "out"
    worked(out).abandon(keep=True)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"out\.partial is what .*--resume.*--restart"):
            WorkFolder(out).open()
    work = WorkFolder(out)
    assert work.open(resume=True)
    assert content(work.path) == NEW
    work.abandon(keep=True)
    assert not work.open(restart=True)
    assert content(work.path) == {}
    assert not work.journal.exists()
    work.abandon(keep=False)
    assert not list(tmp_path.iterdir())


def test_without_a_journal_nothing_is_left_to_go_on_with(tmp_path):
    worked(tmp_path / "out", journal=False).abandon(keep=True)
    work = WorkFolder(tmp_path / "out")
    assert not work.open(resume=True)
    assert content(work.path) == {}
    work.abandon(keep=False)


def test_two_merges_into_one_folder(tmp_path):
    """The second is refused; of the first nothing changes."""
    work = worked(tmp_path / "out")
    for options in ({}, {"resume": True}, {"restart": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="another merge is writing to"):
            WorkFolder(tmp_path / "out").open(**options)
    assert content(work.path) == NEW
    work.finish()


WORKER = """
import os, signal, sys, time
from pathlib import Path
from mergekit_monosoup.checkpoint import work_folder as folder
from mergekit_monosoup.checkpoint.work_folder import WorkFolder

out, new, calls = Path(sys.argv[1]), eval(sys.argv[2]), int(sys.argv[3])

def counted(function):
    def call(*arguments, **options):
        global calls
        if not started:
            return function(*arguments, **options)
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        calls -= 1
        return function(*arguments, **options)
    return call

started = False
if sys.argv[4] == "within":
    folder._can_be_renamed = lambda out: False
work = WorkFolder(out)
left = work.open(overwrite=True, resume=True)
for name, text in new.items():
    (work.path / name).parent.mkdir(parents=True, exist_ok=True)
    (work.path / name).write_text(text)
work.journal.write_text("{}")
for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
started = True
print("locked", flush=True)
if calls < 0:
    time.sleep(60)
work.finish()
print("finished", flush=True)
"""


def start(out, calls, where):
    command = [sys.executable, "-c", WORKER, str(out), repr(NEW), str(calls), where]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_dead_process_holds_no_lock(tmp_path):
    process = start(tmp_path / "out", -1, "beside")
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(OutputError, match="another merge is writing to"):
        WorkFolder(tmp_path / "out").open(resume=True)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(OutputError, match="another merge is writing to"):
        WorkFolder(tmp_path / "out").open(resume=True)
    process.kill()
    process.wait()
    work = WorkFolder(tmp_path / "out")
    assert work.open(resume=True)
    work.finish()
    assert content(tmp_path / "out") == NEW


@pytest.mark.slow
@pytest.mark.parametrize("where", ["beside", "within"])
def test_killed_at_every_step_of_the_exchange(tmp_path, monkeypatch, where):
    """Either the old model stands or the new one, whole; what the next call finds can be gone on with."""
    if where == "within":
        monkeypatch.setattr(folders, "_can_be_renamed", lambda out: False)
    seen = set()
    for calls in range(100):
        out = tmp_path / str(calls) / "out"
        fill(out)
        process = start(out, calls, where)
        output, errors = process.communicate()
        if "finished" in output:
            assert calls > 5
            break
        assert process.returncode == -signal.SIGKILL, errors
        work = WorkFolder(out)
        left = work.open(overwrite=True, resume=True)
        standing = {k: v for k, v in content(out).items() if not k.startswith(".partial")}
        seen.add((left, standing == OLD))
        # Before the last move the old model is back and the new one can be gone on with.
        assert standing == (OLD if left else NEW)
        if left:
            assert content(work.path) == NEW
            work.finish()
        else:
            work.abandon(keep=False)
        assert content(out) == NEW
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
    assert seen == {(True, True), (False, False)}


def test_something_else_was_put_where_the_old_model_was(tmp_path, monkeypatch):
    """Neither is deleted."""
    out = tmp_path / "out"
    fill(out)
    work = worked(out, overwrite=True)
    os.rename(out, work._replaced)
    work._lock.release()
    fill(out, {"third": "x"})
    for options in ({"resume": True, "overwrite": True}, {"restart": True, "overwrite": True}):
        with pytest.raises(ConfigurationError, match="move one of them away"):
            WorkFolder(out).open(**options)
    assert content(out) == {"third": "x"}
    assert content(work._replaced) == OLD
    assert content(work.path) == NEW


def test_a_move_that_fails_is_taken_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out)
    work = worked(out, overwrite=True)
    real = os.rename

    def rename(source, target):
        if Path(target) == out and Path(source) == work.path:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match=r"out cannot be written to \(Input/output error\)"):
        work.finish()
    monkeypatch.undo()
    assert content(out) == OLD
    work.abandon(keep=True)
    assert work.open(overwrite=True, resume=True)
    work.finish()
    assert content(out) == NEW


def test_a_link_stays_a_link(tmp_path):
    disk = tmp_path / "disk"
    fill(disk / "model")
    (tmp_path / "out").symlink_to(disk / "model")
    work = worked(tmp_path / "out", overwrite=True)
    assert work.root == disk / "model.partial"
    work.finish()
    assert (tmp_path / "out").is_symlink()
    assert content(disk / "model") == NEW
    (tmp_path / "dangling").symlink_to(disk / "other")
    worked(tmp_path / "dangling").finish()
    assert content(disk / "other") == NEW


def test_a_mount_point(tmp_path):
    """As `docker run -v` makes them: the folder itself cannot be renamed."""
    with small_disk(tmp_path / "out", "1m") as out:
        work = worked(out)
        assert work.root == out / ".partial"
        assert occupied(out, overwrite=False) is None
        work.abandon(keep=True)
        assert occupied(out, overwrite=False) is None
        with pytest.raises(ConfigurationError, match="--resume"):
            WorkFolder(out).open()
        assert work.open(resume=True)
        work.finish()
        assert content(out) == NEW
        worked(out, overwrite=True).finish()
        assert content(out) == NEW
        assert not (out / ".partial").exists()


def test_the_working_directory(tmp_path, monkeypatch):
    """A shell in it would be left in a folder that has no name any more."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    work = worked(Path())
    work.finish()
    assert content(Path.cwd()) == NEW
    assert os.listdir(tmp_path) == ["out"]


NOBODY = """
import os, sys
from pathlib import Path
from mergekit_monosoup.errors import MonoSoupError
from mergekit_monosoup.checkpoint.work_folder import WorkFolder
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    work = WorkFolder(Path(sys.argv[1]))
    work.open(overwrite=True)
    print(work.root)
    (work.path / "x").write_text("new")
    work.finish()
except MonoSoupError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else"
)
def test_no_permission(tmp_path):
    """A folder of somebody else's; one's own in a folder of somebody else's."""
    for folder in (tmp_path, *tmp_path.parents):
        if not os.stat(folder).st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    root = tmp_path / "root"
    mine = root / "mine"
    mine.mkdir(parents=True)
    os.chown(mine, 65534, 65534)

    def run(out):
        return subprocess.run(
            [sys.executable, "-c", NOBODY, str(out)], capture_output=True, text=True, check=False
        )

    done = run(root / "out")
    assert done.stdout.endswith("cannot be written to (Permission denied); choose another output folder\n"), (
        done.stdout + done.stderr
    )
    assert "out.partial" in done.stdout
    done = run(mine)
    assert done.stdout.strip() == str(mine / ".partial"), done.stdout + done.stderr
    assert (mine / "x").read_text() == "new"


def test_opening_takes_no_time(tmp_path):
    started = time.monotonic()
    worked(tmp_path / "out").finish()
    assert time.monotonic() - started < 2
