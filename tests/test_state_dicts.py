"""Editing weights in memory: every layout, all tensors accounted for."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded import RECORDED, assert_edited, fine_tuned, state_dict
from test_raw_files import soup
from torch import nn

from mergekit_monosoup import edit_module, edit_state_dict, state_dicts
from mergekit_monosoup.errors import ConfigurationError, InputError, MissingTensorError

pytestmark = pytest.mark.usefixtures("one_thread")
ENERGY = 0.6


class Small(nn.Module):
    """A convolution, batch normalisation, tied linear layers, an integer buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.bn = nn.BatchNorm2d(8)
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("position_ids", torch.arange(5)[None])

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


@pytest.fixture
def modules():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Small()
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
        tuned(torch.randn(4, 3, 8, 8))
    return base, tuned


@pytest.mark.parametrize("model", RECORDED)
def test_recorded_models(model):
    base = state_dict(model)
    tuned = fine_tuned(base)
    edited = edit_state_dict(base, tuned, energy=ENERGY)
    assert_edited(edited.weights, base, tuned, energy=ENERGY)
    assert [outcome.tensor for outcome in edited.outcomes] == list(tuned)
    for outcome in edited.outcomes:
        assert (outcome.action == "edited") == (outcome.edit is not None)
        assert outcome.action == "edited" or outcome.reason


@pytest.mark.parametrize(("base_prefix", "tuned_prefix"), [("", ""), ("", "module."), ("module.", "")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_model_soups_layout(base_prefix, tuned_prefix, wrapped):
    plain = soup(0)
    plain_tuned = fine_tuned(plain)
    base = {base_prefix + name: tensor for name, tensor in plain.items()}
    tuned = {tuned_prefix + name: tensor for name, tensor in plain_tuned.items()}
    given = [{"state_dict": s} if wrapped else s for s in (base, tuned)]
    edited = edit_state_dict(*given, energy=ENERGY).weights
    assert list(edited) == list(tuned)
    assert_edited(
        {n.removeprefix(tuned_prefix): t for n, t in edited.items()}, plain, plain_tuned, energy=0.6
    )


def test_a_module(modules):
    base, tuned = modules
    before = copy.deepcopy(tuned.state_dict())
    module, outcomes = edit_module(base, tuned, energy=ENERGY)
    assert module is not tuned
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned.state_dict().items())
    assert_edited(module.state_dict(), base.state_dict(), before, energy=ENERGY)
    assert module.head.weight is module.embed.weight
    found = {outcome.tensor: outcome for outcome in outcomes}
    assert set(found) == set(before)
    assert found["conv.weight"].edit.view == "flattened"
    assert found["head.weight"].reason == "the same tensor as embed.weight"
    assert found["position_ids"].action == "copied"
    assert not torch.equal(before["bn.num_batches_tracked"], base.state_dict()["bn.num_batches_tracked"])
    assert torch.isfinite(module.eval()(torch.ones(1, 3, 8, 8))).all()


def test_in_place_and_data_parallel(modules):
    base, tuned = modules
    expected, _ = edit_module(base, tuned, energy=ENERGY)
    parallel = nn.DataParallel(tuned)
    result, _ = edit_module(base, parallel, inplace=True, energy=ENERGY)
    assert result is parallel
    assert all(torch.equal(t, tuned.state_dict()[n]) for n, t in expected.state_dict().items())


def test_chunks_do_not_change_the_result(modules, monkeypatch):
    base, tuned = modules
    whole = edit_state_dict(base, tuned, energy=ENERGY).weights
    monkeypatch.setattr(state_dicts, "_CHUNK_BYTES", 100)
    parts = edit_state_dict(base, tuned, energy=ENERGY).weights
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_several_fine_tuned_models_and_parameters_by_name():
    base = state_dict("timm_convnext")
    tuned = [fine_tuned(base, seed) for seed in (1, 2)]
    mean = {n: (a + b) / 2 for n, a, b in zip(base, tuned[0].values(), tuned[1].values(), strict=True)}
    edited = edit_state_dict(
        base, tuned, energy=lambda name: 0.9 if "stages.0" in name else ENERGY, edit=lambda n: "head" not in n
    ).weights
    first = {n: t for n, t in edited.items() if "stages.0" in n}
    rest = {n: t for n, t in edited.items() if "stages.0" not in n and "head" not in n}
    for part, energy in ((first, 0.9), (rest, ENERGY)):
        for name in part:
            if base[name].ndim > 1:
                assert_edited({name: part[name]}, base, {name: mean[name]}, energy=energy)
    assert torch.allclose(edited["head.fc.weight"], mean["head.fc.weight"], atol=1e-6)


def test_a_new_head_is_refused_and_kept_on_request():
    base = state_dict("timm_vit")
    tuned = fine_tuned(base)
    tuned["head.weight"], tuned["extra.weight"] = torch.rand(3, 32), torch.rand(4, 4)
    base["old.weight"] = torch.rand(2, 2)
    with pytest.raises(MissingTensorError, match=r"head\.weight: \(3, 32\) here, \(10, 32\) in the base"):
        edit_state_dict(base, tuned)
    edited = edit_state_dict(base, tuned, strict=False)
    assert torch.equal(edited.weights["head.weight"], tuned["head.weight"])
    assert set(edited.weights) == set(tuned)
    found = {outcome.tensor: (outcome.action, outcome.reason) for outcome in edited.outcomes}
    assert set(found) == set(tuned) | set(base)
    assert found["extra.weight"] == ("copied", "not in the base")
    assert found["old.weight"] == ("left out", "not in fine-tuned model 1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_fine_tuned_model_are_kept(dtype):
    base = state_dict("timm_convnext")
    tuned = {n: t.to(dtype) for n, t in fine_tuned(base).items()}
    edited = edit_state_dict(base, tuned).weights
    assert all(edited[name].dtype == dtype for name in tuned)
    assert all(edited[name].data_ptr() != tuned[name].data_ptr() for name in tuned)


def test_refusals(modules):
    base, tuned = modules
    with pytest.raises(ConfigurationError, match="no parameter 'enrgy'"):
        edit_state_dict(base, tuned, enrgy=0.8)
    with pytest.raises(ConfigurationError, match="method 'ties'"):
        edit_state_dict(base, tuned, method="ties")
    with pytest.raises(ConfigurationError, match="no fine-tuned weights"):
        edit_state_dict(base, [])
    with pytest.raises(InputError, match="'epoch' is int"):
        edit_state_dict(base, {"epoch": 3})
    with pytest.raises(InputError, match="NoneType"):
        edit_state_dict(None, tuned)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(modules):
    base, tuned = modules
    expected, _ = edit_module(base, tuned, energy=ENERGY)
    module, _ = edit_module(base, tuned.cuda(), energy=ENERGY)
    for name, tensor in module.state_dict().items():
        assert tensor.is_cuda
        assert torch.allclose(tensor.cpu(), expected.state_dict()[name], atol=1e-5)
