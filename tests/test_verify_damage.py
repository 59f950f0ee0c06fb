"""What `verify` and `push` find: damage of every kind, all of it, in a line each and in bounded time."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import time

import pytest
import torch
from verified import command, problems, reported_model, rewrite, single_file

from mergekit_monosoup.errors import InputError
from mergekit_monosoup.publishing import check_folder

model = pytest.fixture(reported_model)
single = pytest.fixture(single_file)


def header(entries):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {
    "empty": b"",
    "short": b"\x01\x02",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "longest header": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header of zero bytes": struct.pack("<Q", 0),
    "no JSON": header(b"{" * 50),
    "no mapping": header(b"[]"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "deep": header(b"[" * 500_000),
    "deep mapping": header(b'{"a":' * 300_000),
    "overlap": header({"a": entry(0, 8), "b": entry(4, 12)}) + bytes(12),
    "hole": header({"a": entry(0, 8), "b": entry(16, 24)}) + bytes(24),
    "the same range twice": header({"a": entry(0, 8), "b": entry(0, 8)}) + bytes(8),
    "backwards": header({"a": entry(8, 0)}) + bytes(8),
    "negative": header({"a": entry(-8, 0)}) + bytes(8),
    "beyond the end": header({"a": entry(0, 8)}) + bytes(4),
    "more than said": header({"a": entry(0, 8)}) + bytes(12),
    "absurd shape": header({"a": entry(0, 8, (2**62, 2**62))}) + bytes(8),
    "overflowing shape": header({"a": entry(0, 8, (2**32, 2**32, 2))}) + bytes(8),
    "absurd integers": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}')
    + bytes(8),
    "negative shape": header({"a": entry(0, 8, (-1, -2))}) + bytes(8),
    "shape and range": header({"a": entry(0, 8, (3,))}) + bytes(8),
    "unknown dtype": header({"a": entry(0, 8, dtype="X9")}) + bytes(8),
    "wrong types": header({"a": {"dtype": 1, "shape": "x", "data_offsets": None}}),
    "no tensors": header({"__metadata__": {"format": "pt"}}),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_files_are_a_line(single, kind, sharded):
    (single / "model.safetensors").write_bytes(DAMAGED[kind])
    if sharded:
        (single / "model-00001-of-00001.safetensors").write_bytes(DAMAGED[kind])
        (single / "model.safetensors").unlink()
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (single / "model.safetensors.index.json").write_text(json.dumps(index))
    started = time.monotonic()
    result = command(single)
    assert time.monotonic() - started < 10
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert ".safetensors" in line
    assert len(line) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 5}}',
        b"\xff\xfe",
        b"[" * 500_000,
        b"null",
    ],
)
def test_damaged_indexes_are_a_line(single, content):
    (single / "model.safetensors").unlink()
    (single / "model.safetensors.index.json").write_bytes(content)
    result = command(single)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "index" in line


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a\\b.safetensors", "x.bin", "", "."]
)
def test_an_index_cannot_lead_elsewhere(single, tmp_path, file):
    (single / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    (line,) = problems(single)
    assert "no file of the same folder" in line or "no shard" in line


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"kind": "header"}', "\x00", "[" * 500_000])
def test_damaged_reports_are_a_line(single, content):
    (single / "monosoup_report.jsonl").write_text(content)
    (line,) = problems(single)
    assert "monosoup_report.jsonl" in line


@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "[" * 500_000, '{"model_type": 5}', '{"hidden_size": "x", "model_type": "qwen3"}'],
)
def test_damaged_configurations_are_a_line(single, content):
    (single / "config.json").write_text(content)
    (line,) = problems(single)
    assert "config.json" in line


def test_code_of_a_model_is_not_run(single, tmp_path):
    config = json.loads((single / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (single / "config.json").write_text(json.dumps(config))
    (single / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    assert problems(single) == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "monosoup_report.jsonl", "model.safetensors.index.json"]
)
def test_pipes_and_devices_are_not_read(single, name):
    """Reading them would wait for ever, or never end."""
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (single / name).unlink(missing_ok=True)
        make(single / name)
        found = problems(single)
        assert any(name in line for line in found)


def test_names_with_control_characters(single):
    """A name cannot write lines or colours into somebody's terminal."""
    name = "a\n\x1b[31m\u202eb"
    rewrite(single, lambda t: t.update({name: torch.tensor(math.nan)}))
    (line,) = problems(single)
    assert line.isprintable()
    assert "\\n\\x1b[31m\\u202eb" in line


def test_bytes_that_change(model):
    """One bit anywhere in any file of weights is found."""
    generator = random.Random(1)
    for file in sorted(model.glob("*.safetensors")):
        whole = file.read_bytes()
        for _ in range(12):
            damaged = bytearray(whole)
            place = generator.randrange(len(whole))
            damaged[place] ^= 1 << generator.randrange(8)
            file.write_bytes(damaged)
            length = struct.unpack("<Q", whole[:8])[0]
            padded = whole[8 : 8 + length]
            if place >= 8 + length or place < 8:
                assert problems(model), place
            else:
                # In the header a changed name, shape or range is found; a changed dtype of the same width,
                # metadata or white space need not be.
                assert isinstance(problems(model), list), padded
        file.write_bytes(whole)
    assert problems(model) == []


def test_unfinished_and_missing_folders(tmp_path, single):
    (line,) = problems(tmp_path / "nowhere")
    assert "is not a folder" in line
    shutil.copytree(single, tmp_path / "out.partial" / "model")
    for folder in (tmp_path / "out.partial", tmp_path / "out.partial" / "model"):
        (line,) = problems(folder)
        assert "--resume" in line
    assert command(tmp_path / "nowhere").exit_code == 1


def test_pickled_and_missing_weights(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    (line,) = problems(single)
    assert "pickled" in line
    (single / "pytorch_model.bin").unlink()
    (line,) = problems(single)
    assert "holds no weights" in line


def test_links_out_of_the_folder_are_not_pushed(single, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (single / "notes.txt").symlink_to(secret)
    (single / "inside.txt").symlink_to(single / "config.json")
    assert problems(single) == []
    with pytest.raises(InputError, match=r"notes\.txt is a link out of the folder"):
        check_folder(single)
