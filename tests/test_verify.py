"""What `verify` and `push` find: damage of every kind, all of it, in a line each and in bounded time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import copy_with_tensors, load_tensors
from click.testing import CliRunner
from safetensors.torch import save_file

from mergekit_monosoup.checkpoint.headers import DTYPES
from mergekit_monosoup.cli import main
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.layout import plan_layout
from mergekit_monosoup.merging.verify import verify_folder
from mergekit_monosoup.merging.writer import Writer
from mergekit_monosoup.publishing import check_folder
from mergekit_monosoup.report.recorder import new_header
from mergekit_monosoup.report.schema import TensorRecord

NAME = "model.layers.1.mlp.up_proj.weight"


def sha256(tensor):
    return hashlib.sha256(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())).hexdigest()


def write_report(folder, tensors, **changes):
    lines = [new_header(method="monosoup").model_dump_json()]
    for name, tensor in tensors.items():
        record = TensorRecord(
            tensor=name,
            shape=tuple(tensor.shape),
            dtype="bfloat16",
            action="kept",
            sha256=changes.get(name, sha256(tensor)),
        )
        lines.append(record.line())
    (folder / "monosoup_report.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def model(tmp_path, family):
    """A sharded model with a report."""
    source = family("qwen3-tied", "bf16", max_shard_size="30KB").tuned[0]
    shutil.copytree(source, tmp_path / "model")
    write_report(tmp_path / "model", load_tensors(source))
    return tmp_path / "model"


@pytest.fixture
def single(tmp_path, family):
    source = family("qwen3-tied", "bf16").tuned[0]
    shutil.copytree(source, tmp_path / "single")
    return tmp_path / "single"


def command(*arguments):
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def problems(folder):
    return verify_folder(folder).problems


def test_a_whole_model(model):
    looked = []
    found = verify_folder(model, seen=lambda name, size: looked.append((name, size)))
    tensors = load_tensors(model)
    assert found.problems == []
    assert found.tensors == found.hashed == len(tensors)
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert sorted(looked) == sorted((name, t.nbytes) for name, t in tensors.items())
    result = command(model)
    assert result.exit_code == 0
    assert f"{len(tensors)} tensors" in result.output
    assert "the hashes of all of them are those of the report" in result.output
    assert command(model, "--quiet").output == ""


def test_a_model_without_a_report(single):
    result = command(single)
    assert result.exit_code == 0
    assert "complete and finite\n" in result.output


def test_every_problem_is_a_line(model):
    tensors = load_tensors(model)
    names = list(tensors)
    write_report(model, tensors, **{names[3]: "0" * 64, names[5]: "1" * 64})
    shards = sorted(model.glob("*.safetensors"))
    index = json.loads((model / "model.safetensors.index.json").read_text())
    gone = [name for name, file in index["weight_map"].items() if file == shards[-1].name]
    shards[-1].unlink()
    (model / "model-00009-of-00009.safetensors").write_bytes(shards[0].read_bytes())
    (model / "config.json").write_text("{")
    result = command(model)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    wrong = [name for name in (names[3], names[5]) if name not in gone]
    assert len(lines) == 3 + len(wrong) + len(gone)
    for words in (
        ["config.json", "JSON"],
        [shards[-1].name, "missing"],
        ["model-00009-of-00009", "not in the index"],
    ):
        assert any(all(word in line for word in words) for line in lines)
    for name in wrong:
        assert any(name in line and "not what monosoup_report.jsonl says" in line for line in lines)
    with pytest.raises(InputError) as caught:
        check_folder(model)
    assert len(str(caught.value).splitlines()) == len(lines)


def rewrite(model, change):
    tensors = load_tensors(model)
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(single, dtype, value):
    """In a scalar as in a large tensor; large finite values of any dtype are none."""
    kind = getattr(torch, dtype)
    large = torch.full((1000, 1500), torch.finfo(kind).max, dtype=torch.float64).to(kind)
    rewrite(single, lambda t: t.update(large=large, also=torch.tensor(1.0).to(kind)))
    assert problems(single) == []
    bad = torch.tensor(value).to(kind)
    if not bool(torch.isfinite(bad.double())):
        tail = large.clone()
        tail.view(-1)[-1] = bad
        rewrite(single, lambda t: t.update(large=tail, also=bad))
        found = problems(single)
        assert len(found) == 2
        assert "tensor also" in found[0] + found[1]
        assert "tensor large" in found[0] + found[1]
        assert all("holds NaN or infinity" in problem for problem in found)


def test_all_dtypes_are_read(single):
    extra = {}
    for name, _ in DTYPES.values():
        if hasattr(torch, name):
            extra[f"t.{name}"] = torch.zeros(16, dtype=torch.uint8).view(getattr(torch, name))
    extra["complex"] = torch.zeros(2, dtype=torch.complex64)
    rewrite(single, lambda t: t.update(extra))
    assert problems(single) == []


def test_missing_and_unknown_tensors_of_the_report(model):
    tensors = load_tensors(model)
    renamed = {**tensors, "other": tensors[NAME]}
    del renamed[NAME]
    write_report(model, renamed)
    found = problems(model)
    assert len(found) == 2
    assert f"tensor {NAME}" in found[0]
    assert "is not in monosoup_report.jsonl" in found[0]
    assert "tensor other is missing" in found[1]


def test_sub_folders(single):
    """Each with weights of its own, as sentence-transformers has them."""
    layout = plan_layout([("linear.weight", (4, 4), "float32"), ("b", (9,), "float32")], 64, folder="2_Dense")
    writer = Writer.create(single, layout)
    writer.write("2_Dense/linear.weight", torch.ones(4, 4))
    writer.write("2_Dense/b", torch.ones(9))
    writer.finish()
    tensors = load_tensors(single)
    write_report(single, tensors | {"2_Dense/linear.weight": torch.ones(4, 4), "2_Dense/b": torch.ones(9)})
    found = verify_folder(single)
    assert found.problems == []
    assert found.hashed == len(tensors) + 2
    writer.write("2_Dense/b", torch.zeros(9))
    (problem,) = problems(single)
    assert "2_Dense/b" in problem


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


def test_recompute(model):
    tensors = load_tensors(model)
    asked = []

    def recompute(names):
        asked.extend(names)
        for name in names:
            yield name, sha256(tensors[name])

    found = verify_folder(model, recompute=recompute, count=4, seed=7)
    assert found.problems == []
    assert found.recomputed == len(set(asked)) == 4
    first = list(asked)
    asked.clear()
    verify_folder(model, recompute=recompute, count=4, seed=7)
    assert asked == first
    asked.clear()
    assert verify_folder(model, recompute=recompute, count=10**6).recomputed == len(tensors)

    def other(names):
        yield names[0], "0"

    lines = verify_folder(model, recompute=other, count=2, seed=7).problems
    assert len(lines) == 2
    assert f"tensor {first[0]} " in lines[0]
    assert "is not what the inputs give" in lines[0]
    assert "cannot be computed again" in lines[1]


@pytest.mark.slow
def test_a_million_tensors_of_one_entry(tmp_path, single):
    """In seconds, and in memory for their names."""
    copy_with_tensors(single, tmp_path / "many", {})
    code = """
