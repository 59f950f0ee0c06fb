"""The Donoho-Gavish split: the literature, an independent reference, figures of DG-Hard's own code."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import spectra
import test_certify as certify
import torch

from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors
from mergekit_monosoup.spectral import EditOptions, Split, edit_update, edit_weight
from mergekit_monosoup.spectral.analysis import analyse_update
from mergekit_monosoup.spectral.certify import Doubt, is_certain
from mergekit_monosoup.spectral.threshold import NoiseThreshold, marchenko_pastur_median, omega

DG = Split("donoho_gavish")
SHAPES = [(257, 257), (300, 270), (270, 300), (90, 60), (640, 520), (520, 640), (1, 40), (40, 1), (2, 3)]


@pytest.mark.parametrize(
    ("beta", "coefficient"), [(0.05, 1.5194), (0.1, 1.6089), (0.25, 1.8371), (0.5, 2.1711), (1.0, 2.8582)]
)
def test_coefficients_for_unknown_noise_are_those_that_gavish_and_donoho_print(beta, coefficient):
    """Their Table IV: omega(beta) / sqrt(mu_beta), in our notation over the root itself."""
    assert omega(beta) / marchenko_pastur_median(beta) == pytest.approx(coefficient, abs=3e-4)


def test_square_matrices_have_the_threshold_of_the_title():
    assert omega(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-15)


@pytest.mark.parametrize("beta", [1e-4, 0.01, 0.3, 0.75, 0.999, 1.0])
def test_the_median_of_pure_noise_has_half_of_the_law_below_it(beta):
    assert marchenko_pastur_median(beta) == pytest.approx(oracle.median_of_pure_noise(beta), abs=1e-9)


# sigma, tau and k by the published code (BrickleRex/dghard, commit a90ba14) for both of its estimates. It
# finds the median of the Marchenko-Pastur law on a grid: 0.80973 for square matrices where 0.80795 is right.
PUBLISHED = [
    ("1/i", 511, 511, 0.0048241, 0.0111409, 89, 0.0033318, 0.0076944, 129),
    ("1/i", 255, 1023, 0.0081617, 0.0143424, 69, 0.0066628, 0.0117084, 85),
    ("1/i", 1001, 301, 0.0069854, 0.0126301, 79, 0.0056541, 0.0102229, 97),
    ("i^-1/2", 511, 511, 0.0771862, 0.1782538, 31, 0.0702228, 0.1621725, 38),
    ("i^-1/2", 255, 1023, 0.0923395, 0.1622662, 37, 0.0993060, 0.1745083, 32),
    ("i^-1/2", 1001, 301, 0.0858384, 0.1552009, 41, 0.0914786, 0.1653988, 36),
    ("linear", 511, 511, 0.6792382, 1.5686333, 0, 0.3130859, 0.7230410, 157),
    ("linear", 255, 1023, 0.5745861, 1.0097082, 0, 0.3111083, 0.5467041, 128),
    ("spiked", 511, 511, 0.8027360, 1.8538393, 5, 0.5729735, 1.3232256, 5),
    ("spiked", 1001, 301, 0.6856198, 1.2396412, 5, 0.5727699, 1.0356019, 5),
]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: f"{c[0]} {c[1]}x{c[2]}")
def test_figures_of_the_published_code(case):
    kind, rows, columns, *published = case
    values = torch.from_numpy(spectra.singular_values(kind, min(rows, columns)))
    for estimate, (noise, tau, k) in zip(
        ("median", "lower_quarter"), (published[:3], published[3:]), strict=True
    ):
        threshold = NoiseThreshold(rows, columns, estimate=estimate)
        assert threshold.noise(values) == pytest.approx(noise, rel=3e-3)
        assert threshold.threshold(values) == pytest.approx(tau, rel=3e-3)
        assert threshold.index(values) == k


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two():
    values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    mu = marchenko_pastur_median(1.0)
    assert NoiseThreshold(4, 4).noise(values) == pytest.approx(3 / mu)
    # All r count, those that are not listed as zeros.
    assert NoiseThreshold(4, 4).noise(values[:3]) == pytest.approx(3 / mu)
    assert NoiseThreshold(4, 4).noise(values[:2]) == pytest.approx(2 / mu)
    assert NoiseThreshold(4, 4).noise(values[:1]) == 0


def assert_agrees(dw, options=None, mixing="high", **how):
    options = options or {}
    split = Split(
        "donoho_gavish", threshold_scale=options.get("scale", 1.0), noise=options.get("noise", "median")
    )
    edited, record = edit_update(dw, split=split, mixing=mixing, **how)
    expected, found = oracle.monosoup_update(dw.double().numpy(), mixing=mixing, threshold=options)
    assert record.k == found["k"]
    # sigma of nothing but rounding is known to the digits that float64 leaves of it.
    scale = float(np.linalg.norm(dw.double().numpy(), 2))
    for name in ("noise", "threshold"):
        assert getattr(record, name) == pytest.approx(found[name], rel=1e-4, abs=1e-12 * scale), name
    for name in ("rho", "cos_alpha", "lambda_low", "lambda_high"):
        assert getattr(record, name) == pytest.approx(found[name], abs=2e-5), name
    assert spectra.error(edited, expected, dw) <= 5e-5
    return record


@pytest.mark.parametrize("kind", spectra.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_float64_svd(kind, shape):
    assert_agrees(spectra.update(kind, *shape))


@pytest.mark.parametrize("kind", ["gauss", "1/i", "spiked", "i^-1/2", "low rank + noise"])
@pytest.mark.parametrize("options", [{"scale": 0.6}, {"scale": 3.0}, {"noise": "lower_quarter"}], ids=str)
def test_scale_and_the_other_estimate(kind, options):
    assert_agrees(spectra.update(kind, 320, 300), options)


@pytest.mark.parametrize("kind", ["1/i", "spiked", "gauss", "low rank"])
@pytest.mark.parametrize("mixing", ["monosoup", "decay", "uniform", "low"])
def test_any_mixing_on_this_split(kind, mixing):
    assert_agrees(spectra.update(kind, 300, 280), mixing=mixing)


@pytest.mark.parametrize("spectrum", ["gram", "svd"])
@pytest.mark.parametrize("kind", ["gauss", "1/i", "spiked", "linear"])
def test_named_backends(kind, spectrum):
    assert_agrees(spectra.update(kind, 300, 270), spectrum=spectrum)


@pytest.mark.parametrize("kind", ["gauss", "1/i", "spiked", "low rank"])
def test_float64_updates(kind):
    assert_agrees(spectra.update(kind, 120, 90, dtype=torch.float64))


@pytest.mark.parametrize("size", [(64, 48), (300, 280), (700, 640)])
def test_a_rank_that_is_low_to_the_last_digit_keeps_everything(size):
    """No noise, no threshold: the median is zero and all directions stay."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-3, 4, (size[0], 5), generator=generator).float()
    right = torch.randint(-3, 4, (5, size[1]), generator=generator).float()
    dw = left @ right
    record = assert_agrees(dw)
    assert record.k == 5
    assert record.noise == record.threshold == 0
    assert torch.allclose(edit_update(dw, split=DG, mixing="high")[0], dw, atol=1e-5)


