"""Nothing of a checkpoint gets lost: keys, dtypes, shards, vocabulary, tokenizer, card."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from checkpoints import (
    TEXT,
    VOCABULARY,
    build_model,
    build_tokenizer,
    copy_as_bin,
    copy_with_tensors,
    edit_config,
    fine_tune,
    load_tensors,
    weight_files,
    write_adapter,
    write_checkpoint,
)
from commands import command_line, merge, recipe, run, write_config
from expectations import assert_merged

pytestmark = pytest.mark.usefixtures("registered")


def equal(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def as_bits(tensors):
    """Bits rather than values, so that -0.0 is not 0.0."""
    integers = {2: torch.int16, 4: torch.int32}
    return {name: t.view(integers[t.element_size()]) for name, t in tensors.items()}


@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen3-untied", "llama"])
def test_result_loads_and_generates(tmp_path, family, architecture):
    models = family(architecture, "bf16")
    merged = merge(tmp_path, recipe(models.base, models.tuned[0]))
    assert ("lm_head.weight" in merged) == (architecture != "qwen3-tied")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (architecture == "qwen3-tied")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT)["input_ids"] == build_tokenizer()(TEXT)["input_ids"]
    inputs = tokenizer(TEXT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.isfinite(model(**inputs).logits).all()


def test_card_names_the_method_and_its_reference(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    merge(tmp_path, recipe(models.base, models.tuned[0]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[MonoSoup](https://arxiv.org/abs/2602.09689)" in card
    assert "merge_method: monosoup" in card


@pytest.mark.parametrize("options", [(), ("--async-write",), ("--lazy-unpickle",)], ids=str)
def test_shards_in_and_out(tmp_path, family, options):
    whole, shards = (family("qwen3-untied", "fp32", **size) for size in ({}, {"max_shard_size": 40_000}))
    assert all(len(weight_files(folder)) > 3 for folder in shards.folders)
    merged = merge(tmp_path, recipe(shards.base, shards.tuned[0]), "--out-shard-size", "20k", *options)
    assert len(weight_files(tmp_path / "out")) > 5
    assert_merged(merged, load_tensors(shards.base), [load_tensors(shards.tuned[0])])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(merged)
    one_file = merge(tmp_path / "whole", recipe(whole.base, whole.tuned[0]))
    assert equal(as_bits(merged), as_bits(one_file))


@pytest.mark.parametrize("options", [("--lazy-unpickle",), ()], ids=["lazy", "plain"])
@pytest.mark.parametrize("which", ["both", "base", "tuned"])
def test_bin_inputs(tmp_path, family, options, which):
    models = family("llama", "bf16")
    base, tuned = models.base, models.tuned[0]
    expected = merge(tmp_path / "safetensors", recipe(base, tuned))
    if which in ("both", "base"):
        base = copy_as_bin(base, tmp_path / "base")
    if which in ("both", "tuned"):
        tuned = copy_as_bin(tuned, tmp_path / "tuned")
    merged = merge(tmp_path, recipe(base, tuned), *options)
    assert equal(as_bits(merged), as_bits(expected))


@pytest.mark.parametrize(
    ("stored", "dtype", "out_dtype"),
    [
        ("fp32", "bfloat16", None),
        ("fp32", None, "bfloat16"),
        ("fp32", None, "float16"),
        ("bf16", "float32", "bfloat16"),
        ("bf16", "float32", None),
        ("bf16", "bfloat16", None),
        ("fp16", "float32", "float16"),
    ],
)
def test_dtype_and_out_dtype(tmp_path, family, stored, dtype, out_dtype):
    models = family("qwen3-tied", stored)
    keys = {"dtype": dtype, "out_dtype": out_dtype}
    merged = merge(
        tmp_path,
        recipe(models.base, models.tuned[0], **{key: v for key, v in keys.items() if v}),
    )
    assert_merged(
        merged,
        load_tensors(models.base),
        [load_tensors(models.tuned[0])],
        dtype=dtype and getattr(torch, dtype),
        out_dtype=out_dtype and getattr(torch, out_dtype),
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = out_dtype or dtype
    if expected:
        assert (written.get("dtype") or written.get("torch_dtype")) == expected


def test_dtypes_of_a_checkpoint_in_two_dtypes(tmp_path, family):
    """Vectors in float32 among bfloat16 matrices: each tensor keeps its own."""
    models = family("qwen3-tied", "bf16")
    folders = []
    for index, source in enumerate((models.base, models.tuned[0])):
        tensors = load_tensors(source)
        mixed = {name: t.float() if t.ndim == 1 else t for name, t in tensors.items()}
        folders.append(copy_with_tensors(source, tmp_path / str(index), mixed))
    merged = merge(tmp_path, recipe(*folders))
    assert {t.dtype for t in merged.values()} == {torch.float32, torch.bfloat16}
    assert_merged(merged, load_tensors(folders[0]), [load_tensors(folders[1])])


@pytest.mark.parametrize(("base", "tuned"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_inputs_of_two_dtypes_are_promoted(tmp_path, family, base, tuned):
    left, right = family("qwen3-tied", base).base, family("qwen3-tied", tuned).tuned[0]
    merged = merge(tmp_path, recipe(left, right))
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    assert_merged(merged, load_tensors(left), [load_tensors(right)])


@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen3-untied"])
def test_tokenizer_source_base(tmp_path, architecture):
    """A fine-tune with a longer, reordered vocabulary is brought back to the base's rows."""
    model = build_model(architecture)
    base = write_checkpoint(tmp_path / "base", model, torch.bfloat16)
    tuned_model = fine_tune(model, seed=1)
    tuned_model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    tuned = write_checkpoint(
        tmp_path / "tuned",
        tuned_model,
        torch.bfloat16,
        tokenizer=build_tokenizer(extra=("<tool>", "<answer>")),
    )
    merged = merge(tmp_path, recipe(base, tuned, tokenizer={"source": "base"}))
    aligned = {
        name: tensor[:VOCABULARY] if tensor.shape[0] == VOCABULARY + 2 else tensor
        for name, tensor in load_tensors(tuned).items()
    }
    assert_merged(merged, load_tensors(base), [aligned])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == VOCABULARY
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == VOCABULARY


