"""The edit of low-rank updates against the oracle's edit of the same update, materialised."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import MIXINGS, monosoup_update

from mergekit_monosoup.errors import NonFiniteError, ParameterError, ShapeMismatchError
from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors, mean_of, rank_for, truncate
from mergekit_monosoup.spectral import Split


def random_update(
    rows: int, columns: int, rank: int, *, decay: float = 2.0, seed: int = 0, scaling: float = 1.5
) -> LowRankUpdate:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(1, rows, rank, generator=generator) * torch.logspace(0, -decay, rank)
    right = torch.randn(1, rank, columns, generator=generator)
    return LowRankUpdate(left, right, scaling, (rows, columns))


def exact(update: LowRankUpdate) -> np.ndarray:
    return update.materialise(torch.float64).numpy()


@pytest.mark.parametrize("energy", [None, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(60, 40, 8), (33, 90, 16), (10, 12, 16), (7, 5, 1)])
def test_equals_the_edit_of_the_materialised_update(rows, columns, rank, mixing, energy):
    update = random_update(rows, columns, rank)
    edited, record = edit_factors(update, split=Split(energy=energy), mixing=mixing)
    want, info = monosoup_update(exact(update), energy, mixing)
    assert np.abs(exact(edited) - want).max() <= 1e-6 * np.abs(exact(update)).max()
    assert record.k == info["k"]
    assert record.lambda_low == pytest.approx(info["lambda_low"], abs=1e-7)
    assert record.effective_rank == pytest.approx(info["effective_rank"], rel=1e-6)
    assert torch.equal(edited.right, update.right)
    assert edited.scaling == update.scaling


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 12),
    decay=st.floats(0, 4),
    scale=st.sampled_from([1e-12, 1e-4, 1.0, 1e6]),
    tilt=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_any_shape_scale_and_share_between_the_factors(rows, columns, rank, decay, scale, tilt, seed):
    drawn = random_update(rows, columns, rank, decay=decay, seed=seed)
    update = LowRankUpdate(drawn.left * tilt, drawn.right * (scale / tilt), 2.0, drawn.shape)
    edited, record = edit_factors(update)
    want, info = monosoup_update(exact(update))
    if abs(info["effective_rank"] - round(info["effective_rank"])) < 1e-5:
        return  # the last bit decides about ceil
    assert record.k == info["k"]
    assert np.abs(exact(edited) - want).max() <= 2e-6 * np.abs(exact(update)).max()


def test_exact_rank_is_left_whole():
    """All directions equal: k is the rank, the tail is empty, nothing changes."""
    left, _ = torch.linalg.qr(torch.randn(50, 16, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(70, 16, dtype=torch.float64))
    update = LowRankUpdate(left.float()[None], right.T.float()[None], 1.0, (50, 70))
    edited, record = edit_factors(update)
    assert (record.k, record.rho, record.lambda_high) == (16, 0, 1)
    assert torch.equal(edited.left, update.left)


def test_factors_know_the_rank_that_rounding_hides():
    """The same adapter twice side by side is still of its own rank."""
    one = random_update(40, 30, 4)
    twice = mean_of([one, one], [0.5, 0.5], one.scaling)
    assert twice.rank == 8
    edited, record = edit_factors(twice)
    alone, alone_record = edit_factors(one)
    assert record.k == alone_record.k
    assert np.abs(exact(edited) - exact(alone)).max() <= 1e-6 * np.abs(exact(one)).max()


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_no_update_stays_none(side):
    update = random_update(8, 6, 3)
    zeroed = LowRankUpdate(
        update.left * (side == "right"), update.right * (side == "left"), update.scaling, update.shape
    )
    edited, record = edit_factors(zeroed)
    assert record.matrices == ()
    assert not exact(edited).any()
    assert truncate(zeroed, 2)[1] == 0


def test_dead_directions_do_not_matter():
    update = random_update(20, 30, 6)
    left, right = update.left.clone(), update.right.clone()
    left[0, :, 1] = 0
    right[0, 4] = 0
    dead = LowRankUpdate(left, right, 1.0, (20, 30))
    edited, record = edit_factors(dead)
    want, info = monosoup_update(exact(dead))
    assert record.k == info["k"] <= 4
    assert np.abs(exact(edited) - want).max() <= 1e-6 * np.abs(want).max()


def test_matrices_of_a_stack_are_edited_one_by_one():
    parts = [random_update(12, 9, 4, seed=i, decay=i) for i in range(3)]
    stack = LowRankUpdate(
        torch.cat([p.left for p in parts]), torch.cat([p.right for p in parts]), 1.5, (3, 12, 9)
    )
    edited, record = edit_factors(stack)
    assert len(record.matrices) == 3
    for i, part in enumerate(parts):
        want, _ = monosoup_update(exact(part))
        assert np.abs(exact(edited)[i] - want).max() <= 1e-6 * np.abs(want).max()


def test_average_is_the_average():
    parts = [random_update(12, 9, r, seed=r, scaling=s) for r, s in ((4, 1.0), (2, 3.0), (3, 0.5))]
    mean = mean_of(parts, [0.5, 0.3, 0.2], 2.0)
    want = 0.5 * exact(parts[0]) + 0.3 * exact(parts[1]) + 0.2 * exact(parts[2])
    assert (mean.rank, mean.scaling) == (9, 2.0)
    assert np.abs(exact(mean) - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
def test_smaller_rank_is_the_best_one_and_states_its_error(rank):
    update = random_update(30, 20, 6)
    smaller, error = truncate(update, rank)
    s = np.linalg.svd(exact(update), compute_uv=False)
    assert smaller.rank == rank
    assert error == pytest.approx(math.sqrt((s[rank:6] ** 2).sum() / (s**2).sum()), abs=1e-7)
    distance = np.linalg.norm(exact(smaller) - exact(update)) / np.linalg.norm(exact(update))
    assert distance == pytest.approx(error, abs=1e-6)


def test_rank_for_an_energy():
    update = random_update(30, 20, 6)
    energies = np.linalg.svd(exact(update), compute_uv=False) ** 2
    shares = energies.cumsum() / energies.sum()
    assert rank_for(update, 0.9) == int((shares < 0.9).sum()) + 1
    assert rank_for(update, 5) == 5
    with pytest.raises(ParameterError, match="at least 1"):
        rank_for(update, 0)


def test_wrong_factors_are_refused():
    with pytest.raises(ShapeMismatchError, match="do not multiply"):
        LowRankUpdate(torch.zeros(1, 4, 3), torch.zeros(1, 2, 5), 1.0, (4, 5))
    with pytest.raises(ShapeMismatchError, match="shape \\(4, 6\\)"):
        LowRankUpdate(torch.zeros(1, 4, 3), torch.zeros(1, 3, 5), 1.0, (4, 6))
    with pytest.raises(ShapeMismatchError, match="averaged"):
        mean_of([random_update(4, 5, 2), random_update(5, 4, 2)], [0.5, 0.5])
    update = random_update(4, 5, 2)
    update.left[0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        edit_factors(update)
