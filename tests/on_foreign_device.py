"""Run by test_foreign_device.py in a process of its own: the whole path on a device that is not there."""

from __future__ import annotations

import pytest
import spectra
import torch
from checkpoints import load_tensors
from commands import forget_loaders, recipe, succeed, write_config
from foreign_device import FOREIGN, ForeignTensor, room, there, watched

from mergekit_monosoup import edit_module, edit_state_dict
from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors
from mergekit_monosoup.spectral import Split, edit_update, edit_weight, precision, update
from mergekit_monosoup.spectral.update import smaller_pieces

SPLITS = [Split(), Split(energy=0.8), Split("donoho_gavish")]
SHAPES = [(700, 300), (300, 700), (384, 384), (200, 90)]
METHODS = ["monosoup", "dg_hard", "sfgs", "model_stock", "model_stock_stable"]


@pytest.fixture(params=["float32 first", "float64 pays"])
def _card(request, monkeypatch):
    """Both kinds of cards: those with few float64 units and those with many."""
    ratio = 1.0 if request.param == "float64 pays" else 32.0
    monkeypatch.setattr(precision, "_ratio", lambda _device: ratio)


def pair(shape, dtype=torch.float32, kind="gauss"):
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(shape, generator=generator)
    change = spectra.update(kind, *shape) if len(shape) == 2 else torch.randn(shape, generator=generator)
    return w0.to(dtype), (w0 + 0.01 * change).to(dtype)


def assert_same(result, expected):
    assert isinstance(result, ForeignTensor)
    result = result.cpu()
    if expected.dtype in (torch.float32, torch.float64):
        assert torch.allclose(result, expected, atol=1e-5 * float(expected.abs().max()))
    else:
        # Rounded from values a few 1e-6 apart: the same but for the odd tie.
        assert float((result != expected).float().mean()) <= 1e-2


@pytest.mark.usefixtures("_card")
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)
@pytest.mark.parametrize("kind", spectra.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates(kind, shape, split):
    dw = spectra.update(kind, *shape)
    expected, record = edit_update(dw, split=split)
    result, of_result = edit_update(there(dw), split=split)
    assert of_result.k == record.k
    assert float((result.cpu() - expected).norm() / expected.norm().clamp(min=1e-30)) <= 1e-4


@pytest.mark.usefixtures("_card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 60, 50), (3, 300, 280), (64, 32, 3, 3)], ids=str)
def test_weights(shape, dtype):
    w0, w1 = pair(shape, dtype)
    expected, record = edit_weight(w0, [w1])
    result, of_result = edit_weight(there(w0), [there(w1)])
    assert [m.k for m in of_result.matrices] == [m.k for m in record.matrices]
    assert_same(result, expected)


@pytest.mark.usefixtures("_card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_rows_than_are_summed_in_one_go(dtype, monkeypatch):
    monkeypatch.setattr(update, "_DEVICE_BLOCK", 1 << 16)
    w0, w1 = pair((20000, 40), dtype)
    w1[::7] = w0[::7]
    expected, record = edit_weight(w0, [w1])
    result, of_result = edit_weight(there(w0), [there(w1)])
    assert of_result.k == record.k
    assert_same(result, expected)


@pytest.mark.usefixtures("_card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_crosses_to_the_host_does_not_grow_with_the_matrix(dtype, monkeypatch):
    w0, w1 = (there(t) for t in pair((4096, 300), dtype))
    found = []
    for block in (1 << 26, 1 << 16):
        monkeypatch.setattr(update, "_DEVICE_BLOCK", block)
        with watched() as log:
            edit_weight(w0, [w1])
        found.append(log)
    one, many = (log.waits.total() + len(log.to_host) for log in found)
    assert many <= one <= 20
    # Spectrum and squared column norms, in float64, of each pass; samples for the survival.
    assert all(sum(log.to_host) <= 8 * 8 * 300 for log in found)


@pytest.mark.usefixtures("_card")
def test_a_device_without_room_for_the_usual_pieces():
    w0, w1 = pair((20000, 300), torch.bfloat16)
    expected, _ = edit_weight(w0, [w1])
    with room(w0.nbytes), smaller_pieces():
        assert_same(edit_weight(there(w0), [there(w1)])[0], expected)
    with room(w0.nbytes), pytest.raises(torch.OutOfMemoryError):
        edit_weight(there(w0), [there(w1)])


def test_rounding_draws_the_same_numbers():
    from mergekit_monosoup.spectral.storing import Storage

    value, storage = torch.randn(60, 50), Storage("stochastic", "w")
    expected = storage.rounded(value, torch.bfloat16, 5)
    assert torch.equal(storage.rounded(there(value), torch.bfloat16, 5).cpu(), expected)


def test_factors():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, *shape, generator=generator) for shape in ((60, 4), (4, 50)))
    expected, record = edit_factors(LowRankUpdate(left, right, 2.0, (2, 60, 50)))
    result, of_result = edit_factors(LowRankUpdate(there(left), there(right), 2.0, (2, 60, 50)))
    assert of_result.k == record.k
    assert torch.allclose(result.materialise().cpu(), expected.materialise(), atol=1e-4)


def states(count=2):
    generator = torch.Generator().manual_seed(0)
    base = {
        "matrix": torch.randn(90, 60, generator=generator),
        "norm": torch.randn(60, generator=generator),
        "steps": torch.tensor(3),
    }
    tuned = [
        {n: t + 0.01 * torch.randn(t.shape, generator=generator) if t.ndim else t for n, t in base.items()}
        for _ in range(count)
    ]
    return base, tuned


@pytest.mark.parametrize("on_host", [(), (0,), (1,), (1, 2)], ids=str)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "model_stock"])
def test_state_dicts(method, on_host, tmp_path):
    """Models on the device, on the host, or on both: the result lies where the first fine-tuned one does."""
    base, tuned = states()
    expected = edit_state_dict(base, tuned, method=method).weights
    placed = [
        state if i in on_host else {name: there(tensor) for name, tensor in state.items()}
        for i, state in enumerate((base, *tuned))
    ]
    result = edit_state_dict(placed[0], placed[1:], method=method, report=str(tmp_path / "report.jsonl"))
    for name, tensor in result.weights.items():
        assert tensor.device == placed[1][name].device
        assert torch.allclose(tensor.cpu(), expected[name], atol=1e-6)
    assert (tmp_path / "report.jsonl").read_text().count('"tensor"') >= 2


