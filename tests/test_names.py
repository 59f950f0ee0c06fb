"""What wraps, prefixes or renames the tensors of a checkpoint is seen through, with one line saying so."""

from __future__ import annotations

import json
import logging
import shutil

import oracle
import pytest
import torch
import transformers as t
from checkpoints import (
    SIZES,
    VOCABULARY,
    build_model,
    copy_as_bin,
    copy_with_tensors,
    edit_config,
    fine_tune,
    load_tensors,
    write_checkpoint,
)
from commands import our_command, our_merge, recipe
from loading import assert_same_model, loaded
from rounding import as_float64
from safetensors.torch import save_file

from mergekit_monosoup.report.reader import read_report

pytestmark = pytest.mark.usefixtures("registered", "one_thread")
PLAIN = {"parameters": {"alpha": 1.0, "edit": False}}
F32 = torch.float32


def renamed(source, folder, rename):
    return copy_with_tensors(source, folder, {rename(n): w for n, w in load_tensors(source).items()})


def equal(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


WRAPPERS = {
    "compile": lambda n: f"_orig_mod.{n}",
    "data-parallel": lambda n: f"module.{n}",
    "both": lambda n: f"module._orig_mod.{n}",
    "fsdp": lambda n: "_fsdp_wrapped_module." + n.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointed": lambda n: n.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "peft": lambda n: f"base_model.model.{n}",
    "peft twice": lambda n: f"base_model.model.base_model.model.{n}",
    "without model.": lambda n: n.removeprefix("model."),
    "model. twice": lambda n: f"model.{n}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("which", ["tuned", "base"])
def test_a_known_prefix(tmp_path, family, caplog, wrapper, which):
    models = family("llama", "bf16")
    pair = {"base": models.base, "tuned": models.tuned[0]}
    expected = our_merge(tmp_path / "plain", recipe(*pair.values()))
    pair[which] = renamed(pair[which], tmp_path / which, WRAPPERS[wrapper])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        merged = our_merge(tmp_path, recipe(*pair.values()))
    assert equal(merged, expected)
    lines = [r.getMessage() for r in caplog.records if "seen through" in r.getMessage()]
    assert len(lines) == 1, lines
    assert str(pair[which]) in lines[0]
    loaded(tmp_path / "out")


@pytest.mark.parametrize("key", ["olmoe", "vit-classification"])
def test_a_known_prefix_where_mergekit_infers_the_architecture(tmp_path, family_pair, key):
    base, tuned = family_pair(key)
    wrapped = renamed(tuned, tmp_path / "tuned", WRAPPERS["compile"])
    our_merge(tmp_path, recipe(base, wrapped, **PLAIN))
    assert equal(load_tensors(tmp_path / "out"), load_tensors(tuned))


def test_both_wrapped(tmp_path, family):
    models = family("llama", "bf16")
    expected = our_merge(tmp_path / "plain", recipe(models.base, models.tuned[0]))
    base, tuned = (
        renamed(folder, tmp_path / folder.name, WRAPPERS[kind])
        for folder, kind in ((models.base, "compile"), (models.tuned[0], "peft"))
    )
    assert equal(our_merge(tmp_path, recipe(base, tuned)), expected)


def test_pickled_and_wrapped(tmp_path, family):
    models = family("llama", "bf16")
    expected = our_merge(tmp_path / "plain", recipe(models.base, models.tuned[0]))
    tuned = copy_as_bin(renamed(models.tuned[0], tmp_path / "a", WRAPPERS["compile"]), tmp_path / "b")
    assert equal(our_merge(tmp_path, recipe(models.base, tuned)), expected)


def test_an_unknown_prefix_is_named_with_one_example(tmp_path, family):
    models = family("llama", "bf16")
    tuned = renamed(models.tuned[0], tmp_path / "tuned", lambda n: f"student.{n}")
    result = our_command(tmp_path, recipe(models.base, tuned))
    assert result.exit_code == 1
    assert "`student.`" in result.output
    assert "begin with no prefix" in result.output
    assert result.output.count("(student.") == 1
    assert not (tmp_path / "out").exists()


def test_the_base_is_judged_under_the_same_names(tmp_path, family):
    base = family("llama", "bf16").base
    other = write_checkpoint(tmp_path / "other", build_model("llama", seed=9), torch.bfloat16)
    tuned = renamed(other, tmp_path / "tuned", WRAPPERS["compile"])
    result = our_command(tmp_path, recipe(base, tuned))
    assert result.exit_code == 1
    assert "may not be the base" in result.output


def test_names_of_transformers_4_against_5(tmp_path, caplog):
    """LLaVA's `language_model.model.` has become `model.language_model.`."""
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**{**SIZES, "vocab_size": VOCABULARY}),
        vision_config=t.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        image_token_index=VOCABULARY - 1,
    )
    model = t.LlavaForConditionalGeneration(config)
    base = write_checkpoint(tmp_path / "base", model, F32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), F32)
    expected = our_merge(tmp_path / "plain", recipe(base, tuned))

    table = {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.lm_head.": "lm_head.",
    }

    def newer(name):
        return next((new + name[len(old) :] for old, new in table.items() if name.startswith(old)), name)

    other = renamed(tuned, tmp_path / "other", newer)
    assert not set(load_tensors(other)) & set(expected)
    with caplog.at_level(logging.WARNING):
        merged = our_merge(tmp_path, recipe(base, other))
    assert caplog.text.count("seen through") == 1
    # Of the two, the names that the class itself has.
    assert equal(merged, {newer(name): tensor for name, tensor in expected.items()})
    loaded(tmp_path / "out")


