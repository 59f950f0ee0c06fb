"""Under another default device, as in a worker of `--multi-gpu`: nothing of ours may be made there."""

from __future__ import annotations

import json

import pytest
import spectra
import torch
from checkpoints import load_tensors
from commands import forget_loaders, recipe, succeed, write_config

from mergekit_monosoup.spectral import Split, edit_update, edit_weight
from mergekit_monosoup.spectral.analysis import analyse_update, spectrum_points

SPLITS = [Split(), Split(energy=0.8), Split("donoho_gavish")]
METHODS = ["monosoup", "dg_hard", "sfgs", "model_stock", "model_stock_stable"]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
@pytest.mark.parametrize("kind", spectra.KINDS)
@pytest.mark.parametrize("shape", [(700, 600), (90, 60)], ids=str)
def test_edits(kind, shape, split):
    dw = spectra.update(kind, *shape)
    expected, record = edit_update(dw, split=split)
    with torch.device("meta"):
        edited, again = edit_update(dw, split=split)
    assert torch.equal(edited, expected)
    assert again == record


@pytest.mark.parametrize("shape", [(4, 60, 50), (3, 300, 280), (1200, 40)], ids=str)
def test_stacks_and_untouched_lines(shape):
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(shape, generator=generator)
    w1 = w0 + 0.01 * torch.randn(shape, generator=generator)
    w1[::3] = w0[::3]
    expected, record = edit_weight(w0, [w1])
    with torch.device("meta"):
        edited, again = edit_weight(w0, [w1])
    assert torch.equal(edited, expected)
    assert again == record


def test_analysis():
    dw = spectra.update("gauss", 80, 60)
    with torch.device("meta"):
        found = analyse_update(dw, (0.5, 0.8), split=Split("donoho_gavish"))
        points = spectrum_points(found.singular_values[0])
    assert points == spectrum_points(analyse_update(dw).singular_values[0])


def test_adapters():
    from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1, *shape, generator=generator) for shape in ((60, 4), (4, 50)))
    update = LowRankUpdate(left, right, 1.0, (60, 50))
    expected, record = edit_factors(update)
    with torch.device("meta"):
        edited, again = edit_factors(update)
    assert again == record
    assert torch.equal(edited.left, expected.left)


@pytest.mark.parametrize("method", METHODS)
def test_merges(method, registered, family, tmp_path):
    models = family("qwen3-tied", "bf16")
    config = recipe(models.base, *models.tuned, merge_method=method)
    where = write_config(tmp_path, config)
    succeed("mergekit-yaml", where, tmp_path / "out", "--no-copy-tokenizer")
    forget_loaders()
    with torch.device("meta"):
        succeed("mergekit-yaml", where, tmp_path / "again", "--no-copy-tokenizer")
    expected = load_tensors(tmp_path / "out")
    assert all(torch.equal(t, expected[name]) for name, t in load_tensors(tmp_path / "again").items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())