def test_modules():
    base = torch.nn.Linear(30, 40)
    tuned = torch.nn.Linear(30, 40)
    expected, _ = edit_module(base, tuned)
    state = {name: there(tensor) for name, tensor in tuned.state_dict().items()}
    weights = edit_state_dict(base, state).weights
    assert torch.allclose(weights["weight"].cpu(), expected.weight, atol=1e-6)


@pytest.mark.parametrize("where", [{}, {"low_cpu_memory": True}], ids=["", "low cpu memory"])
@pytest.mark.parametrize("method", METHODS)
def test_merges(method, where, registered, family, tmp_path):
    from mergekit.options import MergeOptions

    from mergekit_monosoup.merging.run import merge_to_folder

    models = family("qwen3-tied", "bf16")
    config = recipe(models.base, *models.tuned, merge_method=method)
    for device in ("cpu", str(FOREIGN)):
        forget_loaders()
        options = MergeOptions(quiet=True, copy_tokenizer=False, device=device, **where)
        text = write_config(tmp_path, config).read_text()
        merge_to_folder(text, tmp_path / device.partition(":")[0], options)
    expected, result = load_tensors(tmp_path / "cpu"), load_tensors(tmp_path / "foreign")
    assert expected.keys() == result.keys()
    for name, tensor in expected.items():
        assert float((tensor != result[name]).float().mean()) <= 1e-2, name


@pytest.mark.parametrize("method", ["monosoup", "sfgs"])
def test_the_stock_command(method, registered, family, tmp_path):
    models = family("qwen3-tied", "bf16")
    config = write_config(tmp_path, recipe(models.base, *models.tuned, merge_method=method))
    for device in ("cpu", str(FOREIGN)):
        forget_loaders()
        succeed("mergekit-yaml", config, tmp_path / device[:3], "--no-copy-tokenizer", "--device", device)
    expected, result = load_tensors(tmp_path / "cpu"), load_tensors(tmp_path / "for")
    for name, tensor in expected.items():
        assert float((tensor != result[name]).float().mean()) <= 1e-2, name


@pytest.mark.parametrize("mixed", [True, False])
def test_the_device_refuses_to_be_mixed(mixed):
    """Otherwise none of the above says anything."""
    a, b = there(torch.eye(3)), torch.eye(3)
    if mixed:
        with pytest.raises(RuntimeError, match="same device"):
            a @ b
        with pytest.raises(TypeError, match="numpy"):
            a.numpy()
    else:
        assert torch.equal((a @ there(b)).cpu(), b)
