"""`mergekit-monosoup align` against the float64 reference."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from baselines import cosine, model_stock_ratio, sfgs
from checkpoints import copy_with_tensors, load_tensors, write_adapter
from click.testing import CliRunner
from commands import forget_loaders
from rounding import as_float64
from safetensors.torch import load_file, save_file
from soups import write_relatives

from mergekit_monosoup.cli import main

WEIGHTS = "adapter_model.safetensors"
SHARES = (0.9, -0.8, 0.7)


@pytest.fixture(scope="module")
def models(family, tmp_path_factory):
    base = family("qwen3-tied", "bf16").base
    return base, write_relatives(tmp_path_factory.mktemp("relatives"), base, SHARES)


def align(*arguments, code=0):
    forget_loaders()
    result = CliRunner().invoke(main, ["align", *map(str, arguments)])
    assert result.exit_code == code, result.output
    forget_loaders()
    return result.stdout if code == 0 else result.output


def updates(base, tuned):
    stored = load_tensors(base)
    return {
        name: [as_float64(load_tensors(folder)[name]) - as_float64(w0) for folder in tuned]
        for name, w0 in stored.items()
        if w0.ndim >= 2
    }


def test_json_is_the_reference(models):
    base, tuned = models
    found = json.loads(align(base, *tuned, "--threshold", "0.3", "--json"))
    exact = updates(base, tuned)
    assert {tensor["name"] for tensor in found["tensors"]} == set(exact)
    for tensor in found["tensors"]:
        dws = exact[tensor["name"]]
        for i, j in itertools.product(range(3), repeat=2):
            assert tensor["cosines"][i][j] == pytest.approx(cosine(dws[i], dws[j]), abs=1e-6)
        for angle in ("mean_angle", "mean_cosine"):
            assert tensor["model_stock"][angle] == pytest.approx(model_stock_ratio(dws, angle), abs=1e-5)
    for i, j in itertools.combinations(range(3), 2):
        values = [cosine(dws[i], dws[j]) for dws in exact.values()]
        assert found["average_cosines"][i][j] == pytest.approx(np.mean(values), abs=1e-6)
        spread = found["spread"][f"{i + 1}-{j + 1}"]
        quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        names = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
        assert [spread[name] for name in names] == pytest.approx(list(quartiles), abs=1e-6)
    arrays = [{n: as_float64(t) for n, t in load_tensors(folder).items()} for folder in (base, *tuned)]
    taken, averages = sfgs(arrays[0], arrays[1:], 0.3)
    assert found["sfgs"]["taken"] == [str(tuned[i]) for i in taken]
    expected = {str(tuned[i]): pytest.approx(value, abs=1e-6) for i, value in averages.items()}
    assert found["sfgs"]["average_cosines"] == expected


def test_tables(models):
    base, tuned = models
    text = align(base, *tuned, "--threshold", "0.3")
    assert "over 22 tensors" in text
    assert "sfgs takes 2 of 3 at threshold 0.3" in text
    assert "relative2: average cosine -0.6" in text
    assert "mean_angle" in text
    assert "  1-2   -0." in text


def test_scores_decide_the_order(models):
    base, tuned = models
    found = json.loads(align(base, *tuned, "--json", "--score", 1, "--score", 3, "--score", 2))
    assert found["sfgs"]["order"] == [str(tuned[i]) for i in (1, 2, 0)]


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_plot(models, tmp_path, suffix):
    base, tuned = models
    file = tmp_path / f"pairs.{suffix}"
    align(base, *tuned, "--plot", file)
    assert file.read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_single_files_and_adapters_and_unmoved_checkpoints(models, family, tmp_path):
    base, tuned = models
    files = [folder / "model.safetensors" for folder in (base, *tuned)]
    by_files = json.loads(align(*files, "--json"))
    by_folders = json.loads(align(base, *tuned, "--json"))
    assert by_files["tensors"] == by_folders["tensors"]

    unmoved = copy_with_tensors(base, tmp_path / "unmoved", load_tensors(base))
    adapter = write_adapter(tmp_path / "lora", family("qwen3-tied", "fp32").base)
    arguments = (base, tuned[0], unmoved, f"{base}+{adapter}")
    found = json.loads(align(*arguments, "--json"))
    assert found["average_cosines"][0][1] is None
    assert found["average_cosines"][0][2] is not None
    assert "none" in align(*arguments)


def test_adapters_go_by_their_factors(family, tmp_path, monkeypatch):
    """In bfloat16 a merged copy would lose most of so small an update to rounding; nothing is written."""
    base = family("qwen3-tied", "bf16").base
    adapters = [write_adapter(tmp_path / f"lora{seed}", base, seed=seed) for seed in (1, 2)]
    exact: dict[str, list[np.ndarray]] = {}
    for adapter in adapters:
        tensors = {n: 1e-3 * t if "lora_B" in n else t for n, t in load_file(adapter / WEIGHTS).items()}
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
        scaling = json.loads((adapter / "adapter_config.json").read_text())
        for name in (n for n in tensors if "lora_A" in n):
            a, b = (tensors[n].double().numpy() for n in (name, name.replace("lora_A", "lora_B")))
            module = name.removeprefix("base_model.model.").replace(".lora_A", "")
            exact.setdefault(module, []).append(scaling["lora_alpha"] / scaling["r"] * b @ a)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = json.loads(align(base, *(f"{base}+{adapter}" for adapter in adapters), "--json"))
    assert sorted(tmp_path.rglob("*")) == before
    told = {t["name"]: t["cosines"][0][1] for t in found["tensors"] if t["name"] in exact}
    assert told.keys() == exact.keys()
    for name, (one, other) in exact.items():
        assert told[name] == pytest.approx(cosine(one, other), abs=1e-3)


def test_what_is_left_out_is_said(models, tmp_path):
    base, tuned = models
    tensors = load_tensors(tuned[0])
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1]
    del tensors["model.layers.0.mlp.up_proj.weight"]
    odd = copy_with_tensors(base, tmp_path / "odd", tensors)
    text = align(base, odd, tuned[1])
    assert "Tensors left out: 1 of different shapes, 1 not in every checkpoint" in text


def test_errors(models, tmp_path):
    base, tuned = models
    assert "at least two checkpoints" in align(base, tuned[0], code=2)
    assert "--score once a checkpoint" in align(base, *tuned, "--score", 1, code=2)
    other = {"another.weight": torch.zeros(3, 3)}
    stranger = copy_with_tensors(base, tmp_path / "stranger", other)
    output = align(base, stranger, stranger, code=1)
    assert "no tensor of the same name" in output
    assert "check that they share a base" in output
    assert "Error" in align(base, *tuned, "--plot", tmp_path / "x.nonsense", code=1)
