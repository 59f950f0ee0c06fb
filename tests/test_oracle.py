"""The reference agrees with the authors' outputs and with what their paper describes."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import oracle
import pytest
import rounding
import torch
from baselines import (
    lines_factor,
    model_stock,
    model_stock_ratio,
    sfgs,
    soup_of,
    uniform_soup,
    wise_ft,
)
from golden_cases import CASES, RULES, load_case, load_goldens


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_authors_outputs(case, rule):
    w0, w1, expected = load_case(case, rule)
    ours = oracle.monosoup_weight(w0, [w1], energy=RULES[rule])
    assert np.abs(ours - expected).max() <= 1e-12 * np.abs(w1 - w0).max()


def test_goldens_are_all_used():
    assert {key.rsplit(".", 1)[0] for key in load_goldens() if key.endswith(".w0")} == set(CASES)


def test_the_epsilon_of_the_authors_shows_in_one_case_only():
    """Where k = r and nothing else, and there it is 4e-8 of the update."""
    differ = []
    for case in CASES:
        for rule in RULES:
            w0, w1, expected = load_case(case, rule)
            raw = load_goldens()[f"{case}.{rule}"]
            if np.abs(raw - expected).max() > 1e-12 * np.abs(w1 - w0).max():
                differ.append((case, rule))
                assert np.abs(raw - expected).max() < 5e-8 * np.abs(w1 - w0).max()
    assert differ == [("12x6x3x3.gauss", "auto")]


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns))


@pytest.mark.parametrize(
    ("dw", "energy", "k", "lambda_high"),
    [
        pytest.param(gaussian(512, 512), None, (409, 415), 0.900, id="gaussian"),
        pytest.param(gaussian(512, 512), 0.8, (1, 511), 0.412, id="gaussian, R = 0.8"),
        pytest.param(gaussian(1024, 256), None, (246, 250), 0.782, id="gaussian, tall"),
        pytest.param(np.diag(1 / np.arange(1.0, 513)), None, (118, 118), 0.937, id="s = 1/i"),
        pytest.param(np.diag(np.linspace(1, 0.8, 512)), None, (511, 511), 0.346, id="s linear"),
        pytest.param(np.linalg.qr(gaussian(512, 512))[0], None, (512, 512), 1.0, id="flat"),
        pytest.param(gaussian(96, 16) @ gaussian(16, 64, 1), None, (1, 16), None, id="rank 16"),
    ],
)
def test_behaviour_the_paper_describes(dw, energy, k, lambda_high):
    _, record = oracle.monosoup_update(dw, energy)
    assert k[0] <= record["k"] <= k[1]
    if lambda_high is not None:
        assert record["lambda_high"] == pytest.approx(lambda_high, abs=4e-3)


def test_exact_rank_is_kept_whole():
    u, _ = np.linalg.qr(gaussian(96, 16))
    v, _ = np.linalg.qr(gaussian(64, 16, 1))
    edited, record = oracle.monosoup_update(u @ v.T)
    assert record["k"] == 16
    assert record["lambda_high"] == 1.0
    assert np.allclose(edited, u @ v.T, atol=1e-14)


def test_jump_at_full_rank():
    """A flat spectrum is kept whole, a nearly flat one is not: the paper's rule, no error."""
    assert oracle.monosoup_update(np.eye(512))[1]["lambda_high"] == 1.0
    assert oracle.monosoup_update(np.diag(np.linspace(1, 0.8, 512)))[1]["lambda_high"] < 0.5


def test_a_zero_update_stays_zero():
    edited, record = oracle.monosoup_update(np.zeros((5, 7)))
    assert not edited.any()
    assert record["k"] == 0


def test_small_updates_are_not_biased():
    """A rank-1 update of norm 1e-5 is kept whole: no absolute epsilon is at work."""
    dw = np.outer(gaussian(1, 30)[0], gaussian(1, 20, 1)[0])
    dw *= 1e-5 / np.linalg.norm(dw)
    assert oracle.monosoup_update(dw)[1]["lambda_high"] == 1.0


