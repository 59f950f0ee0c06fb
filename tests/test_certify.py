"""The bounds that let float32 through are bounds: measured against float64."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import spectra
import torch

from mergekit_monosoup.spectral.certify import (
    Doubt,
    gram_doubt,
    is_certain,
    product_error,
    subspace_is_certain,
)
from mergekit_monosoup.spectral.eigen import decomposed
from mergekit_monosoup.spectral.mixing import mixing_coefficients
from mergekit_monosoup.spectral.products import GramSum
from mergekit_monosoup.spectral.split import effective_rank, split_index

MEASURED = [
    ("gauss", 512, 512),
    ("gauss", 1024, 512),
    ("gauss", 700, 640),
    ("i^-1/2", 512, 512),
    ("1/i", 512, 512),
    ("spiked", 700, 512),
    ("linear", 512, 512),
]


def gram_values(dw, dtype=torch.float32):
    """Singular values and squared column norms from the Gram matrix, as the package forms it."""
    gram = GramSum(dw.shape[1], dtype, dw.device)
    gram.add(dw.to(dtype))
    diagonal = gram.diagonal()
    eigen = decomposed(gram.take())
    return eigen.values.flip(0).clamp(min=0).sqrt(), diagonal


def exact_values(dw):
    return torch.from_numpy(np.linalg.svd(dw.double().numpy(), compute_uv=False))


def entropy_change(values, doubt):
    """What the common shift and one spread of independent errors change in H = ln erank."""
    p = torch.maximum(values, doubt.shift + doubt.spread) / values.sum()
    slope = (p.log() + math.log(effective_rank(values))) / values.sum()
    return float((slope * doubt.shift).abs().sum()), float((slope * doubt.spread).square().sum().sqrt())


@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_effect_on_the_effective_rank_is_a_fraction_of_the_bound(kind, rows, columns, seed):
    dw = spectra.update(kind, rows, columns, seed)
    found, diagonal = gram_values(dw)
    shift, spread = entropy_change(found, gram_doubt(found, diagonal, product_error(torch.float32)))
    moved = abs(math.log(effective_rank(found)) - math.log(effective_rank(exact_values(dw))))
    assert moved <= spread
    assert moved <= 0.2 * (shift + 8 * spread)


@pytest.mark.parametrize("kind", ["low rank", "low rank + noise"])
@pytest.mark.parametrize("size", [300, 512])
def test_drowned_values_stay_within_the_bound(kind, size):
    dw = spectra.update(kind, size, size)
    found, diagonal = gram_values(dw)
    shift, spread = entropy_change(found, gram_doubt(found, diagonal, product_error(torch.float32)))
    moved = abs(math.log(effective_rank(found)) - math.log(effective_rank(exact_values(dw))))
    assert moved <= shift + 8 * spread


@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
def test_lambda_low_is_right_where_it_is_certain(kind, rows, columns):
    dw = spectra.update(kind, rows, columns)
    (found, diagonal), exact = gram_values(dw), exact_values(dw)
    for energy in (None, 0.5, 0.8, 0.95):
        if not is_certain(found, gram_doubt(found, diagonal, product_error(torch.float32)), energy):
            continue
        k = split_index(exact, energy)
        assert split_index(found, energy) == k
        if k < len(exact):
            lows = [mixing_coefficients(s, k, "monosoup").lambda_low for s in (found, exact)]
            assert lows[0] == pytest.approx(lows[1], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_doubt_has_the_units_of_the_values(dtype):
    values, diagonal = spectrum("linear"), torch.linspace(0.5, 1.5, 200, dtype=torch.float64)
    one = gram_doubt(values, diagonal, product_error(dtype))
    scaled = gram_doubt(1e10 * values, 1e20 * diagonal, product_error(dtype))
    assert torch.allclose(scaled.spread, 1e10 * one.spread, rtol=1e-12)
    assert torch.allclose(scaled.shift, 1e10 * one.shift, rtol=1e-12)
    assert float(one.spread[0]) == pytest.approx(1.5 * torch.finfo(dtype).eps, rel=1e-6)


def spectrum(kind, count=200):
    return torch.from_numpy(spectra.singular_values(kind, count))


def bounded(values, errors):
    """Doubt that is all of one sign at worst: bounds, not spreads."""
    return Doubt(errors, torch.zeros_like(values))


@pytest.mark.parametrize("kind", ["1/i", "i^-1/2", "linear"])
@pytest.mark.parametrize("energy", [None, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("nature", ["shift", "spread"])
def test_certain_means_that_no_perturbation_changes_the_split(kind, energy, nature):
    """Wherever the verdict is yes, random spectra within the errors agree in k and lambda_low."""
    values, rng = spectrum(kind), np.random.default_rng(0)
    verdicts = set()
    for unit in (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        errors = unit / values.clamp(min=math.sqrt(unit))
        none = torch.zeros_like(values)
        doubt = Doubt(errors, none) if nature == "shift" else Doubt(none, errors)
        certain = is_certain(values, doubt, energy)
        verdicts.add(certain)
        if not certain:
            continue
        reference = coefficients(values.numpy(), energy)
        for trial in range(20):
            if nature == "spread":
                moves = rng.standard_normal(len(values))
            else:
                moves = (
                    np.full(len(values), 1.0 - 2 * trial) if trial < 2 else rng.uniform(-1, 1, len(values))
                )
            moved = np.sort(np.abs(values.numpy() + errors.numpy() * moves))[::-1]
            k, lambda_low = coefficients(moved, energy)
            assert k == reference[0]
            assert lambda_low == pytest.approx(reference[1], abs=1e-4)
    assert verdicts == {True, False}


def coefficients(s, energy):
    """k and lambda_low of a spectrum, by the float64 reference's formulas."""
    k = oracle.split_index(s, (len(s), len(s)), energy)
    rho = (s[k] / s[0]) ** 2 if k < len(s) else 0.0
    return k, rho + (1 - rho) * math.sqrt((s[k:] ** 2).sum() / (s**2).sum())


