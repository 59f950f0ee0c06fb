"""Adapters with tensors of their own: trained heads and embeddings, new heads, longer vocabularies."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from adapters import KINDS, TEXT_SIZES, base_model, fill, make_adapter
from lora_merges import lora_warnings, write_base
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from test_lora_no_copy import merge, merged_by_peft, recipe

from mergekit_monosoup.lora.adapted import AdaptedLoader
from mergekit_monosoup.merging.adapters import adapters_opened
from mergekit_monosoup.merging.opened import opened_checkpoint

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")


def _opened(base: Path, adapter: Path) -> AdaptedLoader:
    """The input as mergekit's planner will find it."""
    LoaderCache().setup(MergeOptions())
    reference = ModelReference.parse(f"{base}+{adapter}")
    plain = ModelReference.parse(str(base))
    return AdaptedLoader.open(reference, plain, LoaderCache().get(plain))


def _adapted(model: torch.nn.Module, folder: Path, **options: object) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **options))
        fill(adapted, 1)
        adapted.save_pretrained(folder)
    return adapted


def test_trained_embeddings_and_heads_are_the_fine_tunes(tmp_path):
    base = write_base("plain", tmp_path / "base")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = make_adapter("plain", tmp_path / "adapter", **options)
    tensors = merge(tmp_path, {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}]})
    want = merged_by_peft("plain", adapter, "bfloat16")
    assert all(torch.equal(tensors[n], want[n]) for n in tensors)
    assert not torch.equal(tensors["lm_head.weight"], base_model("plain").bfloat16().lm_head.weight)


def _tied() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return KINDS["plain"].build(tie_word_embeddings=True).float()


def test_a_trained_head_on_a_tied_base_is_a_tensor_of_its_own(tmp_path):
    _tied().save_pretrained(tmp_path / "base")
    _adapted(_tied(), tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    loader = _opened(tmp_path / "base", tmp_path / "adapter")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert set(loader.index.tensor_paths) == set(stored) | {"lm_head.weight"}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(loader.get_tensor("lm_head.weight"), saved)
    name = "model.embed_tokens.weight"
    assert torch.equal(loader.get_tensor(name), stored[name])
    base = tmp_path / "base"
    config = recipe(base, f"{base}+{tmp_path / 'adapter'}", parameters={"edit": False}, dtype="float32")
    tensors = merge(tmp_path, config)
    torch.testing.assert_close(tensors["lm_head.weight"], saved, rtol=0, atol=1e-6)
    assert torch.equal(tensors[name], stored[name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_reported_with_its_rows(tied, tmp_path):
    model = _tied() if tied else base_model("plain")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101, mean_resizing=False)
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, **options))
        fill(adapted, 1)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        want = adapted.merge_and_unload().state_dict()
    loader = _opened(tmp_path / "base", tmp_path / "adapter")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert set(loader.index.tensor_paths) == set(stored)
    reference = ModelReference.parse(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    LoaderCache.loaders[reference] = loader
    headers = opened_checkpoint(reference).tensors
    for name in stored:
        assert torch.equal(loader.get_tensor(name), want[name]), name
        assert (headers[name].shape, headers[name].dtype) == (tuple(want[name].shape), "float32")
    assert headers["model.embed_tokens.weight"].shape == (101, 32)


def test_rows_of_a_longer_vocabulary_are_the_fine_tunes(tmp_path):
    model = base_model("plain")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj"]))
        fill(adapted, 1)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        want = adapted.merge_and_unload().state_dict()
    base = tmp_path / "base"
    config = recipe(base, f"{base}+{tmp_path / 'adapter'}", parameters={"edit": False}, dtype="float32")
    tensors = merge(tmp_path, config)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape == (101, 32)
        assert torch.equal(tensors[name][96:], want[name][96:])
        torch.testing.assert_close(tensors[name], want[name], rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 101


def test_factors_on_a_resized_vocabulary(tmp_path):
    model = base_model("plain")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101, mean_resizing=False)
    adapted = _adapted(model, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens", "lm_head"])
    want = adapted.merge_and_unload().state_dict()
    loader = _opened(tmp_path / "base", tmp_path / "adapter")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(loader.get_tensor(name), want[name]), name


def test_a_new_head_is_a_tensor_that_only_the_adapter_has(tmp_path):
    base = write_base("plain", tmp_path / "base")
    sizes = TEXT_SIZES | {"attention_bias": True, "num_labels": 5}
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
    model.load_state_dict(base_model("plain").state_dict(), strict=False)
    adapted = _adapted(model, tmp_path / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS")
    loader = _opened(base, tmp_path / "adapter")
    stored = load_file(base / "model.safetensors")
    assert set(loader.index.tensor_paths) == set(stored) | {"score.weight"}
    want = adapted.merge_and_unload().state_dict()
    assert torch.equal(loader.get_tensor("score.weight"), want["score.weight"])
    assert torch.equal(loader.get_tensor("lm_head.weight"), stored["lm_head.weight"])
    tensors = merge(tmp_path, recipe(base, f"{base}+{tmp_path / 'adapter'}", dtype=None))
    assert torch.equal(tensors["score.weight"], want["score.weight"])
    name = "model.layers.1.self_attn.q_proj.weight"
    dw = loader.get_tensor(name).float() - stored[name].float()
    assert 0 < dw.norm() < stored[name].float().norm()


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_of_tied_and_untied_heads(tied, tmp_path, caplog):
    model = _tied() if tied else base_model("plain")
    model.save_pretrained(tmp_path / "base")
    tokens = {"embed_tokens": [1, 5, 90]}
    adapted = _adapted(model, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=tokens)
    base = tmp_path / "base"
    config = recipe(base, f"{base}+{tmp_path / 'adapter'}", parameters={"edit": False}, dtype="float32")
    with caplog.at_level("WARNING"):
        tensors = merge(tmp_path, config)
    assert lora_warnings(caplog) == []
    want = adapted.merge_and_unload().state_dict()
    assert not torch.equal(
        want["model.embed_tokens.weight"], load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    )
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-6)


def test_what_the_model_class_does_not_know_is_merged_by_peft(tmp_path):
    """A stack that the adapter stores whole, where the base stores single experts: no loader for that."""
    base = write_base("experts-qwen3", tmp_path / "base")
    options = {"target_modules": ["q_proj"], "target_parameters": None, "modules_to_save": ["experts"]}
    adapter = make_adapter("experts-qwen3", tmp_path / "adapter", **options)
    config = MergeConfiguration.model_validate(recipe(base, f"{base}+{adapter}"))
    with adapters_opened(config, MergeOptions(), tmp_path / "copies"):
        (reference,) = [m for m in config.referenced_models() if m.lora]
        assert not isinstance(LoaderCache().get(reference), AdaptedLoader)
    assert not (tmp_path / "copies").exists()
