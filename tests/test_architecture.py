"""What our command does where mergekit's definition of an architecture does not fit the files."""

from __future__ import annotations

import json
import logging

import peft
import pytest
import torch
from checkpoints import copy_with_tensors, edit_config, load_tensors
from click.testing import CliRunner
from commands import forget_loaders, recipe, write_config
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from transformers import AutoModelForImageClassification

pytestmark = pytest.mark.usefixtures("registered", "one_thread")
OPTIONS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")


def merge(folder, config, *options):
    from mergekit_monosoup.cli.merge import merge as command

    forget_loaders()
    before = dict(NAME_TO_ARCH)
    try:
        arguments = [str(write_config(folder, config)), str(folder / "out"), *OPTIONS, *options]
        return CliRunner().invoke(command, arguments)
    finally:
        forget_loaders()
        assert before == NAME_TO_ARCH


def with_buffers(folder, target):
    tensors = load_tensors(folder)
    extra = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4).tril() for i in range(2)}
    return copy_with_tensors(folder, target, tensors | extra), set(tensors), set(extra)


def test_tensors_that_only_the_base_has_are_named(tmp_path, family_pair, caplog):
    """GPT-2's published files hold attention masks that transformers no longer writes."""
    base, tuned = family_pair("gpt-2")
    base, names, extra = with_buffers(base, tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        result = merge(tmp_path, recipe(base, tuned))
    assert result.exit_code == 0, result.output
    assert set(load_tensors(tmp_path / "out")) == names
    assert all(name in caplog.text for name in extra)


def test_tensors_that_all_have_are_kept(tmp_path, family_pair):
    folders = [with_buffers(folder, tmp_path / folder.name) for folder in family_pair("gpt-2")]
    result = merge(tmp_path, recipe(folders[0][0], folders[1][0]))
    assert result.exit_code == 0, result.output
    merged = load_tensors(tmp_path / "out")
    assert set(merged) == folders[0][1] | folders[0][2]
    assert torch.equal(merged["transformer.h.0.attn.bias"], torch.ones(1, 1, 4, 4).tril())


def test_slices_are_left_to_mergekit(tmp_path, family_pair):
    base, tuned = (with_buffers(folder, tmp_path / folder.name)[0] for folder in family_pair("gpt-2"))
    sources = [{"model": str(folder), "layer_range": [0, 1]} for folder in (base, tuned)]
    config = {"merge_method": "monosoup", "base_model": str(base), "slices": [{"sources": sources}]}
    result = merge(tmp_path, config)
    assert result.exit_code == 0, result.output
    merged = load_tensors(tmp_path / "out")
    assert {name.split(".")[2] for name in merged if ".h." in name} == {"0"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 1


def test_bert_with_and_without_a_prefix(tmp_path, family_pair):
    """A published base with `bert.` and heads, an embedding model without either."""
    base, tuned = family_pair("bert-bertmodel-most-embedding-models")
    tensors = {f"bert.{name}": tensor for name, tensor in load_tensors(base).items()}
    tensors |= {
        "cls.predictions.bias": torch.zeros(96),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    prefixed = copy_with_tensors(base, tmp_path / "base", tensors)
    result = merge(tmp_path / "a", recipe(prefixed, tuned))
    assert result.exit_code == 0, result.output
    result = merge(tmp_path / "b", recipe(base, tuned))
    assert result.exit_code == 0, result.output
    merged, expected = (load_tensors(tmp_path / part / "out") for part in "ab")
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_gradients_over_layers_that_are_taken_by_name(tmp_path, family_pair):
    base, tuned = family_pair("vit-classification")
    result = merge(tmp_path, recipe(base, tuned, parameters={"alpha": [0, 1], "edit": False}))
    assert result.exit_code == 0, result.output
    merged, w0, w1 = (load_tensors(folder) for folder in (tmp_path / "out", base, tuned))
    for name, tensor in merged.items():
        expected = w1 if "encoder.layer.1." in name else w0
        assert torch.equal(tensor, expected[name]), name


def test_a_tensor_that_its_class_needs_is_not_taken_from_the_base(tmp_path, family_pair):
    base, tuned = family_pair("clip")
    tensors = load_tensors(tuned)
    del tensors["logit_scale"]
    tuned = copy_with_tensors(tuned, tmp_path / "tuned", tensors)
    result = merge(tmp_path, recipe(base, tuned))
    assert result.exit_code == 1
    assert f"tensor logit_scale is missing in {tuned}" in result.output
    assert not (tmp_path / "out").exists()


def test_a_config_without_a_class_is_refused(tmp_path, family_pair):
    base, tuned = family_pair("clip")
    tuned = edit_config(copy_with_tensors(tuned, tmp_path / "t", load_tensors(tuned)), architectures=None)
    result = merge(tmp_path, recipe(base, tuned))
    assert result.exit_code == 1
    assert "names no class under architectures" in result.output


def test_an_adapter_of_an_architecture_that_mergekit_infers(tmp_path, family_pair):
    base, _ = family_pair("vit-classification")
    model = AutoModelForImageClassification.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "expected")
    config = {
        "merge_method": "linear",
        "models": [{"model": f"{base}+{tmp_path / 'adapter'}", "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    result = merge(tmp_path, config, "--lora-merge-cache", str(tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    merged, expected = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected")
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
