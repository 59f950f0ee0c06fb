"""The recipes of examples/yaml/baselines against their formulas, on small checkpoints."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from baselines import lines, model_stock, uniform_soup, wise_ft
from checkpoints import LAYERS, load_tensors
from rounding import as_float64, assert_correctly_rounded
from test_examples import BASE, CODE, FOLDER, MATH, run_example

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(params=["qwen3-tied", "qwen3-untied"])
def stand_ins(request, family):
    """Local checkpoints for the names in the recipes, one without and one with a head of its own."""
    models = family(request.param, "bf16")
    return {BASE: models.base, MATH: models.tuned[0], CODE: models.tuned[1]}


def run(name, stand_ins, folder, monkeypatch):
    """The merged tensors, and base, math and code in float64."""
    results = run_example(FOLDER / "baselines" / f"{name}.yaml", stand_ins, folder, monkeypatch)
    arrays = [
        {name: as_float64(tensor) for name, tensor in load_tensors(stand_ins[model]).items()}
        for model in (BASE, MATH, CODE)
    ]
    return results["merged"], *arrays


def assert_formula(merged, formula):
    for name, tensor in merged.items():
        assert_correctly_rounded(tensor, formula(name), torch.bfloat16, min_fraction=0.998, label=name)


def test_uniform_soup(stand_ins, tmp_path, monkeypatch):
    merged, _, math, code = run("uniform-soup", stand_ins, tmp_path, monkeypatch)
    assert_formula(merged, lambda name: uniform_soup([math[name], code[name]]))


def test_wise_ft(stand_ins, tmp_path, monkeypatch):
    merged, base, math, _ = run("wise-ft", stand_ins, tmp_path, monkeypatch)
    assert_formula(merged, lambda name: wise_ft(base[name], math[name], 0.5))


@pytest.mark.parametrize(("a", "b"), [(0.1, 0.9), (0.5, 0.5)])
def test_lines(stand_ins, tmp_path, monkeypatch, a, b):
    merged, base, math, _ = run(f"lines-{a}-{b}", stand_ins, tmp_path, monkeypatch)
    outside = {name for name in merged if ".layers." not in name}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= outside

    def formula(name):
        block = re.search(r"\.layers\.(\d+)\.", name)
        return lines(base[name], math[name], block and int(block[1]), LAYERS, a, b)

    assert_formula(merged, formula)


def test_task_arithmetic(stand_ins, tmp_path, monkeypatch):
    merged, base, math, code = run("task-arithmetic", stand_ins, tmp_path, monkeypatch)
    assert_formula(merged, lambda n: base[n] + 0.4 * (math[n] - base[n]) + 0.4 * (code[n] - base[n]))


def ties(base, tuned, density):
    """Trim to the largest entries, elect the sign of the larger sum, average those that agree."""
    trimmed = []
    for weight in tuned:
        dw = weight - base
        kept = np.argsort(-np.abs(dw).ravel(), kind="stable")[: max(1, int(density * dw.size))]
        mask = np.zeros(dw.size, bool)
        mask[kept] = True
        trimmed.append(np.where(mask.reshape(dw.shape), dw, 0.0))
    elected = np.where(sum(trimmed) >= 0, 1.0, -1.0)
    agree = [np.sign(dw) == elected for dw in trimmed]
    count = np.maximum(sum(mask.astype(float) for mask in agree), 1.0)
    return base + sum(dw * mask for dw, mask in zip(trimmed, agree, strict=True)) / count


def test_ties(family, tmp_path, monkeypatch):
    # In bfloat16 many updates are equal in size, and any of them may make the cut.
    models = family("qwen3-untied", "fp32")
    stand_ins = {BASE: models.base, MATH: models.tuned[0], CODE: models.tuned[1]}
    merged, base, math, code = run("ties", stand_ins, tmp_path, monkeypatch)
    assert_formula(merged, lambda name: ties(base[name], [math[name], code[name]], 0.2))


def test_dare(stand_ins, tmp_path, monkeypatch):
    # A second model without an update leaves the first one's mask to be seen.
    stand_ins = stand_ins | {CODE: shutil.copytree(stand_ins[BASE], tmp_path / "unmoved")}
    merged, base, math, _ = run("dare", stand_ins, tmp_path, monkeypatch)
    kept_of_all = []
    for name, tensor in merged.items():
        dw = math[name] - base[name]
        got = as_float64(tensor) - base[name]
        rounding = 2.0**-8 * np.abs(as_float64(tensor))
        # A kept entry has at least half its update (weight 0.5), a dropped one has none.
        clear = np.abs(dw) > 8 * rounding
        kept = np.abs(got) > 0.25 * np.abs(dw)
        if clear.sum() < 100:
            continue
        kept_of_all.append(kept[clear].mean())
        scale = got[clear & kept] / dw[clear & kept]
        # Weight 0.5 times the scale that restores the L1 norm, about 1 / density.
        assert np.median(scale) == pytest.approx(0.5 / 0.5, rel=0.15), name
        assert np.all(np.abs(got[clear & ~kept]) <= rounding[clear & ~kept])
    assert np.mean(kept_of_all) == pytest.approx(0.5, abs=0.05)


def test_model_stock(stand_ins, tmp_path, monkeypatch):
    """mergekit's own: in float32, and here with updates that are large enough for it."""
    merged, base, math, code = run("model-stock", stand_ins, tmp_path, monkeypatch)
    options = {"angle": "mean_cosine", "bounded": False}
    assert_formula(merged, lambda name: model_stock(base[name], [math[name], code[name]], **options))
