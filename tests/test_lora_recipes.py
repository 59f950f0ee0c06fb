"""`base+adapter` inputs of recipes: values by the factors."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import peft
import pytest
import torch
from adapters import KINDS, base_model, fill, make_adapter
from commands import forget_loaders
from lora_merges import exact_updates, lora_warnings, merge, merged, oracle_edit, recipe, write_base
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("registered", "fresh_loaders")

SPACING = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}


YAML_KINDS = [k for k in KINDS if k != "convolutions"]


@pytest.mark.parametrize("kind", YAML_KINDS)
def test_every_kind_takes_its_update_from_the_factors(kind, tmp_path):
    base, adapter = write_base(kind, tmp_path / "base"), make_adapter(kind, tmp_path / "adapter")
    tensors = merged(tmp_path, recipe(base, f"{base}+{adapter}"))
    stored = {n: t.bfloat16() for n, t in base_model(kind).state_dict().items()}
    changes = exact_updates(kind, adapter)
    assert changes
    for name, tensor in tensors.items():
        if name not in changes:
            assert torch.equal(tensor, stored[name]), name
            continue
        want = stored[name].double().numpy() + oracle_edit(changes[name])
        if name in ("lm_head.weight", "model.norm.weight") * (kind == "saved-modules") or name.endswith(
            ".bias"
        ):
            # A tensor saved whole: its update is against the base as stored, in bfloat16.
            whole = base_model(kind).state_dict()[name].double().numpy() + changes[name]
            want = stored[name].double().numpy()
            want = want + oracle_edit(whole - want)
        error = np.abs(tensor.double().numpy() - want)
        # Half a spacing, and what float32 leaves of the sum.
        assert (error <= SPACING["bfloat16"] / 2 * np.abs(want) + 1e-6 * np.abs(want).max()).all(), name
    assert set(changes) <= set(tensors)


@pytest.mark.parametrize("kind", ["plain", "conv1d-gpt2", "experts-qwen3", "experts-mixtral", "embeddings"])
def test_without_an_edit_it_is_what_peft_merges(kind, tmp_path):
    base = write_base(kind, tmp_path / "base")
    adapter = make_adapter(kind, tmp_path / "adapter", base_dtype=torch.bfloat16)
    tensors = merged(tmp_path, recipe(base, f"{base}+{adapter}", parameters={"edit": False}))
    stored = base_model(kind).bfloat16()
    w0 = {n: t.double() for n, t in stored.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_float32 = peft.PeftModel.from_pretrained(base_model(kind).bfloat16().float(), adapter)
        in_bfloat16 = peft.PeftModel.from_pretrained(stored, adapter)
    once = in_float32.merge_and_unload().state_dict()
    twice = in_bfloat16.merge_and_unload().state_dict()
    for name, tensor in tensors.items():
        got, want = tensor.double(), once[name].bfloat16().double()
        assert ((got - want).abs() <= SPACING["bfloat16"] * want.abs()).all(), name
        # In bfloat16 peft rounds dW before it adds it: a spacing of the largest of the three.
        dw = (once[name].double() - w0[name]).abs()
        largest = torch.maximum(torch.maximum(dw, w0[name].abs()), want.abs())
        assert ((got - twice[name].double()).abs() <= SPACING["bfloat16"] * largest).all(), name


def test_the_merge_would_have_split_in_noise(tmp_path):
    """What the parameter is for: the effective rank of the factors, not of the rounding."""
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter", scale=0.01)
    config = recipe(base, f"{base}+{adapter}", dtype="float32")
    by_factors = merged(tmp_path, config, "factors")
    by_merge = merged(tmp_path, config | {"parameters": {"exact_lora": False}}, "merge")
    name = "model.layers.0.self_attn.q_proj.weight"
    w0 = base_model("plain").bfloat16().state_dict()[name].double().numpy()
    want = oracle_edit(exact_updates("plain", adapter)[name])
    assert np.linalg.norm(by_factors[name].double().numpy() - w0 - want) <= 1e-4 * np.linalg.norm(want)
    assert np.linalg.norm(by_merge[name].double().numpy() - w0 - want) >= 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize(
    "options", [{"energy": 0.8}, {"mixing": "uniform"}, {"alpha": 0.5}, {"min_relative_update": 1e-9}]
)
def test_parameters_of_the_edit(options, tmp_path):
    base = write_base("plain", tmp_path / "base", "float32")
    adapter = make_adapter("plain", tmp_path / "adapter")
    tensors = merged(tmp_path, recipe(base, f"{base}+{adapter}", parameters=options, dtype="float32"))
    stored = base_model("plain").state_dict()
    kwargs = {k: v for k, v in options.items() if k in ("energy", "mixing")}
    for name, dw in exact_updates("plain", adapter).items():
        want = stored[name].double().numpy() + options.get("alpha", 1.0) * oracle_edit(dw, **kwargs)
        assert np.abs(tensors[name].double().numpy() - want).max() <= 1e-6 * np.abs(want).max()


def test_several_adapters_are_averaged(tmp_path):
    base = write_base("plain", tmp_path / "base", "float32")
    one = make_adapter("plain", tmp_path / "one", seed=1)
    two = make_adapter("plain", tmp_path / "two", seed=2, r=3, target_modules=["q_proj", "k_proj"])
    config = recipe(base, dtype="float32")
    config["models"] = [
        {"model": f"{base}+{one}", "parameters": {"weight": 3}},
        {"model": f"{base}+{two}", "parameters": {"weight": 1}},
    ]
    tensors = merged(tmp_path, config)
    first, second = exact_updates("plain", one), exact_updates("plain", two)
    stored = base_model("plain").state_dict()
    for name in tensors:
        if name not in first and name not in second:
            assert torch.equal(tensors[name], stored[name])
            continue
        dw = 0.75 * first.get(name, 0) + 0.25 * second.get(name, 0)
        want = stored[name].double().numpy() + oracle_edit(dw)
        assert np.abs(tensors[name].double().numpy() - want).max() <= 1e-6 * np.abs(want).max()


def test_adapters_and_full_checkpoints_mix(tmp_path):
    base = write_base("plain", tmp_path / "base", "float32")
    adapter = make_adapter("plain", tmp_path / "adapter")
    tuned = base_model("plain")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "tuned")
    tensors = merged(tmp_path, recipe(base, f"{base}+{adapter}", tmp_path / "tuned", dtype="float32"))
    stored, full = base_model("plain").state_dict(), tuned.state_dict()
    changes = exact_updates("plain", adapter)
    for name, tensor in tensors.items():
        w0 = stored[name].double().numpy()
        dw = (changes.get(name, 0) + full[name].double().numpy() - w0) / 2
        want = w0 + oracle_edit(dw)
        assert np.abs(tensor.double().numpy() - want).max() <= 3e-6 * np.abs(want).max(), name


def test_tied_embeddings_follow(tmp_path):
    """One parameter under two names: an adapter on either changes what both stand for."""
    model = KINDS["plain"].build
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tied = model(tie_word_embeddings=True).float()
    tied.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(tied, peft.LoraConfig(r=3, target_modules=["embed_tokens"]))
        fill(adapted, 1)
        adapted.save_pretrained(tmp_path / "adapter")
        dw = adapted.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
    w0 = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    base = tmp_path / "base"
    tensors = merged(tmp_path, recipe(base, f"{base}+{tmp_path / 'adapter'}", dtype="float32"))
    want = w0.double().numpy() + oracle_edit(dw.double().numpy())
    assert np.abs(tensors["model.embed_tokens.weight"].double().numpy() - want).max() <= 1e-6


def test_lora_bias_is_exact(tmp_path):
    base = write_base("lora-bias", tmp_path / "base")
    adapter = make_adapter("lora-bias", tmp_path / "adapter")
    tensors = merged(tmp_path, recipe(base, f"{base}+{adapter}"))
    factors = load_file(adapter / "adapter_model.safetensors")
    stored = base_model("lora-bias").bfloat16().state_dict()
    name = "model.layers.0.self_attn.q_proj"
    want = stored[f"{name}.bias"].float() + 6 / 4 * factors[f"base_model.model.{name}.lora_B.bias"]
    assert torch.equal(tensors[f"{name}.bias"], want.bfloat16())


def test_what_is_not_linear_takes_the_merge_and_says_so_once(tmp_path, caplog):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter", use_dora=True)
    with caplog.at_level(logging.WARNING):
        by_merge = merged(tmp_path, recipe(base, f"{base}+{adapter}"))
    (message,) = lora_warnings(caplog)
    assert "use_dora" in message
    assert "merged weights" in message
    plainly = merged(tmp_path, recipe(base, f"{base}+{adapter}", parameters={"exact_lora": False}), "plainly")
    assert all(torch.equal(plainly[n], by_merge[n]) for n in plainly)


def test_another_base_model_takes_the_merge_and_says_so(tmp_path, caplog):
    base, other = write_base("plain", tmp_path / "base"), write_base("plain", tmp_path / "other")
    adapter = make_adapter("plain", tmp_path / "adapter")
    with caplog.at_level(logging.WARNING):
        merged(tmp_path, recipe(other, f"{base}+{adapter}"))
    (message,) = lora_warnings(caplog)
    assert "base_model is" in message


def test_spelling_of_the_base_does_not_matter(tmp_path, caplog):
    base, adapter = write_base("plain", tmp_path / "base"), make_adapter("plain", tmp_path / "adapter")
    with caplog.at_level(logging.WARNING):
        merged(tmp_path, recipe(base, f"{tmp_path}/./base/+{adapter}"))
    assert lora_warnings(caplog) == []


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": {"embed_tokens": [1, 5]}}])
def test_stock_mergekit_takes_the_factors_too(options, tmp_path, caplog):
    base = write_base("plain", tmp_path / "base")
    adapter = make_adapter("plain", tmp_path / "adapter", **options)
    ours = merged(tmp_path, recipe(base, f"{base}+{adapter}"))
    forget_loaders()
    config = MergeConfiguration.model_validate(recipe(base, f"{base}+{adapter}"))
    stock_options = MergeOptions(
        lora_merge_cache=str(tmp_path / "stock-cache"), copy_tokenizer=False, quiet=True
    )
    run_merge(config, str(tmp_path / "stock"), stock_options)
    stock = load_file(tmp_path / "stock" / "model.safetensors")
    assert all(torch.equal(ours[n], stock[n]) for n in stock)
    assert lora_warnings(caplog) == []


def test_adapter_of_another_base_is_refused_before_anything_is_written(tmp_path):
    base, adapter = write_base("plain", tmp_path / "base"), make_adapter("conv1d-gpt2", tmp_path / "adapter")
    result = merge(tmp_path, recipe(base, f"{base}+{adapter}"))
    assert result.exit_code == 1
    assert "does not fit base" in result.output or "is not of base" in result.output
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_unknown_names_are_refused(tmp_path):
    base, adapter = write_base("plain", tmp_path / "base"), make_adapter("plain", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = {k.replace("layers.2", "layers.9"): v for k, v in load_file(file).items()}
    save_file(tensors, file)
    result = merge(tmp_path, recipe(base, f"{base}+{adapter}"))
    assert result.exit_code == 1
    assert "names do not match" in result.output
    assert not (tmp_path / "out").exists()


def test_renumbered_layers_take_their_own_factors(tmp_path):
    base, adapter = write_base("plain", tmp_path / "base"), make_adapter("plain", tmp_path / "adapter")
    tuned = f"{base}+{adapter}"
    sources = [[{"model": m, "layer_range": [i, i + 1]} for m in (tuned, str(base))] for i in (0, 2)]
    config = recipe(base) | {"slices": [{"sources": s} for s in sources]}
    del config["models"]
    tensors = merged(tmp_path, config)
    stored, changes = base_model("plain").bfloat16().state_dict(), exact_updates("plain", adapter)
    for new, old in ((0, 0), (1, 2)):
        name = f"model.layers.{old}.self_attn.q_proj.weight"
        want = stored[name].double().numpy() + oracle_edit(changes[name])
        got = tensors[f"model.layers.{new}.self_attn.q_proj.weight"].double().numpy()
        assert (np.abs(got - want) <= SPACING["bfloat16"] / 2 * np.abs(want) + 1e-7).all()


def test_other_layers_of_the_base_take_the_merge_and_say_so(tmp_path, caplog):
    base, adapter = write_base("plain", tmp_path / "base"), make_adapter("plain", tmp_path / "adapter")
    sources = [
        {"model": f"{base}+{adapter}", "layer_range": [2, 3]},
        {"model": str(base), "layer_range": [0, 1]},
    ]
    config = recipe(base, parameters={"edit": False}) | {"slices": [{"sources": sources}]}
    del config["models"]
    with caplog.at_level(logging.WARNING):
        tensors = merged(tmp_path, config)
    assert any("other layers of the base" in message for message in lora_warnings(caplog))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base_model("plain").bfloat16(), adapter).merge_and_unload()
    got = tensors["model.layers.0.self_attn.q_proj.weight"].double()
    want = model.state_dict()["model.layers.2.self_attn.q_proj.weight"].double()
    assert ((got - want).abs() <= SPACING["bfloat16"] * want.abs()).all()


def test_trained_tokens_are_exact(tmp_path, caplog):
    base = write_base("plain", tmp_path / "base")
    options = {"trainable_token_indices": {"embed_tokens": [1, 5]}}
    adapter = make_adapter("plain", tmp_path / "adapter", **options)
    config = recipe(base, f"{base}+{adapter}", parameters={"edit": False})
    with caplog.at_level(logging.WARNING):
        tensors = merged(tmp_path, config)
    assert lora_warnings(caplog) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base_model("plain").bfloat16(), adapter).merge_and_unload()
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors[name], model.state_dict()[name])
    assert not torch.equal(tensors[name], base_model("plain").bfloat16().state_dict()[name])