@pytest.fixture
def composite(tmp_path):
    """A vision-language base, and its language model alone, fine-tuned."""
    text = t.Gemma3TextConfig(
        **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"},
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = t.Gemma3Config(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
    )
    torch.manual_seed(3)
    model = t.Gemma3ForConditionalGeneration(config)
    base = write_checkpoint(tmp_path / "base", model, F32)
    alone = t.Gemma3ForCausalLM(text)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(alone, 1), F32)
    return base, tuned


@pytest.mark.parametrize("says", ["text", "composite"])
def test_a_text_only_fine_tune_of_a_vision_language_base(tmp_path, composite, caplog, says):
    base, tuned = composite
    if says == "composite":
        shutil.copy(base / "config.json", tuned / "config.json")
    with caplog.at_level(logging.WARNING):
        merged = our_merge(tmp_path, recipe(base, tuned))
    w0, w1 = load_tensors(base), load_tensors(tuned)
    assert set(merged) == set(w0)
    vision = {name for name in w0 if "vision" in name or "multi_modal" in name}
    assert len(vision) > 20
    assert all(torch.equal(merged[name], w0[name]) for name in vision)
    assert caplog.text.count(f"{len(vision)} tensors (") == 1
    name = next(n for n in w0 if n.endswith("layers.1.mlp.up_proj.weight") and n not in vision)
    exact = oracle.monosoup_weight(
        as_float64(w0[name]), [as_float64(w1["model.layers.1.mlp.up_proj.weight"])]
    )
    torch.testing.assert_close(merged[name].double(), torch.from_numpy(exact))
    done = {r.tensor: r.action for r in read_report(tmp_path / "out").records}
    assert done[name] == "edited"
    assert {done[n] for n in vision} == {"copied"}
    model = loaded(tmp_path / "out")
    assert torch.equal(model.model.language_model.layers[1].mlp.up_proj.weight, merged[name])


def test_a_float32_tensor_among_bfloat16_ones_stays(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    name = "model.layers.1.input_layernorm.weight"
    weights = load_tensors(models.tuned[0])
    value = weights[name].float() + 1e-4
    tuned = copy_with_tensors(models.tuned[0], tmp_path / "tuned", weights | {name: value})
    for keys in ({"dtype": "bfloat16"}, {"out_dtype": "bfloat16"}, {"dtype": "float16"}, {}):
        merged = our_merge(tmp_path / str(len(str(keys))), recipe(models.base, tuned, **keys, **PLAIN))
        assert torch.equal(merged[name], value)
        narrow = torch.float16 if keys.get("dtype") == "float16" else torch.bfloat16
        assert {w.dtype for n, w in merged.items() if n != name} == {narrow}


def test_the_correction_bias_of_a_router(tmp_path):
    config = t.DeepseekV3Config(
        **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_hidden_layers")},
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    torch.manual_seed(2)
    model = t.DeepseekV3ForCausalLM(config)
    base = write_checkpoint(tmp_path / "b", model, torch.bfloat16)
    tuned = write_checkpoint(tmp_path / "t", fine_tune(model, 1), torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    values = {}
    for folder in (base, tuned):
        values[folder] = torch.randn(4)
        tensors = load_tensors(folder) | {name: values[folder]}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    merged = our_merge(tmp_path, recipe(base, tuned, dtype="bfloat16"))
    assert torch.equal(merged[name], values[tuned])


def test_a_stray_file_beside_an_index_is_not_read(tmp_path, family):
    models = family("qwen3-tied", "bf16", max_shard_size="60KB")
    expected = our_merge(tmp_path / "plain", recipe(models.base, models.tuned[0]))
    tuned = tmp_path / "tuned"
    shutil.copytree(models.tuned[0], tuned)
    stray = {"layers.0.attention.wq.weight": torch.zeros(3, 3)}
    save_file(stray, tuned / "consolidated.safetensors")
    assert equal(our_merge(tmp_path, recipe(models.base, tuned)), expected)
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_layers_of_two_kinds(tmp_path):
    config = t.Qwen3NextConfig(
        **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"},
        vocab_size=VOCABULARY,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    torch.manual_seed(1)
    model = t.Qwen3NextForCausalLM(config)
    base = write_checkpoint(tmp_path / "base", model, F32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), F32)
    names = set(load_tensors(tuned))
    assert any("linear_attn" in name for name in names)
    assert any("self_attn" in name for name in names)
    config_file = tmp_path / "plain"
    result = our_command(config_file, recipe(base, tuned, **PLAIN), "--no-copy-tokenizer", "--quiet")
    assert result.exit_code == 0, result.output
    assert_same_model(config_file / "out", tuned)


def test_a_missing_class_is_still_refused(tmp_path, family):
    models = family("llama", "bf16")
    tuned = renamed(models.tuned[0], tmp_path / "tuned", WRAPPERS["compile"])
    edit_config(tuned, architectures=[])
    result = our_command(tmp_path, recipe(models.base, tuned))
    assert result.exit_code == 1
    assert "architectures" in result.output
    assert json.loads((tuned / "config.json").read_text())["architectures"] == []