def test_columns_that_were_not_touched_count_as_directions_without_signal():
    dw = spectra.update("gauss", 300, 280).clone()
    dw[:, :150] = 0
    assert assert_agrees(dw).k == 130  # less than half of 280: the median is zero
    dw = spectra.update("gauss", 300, 280).clone()
    dw[:, :100] = 0
    assert_agrees(dw)
    # The same for rows, which are left out before anything is formed.
    dw = spectra.update("gauss", 600, 280).clone()
    dw[200:] = 0
    assert_agrees(dw)


def test_rounding_noise_of_a_low_rank_update_is_measured_and_not_bounded():
    """The factor's singular values and those of what is left of it, which are a million times smaller."""
    for kind, (rows, columns) in (("low rank", (640, 520)), ("low rank + noise", (520, 640))):
        record = assert_agrees(spectra.update(kind, rows, columns))
        assert record.matrices[0].backend == "factor"
        assert record.noise > 0
    # Noise of equal level is all below the threshold; rounding, finer where entries are small, is not.
    assert record.k == spectra.RANK


def test_pure_noise_goes_and_with_the_other_mixing_stays():
    dw = spectra.update("gauss", 300, 280)
    edited, record = edit_update(dw, split=DG, mixing="high")
    assert record.k == 0
    assert not edited.any()
    edited, record = edit_update(dw, split=DG)
    assert (record.k, record.rho, record.cos_alpha, record.lambda_low) == (0, 1.0, 1.0, 1.0)
    assert torch.equal(edited, dw)
    w0 = torch.randn(300, 280)
    assert torch.equal(edit_weight(w0, [w0 + dw], options=EditOptions(DG, "high"))[0], w0)


@pytest.mark.parametrize("side", [24, 200])
def test_each_expert_of_a_stack_has_its_own_noise(side):
    dw = torch.stack(
        [spectra.update(kind, side, side - 8) for kind in ("gauss", "1/i", "spiked", "low rank")]
    )
    edited, record = edit_update(dw, split=DG, mixing="high")
    for one, matrix, found in zip(dw, edited, record.matrices, strict=True):
        expected, values = oracle.monosoup_update(one.double().numpy(), mixing="high", threshold={})
        assert found.k == values["k"]
        assert found.noise == pytest.approx(values["noise"], rel=1e-4, abs=1e-12)
        assert spectra.error(matrix, expected, one) <= 5e-5


