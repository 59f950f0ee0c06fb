"""Plans agree with what merges do, name what is wrong, and read no weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from checkpoints import (
    build_model,
    build_tokenizer,
    copy_as_bin,
    copy_with_tensors,
    edit_config,
    fine_tune,
    load_tensors,
    write_checkpoint,
)
from click.testing import CliRunner
from commands import forget_loaders, recipe, write_config

from mergekit_monosoup.cli import main
from mergekit_monosoup.planning.plan import PlanOptions, make_plan
from mergekit_monosoup.report.reader import read_report

MATRIX = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def planned(config, **options):
    return make_plan(yaml.safe_dump(config, sort_keys=False), PlanOptions(costs=False, **options))


def errors(text_or_config, **options):
    text = (
        text_or_config if isinstance(text_or_config, str) else yaml.safe_dump(text_or_config, sort_keys=False)
    )
    return [str(problem) for problem in make_plan(text, PlanOptions(costs=False, **options)).problems.errors]


def run_plan(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def merged(folder, config, *options):
    forget_loaders()
    out = folder / "out"
    result = CliRunner().invoke(main, ["merge", str(write_config(folder, config)), str(out), *options])
    forget_loaders()
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    "case",
    ["plain", "two", "untied", "sharded", "edit", "float32", "slices", "bin", "threshold"],
)
def test_plan_is_what_the_merge_does(tmp_path, family, case):
    """Names, shapes, dtypes and actions of the plan are those of the output and of its report."""
    models = family(
        {"untied": "qwen3-untied", "slices": "llama"}.get(case, "qwen3-tied"),
        "fp32" if case == "float32" else "bf16",
        **({"max_shard_size": "60KB"} if case == "sharded" else {}),
    )
    base, tuned = models.base, models.tuned
    config = recipe(base, *(tuned if case == "two" else tuned[:1]))
    if case == "edit":
        config["parameters"] = {"edit": [{"filter": "self_attn", "value": False}, {"value": True}]}
    elif case == "float32":
        config["out_dtype"] = "bfloat16"
    elif case == "slices":
        del config["models"]
        config["slices"] = [
            {"sources": [{"model": str(m), "layer_range": bounds} for m in (base, tuned[0])]}
            for bounds in ([0, 2], [1, 3])
        ]
    elif case == "bin":
        config["models"] = [{"model": str(copy_as_bin(tuned[0], tmp_path / "pickled"))}]
    elif case == "threshold":
        config["parameters"] = {"min_relative_update": 1e-9}
    plan = planned(config)
    assert not plan.problems.found
    out = merged(tmp_path, config)
    tensors = load_tensors(out)
    assert {t.tensor: (t.shape, t.dtype) for t in plan.tensors} == {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()
    }
    done = {record.tensor: record.action for record in read_report(out).records}
    assert {t.tensor: t.action for t in plan.tensors} == done
    assert plan.output_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(
    ("broken", "line", "named"),
    [
        ("  enery: 0.8", 6, "did you mean 'energy'"),
        ("  energy: 1.5", 6, "(0, 1]"),
        ("  alpha: -1", 6, ">= 0"),
        ("  alpha: [0.1, -1]", 6, "-1"),
        ("  alpha: true", 6, "True"),
        ("  mixing: decai", 6, "decay"),
        ("  edit: perhaps", 6, "true or false"),
        ("  energy:", 6, "no value"),
        ("  edit:\n    - filter: embed\n      valeu: false", 8, "did you mean 'value'"),
        ("  edit:\n    - filter: embed\n      value: 7", 8, "7"),
        ("  edit:\n    - filter: 0.5\n      value: false", 7, "in quotation marks"),
        ("dtyp: bfloat16", 6, "did you mean 'dtype'"),
        ("dtype: bfloat61", 6, "bfloat16"),
        ("base_model: other", 6, "given twice"),
        ("tokenizer:\n  sauce: base", 7, "did you mean 'source'"),
        ("slices: []\nslice: 1", 7, "did you mean 'slices'"),
    ],
)
def test_slips_are_named_with_their_line(family, broken, line, named):
    models = family("qwen3-tied", "bf16")
    block = "parameters:\n" if broken.startswith("  ") else "parameters: {}\n"
    text = (
        f"merge_method: monosoup\nbase_model: {models.base}\nmodels:\n  - model: {models.tuned[0]}\n"
        f"{block}{broken}\n"
    )
    found = errors(text)
    assert any(f"line {line}:" in message and named in message for message in found), found


def test_a_method_of_a_similar_name(family):
    models = family("qwen3-tied", "bf16")
    (message,) = errors({**recipe(models.base, models.tuned[0]), "merge_method": "monosup"})
    assert message.startswith("line 1:")
    assert "did you mean 'monosoup'" in message


def test_parameters_that_mergekit_would_ignore(family):
    models = family("qwen3-tied", "bf16")
    config = recipe(models.base)
    config["models"] = [{"model": str(models.tuned[0]), "parameters": {"energy": 0.5}}]
    (message,) = errors(config)
    assert "top-level" in message


def test_inputs_that_cannot_be_merged(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    base, tuned = models.base, models.tuned[0]
    assert "base_model" in errors(recipe(None, tuned))[0]
    assert "besides base_model" in errors(recipe(base, base))[0]
    assert f"did you mean {tuned}" in errors(recipe(base, str(tuned)[:-1] + "x1"))[0]
    (nowhere,) = errors(recipe(base, "/" + "x" * 5000))
    assert len(nowhere) < 400
    for long in ("x" * 5000, f"{tuned}+{'x' * 5000}", f"{tuned}+/{'x' * 5000}"):
        assert all(len(message) < 400 for message in errors(recipe(base, long)))
    assert not errors(recipe(base, tuned, tokenizer={"source": "x" * 300}))
    tensors = load_tensors(tuned)
    cases = {
        "missing": ({MATRIX: None}, [MATRIX, "missing"]),
        "shape": ({MATRIX: torch.zeros(72, 39)}, [MATRIX, "[72, 39]"]),
        "vocabulary": ({EMBEDDING: torch.zeros(99, 39)}, [EMBEDDING, "[99, 39]"]),
        "integers": ({MATRIX: torch.zeros(72, 40, dtype=torch.int8)}, [MATRIX, "int8", "dequantise"]),
    }
    for name, (changes, named) in cases.items():
        kept = {key: value for key, value in (tensors | changes).items() if value is not None}
        copy = copy_with_tensors(tuned, tmp_path / name, kept)
        (message,) = errors(recipe(base, copy))
        assert all(part in message for part in named), message
    llama = family("llama", "bf16").tuned[0]
    assert "LlamaForCausalLM" in errors(recipe(base, llama))[0]
    cut = copy_with_tensors(tuned, tmp_path / "cut", tensors) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert "cut off" in errors(recipe(base, cut.parent))[0]
    (cut.parent / "config.json").unlink()
    assert "config.json" in errors(recipe(base, cut.parent))[0]


def test_vocabularies_are_aligned_by_a_tokenizer(tmp_path, family, registered):
    base = family("qwen3-tied", "bf16").base
    model = fine_tune(build_model("qwen3-tied"), seed=9)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    tokenizer = build_tokenizer(("<extra1>", "<extra2>"))
    larger = write_checkpoint(tmp_path / "larger", model, torch.bfloat16, tokenizer=tokenizer)
    config = recipe(base, larger)
    assert not errors(config)
    config["tokenizer"] = {"source": "base"}
    plan = planned(config)
    assert not plan.problems.errors
    out = load_tensors(merged(tmp_path, config))
    shapes = {t.tensor: t.shape for t in plan.tensors}
    assert shapes[EMBEDDING] == tuple(out[EMBEDDING].shape)


def test_tensors_that_would_be_lost_and_filters_that_match_nothing(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    tensors = load_tensors(models.tuned[0]) | {"model.extra.weight": torch.zeros(3, 3)}
    copy = copy_with_tensors(models.tuned[0], tmp_path / "extra", tensors)
    config = recipe(models.base, copy, parameters={"edit": [{"filter": "embd", "value": False}]})
    warnings = [str(problem) for problem in planned(config).problems.warnings]
    assert any("model.extra.weight" in warning for warning in warnings)
    assert any("'embd'" in warning and "line" in warning for warning in warnings)


def test_output_folder_and_disk(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    config = recipe(models.base, models.tuned[0])
    assert not planned(config, out=tmp_path / "new").problems.errors
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "not empty" in errors(config, out=tmp_path / "full")[0]
    assert not errors(config, out=tmp_path / "full", overwrite=True)


def test_command(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    file = write_config(tmp_path, recipe(models.base, models.tuned[0]))
    result = run_plan(file, "-v")
    assert result.exit_code == 0
    assert re.search(rf"{MATRIX}\s+edited\s+72x40\s+bfloat16\s+72x40\s+effective rank", result.output)
    assert "this merge would run" in result.output
    assert "peak memory" in result.output
    found = json.loads(run_plan(file, "--json").output)
    assert found["ok"] is True
    assert found["totals"]["edited"]["tensors"] == 22
    assert found["estimate"]["seconds"] > 0
    file = write_config(tmp_path, recipe(models.base, models.tuned[0], dtyp="bfloat16"))
    result = run_plan(file, "--json")
    assert result.exit_code == 1
    (problem,) = json.loads(result.output)["problems"]
    assert problem["line"] == 5


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "a: 1\n---\nb: 2\n", "merge_method: 3\n"])
def test_what_is_no_recipe(tmp_path, text):
    file = tmp_path / "recipe.yml"
    file.write_text(text)
    for command in (["plan", str(file)], ["merge", str(file), str(tmp_path / "out")]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit), result.exception
    assert not (tmp_path / "out").exists()


def test_merge_makes_the_same_checks(tmp_path, family):
    """Refused before a folder is created, with the same words."""
    models = family("qwen3-tied", "bf16")
    config = recipe(models.base, models.tuned[0], parameters={"enery": 0.8})
    file = write_config(tmp_path, config)
    result = CliRunner().invoke(main, ["merge", str(file), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert errors(config)[0] in result.output
    assert not (tmp_path / "out").exists()


def test_other_methods_of_mergekit_pass(tmp_path, family, registered):
    models = family("qwen3-tied", "bf16")
    config = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in models.tuned],
    }
    assert not planned(config).problems.errors
    assert load_tensors(merged(tmp_path, config)).keys() == load_tensors(models.base).keys()
    del config["models"][0]["parameters"], config["models"][1]["parameters"]
    assert "needs the parameter 'weight'" in errors(config)[0]


def test_an_architecture_without_definition(tmp_path, family):
    """mergekit infers it from the model's class; the plan asks mergekit."""
    models = family("llama", "bf16")
    folders = []
    for source in (models.base, models.tuned[0]):
        copy = copy_with_tensors(source, tmp_path / source.name, load_tensors(source))
        folders.append(edit_config(copy, architectures=["LlamaForNothing"]))
    plan = planned(recipe(*folders))
    assert not plan.problems.errors, plan.problems.errors
    assert {t.tensor for t in plan.tensors} == set(load_tensors(models.base))
