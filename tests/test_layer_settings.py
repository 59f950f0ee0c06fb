"""What config.json says of single layers after `slices`: true of the layers that transformers then builds."""

from __future__ import annotations

import pytest
import torch
import transformers
from beside import our_merge, read_json
from checkpoints import fine_tune, write_checkpoint
from commands import recipe

from mergekit_monosoup.merging.configuration import written_config
from mergekit_monosoup.merging.layer_settings import layers_key

pytestmark = pytest.mark.usefixtures("registered", "one_thread")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 6}
KINDS = {
    "Qwen3-MoE": lambda: transformers.Qwen3MoeConfig(
        **SMALL, **MIXED, num_experts=4, mlp_only_layers=[0, 3, 5]
    ),
    "Qwen2-MoE": lambda: transformers.Qwen2MoeConfig(
        **{k: v for k, v in SMALL.items() if k != "head_dim"},
        **MIXED,
        num_experts=4,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[2],
    ),
    "DeepSeek-V3": lambda: transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4, "head_dim": 16},
        **MIXED,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
    ),
    "Llama 4": lambda: transformers.Llama4TextConfig(
        **SMALL,
        num_hidden_layers=6,
        intermediate_size_mlp=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        moe_layers=[1, 3, 4],
        no_rope_layers=[1, 1, 0, 1, 0, 1],
    ),
    "SmolLM3": lambda: transformers.SmolLM3Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"},
        num_hidden_layers=6,
        no_rope_layers=[1, 0, 1, 1, 0, 1],
        pad_token_id=0,
    ),
    "Gemma 3": lambda: transformers.Gemma3TextConfig(**SMALL, num_hidden_layers=6, sliding_window_pattern=3),
}


def _kind_of(layer: torch.nn.Module) -> tuple[object, ...]:
    """What a layer is made of, whatever its place."""
    flags = [getattr(layer, "layer_type", None), getattr(layer, "attention_type", None)]
    attention = getattr(layer, "self_attn", None)
    flags += [getattr(attention, name, None) for name in ("use_rope", "is_sliding", "sliding_window")]
    return (*flags, *sorted((name, tuple(p.shape)) for name, p in layer.named_parameters()))


def _layers(config: transformers.PreTrainedConfig) -> list[tuple[object, ...]]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return [_kind_of(layer) for layer in model.model.layers]


@pytest.mark.parametrize(
    "sources", [[0, 1, 2, 3, 3, 4, 5], [0, 1, 4, 5], [2, 4], [0, 1, 2, 0, 1, 2]], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_is_of_the_kind_of_its_source(kind, sources, caplog):
    config = KINDS[kind]()
    before = _layers(config)
    assert len(set(before)) > 1
    written = written_config(config.to_dict(), {}, {}, layers={"num_hidden_layers": sources})
    after = _layers(type(config)(**written))
    true = after == [before[source] for source in sources]
    # What cannot be expressed is at least said.
    assert true is not ("check that it is true" in caplog.text)
    assert true or (kind, sources) == ("DeepSeek-V3", [0, 1, 2, 0, 1, 2])


def test_a_rule_that_moved_layers_do_not_follow_is_said(caplog):
    source = {
        "num_hidden_layers": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_kv_shared_layers": 2,
    }
    layers = {"num_hidden_layers": [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]}
    written = written_config(source, {}, {}, layers=layers)
    # Layers 6 and 7 share twice, and once with others between.
    assert written["num_kv_shared_layers"] == 4
    assert "by num_kv_shared_layers which" in caplog.text
    assert "attn_layer_period" not in caplog.text
    caplog.clear()
    written_config(source, {}, {}, layers={"num_hidden_layers": [0, 1, 2, 4, 5, 6, 7]})
    assert "by attn_layer_period which" in caplog.text


@pytest.mark.parametrize(
    ("config", "module", "count", "key"),
    [
        ({"num_hidden_layers": 2}, "model", 2, "num_hidden_layers"),
        ({"n_layer": 2}, "", None, "n_layer"),
        ({"num_hidden_layers": 2}, "model", 3, None),
        ({"num_layers": 2, "num_decoder_layers": 2}, "decoder", None, "num_decoder_layers"),
        ({"num_layers": 2, "num_decoder_layers": 2}, "encoder", None, "num_layers"),
        ({"encoder_layers": 2, "decoder_layers": 2}, "model.decoder", 2, "decoder_layers"),
        (
            {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 2}},
            "model.language_model",
            2,
            "text_config.num_hidden_layers",
        ),
        (
            {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}},
            "model.vision_tower",
            2,
            "vision_config.num_hidden_layers",
        ),
        ({}, "model", None, None),
    ],
)
def test_where_the_number_of_layers_stands(config, module, count, key):
    assert layers_key(config, module, count) == key


def test_all_layers_in_their_places_change_nothing(caplog):
    source = {"num_hidden_layers": 4, "kv_source_layers": [0, 0, 1, 1], "hybrid_override_pattern": "M-M*"}
    assert written_config(source, {}, {}, layers={"num_hidden_layers": [0, 1, 2, 3]}) == source
    written = written_config(source, {}, {}, layers={"num_hidden_layers": [0, 3]})
    assert written["hybrid_override_pattern"] == "M*"
    assert "by kv_source_layers which" in caplog.text


@pytest.mark.parametrize("kind", ["SmolLM3", "Gemma 3"])
def test_a_merge_of_slices_loads_with_the_right_layers(kind, tmp_path):
    config = KINDS[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    base = write_checkpoint(tmp_path / "base", model, torch.float32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, seed=1), torch.float32)
    ranges = ([0, 2], [4, 6])
    parts = [{"sources": [{"model": str(m), "layer_range": r} for m in (tuned, base)]} for r in ranges]
    out = our_merge(tmp_path, recipe(base, slices=parts, parameters={"edit": False}))
    told = read_json(out / "config.json")
    assert told["num_hidden_layers"] == 4
    assert len(told["layer_types"]) == 4
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # The fine-tuned model with two of its layers taken out.
    want = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    want.model.layers = torch.nn.ModuleList([want.model.layers[i] for i in (0, 1, 4, 5)])
    for i, layer in enumerate(want.model.layers):
        layer.self_attn.layer_idx = i
    want.config.num_hidden_layers = 4
    for name in ("layer_types", "no_rope_layers"):
        if getattr(want.config, name, None) is not None:
            setattr(want.config, name, [getattr(want.config, name)[i] for i in (0, 1, 4, 5)])
    tokens = torch.arange(24).reshape(2, 12) % 90
    with torch.no_grad():
        torch.testing.assert_close(
            merged(tokens, use_cache=False).logits, want(tokens, use_cache=False).logits
        )
