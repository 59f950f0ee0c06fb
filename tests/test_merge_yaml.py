"""The weights that stock `mergekit-yaml` writes, against the float64 reference."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from checkpoints import (
    DTYPES,
    LAYERS,
    build_model,
    copy_with_tensors,
    load_tensors,
    structured_update,
    write_checkpoint,
)
from commands import merge, recipe
from expectations import FLOAT32_TOLERANCE, assert_merged, depth, interpolate, step
from rounding import as_float64, spacing

pytestmark = pytest.mark.usefixtures("registered")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen3-untied", "llama"])
def test_one_checkpoint(tmp_path, family, architecture, dtype):
    models = family(architecture, dtype)
    base, tuned = load_tensors(models.base), load_tensors(models.tuned[0])
    merged = merge(tmp_path, recipe(models.base, models.tuned[0]))
    assert_merged(merged, base, [tuned])
    for name, tensor in tuned.items():
        if tensor.ndim < 2:
            assert torch.equal(merged[name], tensor), f"{name} is not the fine-tuned vector"
        else:
            assert not torch.equal(merged[name], tensor), f"{name} was not edited"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [None, (3, 1), (0.2, 0.6), (0, 5)], ids=str)
def test_average_of_two(tmp_path, family, dtype, weights):
    models = family("qwen3-tied", dtype)
    config = recipe(models.base, *models.tuned)
    for model, weight in zip(config["models"], weights or (), strict=False):
        model["parameters"] = {"weight": weight}
    merged = merge(tmp_path, config)
    tensors = [load_tensors(folder) for folder in models.tuned]
    assert_merged(merged, load_tensors(models.base), tensors, {"weights": weights})


def test_a_base_listed_among_the_models_is_no_fine_tune(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    merged = merge(tmp_path, recipe(models.base, models.base, models.tuned[0]))
    assert_merged(merged, load_tensors(models.base), [load_tensors(models.tuned[0])])


GLOBAL = [
    {"energy": 0.8},
    {"energy": 1.0},
    {"energy": "8e-1"},
    {"alpha": 0.5},
    {"alpha": 0},
    {"alpha": 1.5},
    {"mixing": "decay"},
    {"mixing": "alignment"},
    {"mixing": "uniform"},
    {"mixing": "high"},
    {"mixing": "low"},
    {"edit": False},
    {"edit": False, "alpha": 0.5},
    {"energy": 0.9, "mixing": "low", "alpha": 0.25},
]


@pytest.mark.parametrize("parameters", GLOBAL, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_global_parameters(tmp_path, family, dtype, parameters):
    models = family("qwen3-tied", dtype)
    merged = merge(tmp_path, recipe(models.base, models.tuned[0], parameters=parameters))
    options = {key: float(v) if key == "energy" else v for key, v in parameters.items()}
    base, tuned = load_tensors(models.base), load_tensors(models.tuned[0])
    assert_merged(merged, base, [tuned], options)
    if parameters == {"alpha": 0}:
        assert all(torch.equal(merged[name], base[name]) for name in base)
    if parameters == {"edit": False}:
        assert all(torch.equal(merged[name], tuned[name]) for name in base)


def test_defaults_may_be_written_out(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    defaults = {"alpha": 1.0, "mixing": "monosoup", "edit": True, "min_relative_update": 0}
    merged = merge(tmp_path, recipe(models.base, models.tuned[0], parameters=defaults))
    assert_merged(merged, load_tensors(models.base), [load_tensors(models.tuned[0])])


def by_filter(*choices):
    """(filter, value), ...: the first filter that is part of the name decides."""
    setting = [{"filter": f, "value": v} if f else {"value": v} for f, v in choices]

    def value(name, default):
        return next((v for f, v in choices if f is None or f in name), default)

    return setting, value


FILTERS = {
    "energy": ([("mlp", 0.9), (None, 0.5)], None),
    "energy without a rest": ([("self_attn", 0.7)], None),
    "alpha": ([("layers.1.", 0.25), ("norm", 0.0), (None, 0.75)], 1.0),
    "mixing": ([("down_proj", "high"), ("q_proj", "decay"), ("embed", "uniform")], "monosoup"),
    "edit": ([("embed_tokens", False), ("lm_head", False)], True),
    "min_relative_update": ([("mlp", 0.5), ("self_attn", 1e-6)], 0.0),
}


@pytest.mark.parametrize("case", FILTERS)
def test_filters(tmp_path, family, case):
    parameter = case.split()[0]
    choices, default = FILTERS[case]
    setting, value = by_filter(*choices)
    models = family("llama", "fp32")
    merged = merge(tmp_path, recipe(models.base, models.tuned[0], parameters={parameter: setting}))
    base, tuned = load_tensors(models.base), load_tensors(models.tuned[0])
    assert_merged(merged, base, [tuned], lambda name: {parameter: value(name, default)})


GRADIENTS = {
    "alpha": ([0.0, 1.0], interpolate),
    "energy": ([0.5, 0.95], interpolate),
    "min_relative_update": ([0.0, 0.4], interpolate),
    "mixing": (["high", "low", "monosoup"], step),
    "edit": ([False, True, False], step),
}


@pytest.mark.parametrize("parameter", GRADIENTS)
def test_gradients(tmp_path, family, parameter):
    values, rule = GRADIENTS[parameter]
    models = family("qwen3-untied", "fp32")
    merged = merge(tmp_path, recipe(models.base, models.tuned[0], parameters={parameter: values}))
    base, tuned = load_tensors(models.base), load_tensors(models.tuned[0])
    assert_merged(merged, base, [tuned], lambda name: {parameter: rule(values, depth(name, LAYERS))})


@pytest.mark.parametrize("kind", ["filter", "gradient"])
def test_weights_by_filter_and_gradient(tmp_path, family, kind):
    models = family("qwen3-tied", "fp32")
    config = recipe(models.base, *models.tuned)
    if kind == "filter":
        first, value = by_filter(("mlp", 3.0), (None, 0.5))
        second = 1.0
    else:
        first, second = [0.0, 1.0], [1.0, 0.5]

    def weights(name):
        if kind == "filter":
            return {"weights": [value(name, None), 1.0]}
        t = depth(name, LAYERS)
        return {"weights": [interpolate(first, t), interpolate(second, t)]}

    for model, weight in zip(config["models"], (first, second), strict=True):
        model["parameters"] = {"weight": weight}
    merged = merge(tmp_path, config)
    assert_merged(merged, load_tensors(models.base), [load_tensors(f) for f in models.tuned], weights)


def test_min_relative_update_compares_norms_of_each_tensor(tmp_path):
    """Tensors on both sides of the bound: the smaller updates stay as they were trained."""
    model = build_model("qwen3-tied")
    base_folder = write_checkpoint(tmp_path / "base", model, torch.float32)
    base = load_tensors(base_folder)
    generator = torch.Generator().manual_seed(3)
    tuned = {}
    for index, (name, w0) in enumerate(base.items()):
        relative = (1e-3, 1e-1)[index % 2]
        tuned[name] = w0 + relative * w0.norm() * structured_update(w0.shape, generator)
    folder = copy_with_tensors(base_folder, tmp_path / "tuned", tuned)
    merged = merge(tmp_path, recipe(base_folder, folder, parameters={"min_relative_update": 1e-2}))
    assert_merged(merged, base, [tuned], {"min_relative_update": 1e-2})
    matrices = [name for name in base if base[name].ndim == 2]
    kept = [name for name in matrices if torch.allclose(merged[name], tuned[name], atol=1e-7)]
    assert 0 < len(kept) < len(matrices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_tensors_keep_the_bits_of_the_base(tmp_path, family, dtype):
    models = family("qwen3-tied", dtype)
    base, tuned = load_tensors(models.base), load_tensors(models.tuned[0])
    frozen = [name for name in base if "layers.1." in name or "embed" in name]
    tuned |= {name: base[name] for name in frozen}
    folder = copy_with_tensors(models.tuned[0], tmp_path / "tuned", tuned)
    merged = merge(tmp_path, recipe(models.base, folder))
    assert_merged(merged, base, [tuned])
    assert all(torch.equal(merged[name], base[name]) for name in frozen)


@pytest.mark.parametrize("relative", [1e-5, 1e-7])
def test_updates_near_the_resolution_of_float32(tmp_path, relative):
    """Small updates are neither lost nor biased: the reference sees the same rounded inputs."""
    model = build_model("qwen3-tied")
    base_folder = write_checkpoint(tmp_path / "base", model, torch.float32)
    base = load_tensors(base_folder)
    generator = torch.Generator().manual_seed(4)
    tuned = {
        name: w0 + relative * w0.norm() * structured_update(w0.shape, generator) for name, w0 in base.items()
    }
    folder = copy_with_tensors(base_folder, tmp_path / "tuned", tuned)
    merged = merge(tmp_path, recipe(base_folder, folder))
    for name, w0 in base.items():
        w1 = as_float64(tuned[name])
        exact = oracle.monosoup_weight(as_float64(w0), [w1])
        allowed = np.maximum(
            spacing(exact, torch.float32), FLOAT32_TOLERANCE * np.abs(w1 - as_float64(w0)).max()
        )
        assert (np.abs(as_float64(merged[name]) - exact) <= allowed).all(), name
