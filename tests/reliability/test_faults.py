"""What goes wrong outside of a merge, and the message its user sees."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import copy_with_tensors, load_tensors
from commands import recipe, write_config
from forked import Command, run_command
from safetensors.torch import load_file, save_file


def merge(folder, config, *options, out=None, check=None, before=None):
    """Run our merge command in a process of its own; its exit status and what it prints."""
    file = write_config(folder, config) if isinstance(config, dict) else config
    done = run_command("merge", file, out or folder / "out", "--quiet", *options, before=before)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def error_of(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@contextmanager
def small_disk(folder, megabytes):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def pair(family):
    models = family("qwen3-tied", "fp32")
    return recipe(models.base, models.tuned[0])


def test_a_disk_that_is_too_small_is_seen_before_anything_is_computed(tmp_path, pair):
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "filler").write_bytes(b"x" * 900_000)
        done = merge(disk, pair, check=1)
        assert "the disk of" in error_of(done)
        assert "choose another disk" in error_of(done)
        assert not (disk / "out").exists()


def test_a_disk_that_fills_up_while_merging(tmp_path, pair):
    """Room for the weights, and not for what is written beside them."""
    with small_disk(tmp_path / "disk", 2) as disk:
        weights = os.path.getsize(os.path.join(pair["base_model"], "model.safetensors"))
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(b"x" * (free - weights - 12_000))
        done = merge(disk, pair, check=1)
        assert "is full" in error_of(done)
        assert not (disk / "out").exists()
        (disk / "filler").unlink()
        merge(disk, pair, "--resume", check=0)
        assert (disk / "out" / "model.safetensors").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path, pair):
    file = tmp_path / "file"
    file.write_text("")
    done = merge(tmp_path, pair, out=file / "out", check=1)
    assert "cannot be written to" in error_of(done)


def test_a_disk_that_may_only_be_read(tmp_path, pair):
    with small_disk(tmp_path / "disk", 2) as disk:
        file = write_config(disk, pair)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = merge(disk, file, check=1)
        assert "cannot be written to" in error_of(done)


def _hold(out):
    from mergekit_monosoup.checkpoint.work_folder import WorkFolder

    folder = WorkFolder(out)
    folder.open()
    print("held", flush=True)
    time.sleep(300)


def test_two_merges_into_one_folder(tmp_path, pair):
    holder = Command("merge", before=partial(_hold, tmp_path / "out"))
    while "held" not in holder.said():
        assert holder.poll() is None
        time.sleep(0.01)
    done = merge(tmp_path, pair, check=1)
    assert "another merge is writing to" in error_of(done)
    # A dead process holds no lock.
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    merge(tmp_path, pair, check=0)


def test_what_an_interrupted_merge_has_left_is_named_and_kept(tmp_path, pair):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "precious").write_text("mine")
    done = merge(tmp_path, pair, check=1)
    assert "--resume" in error_of(done)
    assert "--restart" in error_of(done)
    assert (partial / "precious").read_text() == "mine"
    assert "does not say what was begun" in error_of(merge(tmp_path, pair, "--resume", check=1))
    merge(tmp_path, pair, "--restart", check=0)
    assert not partial.exists()
    assert not (tmp_path / "out" / "precious").exists()


def interrupted(folder, config, *options, sig=signal.SIGKILL, after=1):
    """Start a merge and stop it once its journal has some lines; False where it was too quick."""
    file = write_config(folder, config)
    running = Command("merge", file, folder / "out", "--quiet", *options)
    journal = folder / "out.partial" / "monosoup_journal.jsonl"
    while running.poll() is None:
        if journal.exists() and journal.read_text().count("\n") > after:
            running.send_signal(sig)
            break
        time.sleep(0.002)
    _, said = running.communicate()
    return running.returncode, said


@pytest.fixture
def slow_pair(tmp_path):
    """A pair whose merge takes long enough to be interrupted in its middle."""
    from reliability_pair import write_slow_pair

    return write_slow_pair(tmp_path)


def test_ctrl_c_says_how_to_go_on(tmp_path, slow_pair):
    status, said = interrupted(tmp_path, slow_pair, sig=signal.SIGINT, after=0)
    assert status == 1
    # The second where the signal comes before the first tensor lies on the disk.
    assert "run the same command with --resume to go on" in said or "nothing was written" in said
    assert "Traceback" not in said
    merge(tmp_path, slow_pair, "--resume", check=0)


@pytest.mark.parametrize("what", ["recipe", "input", "option"])
def test_another_merge_is_not_gone_on_with(tmp_path, slow_pair, what):
    interrupted(tmp_path, slow_pair)
    options = ["--resume"]
    config = dict(slow_pair)
    if what == "recipe":
        config["parameters"] = {"alpha": 0.5}
    elif what == "input":
        folder = config["models"][0]["model"]
        os.utime(os.path.join(folder, "model.safetensors"), (1, 1))
    else:
        options += ["--out-shard-size", "1M"]
    said = error_of(merge(tmp_path, config, *options, check=1))
    wanted = {
        "recipe": "recipe has changed",
        "input": "model.safetensors has changed",
        "option": "out_shard_size",
    }
    assert wanted[what] in said
    assert "--restart" in said


def test_a_damaged_part_is_computed_again(tmp_path, slow_pair):
    expected = tmp_path / "expected"
    expected.mkdir()
    merge(expected, slow_pair, check=0)
    interrupted(tmp_path, slow_pair, after=30)
    partial = tmp_path / "out.partial"
    lines = (partial / "monosoup_journal.jsonl").read_text().splitlines()
    done = [json.loads(line)["tensor"] for line in lines[1:] if line.startswith('{"tensor"')]
    header = int.from_bytes((partial / "model" / "model.safetensors").open("rb").read(8), "little")
    content = json.loads((partial / "model" / "model.safetensors").open("rb").read(8 + header)[8:])
    with (partial / "model" / "model.safetensors").open("r+b") as stream:
        stream.seek(8 + header + content[done[0]]["data_offsets"][0])
        stream.write(b"\x00\x01\x02\x03")
    with (partial / "monosoup_journal.jsonl").open("a") as stream:
        stream.write('{"tensor": "model.layers')
    merge(tmp_path, slow_pair, "--resume", check=0)
    one, other = (f / "out" / "model.safetensors" for f in (expected, tmp_path))
    assert one.read_bytes() == other.read_bytes()


def test_overwrite_keeps_the_old_model_until_the_new_one_stands(tmp_path, slow_pair):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    interrupted(tmp_path, slow_pair, "--overwrite")
    assert (out / "old").read_text() == "old"
    merge(tmp_path, slow_pair, "--overwrite", "--resume", check=0)
    assert not (out / "old").exists()
    assert (out / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def _die_after_one_rename():
    from mergekit_monosoup.checkpoint import work_folder as folder

    rename = os.rename

    def killed(source, target):
        rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)

    folder.os.rename = killed


def test_killed_between_the_two_renames(tmp_path, pair):
    """The old model is put back by the next call, and the new one is gone on with."""
    out = tmp_path / "out"
    merge(tmp_path, pair, check=0)
    before = (out / "model.safetensors").read_bytes()
    config = {**pair, "parameters": {"alpha": 0.5}}
    file = write_config(tmp_path, config)
    dead = run_command("merge", file, out, "--overwrite", "--quiet", before=_die_after_one_rename)
    assert dead.returncode == -signal.SIGKILL
    assert not out.exists()
    done = merge(tmp_path, config, check=1)
    assert "not empty" in error_of(done)
    assert (out / "model.safetensors").read_bytes() == before
    merge(tmp_path, config, "--overwrite", "--resume", check=0)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_a_shard_that_is_cut_off(tmp_path, family):
    models = family("qwen3-tied", "fp32")
    tuned = copy_with_tensors(models.tuned[0], tmp_path / "cut", load_tensors(models.tuned[0]))
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = merge(tmp_path, recipe(models.base, tuned), check=1)
    assert "cut off" in error_of(done)


def test_an_input_that_is_replaced_while_merging(tmp_path, slow_pair):
    file = write_config(tmp_path, slow_pair)
    running = Command("merge", file, tmp_path / "out", "--quiet")
    journal = tmp_path / "out.partial" / "monosoup_journal.jsonl"
    while running.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 1):
        time.sleep(0.002)
    weights = os.path.join(slow_pair["models"][0]["model"], "model.safetensors")
    save_file({n: t + 1 for n, t in load_file(weights).items()}, weights + ".new", metadata={"format": "pt"})
    os.replace(weights + ".new", weights)
    _, said = running.communicate()
    assert running.returncode == 1
    assert "model.safetensors" in said
    assert "was changed while it was merged" in said
    assert not (tmp_path / "out").exists()


def _little_memory():
    import mergekit_monosoup.merging.run
    import mergekit_monosoup.methods.monosoup  # noqa: F401

    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) for line in lines if line.startswith("VmSize"))
    limit = (held + (24 << 10)) << 10
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_too_little_memory(tmp_path, slow_pair):
    """An address space that Python and the libraries fit into, and the merge does not."""
    done = merge(tmp_path, slow_pair, before=_little_memory, check=1)
    assert "there is not enough memory" in error_of(done)


def test_a_device_that_runs_out_of_memory(tmp_path, pair, caplog, monkeypatch):
    """The unit is computed on the CPU, and a line says so."""
    from mergekit.options import MergeOptions

    from mergekit_monosoup.merging import units
    from mergekit_monosoup.merging.run import merge_to_folder

    compute, tried = units.host.run_task, []

    def scarce(task, *arguments, math_device="cpu", **options):
        tried.append(str(math_device))
        if str(math_device) != "cpu":
            raise torch.OutOfMemoryError("out of memory")
        return compute(task, *arguments, math_device=math_device, **options)

    monkeypatch.setattr(units.host, "run_task", scarce)
    text = write_config(tmp_path, pair).read_text()
    merge_to_folder(text, tmp_path / "out", MergeOptions(device="meta", quiet=True))
    assert set(tried) == {"meta", "cpu"}
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(said) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_decomposition_that_does_not_converge(tmp_path, pair, monkeypatch):
    from mergekit.options import MergeOptions

    from mergekit_monosoup.errors import InputError
    from mergekit_monosoup.merging.run import merge_to_folder
    from mergekit_monosoup.methods import editing

    def failing(*_arguments):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(editing, "edit_weight", failing)
    text = write_config(tmp_path, pair).read_text()
    with pytest.raises(InputError, match=r"tensor model\.\S+: its decomposition failed .*spectrum: svd"):
        merge_to_folder(text, tmp_path / "out", MergeOptions(quiet=True))


def test_a_hub_that_cannot_be_reached(tmp_path, pair):
    config = {**pair, "models": [{"model": "nobody/no-such-model-anywhere"}]}
    done = merge(tmp_path, config, check=1)
    assert "the Hub cannot be reached" in error_of(done)