def test_energy_one_keeps_everything():
    dw = gaussian(20, 12)
    edited, record = oracle.monosoup_update(dw, energy=1.0)
    assert record["k"] == 12
    assert np.allclose(edited, dw, atol=1e-13)


def test_ablations_are_choices_of_the_two_coefficients():
    dw = gaussian(40, 30)
    records = {mixing: oracle.monosoup_update(dw, mixing=mixing)[1] for mixing in oracle.MIXINGS}
    full = records["monosoup"]
    assert records["decay"]["lambda_low"] == full["rho"]
    assert records["alignment"]["lambda_low"] == full["cos_alpha"]
    assert full["lambda_low"] > max(full["rho"], full["cos_alpha"])
    pairs = {name: (r["lambda_high"], r["lambda_low"]) for name, r in records.items()}
    assert pairs["uniform"] == (0.5, 0.5)
    assert (pairs["high"], pairs["low"]) == ((1.0, 0.0), (0.0, 1.0))
    high, low = (oracle.monosoup_update(dw, mixing=name)[0] for name in ("high", "low"))
    assert np.allclose(high + low, dw, atol=1e-13)


def test_a_stack_is_edited_matrix_by_matrix():
    w0, w1 = np.zeros((3, 8, 6)), np.stack([gaussian(8, 6, seed) for seed in range(3)])
    whole = oracle.monosoup_weight(w0, [w1])
    for expert in range(3):
        assert np.array_equal(whole[expert], oracle.monosoup_weight(w0[expert], [w1[expert]]))


def test_the_average_is_edited_not_the_edits_averaged():
    w0, w1, w2 = (gaussian(12, 9, seed) for seed in range(3))
    both = oracle.monosoup_weight(w0, [w1, w2], weights=[3.0, 1.0])
    assert np.allclose(both, oracle.monosoup_weight(w0, [0.75 * w1 + 0.25 * w2]), atol=1e-12)


def nearest_bfloat16(x: float) -> float:
    """By exact rational arithmetic over the two neighbours of x."""
    truncated = struct.unpack("<I", struct.pack("<f", x))[0] & 0xFFFF0000
    values = [
        struct.unpack("<f", struct.pack("<I", bits))[0]
        for bits in (truncated - 0x10000, truncated, truncated + 0x10000)
    ]
    even = {v: struct.unpack("<I", struct.pack("<f", v))[0] >> 16 & 1 for v in values}
    return min(values, key=lambda v: (abs(Fraction(v) - Fraction(x)), even[v]))


def test_rounding_is_exact_where_two_roundings_are_not():
    # Just above a tie of bfloat16, by less than float32 can hold.
    x = 1.0 + 2.0**-8 + 2.0**-40
    assert rounding.round_to(np.array([x]), torch.bfloat16)[0] == 1.0 + 2.0**-7
    assert torch.tensor(x, dtype=torch.float64).to(torch.float32).to(torch.bfloat16).item() == 1.0


def test_rounding_by_rational_arithmetic():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500)
    expected = np.array([nearest_bfloat16(float(v)) for v in x])
    assert np.array_equal(rounding.round_to(x, torch.bfloat16), expected)


def test_rounding_agrees_with_numpy_where_numpy_rounds_once():
    rng = np.random.default_rng(1)
    x = rng.standard_normal(20000) * 10.0 ** rng.integers(-12, 5, 20000)
    x = np.concatenate([x, [0.0, -0.0, 6e-8, 2.9e-8, 65519.0, 65521.0, -1e9]])
    with np.errstate(over="ignore"):
        half, single = x.astype(np.float16), x.astype(np.float32)
    assert np.array_equal(rounding.round_to(x, torch.float16), half.astype(np.float64))
    assert np.array_equal(rounding.round_to(x, torch.float32), single.astype(np.float64))


def test_spacing():
    x = np.array([1.0, 1.99, 2.0, 0.0])
    expected = [2.0**-7, 2.0**-7, 2.0**-6, 2.0**-133]
    assert np.array_equal(rounding.spacing(x, torch.bfloat16), expected)
    assert np.array_equal(rounding.spacing(x[:3], torch.float16), [2.0**-10, 2.0**-10, 2.0**-9])


