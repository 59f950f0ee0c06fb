"""`dg_hard` and its neighbours in recipes, reports, cards and plans."""

from __future__ import annotations

import importlib.util
import logging
import re

import numpy as np
import oracle
import pytest
import torch
import yaml
from checkpoints import load_tensors
from click.testing import CliRunner
from commands import ROOT, recipe, succeed
from mergekit import merge_methods
from rounding import as_float64

import mergekit_monosoup
from mergekit_monosoup.cli import main
from mergekit_monosoup.report.reader import read_report
from mergekit_monosoup.report.rounding import expected_survival

pytestmark = pytest.mark.usefixtures("registered")
MATRIX = "model.layers.0.mlp.up_proj.weight"
TEXT = (ROOT / "docs" / "dg-hard.md").read_text("utf-8")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def merged(folder, models, method="dg_hard", options=(), **settings):
    file = folder / "recipe.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe(models.base, models.tuned[0], merge_method=method, **settings)))
    result = run("merge", file, folder / "out", *options)
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_report_card_and_table_name_noise_and_threshold(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    out = merged(tmp_path, models, parameters={"threshold_scale": 0.5})
    record = next(r for r in read_report(out / "monosoup_report.jsonl").records if r.tensor == MATRIX)
    base, tuned = load_tensors(models.base)[MATRIX], load_tensors(models.tuned[0])[MATRIX]
    dw = as_float64(tuned) - as_float64(base)
    s = np.linalg.svd(dw, compute_uv=False)
    sigma, tau, k = oracle.noise_threshold(s, dw.shape, 0.5)
    assert record.noise == pytest.approx(sigma, rel=1e-4)
    assert record.threshold == pytest.approx(tau, rel=1e-4)
    assert (record.k, record.lambda_high, record.lambda_low) == (k, 1.0, 0.0)
    assert record.parameters == {"threshold_scale": 0.5}
    card = (out / "README.md").read_text()
    assert "2605.20296" in card
    assert "1305.5870" in card
    assert "is in the written ones" in card
    shown = run("report", out, "--filter", MATRIX, "--columns", "k,noise,threshold").output
    assert "noise" in shown
    assert "tau" in shown


def test_plan_names_the_rule(tmp_path, family):
    models = family("qwen3-tied", "bf16")

    def planned(method, **parameters):
        file = tmp_path / "plan.yaml"
        config = recipe(models.base, models.tuned[0], merge_method=method, parameters=parameters)
        file.write_text(yaml.safe_dump(config))
        return run("plan", file)

    assert "Donoho-Gavish threshold" in planned("dg_hard").output
    assert "Donoho-Gavish threshold times 2" in planned("dg_hard", threshold_scale=2.0).output
    assert "Donoho-Gavish threshold" in planned("monosoup", split="donoho_gavish").output
    assert "energy R = 0.8" in planned("monosoup", split="energy").output
    assert "fewer than 100000000 entries" in planned("dg_hard", min_entries=100_000_000).output
    refused = planned("monosoup", split="donoho_gavish", energy=0.5)
    assert refused.exit_code == 1
    assert "energy is 0.5 and split is donoho_gavish" in refused.output
    assert "one of effective_rank, energy, donoho_gavish" in planned("monosoup", split="median").output


def test_small_matrices_are_left_alone_on_request(family):
    models = family("qwen3-tied", "bf16")
    base, tuned = load_tensors(models.base), load_tensors(models.tuned[0])
    most = max(t.numel() for t in tuned.values())
    kept = mergekit_monosoup.edit_state_dict(base, tuned, method="dg_hard", min_entries=most + 1)
    assert all(torch.equal(kept.weights[name], tuned[name]) for name in tuned)
    assert {o.reason for o in kept.outcomes} <= {f"fewer than {most + 1} entries", "not a matrix"}


def test_inspection_expects_what_the_merge_does(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    file = tmp_path / "inspection.jsonl"
    result = run("inspect", models.base, models.tuned[0], "--dg-hard", "--json", file)
    assert result.exit_code == 0, result.output
    merge = read_report(merged(tmp_path / "m", models) / "monosoup_report.jsonl").records
    expected = {r.tensor: r for r in merge}
    for record in read_report(file).records:
        other = expected[record.tensor]
        assert (record.k, record.lambda_high) == (other.k, other.lambda_high)
        if record.noise is not None:
            assert record.noise == pytest.approx(other.noise, rel=1e-4)
        if record.edit_survival is not None:
            assert record.edit_survival == pytest.approx(other.edit_survival, abs=0.15)
    soup = run("inspect", models.base, models.tuned[0], "--split", "donoho_gavish", "--filter", MATRIX)
    assert soup.exit_code == 0, soup.output


def gentle(dtype=torch.bfloat16, size=3e-3):
    generator = torch.Generator().manual_seed(0)
    base = {
        f"layers.{i}.weight": (0.02 * torch.randn(200, 160, generator=generator)).to(dtype) for i in range(3)
    }
    tuned = {
        name: (w.float() + size * 0.02 * torch.randn(200, 160, generator=generator)).to(dtype)
        for name, w in base.items()
    }
    return base, tuned


def test_edits_lost_to_rounding_are_named_once_with_the_remedies(caplog):
    base, tuned = gentle()
    with caplog.at_level(logging.WARNING, "mergekit_monosoup"):
        mergekit_monosoup.edit_state_dict(base, tuned)
        (message,) = [r.getMessage() for r in caplog.records if "left after rounding" in r.getMessage()]
        for words in ("rounding: stochastic", "out_dtype: float32", "mean of 3 tensors"):
            assert words in message
        caplog.clear()
        mergekit_monosoup.edit_state_dict(base, tuned, rounding="stochastic")
        mergekit_monosoup.edit_state_dict(*gentle(torch.float32))
        assert not [r for r in caplog.records if "left after rounding" in r.getMessage()]


def test_wise_ft_of_vectors_survives_or_not_as_well(tmp_path):
    base, tuned = ({n: w.reshape(-1) for n, w in model.items()} for model in gentle())
    file = tmp_path / "r.jsonl"
    edited = mergekit_monosoup.edit_state_dict(base, tuned, alpha=0.5, report=file)
    for record in read_report(file).records:
        w0, w1, w = (as_float64(m[record.tensor]) for m in (base, tuned, edited.weights))
        intended = -0.5 * (w1 - w0)
        exact = float(((w - w1) * intended).sum() / (intended**2).sum())
        assert record.edit_survival == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("size", [1e-3, 3e-3, 1e-2, 3e-2])
def test_expected_survival_of_an_independent_edit(size):
    generator = torch.Generator().manual_seed(0)
    w1 = (0.02 * torch.randn(500, 400, generator=generator)).bfloat16()
    edit = size * 0.02 * torch.randn(500, 400, generator=generator, dtype=torch.float64)
    written = (w1.double() + edit).bfloat16().double() - w1.double()
    exact = float((written * edit).sum() / edit.square().sum())
    assert expected_survival(w1, float(edit.norm())) == pytest.approx(exact, abs=0.02)
    assert expected_survival(torch.randn(4, 4), 1.0) == 1.0
    assert expected_survival(w1, 0.0) is None


def test_stochastic_rounding_reaches_the_dtype_of_the_file(tmp_path, family):
    """Computed in float32, stored in bfloat16: the same bits as without the detour."""
    models = family("qwen3-tied", "bf16")
    parameters = {"rounding": "stochastic"}
    late = {"dtype": "float32", "out_dtype": "bfloat16", "parameters": parameters}
    one = load_tensors(merged(tmp_path / "a", models, "monosoup", **late))
    two = load_tensors(merged(tmp_path / "b", models, "monosoup", dtype="bfloat16", parameters=parameters))
    nearest = load_tensors(merged(tmp_path / "c", models, "monosoup", dtype="bfloat16"))
    assert one[MATRIX].dtype == torch.bfloat16
    assert not torch.equal(one[MATRIX], nearest[MATRIX])
    same = sum(int((one[n] == two[n]).sum()) for n in one) / sum(t.numel() for t in one.values())
    assert same > 0.999


def test_stock_command_runs_it(tmp_path, family):
    models = family("qwen3-tied", "bf16")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(models.base, models.tuned[0], merge_method="dg_hard")))
    succeed("mergekit-yaml", file, tmp_path / "out")
    ours = load_tensors(merged(tmp_path / "ours", models))
    stock = load_tensors(tmp_path / "out")
    assert all(torch.equal(ours[name], stock[name]) for name in stock)


def test_documented_parameters():
    body = re.search(r"\| parameter \| meaning \| default \|\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT)[1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()]
    stated = {
        name.strip("`"): None if default == "absent" else yaml.safe_load(default.strip("`"))
        for name, _, default in rows
    }
    assert stated == {p.name: p.default for p in merge_methods.get("dg_hard").spec.parameters}


def test_documented_table():
    """If this fails, run `python benchmarks/splits.py` and copy its table."""
    spec = importlib.util.spec_from_file_location("splits", ROOT / "benchmarks" / "splits.py")
    splits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(splits)
    stored = TEXT.split("<!-- benchmarks/splits.py -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    fresh = splits.table().splitlines()
    assert stored[:2] == fresh[:2]
    for one, two in zip(stored[2:], fresh[2:], strict=True):
        numbers = [
            [float(x) for x in re.findall(r"(?<=[ ,])\d+(?:\.\d+)?(?= [|]|,)", line)] for line in (one, two)
        ]
        # Random numbers differ in their last digits from one version of torch to another.
        assert numbers[0] == pytest.approx(numbers[1], rel=0.03, abs=0.005)
