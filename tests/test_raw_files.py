"""Models of timm, open_clip and transformers by `mergekit-pytorch`, and what it cannot take."""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_tensors
from commands import invoke, recipe, write_config
from recorded import RECORDED, assert_edited, fine_tuned, state_dict
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("registered", "one_thread")
ENERGY = 0.6


def counters(state):
    return [name for name, tensor in state.items() if not tensor.is_floating_point()]


def run(folder, base, tuned, suffix, **parameters):
    for name, state in (("base", base), ("tuned", tuned)):
        if suffix == "safetensors":
            save_file(state, folder / f"{name}.safetensors")
        else:
            torch.save(state, folder / f"{name}.pt")
    config = recipe(
        folder / f"base.{suffix}", folder / f"tuned.{suffix}", parameters={"energy": ENERGY, **parameters}
    )
    return invoke("mergekit-pytorch", write_config(folder, config), folder / "out")


def merged_by(folder, base, tuned, suffix, **parameters):
    result = run(folder, base, tuned, suffix, **parameters)
    assert result.exception is None, result.exception
    return load_tensors(folder / "out")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("model", RECORDED)
def test_recorded_models(tmp_path, model, suffix):
    base = state_dict(model)
    tuned = fine_tuned(base)
    tuned |= {name: base[name] for name in counters(base)}
    merged = merged_by(tmp_path, base, tuned, suffix)
    assert_edited(merged, base, tuned, energy=ENERGY)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_batch_statistics_are_those_of_the_fine_tuned_model(tmp_path, alpha):
    base = state_dict("timm_resnet")
    tuned = fine_tuned(base) | {name: base[name] for name in counters(base)}
    merged = merged_by(tmp_path, base, tuned, "safetensors", alpha=alpha)
    statistics = [name for name in base if "running_" in name]
    assert statistics
    assert all(torch.equal(merged[name], tuned[name]) for name in statistics)


def test_counters_that_differ_are_refused_by_mergekit(tmp_path):
    base = state_dict("timm_resnet")
    result = run(tmp_path, base, fine_tuned(base), "safetensors")
    assert "num_batches_tracked" in str(result.exception)


def soup(seed):
    """The layout of the model-soups release: image tower under `model.`, a linear head beside it."""
    open_clip = state_dict("open_clip_vit", seed)
    tower = {f"model.{n}": t for n, t in open_clip.items() if not n.startswith("transformer.")}
    head = torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))
    return tower | {"classification_head.weight": head, "classification_head.bias": torch.zeros(10)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_model_soups_layout(tmp_path, prefix):
    base = {prefix + name: tensor for name, tensor in soup(0).items()}
    tuned = fine_tuned(base)
    assert_edited(merged_by(tmp_path, base, tuned, "pt"), base, tuned, energy=ENERGY)


def test_a_wrapped_state_dict_is_beyond_mergekit_pytorch(tmp_path):
    base = soup(0)
    result = run(tmp_path, {"state_dict": base}, {"state_dict": fine_tuned(base)}, "pt")
    assert isinstance(result.exception, KeyError)