@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 40, 8), (40, 30, 20), (12, 10, 16)])
def test_factors_count_the_directions_that_they_do_not_have(rows, columns, rank):
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(1, rows, rank, generator=generator)
    right = torch.randn(1, rank, columns, generator=generator)
    update = LowRankUpdate(left, right, 0.5, (rows, columns))
    edited, record = edit_factors(update, split=DG, mixing="high")
    dw = update.materialise(torch.float64)
    expected, values = oracle.monosoup_update(dw.numpy(), mixing="high", threshold={})
    assert record.k == values["k"]
    assert record.noise == pytest.approx(values["noise"], rel=1e-6, abs=1e-12)
    assert np.abs(edited.materialise(torch.float64).numpy() - expected).max() <= 1e-6 * float(dw.abs().max())
    if rank < min(rows, columns) / 2:
        assert record.k == rank


@pytest.mark.parametrize("kind", spectra.KINDS)
def test_the_analysis_finds_what_the_edit_finds(kind):
    dw = spectra.update(kind, 300, 280)
    found = analyse_update(dw, [0.8], split=DG, mixing="high")
    _, expected = edit_update(dw, split=DG, mixing="high")
    assert found.record.k == expected.k
    assert found.record.noise == pytest.approx(expected.noise, rel=1e-4, abs=1e-12)
    assert found.record.lambda_high == 1
    assert found.fixed[0.8].k == edit_update(dw, energy=0.8)[1].k


@pytest.mark.parametrize("reduced", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("make", "kind", "rows", "columns"),
    [(spectra.update, kind, *shape) for kind, *shape in certify.MEASURED]
    + [(certify.wide, kind, 700, 512) for kind in certify.WIDE],
)
def test_no_single_value_is_off_by_more_than_is_allowed_for(make, kind, rows, columns, reduced):
    dw = make(kind, rows, columns, 0)
    found, doubt = certify.gram_values(dw, reduced=reduced)
    off = (found - certify.exact_values(dw)).abs()
    assert (off <= 0.7 * (doubt.shift + 8 * doubt.spread + doubt.relative * found)).all()


@pytest.mark.parametrize("kind", ["1/i", "i^-1/2", "linear", "spiked"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.6}, {"noise": "lower_quarter"}], ids=str)
def test_certain_means_that_no_perturbation_changes_k(kind, options):
    values, rng = torch.from_numpy(spectra.singular_values(kind, 201)), np.random.default_rng(0)
    split = Split("donoho_gavish", None, options.get("scale", 1.0), options.get("noise", "median"))
    verdicts = set()
    for unit in (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        errors = unit / values.clamp(min=math.sqrt(unit))
        doubt = Doubt(errors, torch.zeros_like(values))
        certain = is_certain(values, doubt, split, (201, 201))
        verdicts.add(certain)
        for trial in range(20 if certain else 0):
            moves = rng.uniform(-1, 1, 201) if trial > 1 else np.full(201, 1.0 - 2 * trial)
            moved = np.sort(np.abs(values.numpy() + errors.numpy() * moves))[::-1]
            assert oracle.noise_threshold(moved, (201, 201), **options)[2] == split.index(values, (201, 201))
    assert True in verdicts
    assert False in verdicts or kind == "linear"


def test_a_value_at_the_threshold_is_in_doubt():
    values = torch.from_numpy(spectra.singular_values("spiked", 201))
    tau = NoiseThreshold(201, 201).threshold(values)
    values[4] = tau * (1 + 1e-7)
    for unit, certain in ((1e-9, True), (1e-6, False)):
        doubt = Doubt(values * unit, torch.zeros_like(values))
        assert is_certain(values, doubt, DG, (201, 201)) is certain


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "donoho_gavish", "energy": 0.5}, "energy is 0.5 and split is donoho_gavish"),
        ({"name": "effective_rank", "energy": 0.5}, "split is effective_rank"),
        ({"threshold_scale": 2.0}, "belongs to `split: donoho_gavish`"),
        ({"name": "donoho_gavish", "threshold_scale": 0.0}, "above 0"),
        ({"energy": 1.5}, r"in \(0, 1\]"),
    ],
)
def test_contradictions_are_refused_in_a_sentence(arguments, words):
    with pytest.raises(ParameterError, match=words):
        Split(**arguments)


def test_energy_alone_is_that_rule_and_the_rule_alone_the_papers_value():
    assert Split(energy=0.5) == Split("energy", 0.5)
    assert Split("energy").energy == 0.8
    assert Split().title == "effective rank"
    assert Split("donoho_gavish", threshold_scale=2.0).title == "Donoho-Gavish threshold times 2"
