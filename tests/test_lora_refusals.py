"""What `mergekit-monosoup lora` refuses: by name, and leaving nothing behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from adapters import base_model, make_adapter
from lora_edits import refuse, run
from safetensors.torch import load_file, save_file


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def test_pickled_objects_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_adapter("plain", tmp_path / "in")
    (source / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x.lora_A.weight": _Evil()}, source / "adapter_model.bin")
    refuse(source, tmp_path / "out", "adapter_model.bin", "was not loaded")
    assert not (tmp_path / "ran-code").exists()


def _tamper(source: Path, change) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors, next(k for k in tensors if "lora_A" in k))
    save_file(tensors, source / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, k: t.pop(k), ("lora_B", "no lora_A")),
        (lambda t, k: t[k].fill_(math.nan), ("lora_A", "NaN")),
        (lambda t, k: t.__setitem__(k, torch.zeros(5, t[k].shape[1])), ("do not multiply",)),
        (lambda t, k: t.__setitem__(k[len("base_model.model.") :], t.pop(k)), ("base_model.model.",)),
        (
            lambda t, k: t.__setitem__(k.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(3)),
            ("lora_magnitude_vector", "merge"),
        ),
    ],
    ids=["missing factor", "NaN", "shapes", "foreign names", "DoRA's magnitudes"],
)
def test_damaged_adapters_are_refused(change, words, tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    _tamper(source, change)
    refuse(source, tmp_path / "out", *words)


def test_rank_of_the_configuration_must_be_that_of_the_factors(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    refuse(source, tmp_path / "out", "rank 4", "says 5")


def test_truncated_file_is_refused(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    file = source / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    refuse(source, tmp_path / "out", "adapter_model.safetensors is damaged")


def test_missing_files_are_named(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    (source / "adapter_model.safetensors").unlink()
    refuse(source, tmp_path / "out", "neither adapter_model.safetensors")
    (source / "adapter_config.json").unlink()
    refuse(source, tmp_path / "out", "no adapter_config.json")
    refuse(tmp_path / "nowhere", tmp_path / "out", "not a folder")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
        (peft.VeraConfig(target_modules=["q_proj"]), "VERA"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1]), "alora_invocation_tokens"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "pissa"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "olora"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_linear_is_refused(config, word, tmp_path):
    adapted = peft.get_peft_model(base_model("plain"), config)
    adapted.save_pretrained(tmp_path / "in")
    refuse(tmp_path / "in", tmp_path / "out", word)


def test_unknown_types_are_refused(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA_2030"}))
    refuse(source, tmp_path / "out", "LORA_2030", "upgrade peft")


def test_adapters_of_different_bases_are_refused(tmp_path):
    llama, gpt2 = make_adapter("plain", tmp_path / "a"), make_adapter("conv1d-gpt2", tmp_path / "b")

    result = run(llama, gpt2, tmp_path / "out")
    assert result.exit_code == 1
    assert "no module in common" in result.output
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path):
    source = make_adapter("conv1d-gpt2", tmp_path / "in")
    base_model("plain").save_pretrained(tmp_path / "base")
    refuse(source, tmp_path / "out", "c_attn", "base", arguments=("--base", tmp_path / "base"))


def test_ambiguous_ranks_are_refused(tmp_path):
    source = make_adapter(
        "experts-qwen3",
        tmp_path / "in",
        rank_pattern={r".*gate_up_proj": 8},
        alpha_pattern={r".*down_proj": 3},
    )
    config = json.loads((source / "adapter_config.json").read_text())
    config["rank_pattern"] = {}
    (source / "adapter_config.json").write_text(json.dumps(config))
    refuse(source, tmp_path / "out", "rank_pattern", "target_parameters")


def test_larger_rank_is_refused(tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    refuse(source, tmp_path / "out", "rank 9 is larger", arguments=("--rank", 9))


@pytest.mark.parametrize(
    "arguments", [("--energy", 0), ("--energy", 1.5), ("--alpha", -1), ("--rank", 0), ("--rank", 1.5)]
)
def test_wrong_options_are_refused(arguments, tmp_path):
    source = make_adapter("plain", tmp_path / "in")
    refuse(source, tmp_path / "out", "must be", arguments=arguments)