def test_ties_of_the_rule_are_not_certain():
    four = torch.cat([torch.ones(4), torch.zeros(60)]).double()
    exact, doubtful = torch.zeros(64).double(), torch.full((64,), 1e-9).double()
    assert is_certain(four, bounded(four, exact), None)
    assert not is_certain(four, bounded(four, doubtful), None)
    # Half the energy sits exactly at k = 2.
    assert not is_certain(four, bounded(four, doubtful), 0.5)
    assert is_certain(four, bounded(four, doubtful), 0.6)


def test_a_drowned_tail_that_decides_is_not_certain():
    """One direction and a tail of 1e-5: whether it is there decides between k = 1 and k = 2."""
    for values, expected in ((torch.full((200,), 1e-5).double(), False), (spectrum("linear"), True)):
        values[0] = 1.0
        diagonal = torch.ones(200).double() * values.square().mean()
        assert (
            is_certain(values, gram_doubt(values, diagonal, product_error(torch.float32)), None) is expected
        )


def test_subspaces_need_a_gap():
    values = spectrum("linear")
    diagonal = torch.ones(200).double() * values.square().mean()
    assert subspace_is_certain(values, diagonal, product_error(torch.float32), 100)
    values[100] = values[99] * (1 - 1e-7)
    assert not subspace_is_certain(values, diagonal, product_error(torch.float32), 100)
    assert subspace_is_certain(values, diagonal, product_error(torch.float64), 100)
    values[100] = values[99]
    assert not subspace_is_certain(values, diagonal, product_error(torch.float64), 100)
    # Without a low side there is nothing to separate.
    assert subspace_is_certain(values, diagonal, product_error(torch.float32), len(values))


@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
def test_the_subspace_error_is_below_what_is_estimated(kind, rows, columns):
    """Where the verdict is yes, the largest entry of the error stays below 5e-5 of max|dW|."""
    dw = spectra.update(kind, rows, columns)
    exact = dw.double()
    _, s, right = torch.linalg.svd(exact, full_matrices=False)
    for energy in (None, 0.5, 0.9, 0.99):
        gram = GramSum(columns, torch.float32, dw.device)
        gram.add(dw)
        diagonal = gram.diagonal()
        eigen = decomposed(gram.take())
        k = split_index(s, energy)
        if not subspace_is_certain(
            eigen.values.flip(0).clamp(min=0).sqrt(), diagonal, product_error(torch.float32), k
        ):
            continue
        basis = eigen.vectors(columns - k, columns).double()
        error = (exact @ basis) @ basis.T - (exact @ right[:k].T) @ right[:k]
        assert float(error.abs().max()) <= 5e-5 * float(exact.abs().max())
