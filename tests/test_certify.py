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
    reduction_error,
    subspace_error,
    subspace_tolerance,
)
from mergekit_monosoup.spectral.eigen import decomposed
from mergekit_monosoup.spectral.mixing import mixing_coefficients
from mergekit_monosoup.spectral.products import GramSum
from mergekit_monosoup.spectral.split import Split, effective_rank, split_index
from mergekit_monosoup.spectral.update import MatrixUpdate

MEASURED = [
    ("gauss", 512, 512),
    ("gauss", 1024, 512),
    ("gauss", 700, 640),
    ("i^-1/2", 512, 512),
    ("1/i", 512, 512),
    ("spiked", 700, 512),
    ("linear", 512, 512),
]


def wide(kind, rows, columns, seed):
    """Updates whose entries are far from independent normal ones."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    other = torch.randn(rows, columns, generator=generator)
    return {
        "common part": normal + 100,
        "graded rows": normal * torch.logspace(0, -4, rows)[:, None],
        "graded columns": normal * torch.logspace(0, -4, columns),
        "heavy tails": normal / other.abs().clamp(min=1e-3),
        "sparse": normal * (other > 2),
        "positive": normal.abs(),
        "stored in bf16": (0.02 * other + 1e-4 * normal).bfloat16().float()
        - (0.02 * other).bfloat16().float(),
    }[kind]


WIDE = ["common part", "graded rows", "graded columns", "heavy tails", "sparse", "positive", "stored in bf16"]


def gram_values(dw, dtype=torch.float32, reduced=torch.float64):
    """Singular values and their doubt from the Gram matrix, as the package forms it."""
    gram = GramSum(dw.shape[1], dtype, dw.device)
    gram.add([dw.to(dtype)])
    diagonal = gram.diagonal()
    eigen = decomposed(gram.take(reduced))
    values = eigen.values.flip(0).clamp(min=0).sqrt()
    reduction = reduction_error(values, diagonal, reduced)
    return values, gram_doubt(values, diagonal, product_error(dtype), reduction)


def decides(values, doubt, energy):
    return is_certain(values, doubt, Split(energy=energy), (len(values), len(values)))


def exact_values(dw):
    return torch.from_numpy(np.linalg.svd(dw.double().numpy(), compute_uv=False))


def entropy_change(values, doubt):
    """What the common shift and one spread of independent errors change in H = ln erank."""
    p = torch.maximum(values, doubt.shift + doubt.spread) / values.sum()
    slope = (p.log() + math.log(effective_rank(values))) / values.sum()
    return float((slope * doubt.shift).abs().sum()), float((slope * doubt.spread).square().sum().sqrt())


def share_of_the_bound(dw, reduced):
    """What rounding moved ln erank by, over what is allowed for."""
    found, doubt = gram_values(dw, reduced=reduced)
    shift, spread = entropy_change(found, doubt)
    moved = abs(math.log(effective_rank(found)) - math.log(effective_rank(exact_values(dw))))
    return moved / (shift + 2 * spread)


@pytest.mark.parametrize("reduced", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_effect_on_the_effective_rank_is_a_fraction_of_the_bound(kind, rows, columns, seed, reduced):
    assert share_of_the_bound(spectra.update(kind, rows, columns, seed), reduced) <= 0.2


@pytest.mark.parametrize("reduced", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", WIDE)
def test_the_same_for_entries_of_other_distributions(kind, reduced):
    for seed, (rows, columns) in enumerate([(512, 512), (1024, 512), (400, 300)]):
        share = share_of_the_bound(wide(kind, rows, columns, seed), reduced)
        assert share <= (0.5 if kind == "common part" else 0.25)


@pytest.mark.parametrize("reduced", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["low rank", "low rank + noise"])
@pytest.mark.parametrize("size", [300, 512])
def test_drowned_values_stay_within_the_bound(kind, size, reduced):
    assert share_of_the_bound(spectra.update(kind, size, size), reduced) <= 0.3


@pytest.mark.parametrize("reduced", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
def test_lambda_low_is_right_where_it_is_certain(kind, rows, columns, reduced):
    dw = spectra.update(kind, rows, columns)
    (found, doubt), exact = gram_values(dw, reduced=reduced), exact_values(dw)
    for energy in (None, 0.5, 0.8, 0.95):
        if not decides(found, doubt, energy):
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
        certain = decides(values, doubt, energy)
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
    assert decides(four, bounded(four, exact), None)
    assert not decides(four, bounded(four, doubtful), None)
    # Half the energy sits exactly at k = 2.
    assert not decides(four, bounded(four, doubtful), 0.5)
    assert decides(four, bounded(four, doubtful), 0.6)


def test_a_drowned_tail_that_decides_is_not_certain():
    """One direction and a tail of 1e-5: whether it is there decides between k = 1 and k = 2."""
    for values, expected in ((torch.full((200,), 1e-5).double(), False), (spectrum("linear"), True)):
        values[0] = 1.0
        diagonal = torch.ones(200).double() * values.square().mean()
        assert decides(values, gram_doubt(values, diagonal, product_error(torch.float32)), None) is expected


def subspace_is_certain(values, diagonal, error, k, reduction=0.0, hidden=0.0, refined=0):
    return subspace_error(values, diagonal, error, k, reduction, refined) <= subspace_tolerance(hidden)


def test_subspaces_need_a_gap():
    values = spectrum("linear")
    diagonal = torch.ones(200).double() * values.square().mean()
    assert subspace_is_certain(values, diagonal, product_error(torch.float32), 100)
    values[100] = values[99] * (1 - 1e-7)
    assert not subspace_is_certain(values, diagonal, product_error(torch.float32), 100)
    assert subspace_is_certain(values, diagonal, product_error(torch.float64), 100)
    values[100] = values[99]
    assert not subspace_is_certain(values, diagonal, product_error(torch.float64), 100)
    # Neighbours of the split that float64 tells apart afterwards: all but equal ones.
    assert not subspace_is_certain(values, diagonal, product_error(torch.float32), 100, refined=8)
    values[100] = values[99] * (1 - 1e-7)
    assert subspace_is_certain(values, diagonal, product_error(torch.float32), 100, refined=8)
    assert not subspace_is_certain(values, diagonal, 1e3 * product_error(torch.float32), 100, refined=8)
    # More equal values than are refined.
    values[90:120] = values[90]
    assert not subspace_is_certain(values, diagonal, product_error(torch.float32), 100, refined=8)
    assert not subspace_is_certain(values, diagonal, product_error(torch.float32), 100, refined=200)
    # Without a low side there is nothing to separate.
    assert subspace_is_certain(values, diagonal, product_error(torch.float32), len(values))


@pytest.mark.parametrize("reduced", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
def test_the_subspace_error_is_below_what_is_estimated(kind, rows, columns, reduced):
    """Where the verdict is yes, the largest entry of the error stays below 5e-5 of max|dW|.

    Below a third of the tolerance in the norm, that is, also where coarse rounding hides more.
    """
    dw = spectra.update(kind, rows, columns)
    exact = dw.double()
    _, s, right = torch.linalg.svd(exact, full_matrices=False)
    for energy in (None, 0.5, 0.9, 0.99):
        gram = GramSum(columns, torch.float32, dw.device)
        gram.add([dw])
        diagonal = gram.diagonal()
        # Only flat spectra are reduced in float32 where the result is kept in it.
        kept = reduced == torch.float64 or gram.participation() > 0.1
        eigen = decomposed(gram.take(reduced))
        values = eigen.values.flip(0).clamp(min=0).sqrt()
        k = split_index(s, energy)
        basis = eigen.vectors(columns - k, columns).double()
        error = (exact @ basis) @ basis.T - (exact @ right[:k].T) @ right[:k]
        reduction = reduction_error(values, diagonal, reduced)
        for hidden in (0.0, 0.1, 1.0):
            if subspace_is_certain(values, diagonal, product_error(torch.float32), k, reduction, hidden):
                assert float(error.norm() / exact.norm()) <= subspace_tolerance(hidden) / 3
                if hidden == 0 and kept:
                    assert float(error.abs().max()) <= 5e-5 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 1e-3), (torch.bfloat16, 0.01), (torch.float16, 1e-3)]
)
def test_what_the_tolerance_lets_through_is_hidden_by_rounding(dtype, share):
    """An error as large as the tolerance allows changes one entry in a thousand of the rounded weight."""
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(600, 500, generator=generator, dtype=torch.float64)

    w0 = (0.02 * normal()).to(dtype)
    w1 = (w0.double() + share * 0.02 * normal()).to(dtype)
    dw = w1.double() - w0.double()
    norm = float(dw.norm())
    hidden = MatrixUpdate(w0, [w1]).hidden_by_rounding(norm)
    assert hidden == pytest.approx(torch.finfo(dtype).eps * float(w0.double().norm()) / norm, rel=0.1)
    tolerance = subspace_tolerance(hidden)
    assert tolerance > subspace_tolerance(0)
    # The error itself is a ninth of the estimate that is compared with the tolerance.
    error = normal() * tolerance / 9 * share * 0.02
    value = w0.double() + 0.6 * dw + 0.05 * share * 0.02 * normal()
    assert float((value.to(dtype) != (value + error).to(dtype)).double().mean()) <= 1e-3


def test_nothing_is_hidden_in_float32():
    w = torch.randn(300, 300)
    assert MatrixUpdate(w, [w + 1]).hidden_by_rounding(1.0) == 0
    assert MatrixUpdate(None, [w.bfloat16()]).hidden_by_rounding(1.0) == 0
