"""The journal: torn at any byte, damaged anywhere else, of another run, killed at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
from disks import small_disk

from mergekit_monosoup.errors import ConfigurationError, InputError, OutputError
from mergekit_monosoup.merging import journal as journals
from mergekit_monosoup.merging.journal import Done, Journal

FINGERPRINT = {
    "recipe": "merge_method: monosoup\n",
    "input": {"base": {"model.safetensors": [10, 20]}, "tuned": {"model.safetensors": [10, 21]}},
    "options": {"random_seed": None, "out_shard_size": 5},
    "version": {"torch": "2.13"},
}
RESULTS = [Done(f"layer\n{i}", f"{i:064x}", {"tensor": f"é{i}", "k": i} if i % 2 else None) for i in range(4)]


def filled(file):
    journal = Journal(file, FINGERPRINT)
    for done in RESULTS:
        journal.add(done)
    journal.note("a sentence")
    journal.close()
    return file.read_bytes()


def test_what_was_added_is_there(tmp_path):
    filled(tmp_path / "j")
    journal = Journal.resume(tmp_path / "j", FINGERPRINT)
    assert list(journal.kept.values()) == RESULTS
    assert journal.notes == ["a sentence"]
    journal.note("a sentence")
    journal.add(Done("more", "0"))
    journal.add(Done("layer\n0", "again"))
    journal.close()
    journal.close()
    again = Journal.resume(tmp_path / "j", FINGERPRINT)
    assert len(again.kept) == 5
    assert again.kept["layer\n0"].sha256 == "again"
    assert again.notes == ["a sentence"]


def test_torn_at_every_byte(tmp_path):
    """Whole lines are kept, the rest is cut off, and the next line does not grow onto it."""
    file = tmp_path / "j"
    content = filled(file)
    for length in range(len(content) + 1):
        for tail in (b"", bytes(5)):
            file.write_bytes(content[:length] + tail)
            whole = max(0, content[:length].count(b"\n") - 1)
            journal = Journal.resume(file, FINGERPRINT)
            assert list(journal.kept.values()) == RESULTS[:whole]
            journal.add(Done("next", "1"))
            journal.close()
            assert list(Journal.resume(file, FINGERPRINT).kept.values()) == [
                *RESULTS[:whole],
                Done("next", "1"),
            ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        '{"tensor": 1}',
        '{"tensor": "a", "sha256": "0", "record": []}',
        "\x00\x00",
        "[" * 10**5,
    ],
)
@pytest.mark.parametrize("number", [1, 3, 6])
def test_damage_names_file_and_line(tmp_path, line, number):
    file = tmp_path / "j"
    lines = filled(file).decode().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=rf"j, line {number} .*--restart"):
        Journal.resume(file, FINGERPRINT)
    assert file.read_text() == "\n".join(lines) + "\n", "nothing is deleted in silence"


def changed(**changes):
    return json.loads(json.dumps(FINGERPRINT)) | changes


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (changed(recipe="merge_method: linear\n"), "recipe has changed"),
        (changed(version={"torch": "2.14"}), "version, torch was 2.13 and is 2.14"),
        (changed(options={"random_seed": 3, "out_shard_size": 5}), "options, random_seed was None and is 3"),
        (changed(options={"random_seed": None}), "options, out_shard_size is gone"),
        (changed(device="cuda"), "device is new"),
        (
            changed(input={**FINGERPRINT["input"], "tuned": {"model.safetensors": [11, 21]}}),
            "input, tuned, model.safetensors has changed",
        ),
    ],
)
def test_another_run_is_refused_in_a_sentence(tmp_path, other, said):
    content = filled(tmp_path / "j")
    with pytest.raises(ConfigurationError) as caught:
        Journal.resume(tmp_path / "j", other)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "j").read_bytes() == content


def test_bytes_that_do_not_match_are_done_again(tmp_path):
    filled(tmp_path / "j")
    journal = Journal.resume(tmp_path / "j", FINGERPRINT)
    stored = {done.tensor: done.sha256 for done in RESULTS} | {RESULTS[2].tensor: "other"}
    looked = []
    assert journal.recheck(stored.__getitem__, looked.append) == [RESULTS[2].tensor]
    assert looked == list(stored)
    assert list(journal.kept.values()) == [RESULTS[0], RESULTS[1], RESULTS[3]]


def test_no_line_before_its_bytes(tmp_path, monkeypatch):
    """From many threads: whatever the file says, a later sync had seen the bytes of."""
    monkeypatch.setattr(journals, "_SECONDS", 0.0)
    file = tmp_path / "j"
    written, durable = set(), set()
    lock = threading.Lock()

    def sync():
        with lock:
            seen = set(written)
        time.sleep(0.001)
        durable.update(seen)
        check()

    def check():
        lines = file.read_bytes().splitlines()[1:]
        assert {json.loads(line)["tensor"] for line in lines} <= durable

    journal = Journal(file, FINGERPRINT, sync)

    def work(part):
        for i in range(50):
            name = f"{part}.{i}"
            with lock:
                written.add(name)
            journal.add(Done(name, "0"))

    threads = [threading.Thread(target=work, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    check()
    assert Journal.resume(file, FINGERPRINT).kept.keys() == written


def test_lines_share_the_wait_for_the_disk(tmp_path):
    calls = []
    journal = Journal(tmp_path / "j", FINGERPRINT, lambda: calls.append(1))
    for i in range(1000):
        journal.add(Done(str(i), "0"))
    journal.close()
    assert len(calls) < 10
    assert len(Journal.resume(tmp_path / "j", FINGERPRINT).kept) == 1000


def test_after_a_failed_sync_nothing_is_promised(tmp_path):
    """A disk may drop what it failed to write and call the next sync a success."""
    fail = True

    def sync():
        if fail:
            raise OutputError("the disk is broken")

    journal = Journal(tmp_path / "j", FINGERPRINT, sync)
    journal.add(Done("a", "0"))
    with pytest.raises(OutputError, match="broken"):
        journal.flush()
    fail = False
    journal.add(Done("b", "0"))
    journal.close()
    assert not Journal.resume(tmp_path / "j", FINGERPRINT).kept


def test_no_permission_and_no_folder(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "j", FINGERPRINT)


def test_a_full_disk(tmp_path):
    """A sentence; what was there can be gone on with when there is room again."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        journal = Journal(disk / "j", FINGERPRINT)
        journal.add(RESULTS[0])
        journal.flush()
        (disk / "other").write_bytes(bytes(50_000))
        journal.add(Done("large", "0", {"text": "x" * 20_000}))
        with pytest.raises(OutputError, match=r"the disk of .*j is full: .* free; make room"):
            journal.flush()
        journal.close()
        (disk / "other").unlink()
        again = Journal.resume(disk / "j", FINGERPRINT)
        assert list(again.kept.values()) == [RESULTS[0]]
        again.close()


