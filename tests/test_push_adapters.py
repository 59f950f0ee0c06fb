"""Adapter folders on their way to the Hub: what is checked, what arrives, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from adapters import make_adapter
from click.testing import CliRunner
from hub_server import running_hub
from safetensors.torch import load_file, save_file
from test_push import push

from mergekit_monosoup.cli import main


@pytest.fixture
def adapter(tmp_path):
    """An adapter that names its base by an id, as one trained on a model of the Hub does."""
    return named(make_adapter("plain", tmp_path / "adapter"), "tester/base")


def named(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    (folder / "README.md").write_text(f"---\nbase_model: {base}\nlibrary_name: peft\n---\n# An adapter\n")
    return folder


def check(folder):
    return CliRunner().invoke(main, ["push", str(folder), "tester/adapter", "--dry-run"])


def test_dry_run(adapter):
    result = check(adapter)
    assert result.exit_code == 0, result.output
    count = len(load_file(adapter / "adapter_model.safetensors"))
    assert f"{count} tensors" in result.output
    assert "adapter_model.safetensors" in result.output


@pytest.mark.parametrize("kind", ["LOHA", "use_dora"])
def test_adapters_that_have_no_factors_to_edit_are_whole_all_the_same(tmp_path, kind):
    import peft
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    options = (
        peft.LoHaConfig(r=2, target_modules=["q_proj"])
        if kind == "LOHA"
        else peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    peft.get_peft_model(transformers.LlamaForCausalLM(config), options).save_pretrained(tmp_path / "adapter")
    result = check(named(tmp_path / "adapter", "tester/base"))
    assert result.exit_code == 0, result.output


def damage(folder, kind):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    first = next(name for name in tensors if "lora_A" in name)
    if kind == "NaN":
        tensors[first] = tensors[first].clone().fill_(math.nan)
    elif kind == "missing factor":
        del tensors[first]
    elif kind == "another rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 7}))
    elif kind == "local base":
        named(folder, "/home/somebody/models/base")
    elif kind == "local base in the card":
        (folder / "README.md").write_text("---\nbase_model:\n- ../models/base\n---\n")
    elif kind == "type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "NO_SUCH"}))
    save_file(tensors, weights, metadata={"format": "pt"})
    if kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif kind == "pickled":
        weights.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    elif kind == "no weights":
        weights.unlink()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("NaN", "NaN"),
        ("missing factor", "no lora_A"),
        ("another rank", "rank 4"),
        ("local base", "folder of this machine"),
        ("local base in the card", "README.md names the base model by a folder"),
        ("type", "NO_SUCH"),
        ("cut off", "cut off"),
        ("pickled", "only safetensors"),
        ("no weights", "neither adapter_model.safetensors"),
    ],
)
def test_what_nobody_could_use_is_refused(adapter, kind, words):
    damage(adapter, kind)
    result = check(adapter)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert words in result.output
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_upload(tmp_path, adapter):
    with running_hub() as hub:
        done = push(hub, tmp_path, adapter, "tester/adapter")
        assert "complete and finite" in done.stdout
        arrived = hub.files["tester/adapter", "main"]
    assert arrived == {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
