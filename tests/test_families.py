"""Every model family by `mergekit-yaml` and by `mergekit-monosoup merge`: nothing lost, all correct."""

from __future__ import annotations

import logging
import re

import numpy as np
import oracle
import pytest
import torch
from checkpoints import load_tensors
from click.testing import CliRunner
from commands import forget_loaders, invoke, recipe, write_config
from families import BY_KEY
from rounding import as_float64

from mergekit_monosoup.planning.plan import PlanOptions, make_plan
from mergekit_monosoup.report.reader import read_report
from mergekit_monosoup.spectral.matrix import choose_view

pytestmark = pytest.mark.usefixtures("registered", "one_thread")

ENERGY = 0.6
QUIET = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")


def merge_with_our_command(config, out, *options):
    from mergekit_monosoup.cli.merge import merge

    forget_loaders()
    try:
        result = CliRunner().invoke(merge, [str(config), str(out), *QUIET, *options])
    finally:
        forget_loaders()
    assert result.exit_code == 0, result.output
    return load_tensors(out)


def assert_nothing_lost(family, merged, base, tuned):
    """Every tensor of both inputs is in the output, or in a larger tensor of it."""
    for given in (base, tuned):
        left_out = set(given) - set(merged)
        unexplained = [n for n in left_out if not (family.fused and re.search(family.fused, n))]
        assert not unexplained
        assert sum(t.numel() for t in merged.values()) == sum(t.numel() for t in given.values())


def assert_loads_and_equals_the_reference(family, out, base_folder, tuned_folder):
    with torch.random.fork_rng(devices=[]):
        cls = type(family.build())
    model, info = cls.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.isfinite(family.forward(model.eval())).all()
    merged = model.state_dict()
    base = cls.from_pretrained(base_folder).state_dict()
    tuned = cls.from_pretrained(tuned_folder).state_dict()
    edited = 0
    for name, w0 in base.items():
        w1 = tuned[name]
        view = choose_view(tuple(w0.shape), name)
        if not w0.is_floating_point() or not view.decomposes:
            assert torch.equal(merged[name], w1), name
            continue
        dw = (as_float64(w1) - as_float64(w0)).reshape(view.shape)
        expected = np.stack([oracle.monosoup_update(matrix, ENERGY)[0] for matrix in dw]).reshape(w0.shape)
        error = np.abs(as_float64(merged[name]) - as_float64(w0) - expected).max()
        assert error <= 5e-5 * np.abs(dw).max(), name
        edited += not torch.equal(merged[name], w1)
    assert edited > 2


@pytest.mark.parametrize("key", BY_KEY)
def test_our_command_takes_every_family(tmp_path, family_pair, key):
    family = BY_KEY[key]
    base, tuned = family_pair(key)
    config = write_config(tmp_path, recipe(base, tuned, parameters={"energy": ENERGY}))
    plan = make_plan(config.read_text(), PlanOptions(costs=False))
    assert not plan.problems.errors
    merged = merge_with_our_command(config, tmp_path / "out")
    assert_nothing_lost(family, merged, load_tensors(base), load_tensors(tuned))
    done = {r.tensor: (r.shape, r.action) for r in read_report(tmp_path / "out").records}
    foreseen = {t.tensor: (t.shape, t.action) for t in plan.tensors}
    # What mergekit fuses as it loads a checkpoint has no header to plan from, and a warning instead.
    warned = " ".join(map(str, plan.problems.warnings))
    assert foreseen.items() <= done.items()
    assert done.keys() == foreseen.keys() or "so shapes are not checked" in warned
    assert_loads_and_equals_the_reference(family, tmp_path / "out", base, tuned)


@pytest.mark.parametrize("key", BY_KEY)
def test_stock_mergekit_yaml(tmp_path, family_pair, key, caplog):
    """What the table says of mergekit-yaml: complete, refused, or tensors lost and named."""
    family = BY_KEY[key]
    base, tuned = family_pair(key)
    config = write_config(tmp_path, recipe(base, tuned, parameters={"energy": ENERGY}))
    with caplog.at_level(logging.WARNING):
        result = invoke("mergekit-yaml", config, tmp_path / "out", *QUIET)
    if family.stock == "refuses":
        assert family.reason in str(result.exception)
        return
    assert result.exception is None, result.exception
    merged = load_tensors(tmp_path / "out")
    warned = [r.getMessage() for r in caplog.records if "not be in the merged model" in r.getMessage()]
    if family.stock == "loses":
        assert len(load_tensors(base)) - len(merged) == int(family.reason)
        assert len(warned) == 1
        assert f"{family.reason} tensors" in warned[0]
        return
    assert not warned
    assert_nothing_lost(family, merged, load_tensors(base), load_tensors(tuned))
    again = merge_with_our_command(config, tmp_path / "ours")
    assert set(again) == set(merged)
    assert all(torch.equal(again[name], merged[name]) for name in merged)


@pytest.mark.parametrize("key", [k for k, f in BY_KEY.items() if f.stock != "complete"])
def test_mergekit_pytorch_on_the_single_file_is_a_way_round(tmp_path, family_pair, key):
    family = BY_KEY[key]
    base, tuned = (folder / "model.safetensors" for folder in family_pair(key))
    config = write_config(tmp_path, recipe(base, tuned, parameters={"energy": ENERGY}))
    result = invoke("mergekit-pytorch", config, tmp_path / "out")
    assert result.exception is None, result.exception
    (tmp_path / "out" / "config.json").write_bytes((base.parent / "config.json").read_bytes())
    merged = load_tensors(tmp_path / "out")
    assert set(merged) == set(load_tensors(base.parent))
    assert_loads_and_equals_the_reference(family, tmp_path / "out", base.parent, tuned.parent)
