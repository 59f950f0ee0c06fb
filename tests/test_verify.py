"""What `verify` says of whole models, of values and of what is computed again."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from checkpoints import copy_with_tensors, load_tensors
from commands import ROOT
from safetensors.torch import save_file
from verified import NAME, command, problems, reported_model, rewrite, sha256, single_file, write_report

from mergekit_monosoup.checkpoint.headers import DTYPES
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.layout import plan_layout
from mergekit_monosoup.merging.verify import verify_folder
from mergekit_monosoup.merging.writer import Writer
from mergekit_monosoup.publishing import check_folder

model = pytest.fixture(reported_model)
single = pytest.fixture(single_file)


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
import sys, time, torch
from pathlib import Path
sys.path.insert(0, "tests")
from own_memory import peak_bytes
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
print(time.process_time() - started, peak_bytes() / 1e9, found.tensors)
assert found.problems == [], found.problems[:3]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "many"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
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
    from safetensors.torch import load_file

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
