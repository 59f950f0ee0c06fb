"""Every file of examples/yaml, by the command that its comment names, against the reference."""

from __future__ import annotations

import re
import shlex

import numpy as np
import oracle
import peft
import pytest
import torch
import yaml
from checkpoints import LAYERS, load_tensors, write_adapter
from commands import ROOT, succeed
from expectations import assert_merged, depth, interpolate
from rounding import as_float64, round_to, spacing
from transformers import AutoModelForCausalLM

FOLDER = ROOT / "examples" / "yaml"
EXAMPLES = sorted(FOLDER.rglob("*.yaml"))
BASE = "Qwen/Qwen3-0.6B-Base"
MATH = "suayptalha/Qwen3-0.6B-Math-Expert"
CODE = "suayptalha/Qwen3-0.6B-Code-Expert"
LORA_BASE = "Qwen/Qwen3-0.6B"
LORA = "woohello/qwen3-0.6b-zh-lora"


@pytest.fixture
def stand_ins(registered, family, tmp_path):
    """Local checkpoints for the models that the examples name."""
    models = family("qwen3-tied", "bf16")
    math, code = models.tuned
    adapter = write_adapter(tmp_path / "adapter", models.base)
    return {BASE: models.base, MATH: math, CODE: code, LORA_BASE: models.base, LORA: adapter}


def run_example(example, stand_ins, folder, monkeypatch):
    """Run an example on the stand-ins; the tensors of each result by its folder's name."""
    text = example.read_text()
    commands = re.findall(r"^#   (mergekit-(?:yaml|multi) .*)$", text, re.MULTILINE)
    assert len(commands) == 1, "an example names the one command that runs it"
    command, path, *arguments = shlex.split(commands[0])
    assert path == example.relative_to(ROOT).as_posix()
    for name, local in stand_ins.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", str(local), text)
    documents = list(yaml.safe_load_all(text))
    stages = {document["name"] for document in documents if "name" in document}
    for document in documents:
        for model in [document.get("base_model"), *(m["model"] for m in document["models"])]:
            assert model is None or model in stages or model.startswith("/"), f"no stand-in: {model}"
    recipe = folder / example.name
    recipe.write_text(text)
    monkeypatch.chdir(folder)
    succeed(command, recipe, *arguments)
    written = [file.parent for file in folder.rglob("mergekit_config.yml")]
    assert len(written) == len(documents)
    for result in written:
        assert_loads(result)
    return {result.name: load_tensors(result) for result in written}


def assert_loads(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def differ(a, b):
    assert a.keys() == b.keys()
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, stand_ins, tmp_path, monkeypatch):
    inputs = {name: load_tensors(path) for name, path in stand_ins.items() if name != LORA}
    results = run_example(example, stand_ins, tmp_path, monkeypatch)
    different = [*results.values()]
    for i, result in enumerate(different):
        assert all(differ(result, other) for other in [*inputs.values(), *different[:i]])
    if example.parent == FOLDER:
        CHECKS[example.stem](results, inputs, stand_ins)


def one(*tuned, **settings):
    """The single result is the edit of these models with these settings."""

    def check(results, inputs, stand_ins):
        assert_merged(results["merged"], inputs[BASE], [inputs[name] for name in tuned], settings)

    return check


def keep_embeddings(results, inputs, stand_ins):
    merged, tuned = results["merged"], inputs[MATH]
    assert torch.equal(merged["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])
    assert_merged(merged, inputs[BASE], [tuned], lambda name: {"edit": "embed_tokens" not in name})


def depth_gradient(results, inputs, stand_ins):
    def settings(name):
        return {"alpha": interpolate([0.1, 1.0], depth(name, LAYERS))}

    assert_merged(results["merged"], inputs[BASE], [inputs[MATH]], settings)


def ablations(results, inputs, stand_ins):
    mixings = {
        "decay-only": "decay",
        "alignment-only": "alignment",
        "uniform-mixing": "uniform",
        "high-only": "high",
        "low-only": "low",
    }
    assert results.keys() == mixings.keys()
    for name, mixing in mixings.items():
        assert_merged(results[name], inputs[BASE], [inputs[MATH]], {"mixing": mixing})


def lora(results, inputs, stand_ins):
    # The exact update of the adapter: peft merges it into the base in float32.
    model = AutoModelForCausalLM.from_pretrained(stand_ins[LORA_BASE], dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, stand_ins[LORA]).merge_and_unload().state_dict()
    tuned = {name: merged[name] for name in inputs[LORA_BASE]}
    types = {"dtype": torch.float32, "out_dtype": torch.bfloat16}
    assert_merged(results["merged"], inputs[LORA_BASE], [tuned], **types)


def multi_stage(results, inputs, stand_ins):
    soups = {"math-soup": MATH, "code-soup": CODE}
    assert results.keys() == {*soups, "merged"}
    for stage, tuned in soups.items():
        assert_merged(results[stage], inputs[BASE], [inputs[tuned]])
    for name, merged in results["merged"].items():
        mean = sum(results[stage][name].float() for stage in soups) / 2
        assert torch.equal(merged, mean.bfloat16())


def stochastic_rounding(results, inputs, stand_ins):
    merged, base, tuned = results["merged"], inputs[BASE], inputs[MATH]
    rounded = 0
    for name, w0 in base.items():
        exact = oracle.monosoup_weight(as_float64(w0), [as_float64(tuned[name])])
        got, unit = as_float64(merged[name]), spacing(exact, torch.bfloat16)
        # Float32 may take a number on the grid for one just beside it.
        assert (np.abs(got - exact) < unit * 1.001).all()
        rounded += int((got != round_to(exact, torch.bfloat16)).sum())
    assert rounded > 1000


CHECKS = {
    "01-automatic": one(MATH),
    "02-fixed-energy": one(MATH, energy=0.8),
    "03-average-then-edit": one(MATH, CODE, weights=[0.6, 0.4]),
    "04-wise-ft": one(MATH, alpha=0.5),
    "05-keep-embeddings": keep_embeddings,
    "06-depth-gradient": depth_gradient,
    "07-ablations": ablations,
    "08-lora": lora,
    "09-multi-stage": multi_stage,
    "10-dg-hard": one(MATH, threshold={"scale": 0.5}, mixing="high"),
    "11-noise-split": one(MATH, threshold={}),
    "12-stochastic-rounding": stochastic_rounding,
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_explained(example):
    documents = example.read_text().split("\n---\n")
    assert documents[0].startswith("# ")
    for document in documents:
        assert sum(not line.startswith("#") for line in document.splitlines()) <= 15
