"""The bounds that let float32 through are bounds: measured against float64."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import spectra
import torch

from mergekit_monosoup.spectral.certify import (
    eigenvalue_tolerance,
    is_certain,
    singular_value_errors,
    subspace_is_certain,
)
from mergekit_monosoup.spectral.eigen import GramAccumulator
from mergekit_monosoup.spectral.split import effective_rank

EPS32 = torch.finfo(torch.float32).eps
# (kind, rows, columns). Low ranks are not among them: their drowned values never pass. Nor is a flat
# spectrum: all its eigenvalues are off by one common factor, which the entropy does not see.
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
    """Singular values from the Gram matrix, as the package forms it."""
    gram = GramAccumulator(dw.shape[1], dtype, dw.device)
    gram.add(dw.to(dtype))
    return gram.eigen(torch.ones(dw.shape[1], dtype=torch.bool)).values.flip(0).clamp(min=0).sqrt()


def exact_values(dw):
    return torch.from_numpy(np.linalg.svd(dw.double().numpy(), compute_uv=False))


def entropy_bound(values, errors):
    """Bound on the change of H = ln erank, term by term."""
    entropy = math.log(effective_rank(values))
    p = torch.maximum(values, errors) / values.sum()
    return float((errors * (p.log() + entropy).abs()).sum() / values.sum())


@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_effect_on_the_effective_rank_is_a_tenth_of_the_bound(kind, rows, columns, seed):
    dw = spectra.update(kind, rows, columns, seed)
    found, exact = gram_values(dw), exact_values(dw)
    errors = singular_value_errors(found, eigenvalue_tolerance(float(found[0]) ** 2, torch.float32))
    moved = abs(math.log(effective_rank(found)) - math.log(effective_rank(exact)))
    assert moved <= 0.1 * entropy_bound(found, errors)


@pytest.mark.parametrize(("kind", "rows", "columns"), MEASURED)
def test_single_eigenvalues_are_off_by_a_few_units(kind, rows, columns):
    dw = spectra.update(kind, rows, columns)
    found, exact = gram_values(dw).square(), exact_values(dw).square()
    assert float((found - exact).abs().max() / exact[0]) <= 6 * EPS32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tolerance_scales_with_the_largest_eigenvalue(dtype):
    tau = eigenvalue_tolerance(1.0, dtype)
    assert tau == pytest.approx(2 * torch.finfo(dtype).eps)
    assert eigenvalue_tolerance(1e20, dtype) == pytest.approx(1e20 * tau)


@pytest.mark.parametrize("tau", [1e-7, 1e-3, 0.5])
def test_errors_of_roots_are_bounds(tau):
    values = torch.tensor([1.0, 0.7, 0.1, 1e-2, 1e-4, 0.0], dtype=torch.float64)
    bounds = singular_value_errors(values, tau)
    for sign in (-1, 1):
        moved = (values.square() + sign * tau).clamp(min=0).sqrt()
        # A root that falls to zero falls by itself, not by more.
        allowed = torch.maximum(bounds, values) if sign < 0 else bounds
        assert ((moved - values).abs() <= allowed * (1 + 1e-12)).all()
    assert not singular_value_errors(values, 0.0).any()


def spectrum(kind, count=200):
    return torch.from_numpy(spectra.singular_values(kind, count))


@pytest.mark.parametrize("kind", ["1/i", "i^-1/2", "linear"])
@pytest.mark.parametrize("energy", [None, 0.5, 0.8, 0.95])
def test_certain_means_that_no_perturbation_changes_the_split(kind, energy):
    """Wherever the verdict is yes, random spectra within the errors agree in k and lambda_low."""
    values, rng = spectrum(kind), np.random.default_rng(0)
    verdicts = set()
    for unit in (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        errors = singular_value_errors(values, unit)
        certain = is_certain(values, errors, energy)
        verdicts.add(certain)
        if not certain:
            continue
        reference = coefficients(values.numpy(), energy)
        for trial in range(20):
            signs = rng.uniform(-1, 1, len(values)) if trial > 1 else np.full(len(values), 1.0 - 2 * trial)
            moved = np.sort(np.abs(values.numpy() + errors.numpy() * signs))[::-1]
            k, lambda_low = coefficients(moved, energy)
            assert k == reference[0]
            assert lambda_low == pytest.approx(reference[1], abs=1e-4)
    assert verdicts == {True, False}


def coefficients(s, energy):
    """k and lambda_low of a spectrum, by the float64 reference."""
    _, values = oracle.monosoup_update(np.diag(s), energy)
    return values["k"], values["lambda_low"]


def test_ties_of_the_rule_are_not_certain():
    four = torch.cat([torch.ones(4), torch.zeros(60)]).double()
    exact, doubtful = torch.zeros(64).double(), torch.full((64,), 1e-9).double()
    assert is_certain(four, exact, None)
    assert not is_certain(four, doubtful, None)
    # Half the energy sits exactly at k = 2.
    assert not is_certain(four, doubtful, 0.5)
    assert is_certain(four, doubtful, 0.6)


def test_a_drowned_tail_is_not_certain():
    values = spectrum("low rank + noise")
    errors = singular_value_errors(values, eigenvalue_tolerance(1.0, torch.float32))
    assert not is_certain(values, errors, None)
    values = spectrum("linear")
    errors = singular_value_errors(values, eigenvalue_tolerance(1.0, torch.float32))
    assert is_certain(values, errors, None)


def test_subspaces_need_a_gap():
    values = spectrum("linear")
    assert subspace_is_certain(values, 100, torch.float32)
    values[100] = values[99] * (1 - 1e-7)
    assert not subspace_is_certain(values, 100, torch.float32)
    assert subspace_is_certain(values, 100, torch.float64)
    values[100] = values[99]
    assert not subspace_is_certain(values, 100, torch.float64)
    # Without a low side there is nothing to separate.
    assert subspace_is_certain(values, len(values), torch.float32)