def test_correct_rounding_is_told_from_a_miss():
    exact = np.random.default_rng(2).standard_normal((50, 50))
    good = torch.from_numpy(rounding.round_to(exact, torch.bfloat16)).to(torch.bfloat16)
    assert rounding.assert_correctly_rounded(good, exact, torch.bfloat16) == (2500, 2500)
    step = torch.from_numpy(rounding.spacing(exact, torch.bfloat16))
    one = good.clone()
    one[0, 0] += step[0, 0].to(torch.bfloat16)
    rounding.assert_correctly_rounded(one, exact, torch.bfloat16)
    two = good.clone()
    two[0, 0] += 4 * step[0, 0].to(torch.bfloat16)
    with pytest.raises(AssertionError, match="spacings"):
        rounding.assert_correctly_rounded(two, exact, torch.bfloat16)
    many = (good.double() + step * (torch.rand(50, 50) < 0.1)).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="not correctly rounded"):
        rounding.assert_correctly_rounded(many, exact, torch.bfloat16)


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-12])
def test_model_stock_two_thirds(size):
    """Updates at 60 degrees give t = 2 c / (1 + c) = 2/3, whatever their size."""
    a, b = np.array([1.0, 0.0]), np.array([0.5, 3**0.5 / 2])
    for angle in ("mean_angle", "mean_cosine"):
        assert model_stock_ratio([size * a, size * b], angle) == pytest.approx(2 / 3)


def test_model_stock_bounds_and_angles():
    a, opposite = np.array([1.0, 0.0]), np.array([-0.9, 0.19**0.5])
    assert model_stock_ratio([a, opposite]) == 0.0
    assert model_stock_ratio([a, opposite], bounded=False) == pytest.approx(-18)
    assert model_stock_ratio([a, a, a]) == pytest.approx(1.0)
    assert model_stock_ratio([a, 0 * a]) == pytest.approx(0.0, abs=1e-15)
    three = [gaussian(1, 6, seed)[0] + 2 for seed in range(3)]
    means = {angle: model_stock_ratio(three, angle) for angle in ("mean_angle", "mean_cosine")}
    assert means["mean_angle"] != means["mean_cosine"]
    w0 = np.zeros((2, 2))
    w1, w2 = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    rows = model_stock(w0, [w1, w2], filter_wise=True)
    assert np.allclose(rows, [[1.0, 0.0], [0.0, 0.0]])
    assert np.allclose(model_stock(w0, [w1, w1]), w1)


def test_sfgs_decides_once_for_the_whole_model():
    base = {"a": np.zeros((2, 2)), "b": np.zeros((2, 2)), "bias": np.zeros(2)}
    first = {"a": np.eye(2), "b": np.eye(2), "bias": np.ones(2)}
    near = {"a": np.array([[1.0, 0.2], [0, 1]]), "b": np.eye(2), "bias": -np.ones(2)}
    far = {"a": -np.eye(2), "b": np.eye(2), "bias": np.ones(2)}
    taken, averages = sfgs(base, [first, near, far], threshold=0.5)
    assert taken == [0, 1]
    assert averages[2] == pytest.approx(0.0, abs=0.05)
    assert sfgs(base, [first, near, far], threshold=0.5, scores=[0, 0, 1])[0][0] == 2
    assert np.allclose(soup_of(base, [first, near])["bias"], 0.0)


def test_baseline_formulas():
    w0, w1 = gaussian(3, 4), gaussian(3, 4, 1)
    assert np.allclose(wise_ft(w0, w1, 0.25), 0.75 * w0 + 0.25 * w1)
    assert np.allclose(uniform_soup([w0, w1]), (w0 + w1) / 2)
    assert [lines_factor(block, 3, 0.1, 0.9) for block in (None, 0, 1, 2)] == pytest.approx(
        [0.1, 0.1, 0.55, 1.0]
    )
