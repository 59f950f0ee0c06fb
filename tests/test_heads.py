"""Heads of the fine-tuned checkpoint come out as it has them: own, tied, new, or none."""

from __future__ import annotations

import logging

import oracle
import pytest
import torch
import transformers as t
from checkpoints import (
    SIZES,
    VOCABULARY,
    build_model,
    copy_with_tensors,
    edit_config,
    fine_tune,
    load_tensors,
    structured_update,
    write_checkpoint,
)
from commands import our_command, our_merge, recipe
from loading import assert_same_model, loaded
from rounding import as_float64

from mergekit_monosoup.report.reader import read_report

pytestmark = pytest.mark.usefixtures("registered", "one_thread")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLAIN = {"parameters": {"alpha": 1.0, "edit": False}}
F32 = torch.float32


def untied(model, seed):
    """The model with a head of its own, which has been trained."""
    config = t.Qwen3Config(**{**model.config.to_dict(), "tie_word_embeddings": False})
    own = t.Qwen3ForCausalLM(config)
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        weight = own.lm_head.weight
        update = structured_update(weight.shape, torch.Generator().manual_seed(seed))
        weight.add_(0.02 * weight.norm() * update)
    return own


def records(folder):
    return {r.tensor: r for r in read_report(folder / "out").records}


@pytest.mark.parametrize("says_tied", [False, True])
def test_a_head_of_its_own_over_a_tied_base(tmp_path, says_tied):
    model = build_model("qwen3-tied")
    base = write_checkpoint(tmp_path / "base", model, F32)
    tuned = write_checkpoint(tmp_path / "tuned", untied(fine_tune(model, 1), 2), F32)
    if says_tied:
        edit_config(tuned, tie_word_embeddings=True)
    merged = our_merge(tmp_path, recipe(base, tuned))
    w0, w1 = load_tensors(base), load_tensors(tuned)
    assert HEAD not in w0
    exact = oracle.monosoup_weight(as_float64(w0[EMBEDDING]), [as_float64(w1[HEAD])])
    torch.testing.assert_close(merged[HEAD].double(), torch.from_numpy(exact))
    assert records(tmp_path)[HEAD].action == "edited"
    assert not torch.equal(merged[HEAD], merged[EMBEDDING])
    our_merge(tmp_path / "plain", recipe(base, tuned, **PLAIN))
    edit_config(tuned, tie_word_embeddings=False)
    assert_same_model(tmp_path / "plain" / "out", tuned)


def test_a_tied_fine_tune_of_an_untied_base(tmp_path, caplog):
    model = build_model("qwen3-tied")
    base = write_checkpoint(tmp_path / "base", untied(model, 2), F32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), F32)
    with caplog.at_level(logging.WARNING):
        merged = our_merge(tmp_path, recipe(base, tuned))
    assert set(merged) == set(load_tensors(tuned))
    assert len([r for r in caplog.records if HEAD in r.getMessage()]) == 1
    our_merge(tmp_path / "plain", recipe(base, tuned, **PLAIN))
    assert_same_model(tmp_path / "plain" / "out", tuned)