def test_slices(tmp_path, family):
    """Layers 0, 1 and 1, 2 on top of each other, each slice with settings of its own."""
    models = family("llama", "fp32")
    ranges, settings = ([0, 2], [1, 3]), ({"alpha": 0.5}, {"energy": 0.7})
    config = recipe(
        models.base,
        slices=[
            {
                "sources": [
                    {"model": str(models.tuned[0]), "layer_range": layers},
                    {"model": str(models.base), "layer_range": layers},
                ],
                "parameters": parameters,
            }
            for layers, parameters in zip(ranges, settings, strict=True)
        ],
    )
    merged = merge(tmp_path, config)
    sources = [layer for first, last in ranges for layer in range(first, last)]

    def stacked(tensors):
        result = {name: t for name, t in tensors.items() if ".layers." not in name}
        for target, source in enumerate(sources):
            prefix = f"model.layers.{source}."
            result |= {
                name.replace(prefix, f"model.layers.{target}."): t
                for name, t in tensors.items()
                if name.startswith(prefix)
            }
        return result

    def slice_settings(name):
        if ".layers." in name:
            return settings[int(name.split(".")[2]) // 2]
        return settings[0 if "embed" in name else 1]

    base, tuned = (stacked(load_tensors(f)) for f in (models.base, models.tuned[0]))
    assert_merged(merged, base, [tuned], slice_settings)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == len(sources)


def test_a_slice_with_a_base_of_its_own(tmp_path, family):
    models = family("llama", "bf16")
    sources = [{"model": str(f), "layer_range": [0, 3]} for f in (models.tuned[0], models.base)]
    config = recipe(None, slices=[{"sources": sources, "base_model": str(models.base)}])
    merged = merge(tmp_path, config)
    assert_merged(merged, load_tensors(models.base), [load_tensors(models.tuned[0])])


def test_a_quantisation_that_is_null_is_none(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    tuned = copy_with_tensors(models.tuned[0], tmp_path / "t", load_tensors(models.tuned[0]))
    edit_config(tuned, quantization_config=None)
    merged = merge(tmp_path, recipe(models.base, tuned))
    assert_merged(merged, load_tensors(models.base), [load_tensors(tuned)])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_base_with_adapter(tmp_path, family, dtype):
    base = family("qwen3-tied", "bf16").base
    adapter = write_adapter(tmp_path / "adapter", base)
    cache = tmp_path / "cache"
    # The merged weights; the factors have tests of their own.
    keys = {"parameters": {"exact_lora": False}} | ({"dtype": dtype} if dtype else {})
    merged = merge(tmp_path, recipe(base, f"{base}+{adapter}", **keys), "--lora-merge-cache", str(cache))
    (folder,) = cache.iterdir()
    before, after = load_tensors(base), load_tensors(folder)
    assert_merged(merged, before, [after], dtype=dtype and getattr(torch, dtype))
    touched = {name for name in before if any(part in name for part in ("q_proj", "v_proj", "down"))}
    for name, tensor in before.items():
        assert torch.equal(merged[name], tensor.to(merged[name].dtype)) == (name not in touched)


@pytest.mark.slow
def test_a_real_process(tmp_path, family):
    """The command as a user runs it; bit for bit what this process computes."""
    models = family("qwen3-tied", "bf16", max_shard_size=40_000)
    config = recipe(models.base, *models.tuned, parameters={"energy": 0.8})
    here = merge(tmp_path, config)
    out = tmp_path / "process"
    file = write_config(tmp_path, config)
    run([*command_line("mergekit-yaml"), str(file), str(out), "--out-shard-size", "20k"], tmp_path)
    assert equal(as_bits(load_tensors(out)), as_bits(here))
