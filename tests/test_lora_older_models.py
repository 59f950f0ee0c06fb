"""Checkpoints and adapters under the names of older model classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from adapters import base_model
from click.testing import CliRunner
from lora_merges import merged, oracle_edit, recipe, write_base
from safetensors.torch import load_file, save_file

from mergekit_monosoup.cli import main
from mergekit_monosoup.lora.hollow import NameMap

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")


def test_names_of_older_checkpoints_are_found():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    gemma = transformers.Gemma3Config(text_config=text, vision_config=vision)
    mixtral = transformers.MixtralConfig(**text, num_local_experts=4)
    with torch.device("meta"):
        seeing = NameMap(transformers.Gemma3ForConditionalGeneration(gemma))
        experts = NameMap(transformers.MixtralForCausalLM(mixtral))
    new = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert seeing.resolve(new) == new
    assert seeing.resolve("language_model.model.layers.0.self_attn.q_proj.weight") == new
    assert seeing.resolve("language_model.model.layers.7.self_attn.q_proj.weight") is None
    gate = "model.layers.0.mlp.gate.weight"
    assert experts.resolve("model.layers.0.block_sparse_moe.gate.weight") == gate
    # One expert of a stack is no tensor of the model.
    assert experts.resolve("model.layers.0.block_sparse_moe.experts.1.w1.weight") is None


def _old_mixtral(folder: Path) -> Path:
    """An adapter as transformers 4 saved it: one pair of factors for each projection of each expert."""
    sizes = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32), "q_proj": (32, 32)}
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        names = {f"block_sparse_moe.experts.{e}.{w}": w for e in range(4) for w in ("w1", "w2", "w3")}
        for name, kind in (names | {"self_attn.q_proj": "q_proj"}).items():
            rows, columns = sizes[kind]
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, columns, generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "w1", "w2", "w3"]).save_pretrained(
        str(folder)
    )
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_of_older_model_classes_are_converted_by_peft(tmp_path):
    base = write_base("experts-mixtral", tmp_path / "base", "float32")
    adapter = _old_mixtral(tmp_path / "adapter")
    tensors = merged(tmp_path, recipe(base, f"{base}+{adapter}", dtype="float32"))
    stored = base_model("experts-mixtral").state_dict()
    factors = load_file(adapter / "adapter_model.safetensors")

    def dw(key: str) -> np.ndarray:
        b, a = (factors[f"base_model.model.model.layers.{key}.lora_{x}.weight"].double() for x in "BA")
        return 1.5 * (b @ a).numpy()

    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = [f"{layer}.block_sparse_moe.experts.{e}" for e in range(4)]
        updates_by_name = {
            f"{prefix}.gate_up_proj": np.stack(
                [np.concatenate([dw(f"{e}.w1"), dw(f"{e}.w3")]) for e in experts]
            ),
            f"{prefix}.down_proj": np.stack([dw(f"{e}.w2") for e in experts]),
            f"model.layers.{layer}.self_attn.q_proj.weight": dw(f"{layer}.self_attn.q_proj"),
        }
        for name, update in updates_by_name.items():
            want = stored[name].double().numpy() + oracle_edit(update)
            assert np.abs(tensors[name].double().numpy() - want).max() <= 1e-6 * np.abs(want).max(), name
    result = CliRunner().invoke(main, ["lora", str(adapter), str(tmp_path / "edited")])
    assert result.exit_code == 0, result.output