WORKER = """
import sys, torch
from pathlib import Path
from mergekit_monosoup.merging.journal import Done, Journal
from mergekit_monosoup.merging import journal
from mergekit_monosoup.merging.layout import plan_layout
from mergekit_monosoup.merging.writer import Writer
journal._SECONDS = 0.0
root = Path(sys.argv[1])
layout = plan_layout(((f"t{i}", (300, 300), "float32") for i in range(60)), 10**6)
if (root / "j").exists():
    writer = Writer.reopen(root, layout)
    notes = Journal.resume(root / "j", {"recipe": "r"}, writer.sync)
    assert not notes.recheck(writer.stored_hash), "the journal promises what is not there"
else:
    writer = Writer.create(root, layout)
    notes = Journal(root / "j", {"recipe": "r"}, writer.sync)
print("ready", len(notes.kept), flush=True)
for name in layout.slots:
    if name not in notes.kept:
        torch.manual_seed(int(name[1:]))
        value = torch.randn(300, 300)
        notes.add(Done(name, writer.write(name, value)))
        print(name, flush=True)
notes.close()
writer.finish()
print("finished", flush=True)
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """SIGKILL at several points of a run; the result is that of a run that nobody has killed."""

    def start(folder):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", WORKER, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert "finished" in whole.communicate()[0]
    kept = []
    for lines in (7, 15):
        process = start(tmp_path / "killed")
        kept.append(int(process.stdout.readline().split()[1]))
        for _ in range(lines):
            process.stdout.readline()
        process.kill()
        process.communicate()
    process = start(tmp_path / "killed")
    output = process.communicate()[0]
    assert "finished" in output
    kept.append(int(output.split()[1]))
    assert 0 == kept[0] < kept[1] < kept[2]
    files = {file.name for file in (tmp_path / "whole").iterdir()} - {"j"}
    assert files == {file.name for file in (tmp_path / "killed").iterdir()} - {"j"}
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