def llama(kind, **changes):
    config = t.LlamaConfig(**{**SIZES, "vocab_size": VOCABULARY, "num_labels": 3, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return kind(config).eval()


BASES = {"model": t.LlamaModel, "causal": t.LlamaForCausalLM}
HEADS = {
    "sequence": (t.LlamaForSequenceClassification, {"score.weight"}),
    "token": (t.LlamaForTokenClassification, {"score.weight", "score.bias"}),
    "question": (t.LlamaForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("plain", BASES)
def test_new_heads_over_a_plain_base(tmp_path, caplog, plain, head):
    base_model = llama(BASES[plain])
    kind, new = HEADS[head]
    model = llama(kind)
    backbone = getattr(base_model, "model", base_model)
    getattr(model, model.base_model_prefix).load_state_dict(backbone.state_dict())
    base = write_checkpoint(tmp_path / "base", base_model, F32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), F32)
    with caplog.at_level(logging.WARNING):
        merged = our_merge(tmp_path, recipe(base, tuned))
    w0, w1 = load_tensors(base), load_tensors(tuned)
    assert set(merged) == set(w1)
    done = records(tmp_path)
    for name in new:
        assert torch.equal(merged[name], w1[name])
        assert (done[name].action, done[name].reason) == ("kept", "the base does not have it")
        assert name in caplog.text
    assert (HEAD in caplog.text) == (HEAD in w0)
    name = next(n for n in merged if n.endswith("layers.1.mlp.up_proj.weight"))
    base_name = next(n for n in w0 if n.endswith("layers.1.mlp.up_proj.weight"))
    exact = oracle.monosoup_weight(as_float64(w0[base_name]), [as_float64(w1[name])])
    torch.testing.assert_close(merged[name].double(), torch.from_numpy(exact))
    assert done[name].action == "edited"
    loaded(tmp_path / "out")
    our_merge(tmp_path / "plain", recipe(base, tuned, **PLAIN))
    config = t.AutoConfig.from_pretrained(tuned)
    results = [kind.from_pretrained(f, config=config)(torch.arange(9)[None]) for f in (tuned, out(tmp_path))]
    for key, value in results[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, results[1][key])


def out(folder):
    return folder / "plain" / "out"


@pytest.mark.parametrize("plain", [t.BertModel, t.BertForMaskedLM])
def test_a_classifier_over_bert(tmp_path, plain):
    config = t.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    base_model, model = plain(config), t.BertForSequenceClassification(config)
    inner = getattr(base_model, "bert", base_model)
    model.bert.load_state_dict(inner.state_dict(), strict=False)
    base = write_checkpoint(tmp_path / "base", base_model, F32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), F32)
    merged = our_merge(tmp_path, recipe(base, tuned))
    assert set(merged) == set(load_tensors(tuned))
    done = records(tmp_path)
    assert done["bert.encoder.layer.1.output.dense.weight"].action == "edited"
    assert done["classifier.weight"].reason == "the base does not have it"
    our_merge(tmp_path / "plain", recipe(base, tuned, **PLAIN))
    assert_same_model(out(tmp_path), tuned)


def test_a_classifier_of_an_enlarged_vocabulary(tmp_path):
    base_model = llama(t.LlamaModel)
    model = llama(t.LlamaForSequenceClassification)
    model.model.load_state_dict(base_model.state_dict())
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    base = write_checkpoint(tmp_path / "base", base_model, F32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), F32)
    merged = our_merge(tmp_path, recipe(base, tuned))
    new = load_tensors(tuned)[EMBEDDING][VOCABULARY:]
    assert torch.equal(merged[EMBEDDING][VOCABULARY:], new)


def test_a_head_that_its_own_class_needs_is_missing(tmp_path):
    model = llama(t.LlamaForSequenceClassification)
    base = write_checkpoint(tmp_path / "base", llama(t.LlamaModel), F32)
    tuned = write_checkpoint(tmp_path / "full", fine_tune(model, 1), F32)
    tensors = {n: w for n, w in load_tensors(tuned).items() if "layers.1.mlp.up_proj" not in n}
    cut = copy_with_tensors(tuned, tmp_path / "tuned", tensors)
    result = our_command(tmp_path, recipe(base, cut))
    assert result.exit_code == 1
    assert f"model.layers.1.mlp.up_proj.weight is missing in {cut}" in result.output


def test_different_architectures_are_refused_still(tmp_path, family):
    base, tuned = family("qwen3-tied", "bf16").base, family("llama", "bf16").tuned[0]
    result = our_command(tmp_path, recipe(base, tuned))
    assert result.exit_code == 1
    assert "LlamaForCausalLM" in result.output


def test_multi_token_prediction_layers_that_only_the_base_has(tmp_path, caplog):
    model = build_model("qwen3-tied")
    plain = write_checkpoint(tmp_path / "plain_base", model, F32)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), F32)
    tensors = load_tensors(plain)
    extra = {
        name.replace("model.", "mtp."): tensor + 1 for name, tensor in tensors.items() if ".layers.0." in name
    } | {"mtp.fc.weight": torch.ones(40, 80)}
    base = copy_with_tensors(plain, tmp_path / "base", tensors | extra)
    with caplog.at_level(logging.WARNING):
        merged = our_merge(tmp_path, recipe(base, tuned))
    assert set(merged) == set(tensors) | set(extra)
    assert all(torch.equal(merged[name], tensor) for name, tensor in extra.items())
    assert caplog.text.count(f"{len(extra)} tensors (mtp.") == 1
    done = records(tmp_path)
    assert {(done[name].action, done[name].reason) for name in extra} == {("copied", "only the base has it")}


def test_float8_layers_that_only_the_base_has_keep_their_values(tmp_path):
    model = build_model("qwen3-tied")
    plain = write_checkpoint(tmp_path / "plain_base", model, torch.bfloat16)
    tuned = write_checkpoint(tmp_path / "tuned", fine_tune(model, 1), torch.bfloat16)
    values, scale = torch.randn(40, 80), torch.tensor([0.25])
    extra = {"mtp.fc.weight": values.to(torch.float8_e4m3fn), "mtp.fc.weight_scale_inv": scale}
    base = copy_with_tensors(plain, tmp_path / "base", load_tensors(plain) | extra)
    for keys in ({}, {"dtype": "float32"}):
        merged = our_merge(tmp_path / str(len(keys)), recipe(base, tuned, **keys))
        assert "mtp.fc.weight_scale_inv" not in merged
        expected = extra["mtp.fc.weight"].float() * 0.25
        assert torch.equal(merged["mtp.fc.weight"].float(), expected)


def test_parts_that_only_the_fine_tune_has(tmp_path, caplog):
    model = build_model("qwen3-tied")
    base = write_checkpoint(tmp_path / "base", model, F32)
    plain = write_checkpoint(tmp_path / "full", fine_tune(model, 1), F32)
    extra = {"v_head.summary.weight": torch.ones(1, 40), "v_head.summary.bias": torch.ones(1)}
    tuned = copy_with_tensors(plain, tmp_path / "tuned", load_tensors(plain) | extra)
    merged = our_merge(tmp_path, recipe(base, tuned))
    assert all(torch.equal(merged[name], tensor) for name, tensor in extra.items())
    assert all(records(tmp_path)[name].action == "kept" for name in extra)


def test_leftover_buffers_are_left_out_with_one_line(tmp_path, caplog):
    model = build_model("qwen3-tied")
    base = write_checkpoint(tmp_path / "base", model, F32)
    plain = write_checkpoint(tmp_path / "full", fine_tune(model, 1), F32)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tuned = copy_with_tensors(plain, tmp_path / "tuned", load_tensors(plain) | {buffer: torch.arange(6.0)})
    for number, pair in enumerate(((base, tuned), (tuned, base))):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            merged = our_merge(tmp_path / str(number), recipe(*pair))
        assert set(merged) == set(load_tensors(base))
        assert len([r for r in caplog.records if buffer in r.getMessage()]) == 1