import resource, sys, time, torch
from pathlib import Path
from mergekit_monosoup.merging.layout import plan_layout
from mergekit_monosoup.merging.writer import Writer
from mergekit_monosoup.merging.verify import verify_folder
folder = Path(sys.argv[1])
(folder / "model.safetensors").unlink()
layout = plan_layout(((f"l.{i}", (1,), "bfloat16") for i in range(1_000_000)), 0)
Writer.create(folder, layout).finish()
del layout
started = time.process_time()
found = verify_folder(folder)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, found.tensors)
assert found.problems == [], found.problems[:3]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "many"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, gigabytes, count = map(float, done.stdout.split())
    assert count == 1_000_000
    assert seconds < 30
    assert gigabytes < 2.5


@pytest.mark.slow
def test_tensors_are_computed_again_from_the_inputs(tmp_path, family):
    """By the command: a whole model, and one whose report was made to fit a changed tensor."""
    from commands import recipe, run, write_config
    from safetensors.torch import load_file, save_file

    models = family("qwen3-tied", "bf16")
    config = write_config(tmp_path, recipe(models.base, models.tuned[0]))
    command = [sys.executable, "-m", "mergekit_monosoup"]
    run([*command, "merge", str(config), "out", "--quiet"], tmp_path)
    done = run([*command, "verify", "out", "--recompute", "5"], tmp_path)
    assert "5 computed again, to the same bytes" in done.stdout
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "out" / "monosoup_report.jsonl").unlink()
    done = run([*command, "verify", "out", "--recompute", "5"], tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout.count("is not what the inputs give when it is computed again") == 5
