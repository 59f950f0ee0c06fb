"""`mergekit-monosoup lora` on adapters that peft wrote, read back by peft."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from adapters import KINDS, base_model, load_adapter, make_adapter, updates
from lora_edits import compare, edit, oracle_edit, refuse, run, truncated
from oracle import monosoup_update
from safetensors import safe_open
from safetensors.torch import load_file

FACTOR_KINDS = [k for k in KINDS if k not in ("saved-modules", "trained-biases")]


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize("options", [{}, {"energy": 0.8}], ids=["automatic", "threshold"])
def test_every_linear_kind_equals_the_oracle(kind, options, tmp_path):
    source = make_adapter(kind, tmp_path / "in")
    edit(source, tmp_path / "out", *[part for k, v in options.items() for part in (f"--{k}", v)])
    before, after = updates(load_adapter(kind, source)), updates(load_adapter(kind, tmp_path / "out"))
    assert len(before) >= 3
    compare(after, {n: oracle_edit(dw, **options) for n, dw in before.items()}, 1e-5)


@pytest.mark.parametrize("kind", ["plain", "embeddings", "experts-qwen3", "conv1d-gpt2"])
def test_the_file_has_the_same_form(kind, tmp_path):
    source = make_adapter(kind, tmp_path / "in", dtype=torch.bfloat16)
    edit(source, tmp_path / "out")
    config, edited_config = (
        json.loads((f / "adapter_config.json").read_text()) for f in (source, tmp_path / "out")
    )
    assert config == edited_config
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    for key in before:
        if "lora_A" in key or "lora_embedding_A" in key:
            assert torch.equal(before[key], after[key])
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["mergekit_monosoup"])["adapters"] == [source.name]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "monosoup_edit.json",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_rounded_once(dtype, tmp_path):
    source = make_adapter("plain", tmp_path / "in", dtype=dtype)
    edit(source, tmp_path / "out")
    keys = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key in keys:
        if "lora_B" not in key:
            continue
        b, a = keys[key].double(), keys[key.replace("lora_B", "lora_A")].double()
        want, _ = monosoup_update((b @ a).numpy())
        got = (after[key].double() @ a).numpy()
        # One rounding of B: half a spacing of each entry, summed over the rank.
        bound = torch.finfo(dtype).eps / 2 * (after[key].double().abs() @ a.abs()).numpy()
        assert (np.abs(got - want) <= bound * 1.01 + 1e-7).all()


def test_the_adapted_model_is_base_plus_edited_update(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    edit(source, tmp_path / "out", "--alpha", 0.5)
    before = updates(load_adapter("plain", source))
    merged = load_adapter("plain", tmp_path / "out").merge_and_unload().state_dict()
    base = base_model("plain").state_dict()
    touched = set()
    for name, dw in before.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        want = base[key].double().numpy() + 0.5 * oracle_edit(dw)
        assert np.abs(merged[key].double().numpy() - want).max() <= 1e-5 * np.abs(want).max()
        touched.add(key)
    assert all(torch.equal(merged[key], base[key]) for key in base.keys() - touched)


@pytest.mark.parametrize("mixing", ["high", "low", "uniform", "decay", "alignment"])
def test_ablations(mixing, tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    edit(source, tmp_path / "out", "--mixing", mixing)
    before, after = updates(load_adapter("plain", source)), updates(load_adapter("plain", tmp_path / "out"))
    for name, dw in before.items():
        want = oracle_edit(dw, mixing=mixing)
        error = np.abs(after[name].double().numpy() - want).max()
        assert error <= 1e-5 * float(dw.abs().max()), name


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank-pattern", "experts-qwen3", "embeddings"])
def test_a_smaller_rank(kind, tmp_path):
    source = make_adapter(kind, tmp_path / "in")
    edit(source, tmp_path / "out", "--rank", 2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["rank_pattern"] == {}
    before, after = updates(load_adapter(kind, source)), updates(load_adapter(kind, tmp_path / "out"))
    compare(after, {n: truncated(oracle_edit(dw), 2) for n, dw in before.items()}, 1e-5)
    report = json.loads((tmp_path / "out" / "monosoup_edit.json").read_text())
    for module in report["modules"]:
        name = "base_model.model." + module["module"]
        want = oracle_edit(before[name])
        error = np.linalg.norm(after[name].numpy() - want) / np.linalg.norm(want)
        assert module["truncation_error"] == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "rslora", "experts-qwen3", "alpha-pattern", "convolutions"])
@pytest.mark.parametrize("rank", ["auto", "0.9"])
def test_a_rank_for_each_module(kind, rank, tmp_path):
    source = make_adapter(kind, tmp_path / "in")
    edit(source, tmp_path / "out", "--rank", rank)
    before, after = updates(load_adapter(kind, source)), updates(load_adapter(kind, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "monosoup_edit.json").read_text())
    ranks = {f"base_model.model.{m['module']}": m["rank"] for m in report["modules"]}
    errors = []
    for name, dw in before.items():
        want = oracle_edit(dw).reshape(*((-1,) if dw.ndim != 3 or kind == "convolutions" else dw.shape))
        if want.ndim == 1:
            want = want.reshape(dw.shape[0], -1)
        got = after[name].double().numpy().reshape(want.shape)
        expected = truncated(want, ranks[name])
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(want).max(), name
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    if rank == "0.9":
        assert max(errors) <= math.sqrt(0.1) + 1e-6


def test_several_adapters_are_averaged_first(tmp_path):
    one = make_adapter("plain", tmp_path / "one", seed=1)
    two = make_adapter(
        "plain", tmp_path / "two", seed=2, r=3, lora_alpha=9, target_modules=["q_proj", "k_proj"]
    )
    edit(one, two, tmp_path / "out")
    first, second = updates(load_adapter("plain", one)), updates(load_adapter("plain", two))
    zero = dict.fromkeys(first.keys() | second.keys(), 0.0)
    means = {n: (first.get(n, 0.0) + second.get(n, 0.0)) / 2 for n in zero}
    loaded = load_adapter("plain", tmp_path / "out")
    compare(updates(loaded), {n: oracle_edit(dw) for n, dw in means.items()}, 1e-5)
    edit(one, two, tmp_path / "small", "--rank", 3)
    small = updates(load_adapter("plain", tmp_path / "small"))
    compare(small, {n: truncated(oracle_edit(dw), 3) for n, dw in means.items()}, 1e-5)


def test_stacks_of_experts_are_averaged_too(tmp_path):
    paths = [make_adapter("experts-qwen3", tmp_path / str(i), seed=i) for i in (1, 2, 3)]
    edit(*paths, tmp_path / "out")
    before = [updates(load_adapter("experts-qwen3", p)) for p in paths]
    means = {n: sum(b[n] for b in before) / 3 for n in before[0]}
    compare(
        updates(load_adapter("experts-qwen3", tmp_path / "out")),
        {n: oracle_edit(dw) for n, dw in means.items()},
        1e-5,
    )


def test_tokenizer_files_come_along(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "optimizer.pt").write_text("not this")
    edit(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_bin_files_are_read_without_objects(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    tensors = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save(tensors, source / "adapter_model.bin")
    edit(source, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_output_is_not_replaced_unasked(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    out = tmp_path / "out"
    shutil.copytree(source, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    result = run(source, out)
    assert result.exit_code == 1
    assert "--overwrite" in result.output
    assert (out / "adapter_model.safetensors").read_bytes() == before
    edit(source, out, "--overwrite")
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_an_interrupted_command_has_left_is_named_and_kept(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    left = tmp_path / "out.partial" / "model" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("of a merge")
    result = run(source, tmp_path / "out")
    assert result.exit_code == 1
    assert "out.partial is what an interrupted command has left" in result.output
    assert left.read_text() == "of a merge"
    assert not (tmp_path / "out").exists()


def test_adapters_of_the_hub_are_found_in_its_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--adapter"
    make_adapter("plain", repository / "snapshots" / commit)
    for name in ("main", "v2"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in ("someone/adapter", "someone/adapter@v2"):
        edit(source, tmp_path / source.replace("/", "-"))
    report = json.loads((tmp_path / "someone-adapter@v2" / "monosoup_edit.json").read_text())
    assert report["adapters"] == ["someone/adapter@v2"]
    refuse(Path("someone/other"), tmp_path / "out", "someone/other", "neither a local folder")


def test_summary_and_quiet(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    result = edit(source, tmp_path / "out", "--rank", 2)
    for word in ("9 modules", "effective rank", "lambda_high", "error of the smaller rank", "Wrote"):
        assert word in result.output
    assert edit(source, tmp_path / "again", "--quiet").output == ""


def test_an_adapter_that_changes_nothing(tmp_path):
    peft.get_peft_model(base_model("plain"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "in"
    )
    result = edit(tmp_path / "in", tmp_path / "out", "--rank", "auto")
    assert "3 modules, 3 of them without any update" in result.output
    assert not any(dw.any() for dw in updates(load_adapter("plain", tmp_path / "out")).values())
