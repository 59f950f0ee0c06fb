"""What an adapter holds besides factors, under `mergekit-monosoup lora`: whole tensors, biases, tokens."""

from __future__ import annotations

import numpy as np
import torch
from adapters import base_model, load_adapter, make_adapter, updates
from lora_edits import compare, edit, oracle_edit, run
from oracle import monosoup_update
from safetensors.torch import load_file


def test_whole_tensors_without_base_are_kept_with_a_warning(tmp_path):
    source = make_adapter("saved-modules", tmp_path / "in")
    result = edit(source, tmp_path / "out")
    assert "lm_head.weight is stored whole" in result.output
    assert "--base" in result.output
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(before[f"base_model.model.{name}"], after[f"base_model.model.{name}"])


def test_whole_tensors_are_edited_against_the_base(tmp_path):
    source = make_adapter("saved-modules", tmp_path / "in")
    base_model("saved-modules").save_pretrained(tmp_path / "base")
    result = edit(source, tmp_path / "out", "--base", tmp_path / "base", "--alpha", 0.5)
    assert "Warning" not in result.output
    before = load_file(source / "adapter_model.safetensors")
    merged = load_adapter("saved-modules", tmp_path / "out").merge_and_unload().state_dict()
    base = base_model("saved-modules").state_dict()
    for name in ("lm_head.weight", "model.norm.weight"):
        dw = (before[f"base_model.model.{name}"] - base[name]).double().numpy()
        want = base[name].double().numpy() + 0.5 * (monosoup_update(dw)[0] if dw.ndim == 2 else dw)
        assert np.abs(merged[name].double().numpy() - want).max() <= 1e-5 * np.abs(want).max()


def test_trained_biases_follow_alpha(tmp_path):
    source = make_adapter("trained-biases", tmp_path / "in")
    base_model("trained-biases").save_pretrained(tmp_path / "base")
    edit(source, tmp_path / "out", "--base", tmp_path / "base", "--alpha", 0.25)
    tuned = load_adapter("trained-biases", source).merge_and_unload().state_dict()
    merged = load_adapter("trained-biases", tmp_path / "out").merge_and_unload().state_dict()
    base = base_model("trained-biases").state_dict()
    names = [n for n in base if n.endswith(".bias")]
    assert names
    for name in names:
        assert not torch.equal(tuned[name], base[name])
        torch.testing.assert_close(merged[name], base[name] + 0.25 * (tuned[name] - base[name]))


def test_lora_bias_follows_alpha(tmp_path):
    source = make_adapter("lora-bias", tmp_path / "in")
    edit(source, tmp_path / "out", "--alpha", 0.25)
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    names = [n for n in before if n.endswith("lora_B.bias")]
    assert names
    for name in names:
        torch.testing.assert_close(after[name], 0.25 * before[name])


def test_embeddings_saved_along_are_kept(tmp_path):
    source = tmp_path / "in"
    adapted = load_adapter("embeddings", make_adapter("embeddings", tmp_path / "first"))
    adapted.save_pretrained(source, save_embedding_layers=True)
    assert any("base_layer" in k for k in load_file(source / "adapter_model.safetensors"))
    edit(source, tmp_path / "out")
    before = updates(load_adapter("embeddings", source))
    after = updates(load_adapter("embeddings", tmp_path / "out"))
    compare(after, {n: oracle_edit(dw) for n, dw in before.items()}, 1e-5)


def test_trained_tokens_are_kept_with_a_warning(tmp_path):
    source = make_adapter("plain", tmp_path / "in", trainable_token_indices={"embed_tokens": [1, 5]})
    result = edit(source, tmp_path / "out")
    assert "trainable_tokens_delta is stored whole" in result.output
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (key,) = [k for k in before if "trainable_tokens" in k]
    assert torch.equal(before[key], after[key])


def test_whole_tensors_of_some_adapters_need_the_base(tmp_path):
    one = make_adapter("saved-modules", tmp_path / "one", seed=1)
    two = make_adapter("plain", tmp_path / "two", seed=2)
    result = run(one, two, tmp_path / "out")
    assert result.exit_code == 1
    assert "some of the adapters only; give --base" in result.output
    assert not (tmp_path / "out").exists()
    base_model("plain").save_pretrained(tmp_path / "base")
    edit(one, two, tmp_path / "out", "--base", tmp_path / "base")
    base, name = base_model("plain").state_dict(), "lm_head.weight"
    saved = load_file(one / "adapter_model.safetensors")[f"base_model.model.{name}"]
    want = base[name].double().numpy() + oracle_edit((saved - base[name]) / 2)
    merged = load_adapter("plain", tmp_path / "out").merge_and_unload().state_dict()
    assert np.abs(merged[name].double().numpy() - want).max() <= 1e-5 * np.abs(want).max()
