"""What must hold for every update, on updates that Hypothesis chooses."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mergekit_monosoup.spectral import edit_update

KINDS = ("gauss", "power", "geometric", "low rank", "flat", "linear", "rows")
MIXINGS = st.sampled_from(oracle.MIXINGS)
ENERGIES = st.one_of(st.none(), st.floats(0.01, 1.0))
RECORD = ("effective_rank", "rho", "cos_alpha", "lambda_low", "lambda_high")

common = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def orthogonal(rng, n):
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


@st.composite
def updates(draw, smallest=1, largest=24):
    """Matrices of many shapes and spectra, in float64."""
    rows, columns = draw(st.integers(smallest, largest)), draw(st.integers(smallest, largest))
    kind = draw(st.sampled_from(KINDS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dw = rng.standard_normal((rows, columns))
    r = min(rows, columns)
    spectra = {
        "power": 1 / np.arange(1.0, r + 1),
        "geometric": 0.5 ** np.arange(r),
        "flat": np.ones(r),
        "linear": np.linspace(1.0, 0.5, r),
    }
    if kind in spectra:
        dw = orthogonal(rng, rows)[:, :r] * spectra[kind] @ orthogonal(rng, columns)[:r]
    elif kind == "low rank":
        rank = draw(st.integers(1, r))
        dw = dw[:, :rank] @ rng.standard_normal((rank, columns))
    elif kind == "rows":
        dw[draw(st.integers(0, rows - 1)) :: 2] = 0.0
    assume(dw.any())
    return dw


def well_separated(dw, energy=None):
    """False where the last digit decides k: a tie of the rule, or of two singular values."""
    s = np.linalg.svd(dw, compute_uv=False)
    rank = oracle.numerical_rank(s, dw.shape)
    if energy is None:
        position = oracle.effective_rank(s[:rank])
        if abs(position - round(position)) < 1e-6 and round(position) < rank:
            return False
    else:
        kept = np.cumsum(s**2) / (s**2).sum()
        if np.abs(kept[: rank - 1] - energy).min(initial=1.0) < 1e-9:
            return False
    k = oracle.split_index(s, dw.shape, energy)
    return k == rank or (s[k - 1] - s[k]) > 1e-6 * s[0]


def edit(dw, **options):
    edited, record = edit_update(torch.from_numpy(np.ascontiguousarray(dw)), **options)
    assert edited.shape == dw.shape
    return edited.numpy(), record


def assert_close(actual, expected, dw, tolerance=1e-12):
    scale = np.abs(dw).max()
    assert np.abs(actual - expected).max() <= tolerance * scale * max(dw.shape)


@common
@given(updates(), ENERGIES, MIXINGS)
def test_equal_to_the_reference(dw, energy, mixing):
    assume(well_separated(dw, energy))
    edited, record = edit(dw, energy=energy, mixing=mixing)
    expected, values = oracle.monosoup_update(dw, energy, mixing)
    assert_close(edited, expected, dw)
    assert record.k == values["k"]
    for name in RECORD:
        assert getattr(record, name) == pytest.approx(values[name], rel=1e-9, abs=1e-9), name


@common
@given(updates(), ENERGIES)
def test_high_and_low_add_up_to_the_update(dw, energy):
    high, of_high = edit(dw, energy=energy, mixing="high")
    low, of_low = edit(dw, energy=energy, mixing="low")
    assert_close(high + low, dw, dw)
    # Orthogonal parts, so the squared norms add up too.
    assert (high**2).sum() + (low**2).sum() == pytest.approx((dw**2).sum(), rel=1e-9)
    assert (of_high.lambda_high, of_high.lambda_low) == (1.0, 0.0)
    assert (of_low.lambda_high, of_low.lambda_low) == (0.0, 1.0)


@common
@given(updates(), ENERGIES, MIXINGS, st.integers(0, 2**32 - 1))
def test_orthogonal_invariance(dw, energy, mixing, seed):
    assume(well_separated(dw, energy))
    rng = np.random.default_rng(seed)
    left, right = orthogonal(rng, dw.shape[0]), orthogonal(rng, dw.shape[1])
    edited, record = edit(dw, energy=energy, mixing=mixing)
    turned, of_turned = edit(left @ dw @ right, energy=energy, mixing=mixing)
    assert_close(turned, left @ edited @ right, dw, 1e-11)
    assert of_turned.k == record.k


@common
@given(updates(), ENERGIES, MIXINGS)
def test_transposition(dw, energy, mixing):
    assume(well_separated(dw, energy))
    edited, record = edit(dw, energy=energy, mixing=mixing)
    transposed, of_transposed = edit(dw.T, energy=energy, mixing=mixing)
    assert_close(transposed.T, edited, dw, 1e-11)
    assert of_transposed.k == record.k
    assert of_transposed.lambda_low == pytest.approx(record.lambda_low, rel=1e-9, abs=1e-9)


@common
@given(updates(), ENERGIES, MIXINGS, st.integers(-12, 12), st.sampled_from(["float32", "float64"]))
def test_scale(dw, energy, mixing, power, dtype):
    """A scaled update is edited alike: no absolute constant is at work."""
    assume(well_separated(dw, energy))
    if dtype == "float32":
        # An exact low rank is only exact in the dtype that it was computed in.
        assume(np.linalg.matrix_rank(dw) == min(dw.shape))
        dw = dw.astype(np.float32)
        assume(well_separated(dw.astype(np.float64), energy))
    factor = 10.0**power
    scaled = (dw.astype(np.float64) * factor).astype(dtype)
    edited, record = edit(dw, energy=energy, mixing=mixing)
    of_scaled, scaled_record = edit(scaled, energy=energy, mixing=mixing)
    tolerance = {"float64": 1e-11, "float32": 2e-5}[dtype]
    back = of_scaled.astype(np.float64) / factor
    assert_close(back, edited.astype(np.float64), dw, tolerance)
    assert scaled_record.k == record.k
    assert scaled_record.lambda_low == pytest.approx(record.lambda_low, abs=50 * tolerance)


@common
@given(updates(), st.integers(-1000, 1000))
def test_scale_by_powers_of_two_is_exact(dw, exponent):
    """Far beyond the range in which squares fit, and bit for bit."""
    dw = dw / 2.0 ** math.frexp(np.abs(dw).max())[1]
    assume(np.abs(dw[dw != 0]).min() > 1e-6)
    edited, record = edit(dw)
    scaled, of_scaled = edit(np.ldexp(dw, exponent))
    assert np.array_equal(np.ldexp(scaled, -exponent), edited) or exponent < -900
    assert (of_scaled.k, of_scaled.lambda_low) == (record.k, record.lambda_low)


@common
@given(updates(), st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6))
def test_k_grows_with_the_energy(dw, energies):
    ks = [edit(dw, energy=energy)[1].k for energy in sorted(energies)]
    assert ks == sorted(ks)
    assert all(1 <= k <= min(dw.shape) for k in ks)
    whole, record = edit(dw, energy=1.0)
    assert record.lambda_low == pytest.approx(0.0, abs=1e-7)
    assert_close(whole, dw, dw, 1e-7)


@common
@given(updates(), MIXINGS, st.floats(0.0, 4.0))
@pytest.mark.usefixtures("registered")
def test_alpha_is_linear(dw, mixing, alpha):
    from mergekit.merge_methods import merge_tensors

    w0 = torch.from_numpy(np.random.default_rng(0).standard_normal(dw.shape))
    w1 = w0 + torch.from_numpy(dw)

    def update(a):
        parameters = {"alpha": a, "mixing": mixing}
        return merge_tensors([w0, w1], "monosoup", base_index=0, parameters=parameters) - w0

    difference = (update(alpha) - alpha * update(1.0)).abs().max().item()
    assert difference <= 1e-13 * (1 + alpha) * (1 + np.abs(dw).max())
    assert update(0.0).abs().max().item() == 0.0


@common
@given(updates(), ENERGIES)
def test_coefficients_stay_in_their_range(dw, energy):
    edited, record = edit(dw, energy=energy)
    for name in ("rho", "cos_alpha", "lambda_low", "lambda_high"):
        assert 0.0 <= getattr(record, name) <= 1.0, name
    assert record.lambda_low + record.lambda_high == pytest.approx(1.0)
    assert 1 <= record.k <= min(dw.shape)
    assert 1.0 - 1e-9 <= record.effective_rank <= min(dw.shape) + 1e-9
    assert np.linalg.norm(edited) <= np.linalg.norm(dw) * (1 + 1e-12)


@common
@given(updates(smallest=2), st.integers(1, 4))
def test_a_stack_is_its_matrices(dw, experts):
    stack = np.stack([dw * (index + 1) for index in range(experts)])
    edited, _ = edit(stack)
    for matrix, result in zip(stack, edited, strict=True):
        assert_close(result, edit(matrix)[0], matrix)


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (6, 2, 2, 1)])
@pytest.mark.parametrize("mixing", oracle.MIXINGS)
def test_zero_stays_zero(shape, mixing):
    edited, _ = edit(np.zeros(shape), mixing=mixing)
    assert not edited.any()


def test_the_split_does_not_exceed_an_exact_rank():
    """Rounding noise is no direction of the update, however flat the spectrum above it."""
    rng = np.random.default_rng(0)
    flat = orthogonal(rng, 96)[:, :16] @ orthogonal(rng, 64)[:16]
    for dw in (flat, rng.standard_normal((96, 16)) @ rng.standard_normal((16, 64))):
        _, record = edit(dw)
        assert record.k <= 16
        assert record.k < 16 or record.lambda_high == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_one_is_kept_whole_at_any_size(dtype):
    for size in (1e-12, 1e-5, 1.0, 1e12):
        u = torch.linspace(1, 2, 30, dtype=dtype)
        v = torch.linspace(-1, 1, 20, dtype=dtype)
        dw = size * torch.outer(u, v)
        edited, record = edit_update(dw)
        assert record.lambda_high == pytest.approx(1.0, abs=1e-4)
        assert torch.allclose(edited, dw, rtol=1e-4, atol=1e-4 * size)


def test_the_update_is_left_as_it_was():
    dw = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    before = dw.clone()
    edited, _ = edit_update(dw)
    edited.zero_()
    assert torch.equal(dw, before)
