"""The folders that hold merged adapters: used again if whole, never if half-written or stale."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from lora_merges import lora_warnings, merge, merged, recipe, write_base
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_monosoup.lora.cache import MARKER

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")


# What is not linear is merged by peft; nothing is left to say of its factors.
BY_MERGE = {"exact_lora": False}


def _place(tmp_path: Path) -> Path:
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    return folder


def test_a_finished_merge_is_used_again(tmp_path, caplog):
    base, adapter = (
        write_base("plain", tmp_path / "base"),
        make_adapter("plain", tmp_path / "adapter", use_dora=True),
    )
    merged(tmp_path, recipe(base, f"{base}+{adapter}", parameters=BY_MERGE))
    before = os.stat(_place(tmp_path) / "model.safetensors").st_mtime_ns
    assert (_place(tmp_path) / MARKER).is_file()
    with caplog.at_level(logging.WARNING):
        merged(tmp_path, recipe(base, f"{base}+{adapter}", parameters=BY_MERGE), "again")
    assert lora_warnings(caplog) == []
    assert os.stat(_place(tmp_path) / "model.safetensors").st_mtime_ns == before


def _interrupt(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_interrupt, "no marker"),
        (lambda folder: (folder / MARKER).unlink(), "no marker"),
        (lambda folder: (folder / MARKER).write_text("{"), "damaged marker"),
        (lambda folder: (folder / "model.safetensors").unlink(), "incomplete"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (_truncate, "incomplete"),
    ],
    ids=["interrupted", "without marker", "broken marker", "without weights", "without config", "cut off"],
)
def test_half_written_folders_are_merged_again(damage, word, tmp_path, caplog):
    base, adapter = (
        write_base("plain", tmp_path / "base"),
        make_adapter("plain", tmp_path / "adapter", use_dora=True),
    )
    config = recipe(base, f"{base}+{adapter}", parameters=BY_MERGE)
    want = merged(tmp_path, config)
    damage(_place(tmp_path))
    with caplog.at_level(logging.WARNING):
        got = merged(tmp_path, config, "again")
    (message,) = lora_warnings(caplog)
    assert word in message
    assert "merging" in message
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert json.loads((_place(tmp_path) / MARKER).read_text())["base"] == str(base)


def test_another_dtype_is_merged_again(tmp_path, caplog):
    base = write_base("plain", tmp_path / "base", "float32")
    adapter = make_adapter("plain", tmp_path / "adapter", use_dora=True)
    config = recipe(base, f"{base}+{adapter}", parameters=BY_MERGE, dtype="float32")
    merged(tmp_path, config, "half", "--lora-merge-dtype", "bfloat16")
    with caplog.at_level(logging.WARNING):
        merged(tmp_path, config, "whole", "--lora-merge-dtype", "float32")
    (message,) = lora_warnings(caplog)
    assert "another dtype" in message
    name = "model.layers.0.self_attn.q_proj.weight"
    assert load_file(_place(tmp_path) / "model.safetensors")[name].dtype == torch.float32


def test_a_retrained_adapter_is_merged_again(tmp_path, caplog):
    base, adapter = (
        write_base("plain", tmp_path / "base"),
        make_adapter("plain", tmp_path / "adapter", use_dora=True),
    )
    config = recipe(base, f"{base}+{adapter}", parameters=BY_MERGE)
    first = merged(tmp_path, config)
    make_adapter("plain", adapter, seed=99, use_dora=True)
    with caplog.at_level(logging.WARNING):
        second = merged(tmp_path, config, "again")
    assert "another adapter" in lora_warnings(caplog)[0]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], second[name])


def test_a_stale_cache_is_noticed_under_stock_mergekit(tmp_path):
    base, adapter = write_base("plain", tmp_path / "base"), make_adapter("plain", tmp_path / "adapter")
    reference = ModelReference.parse(f"{base}+{adapter}")
    reference.merged(cache_dir=str(tmp_path / "cache"))
    make_adapter("plain", adapter, seed=99)
    config = MergeConfiguration.model_validate(recipe(base, f"{base}+{adapter}"))
    options = MergeOptions(lora_merge_cache=str(tmp_path / "cache"), copy_tokenizer=False, quiet=True)
    with pytest.raises(Exception, match="is not base \\+ adapter"):
        run_merge(config, str(tmp_path / "stock"), options)


def test_a_failing_merge_leaves_no_folder(tmp_path, monkeypatch):
    base, adapter = (
        write_base("plain", tmp_path / "base"),
        make_adapter("plain", tmp_path / "adapter", use_dora=True),
    )

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    result = merge(tmp_path, recipe(base, f"{base}+{adapter}", parameters=BY_MERGE))
    assert result.exit_code == 1
    assert "no space left" in result.output
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "out").exists()
