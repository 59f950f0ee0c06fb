"""Stochastic rounding and what is left of an edit after it has been stored."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import spectra
import torch
from mergekit.merge_methods.api import merge_state_dicts
from rounding import FORMATS, as_float64, round_to, spacing

from mergekit_monosoup.alignment.average import towards_average
from mergekit_monosoup.spectral import EditOptions, edit_weight
from mergekit_monosoup.spectral import update as update_module
from mergekit_monosoup.spectral.storing import Storage

COARSE = [torch.bfloat16, torch.float16]
METHODS = ["monosoup", "dg_hard", "model_stock_stable", "sfgs"]


def stochastic(value, dtype, name="w", start=0):
    return Storage("stochastic", name).rounded(value, dtype, start)


def values(count, dtype, low=-30):
    """Numbers of many magnitudes, some of them below the smallest normal one of float16."""
    generator = torch.Generator().manual_seed(0)
    size = 2.0 ** (torch.rand(count, generator=generator) * -low + low)
    value = torch.randn(count, generator=generator) * size
    return value.clamp(-FORMATS[dtype][2] / 2, FORMATS[dtype][2] / 2)


def neighbours(x, dtype):
    """The numbers of `dtype` next to x, below and above; x itself where it is one."""
    x = np.abs(np.asarray(x, np.float64))
    unit = spacing(x, dtype)
    return np.floor(x / unit) * unit, np.ceil(x / unit) * unit


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_numbers_of_the_dtype_stay_as_they_are(dtype):
    stored = values(10_000, dtype).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    special = torch.tensor(
        [0.0, -0.0, tiny, tiny / 4, -tiny / 4, torch.finfo(dtype).max, 1.0, -2.0], dtype=dtype
    )
    for given in (stored, special):
        assert torch.equal(stochastic(given.float(), dtype).to(dtype), given)


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_others_become_a_neighbour_the_nearer_one_more_often(dtype):
    value = values(400, dtype, low=-24).repeat_interleave(2000)
    result = stochastic(value, dtype)
    assert torch.equal(result.to(dtype).float(), result)
    below, above = neighbours(value, dtype)
    got = np.abs(as_float64(result))
    assert ((got == below) | (got == above)).all()
    # The mean of n draws is within five standard errors; one spacing is the largest deviation there is.
    mean = as_float64(result).reshape(400, 2000).mean(1)
    exact = as_float64(value).reshape(400, 2000)[:, 0]
    unit = spacing(exact, dtype)
    share = np.abs(exact) / unit - np.floor(np.abs(exact) / unit)
    allowed = 5 * np.sqrt(share * (1 - share) / 2000) + 2**-12
    assert (np.abs(mean - exact) <= allowed * unit).all()


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_subnormal_numbers_are_rounded_on_their_own_grid(dtype):
    unit = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    value = torch.full((100_000,), 2.25 * unit)
    result = as_float64(stochastic(value, dtype)) / unit
    assert set(result.tolist()) == {2.0, 3.0}
    assert result.mean() == pytest.approx(2.25, abs=0.01)


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_infinity_comes_only_where_nearest_rounding_gives_it(dtype):
    largest = float(torch.finfo(dtype).max)
    half = largest * torch.finfo(dtype).eps / 4
    just = torch.tensor([largest + 0.5 * half, -largest - 0.5 * half], dtype=torch.float64).float()
    result = stochastic(just.repeat(1000), dtype).to(dtype)
    assert result.isfinite().all()
    assert torch.equal(result.abs().float().unique(), torch.tensor([largest]))
    assert stochastic(torch.tensor([float("inf")]), dtype).isinf().all()
    if dtype == torch.float16:
        assert stochastic(torch.tensor([70_000.0]), dtype).to(dtype).isinf().all()


def test_wider_dtypes_are_left_alone():
    value = torch.randn(100)
    assert stochastic(value, torch.float32) is value
    assert stochastic(value.double(), torch.float64).dtype == torch.float64
    assert Storage("nearest").rounded(value, torch.bfloat16) is value


def test_random_numbers_belong_to_name_and_position():
    value = torch.full((1000,), 1.001)
    whole = stochastic(value, torch.bfloat16)
    for cut in (1, 7, 500, 999):
        parts = [stochastic(value[:cut], torch.bfloat16), stochastic(value[cut:], torch.bfloat16, start=cut)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(stochastic(value, torch.bfloat16, "v"), whole)
    turned = stochastic(torch.full((40, 25), 1.001).T.contiguous().T, torch.bfloat16)
    assert torch.equal(turned.reshape(-1), whole)


def test_the_stream_is_that_of_the_bit_generator():
    """NumPy promises it for bit generators, and not for what is drawn from them."""
    seed = int.from_bytes(hashlib.blake2b(b"w", digest_size=16).digest(), "little")
    raw = np.random.PCG64DXSM(seed).random_raw(50).view("<i2")
    assert (Storage("stochastic", "w")._draws(0, 200).numpy() == raw).all()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (6, 40, 30)], ids=str)
def test_edits_do_not_depend_on_blocks_or_threads(shape, monkeypatch):
    w0, w1 = pair(shape, 1e-3)
    options = EditOptions(storage=Storage("stochastic", "w"))
    expected, _ = edit_weight(w0, [w1], options=options)
    nearest, _ = edit_weight(w0, [w1])
    assert not torch.equal(expected, nearest)
    before = torch.get_num_threads()
    monkeypatch.setattr(update_module, "_CPU_BLOCK", 1 << 12)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(edit_weight(w0, [w1], options=options)[0], expected)
    torch.set_num_threads(before)


def pair(shape, relative, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w0 = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    return w0, (w0.float() + relative * 0.02 * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("shape", [(500, 400), (400, 500), (8, 100, 90)], ids=str)
def test_survival_is_the_projection_of_what_is_written_on_what_was_meant(shape, dtype):
    w0, w1 = pair(shape, 5e-3, dtype)
    wide, _ = edit_weight(w0.float(), [w1.float()])
    for rounding in ("nearest", "stochastic"):
        written, record = edit_weight(w0, [w1], options=EditOptions(storage=Storage(rounding, "w")))
        intended = wide.double() - w1.double()
        actual = written.double() - w1.double()
        exact = float((actual * intended).sum() / intended.square().sum())
        # Seen from a sample: a few in a hundred.
        assert record.survival == pytest.approx(exact, abs=0.04)
        if rounding == "stochastic":
            assert exact == pytest.approx(1, abs=0.03)
        elif dtype == torch.bfloat16:
            assert exact < 0.8


def test_survival_is_of_the_dtype_that_is_stored_in_the_end():
    """Computed in float32 and stored in bfloat16 afterwards: `dtype` and `out_dtype` of a recipe."""
    w0, w1 = pair((500, 400), 5e-3)
    _, direct = edit_weight(w0, [w1])
    late = EditOptions(storage=Storage(dtype=torch.bfloat16))
    result, record = edit_weight(w0.float(), [w1.float()], options=late)
    assert record.survival == pytest.approx(direct.survival, abs=1e-6)
    assert result.dtype == torch.float32
    late = EditOptions(storage=Storage("stochastic", "w", torch.bfloat16))
    result, record = edit_weight(w0.float(), [w1.float()], options=late)
    assert torch.equal(result.bfloat16().float(), result)
    expected, _ = edit_weight(w0, [w1], options=EditOptions(storage=Storage("stochastic", "w")))
    assert torch.equal(result.bfloat16(), expected)


def test_survival_is_not_defined_without_an_edit_or_for_several():
    w0, w1 = pair((120, 90), 0.1)
    assert np.isnan(edit_weight(w0, [w0])[1].survival)
    # Exact rank 1: k = r, nothing is left over.
    line = torch.ones(120, 1) @ torch.ones(1, 90)
    assert np.isnan(edit_weight(torch.zeros(120, 90), [line])[1].survival)
    assert np.isnan(edit_weight(w0, [w1, w1], (0.5, 0.5))[1].survival)
    assert edit_weight(w0.float(), [w1.float()])[1].survival == pytest.approx(1)


def test_averages_round_by_position_too():
    w0, w1 = pair((700, 600), 1e-3)
    w2 = pair((700, 600), 1e-3, seed=1)[1]
    ratio = torch.full((700,), 0.3)
    storage = Storage("stochastic", "w")
    rows = towards_average(w0, [w1, w2], ratio, storage)
    whole = towards_average(w0, [w1, w2], torch.full((1,), 0.3), storage)
    assert torch.equal(rows, whole)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_it_and_means_the_same_on_average(method):
    w0, w1 = pair((300, 200), 5e-3)
    generator = torch.Generator().manual_seed(3)
    # Something above the noise, so that dg_hard has what to keep.
    w1 = (w1.float() + 2e-4 * torch.randn(300, 1, generator=generator)).bfloat16()
    w2 = (w1.float() + 2e-4 * torch.randn(300, 200, generator=generator)).bfloat16()
    models = [{"a.weight": w} for w in (w0, w1, w2)]

    def merged(rounding, dtype=torch.bfloat16):
        given = [{n: t.to(dtype) for n, t in m.items()} for m in models]
        parameters = {"rounding": rounding}
        return merge_state_dicts(given, method, base=0, parameters=parameters)["a.weight"]

    exact = merged("nearest", torch.float32).double()
    drawn, again, nearest = merged("stochastic"), merged("stochastic"), merged("nearest")
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, nearest)
    assert torch.equal(merged("stochastic", torch.float32).double(), exact)
    below, above = neighbours(exact.numpy(), torch.bfloat16)
    got = np.abs(as_float64(drawn))
    close = 1e-6 * np.abs(exact.numpy())
    assert ((np.abs(got - below) <= close) | (np.abs(got - above) <= close)).mean() > 0.999
    unit = spacing(exact.numpy(), torch.bfloat16)
    assert abs(float(((drawn.double() - exact) / torch.from_numpy(unit)).mean())) < 0.01
    assert np.abs(as_float64(nearest) - round_to(exact.numpy(), torch.bfloat16)).max() <= unit.max()


def test_kinds_of_spectra_survive_alike():
    for kind in ("gauss", "1/i", "spiked"):
        dw = spectra.update(kind, 300, 280)
        w0 = pair((300, 280), 0)[0]
        w1 = (w0.float() + 1e-4 * dw / dw.std()).bfloat16()
        _, record = edit_weight(w0, [w1], options=EditOptions(storage=Storage("stochastic", kind)))
        assert record.survival == pytest.approx(1, abs=0.15)
