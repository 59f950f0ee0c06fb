"""Adapters that something else than the present peft has written: names, stacks, unfinished saves."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from adapters import MOE_SIZES, base_model, fill, load_adapter, make_adapter
from lora_edits import refuse
from lora_merges import lora_warnings, write_base
from mergekit.common import ModelReference
from safetensors.torch import load_file, save_file
from test_lora_no_copy import merge, merged_by_peft

from mergekit_monosoup.errors import AdapterError
from mergekit_monosoup.lora.adapted import AdaptedLoader
from mergekit_monosoup.lora.adapter import read_adapter
from mergekit_monosoup.lora.hollow import place

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")

WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]


def rewritten(adapter: Path, out: Path, change: Callable[[Tensors], Tensors], **settings: object) -> Path:
    shutil.copytree(adapter, out)
    save_file({k: t.contiguous() for k, t in change(load_file(adapter / WEIGHTS)).items()}, out / WEIGHTS)
    known = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(known | settings))
    return out


def passthrough(tmp_path: Path, base: Path, adapter: Path, out: str = "out") -> Tensors:
    return merge(tmp_path, {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]}, out)


def _renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for old, new in pairs:
            tensors = {key.replace(old, new, 1): tensor for key, tensor in tensors.items()}
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_renamed(("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default.")), None),
        (_renamed(("lora_A.", "lora_A.my_run."), ("lora_B.", "lora_B.my_run.")), None),
        (_renamed(("base_model.model.model.", "base_model.model.")), "read as"),
        (_renamed(("base_model.model.", "base_model.model.base_model.model.")), "read as"),
        (_renamed(("base_model.model.", "module.base_model.model.")), "read as"),
        (_renamed(("base_model.model.", "base_model.model._orig_mod.")), None),
        (_renamed((".self_attn.", "._fsdp_wrapped_module.self_attn.")), None),
    ],
    ids=["default", "my_run", "without model.", "twice", "module.", "compiled", "FSDP"],
)
def test_names_are_seen_through(change, said, tmp_path, caplog):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter")
    other = rewritten(adapter, tmp_path / "other", change)
    with caplog.at_level("WARNING"):
        tensors = passthrough(tmp_path, base, other)
    messages = lora_warnings(caplog)
    assert len(messages) == (said is not None)
    assert all(said in message for message in messages)
    want = merged_by_peft("plain", adapter, "bfloat16")
    assert all(torch.equal(tensors[n], want[n]) for n in tensors)


def test_factors_of_embeddings_under_the_adapters_name(tmp_path):
    adapter = make_adapter("embeddings", tmp_path / "adapter")
    suffixes = (("embedding_A", "embedding_A.default"), ("embedding_B", "embedding_B.default"))
    other = rewritten(adapter, tmp_path / "other", _renamed(*suffixes))
    found, plain = read_adapter(str(other)).tensors, load_file(adapter / WEIGHTS)
    assert any(key.endswith("lora_embedding_A") for key in plain)
    assert found.keys() == plain.keys()


def test_whole_tensors_under_the_adapters_name(tmp_path):
    base = write_base("saved-modules", tmp_path / "base")
    adapter = make_adapter("saved-modules", tmp_path / "adapter")

    def change(tensors: Tensors) -> Tensors:
        # As `model.state_dict()` has them.
        named = _renamed(
            ("lora_A.", "lora_A.default."),
            ("lora_B.", "lora_B.default."),
            ("lm_head.", "lm_head.modules_to_save.default."),
            ("model.norm.", "model.norm.modules_to_save.default."),
        )(tensors)
        original = "base_model.model.lm_head.original_module.weight"
        return named | {original: torch.zeros_like(tensors["base_model.model.lm_head.weight"])}

    tensors = passthrough(tmp_path, base, rewritten(adapter, tmp_path / "other", change))
    want = merged_by_peft("saved-modules", adapter, "bfloat16")
    assert all(torch.equal(tensors[n], want[n]) for n in tensors)


def test_of_several_adapters_in_a_file_peft_reads_the_default(tmp_path, caplog):
    adapter = make_adapter("plain", tmp_path / "adapter")

    def both(*names: str) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {
            key.replace(".weight", f".{name}.weight"): tensor + i
            for i, name in enumerate(names)
            for key, tensor in tensors.items()
        }

    two = rewritten(adapter, tmp_path / "two", both("default", "reference"))
    with caplog.at_level("WARNING"):
        found = read_adapter(str(two)).tensors
    assert "'default' of default, reference" in caplog.text
    plain = load_file(adapter / WEIGHTS)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    loaded = load_adapter("plain", two).state_dict()
    for key, tensor in plain.items():
        assert torch.equal(loaded[key.replace(".weight", ".default.weight")], tensor)
    others = rewritten(adapter, tmp_path / "others", both("policy", "reference"))
    with pytest.raises(AdapterError, match=r"several adapters \(policy, reference\)"):
        read_adapter(str(others))


@pytest.mark.parametrize("part", ["lora_B", "lm_head.weight"])
def test_saves_under_zero_3_are_refused_in_those_words(part, tmp_path):
    adapter = make_adapter("saved-modules", tmp_path / "adapter")

    def empty(tensors: Tensors) -> Tensors:
        return {k: torch.empty(0) if part in k else t for k, t in tensors.items()}

    broken = rewritten(adapter, tmp_path / "broken", empty)
    refuse(broken, tmp_path / "out", "saved under ZeRO-3 without gathering", part)


@pytest.mark.parametrize("square", [False, True])
def test_stacks_of_an_older_peft_have_their_axes_swapped_back(square, tmp_path):
    """Before 0.19, peft took experts x out x in for experts x in x out: dW_e = (B_e A_e)^T."""
    sizes = MOE_SIZES | {"num_experts": 4, "moe_intermediate_size": 16 if square else 24}
    torch.manual_seed(3)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).float()
    model.save_pretrained(tmp_path / "base")
    stored = model.state_dict()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=["experts.gate_up_proj"])
    config.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": "0.18.1"}))
    generator = torch.Generator().manual_seed(5)
    tensors, updates = {}, {}
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        _, rows, columns = stored[f"{name}.gate_up_proj"].shape
        assert (rows == columns) == square
        a = 0.1 * torch.randn(4, 3, rows, generator=generator)
        b = 0.1 * torch.randn(4, columns, 3, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.reshape(12, rows)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.permute(1, 2, 0).reshape(columns, 12)
        updates[f"{name}.gate_up_proj"] = 2 * (b.double() @ a.double()).mT
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    merged = passthrough(tmp_path, tmp_path / "base", tmp_path / "adapter")
    for name, dw in updates.items():
        torch.testing.assert_close(merged[name].double(), stored[name].double() + dw, rtol=0, atol=1e-6)


def _v4_experts(folder: Path) -> Path:
    """An adapter of transformers 4: factors for each projection of each expert of a Qwen3-MoE."""
    shapes = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, (rows, columns) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(4, columns, generator=generator)
                tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(shapes)).save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_adapters_on_single_experts_fit_bases_of_both_forms(tmp_path):
    """Experts stacked as in the class of transformers 5, or stored one by one and asked for one by one."""
    adapter = _v4_experts(tmp_path / "adapter")
    factors = load_file(adapter / WEIGHTS)
    stored = base_model("experts-qwen3").state_dict()

    def dw(key: str) -> torch.Tensor:
        b, a = (factors[f"base_model.model.{key}.lora_{x}.weight"].double() for x in "BA")
        return 1.5 * b @ a

    base = write_base("experts-qwen3", tmp_path / "base", "float32")
    merged = passthrough(tmp_path, base, adapter)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        up = [torch.cat([dw(f"{name}.{e}.gate_proj"), dw(f"{name}.{e}.up_proj")]) for e in range(4)]
        want = stored[f"{name}.gate_up_proj"].double() + torch.stack(up)
        torch.testing.assert_close(merged[f"{name}.gate_up_proj"].double(), want, rtol=0, atol=1e-6)
    placed = place(ModelReference.parse(f"{base}+{adapter}"), read_adapter(str(adapter)))
    for key in ("0.mlp.experts.2.up_proj", "1.mlp.experts.3.down_proj", "1.mlp.experts.0.gate_proj"):
        change = placed.change_of(f"model.layers.{key}.weight")
        (update,) = change.low_rank
        got = update.materialise(torch.float64)
        torch.testing.assert_close(got, dw(f"model.layers.{key}"), rtol=0, atol=1e-9)
    assert placed.change_of("model.layers.0.self_attn.q_proj.weight") is None


def test_adapters_of_stacks_fit_bases_with_renamed_single_experts(tmp_path):
    base = write_base("experts-mixtral", tmp_path / "base", "float32")
    adapter = make_adapter("experts-mixtral", tmp_path / "adapter")
    placed = place(ModelReference.parse(f"{base}+{adapter}"), read_adapter(str(adapter)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = load_adapter("experts-mixtral", adapter).merge_and_unload().state_dict()
    before = base_model("experts-mixtral").state_dict()
    stack = {n: (after[n].double() - before[n].double()).numpy() for n in before if ".experts." in n}
    prefix = "model.layers.1.mlp.experts"
    half = stack[f"{prefix}.gate_up_proj"].shape[1] // 2
    want = {
        "w1": stack[f"{prefix}.gate_up_proj"][3, :half],
        "w3": stack[f"{prefix}.gate_up_proj"][3, half:],
        "w2": stack[f"{prefix}.down_proj"][3],
    }
    for leaf, dw in want.items():
        change = placed.change_of(f"model.layers.1.block_sparse_moe.experts.3.{leaf}.weight")
        got = change.low_rank[0].materialise(torch.float64).numpy()
        assert np.abs(got - dw).max() <= 1e-6


def test_names_that_no_prefix_explains_are_refused(tmp_path):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter")
    other = rewritten(adapter, tmp_path / "other", _renamed((".layers.", ".blocks.")))
    with pytest.raises(AdapterError, match="names do not match"):
        place(ModelReference.parse(f"{base}+{other}"), read_adapter(str(other)))


def test_a_base_of_single_experts_takes_a_stack_as_a_whole_and_in_parts(tmp_path):
    torch.manual_seed(3)
    config = transformers.OlmoeConfig(**MOE_SIZES, num_experts=4, eos_token_id=1, pad_token_id=0)
    model = transformers.OlmoeForCausalLM(config).float()
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stored
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        options = peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=targets)
        adapted = peft.get_peft_model(model, options)
        fill(adapted, 1)
        adapted.save_pretrained(tmp_path / "adapter")
        whole = adapted.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    # As mergekit asks for them, experts fused, and as the files have them.
    passthrough(tmp_path, tmp_path / "base", tmp_path / "adapter")
    loaded = transformers.OlmoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[n], tensor) for n, tensor in whole.state_dict().items())
    reference = ModelReference.parse(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    base = ModelReference.parse(str(tmp_path / "base"))
    loader = AdaptedLoader.open(reference, base, base.lazy_loader())
    want = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(loader.index.tensor_paths) == set(want)
    assert all(torch.equal(loader.get_tensor(n), want[n]) for n in want)
    assert sum(not torch.equal(want[n], stored[n]) for n in want) == 2 * (4 * 3 + 1)
