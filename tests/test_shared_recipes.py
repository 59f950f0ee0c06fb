"""Recipes as people share them: parameters of other methods in them are ignored, as mergekit does.

The settings are those of mergekit's own merge tests (two models weighted 0.6 and 0.4 whatever the method),
with what recipes on the Hub carry along.
"""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from checkpoints import fine_tune, load_tensors
from click.testing import CliRunner
from commands import forget_loaders, write_config

from mergekit_monosoup.cli import main

pytestmark = pytest.mark.usefixtures("registered")

# method -> (which model is the base: the first of the two, a third, or none; parameters of the recipe)
METHODS = {
    "linear": ("none", {}),
    "slerp": ("first", {"t": 0.35}),
    "nuslerp": ("third", {"nuslerp_row_wise": True, "nuslerp_flatten": False}),
    "task_arithmetic": ("third", {}),
    "breadcrumbs": ("third", {}),
    "ties": ("third", {"density": 0.3}),
    "sce": ("third", {"select_topk": 0.5}),
    "ram": ("third", {}),
    "ramplus_tl": ("third", {"r": 0.05, "alpha": 1.0}),
    "multislerp": ("third", {}),
    "dare_ties": ("third", {"density": 0.66}),
    "model_stock": ("third", {"filter_wise": True}),
    "arcee_fusion": ("first", {}),
    "nearswap": ("first", {"t": 0.0001}),
    "della": ("third", {"density": 0.66, "epsilon": 0.05, "lambda": 0.5}),
    "karcher": ("third", {"max_iter": 5, "tol": 1e-5}),
}
WITHOUT_WEIGHT = {"slerp", "sce", "ram", "ramplus_tl", "model_stock", "arcee_fusion", "nearswap", "karcher"}


def weighted(method, models):
    third, first, second = map(str, models)
    base, parameters = METHODS[method]
    config = {
        "merge_method": method,
        "models": [
            {"model": first, "parameters": {"weight": 0.6}},
            {"model": second, "parameters": {"weight": 0.4}},
        ],
        "dtype": "bfloat16",
        "parameters": dict(parameters),
    }
    if base != "none":
        config["base_model"] = first if base == "first" else third
    return config


def run(command, folder, config):
    forget_loaders()
    arguments = [
        command,
        str(write_config(folder, config)),
        *([str(folder / "out")] if command == "merge" else []),
    ]
    result = CliRunner().invoke(main, arguments)
    forget_loaders()
    return result


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_given_to_every_method(tmp_path, family, method, caplog):
    config = weighted(method, family("llama", "bf16").folders)
    with caplog.at_level(logging.WARNING):
        result = run("merge", tmp_path, config)
    assert result.exit_code == 0, result.output
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_tensors(tmp_path / "out").values())
    told = [r.getMessage() for r in caplog.records if "has no parameter 'weight'" in r.getMessage()]
    assert len(told) == (2 if method in WITHOUT_WEIGHT else 0)
    assert run("plan", tmp_path, config).exit_code == 0


@pytest.mark.parametrize("name", ["int8_mask", "normalize", "density", "lambda", "random_seed", "dtype"])
@pytest.mark.parametrize("method", ["monosoup", "slerp"])
def test_what_other_recipes_leave_behind_is_a_warning(tmp_path, family, name, method):
    config = weighted("slerp", family("llama", "bf16").folders) | {"merge_method": method}
    for entry in config["models"]:
        del entry["parameters"]
    config["parameters"] = {name: 1} | ({"t": 0.5} if method == "slerp" else {})
    result = run("plan", tmp_path, config)
    assert result.exit_code == 0, result.output
    assert f"has no parameter '{name}', which is ignored" in result.output


def test_slips_in_our_methods_stay_errors(tmp_path, family):
    config = weighted("slerp", family("llama", "bf16").folders) | {"merge_method": "monosoup"}
    for wrong, meant in (("enrgy", "energy"), ("mixin", "mixing"), ("nonsense", "known are")):
        config["parameters"] = {wrong: 0.5}
        result = run("plan", tmp_path, config)
        assert result.exit_code == 1
        assert meant in result.output
    config = weighted("slerp", family("llama", "bf16").folders)
    config["parameters"]["tt"] = 0.5
    result = run("plan", tmp_path, config)
    assert result.exit_code == 0
    assert "'tt', which is ignored; did you mean 't'?" in result.output


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA of a few layers and two variants of it, in the layout that transformers writes."""
    folder = tmp_path_factory.mktemp("llava")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=4),
        text_config=transformers.LlamaConfig(**sizes, vocab_size=64),
        image_seq_length=16,
    )
    torch.manual_seed(0)
    base = transformers.LlavaForConditionalGeneration(config).eval()
    folders = [folder / name for name in ("base", "one", "two")]
    for seed, place in enumerate(folders):
        (fine_tune(base, seed) if seed else base).save_pretrained(place)
    return folders


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp", "ties", "model_stock", "monosoup"])
def test_a_vision_language_model_in_few_words(tmp_path, llava, method, caplog):
    if method == "monosoup":
        config = weighted("ties", llava) | {"merge_method": "monosoup", "parameters": {}}
    else:
        config = weighted(method, llava)
    with caplog.at_level(logging.WARNING):
        result = run("merge", tmp_path, config)
    assert result.exit_code == 0, result.output
    told = [r.getMessage() for r in caplog.records if r.name.startswith("mergekit_monosoup")]
    assert len(told) <= 2 + 3, told
    written = load_tensors(tmp_path / "out")
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in written.values())
    plan = run("plan", tmp_path, config)
    assert plan.exit_code == 0
    assert plan.output.count("warning:") <= 2 + 3
