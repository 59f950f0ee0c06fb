"""The rounding in an update: simulated fine-tuning, of which the update before storage is known."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_monosoup.report.measure import tensor_record
from mergekit_monosoup.report.rounding import storage_dtype, storage_noise

SHAPE = (301, 700)
# Standard deviation of U over that of W0: from far below bfloat16's spacing, 2^-8 of a weight, to above.
SIZES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1, 1.0]


def updates(kind, size):
    """U with standard deviation `size` times 0.02, of several shapes."""
    generator = torch.Generator().manual_seed(1)
    normal, other = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    u = {
        "normal": normal,
        "heavy tails": normal / (other.square() + 0.25).sqrt(),
        "few rows": normal * (torch.rand(SHAPE[0], 1, generator=generator) < 0.1),
        "rows of many sizes": normal * (0.7 * other[:, :1]).exp(),
        "even steps": normal.sign() * (0.5 + 0.8 * torch.rand(SHAPE, generator=generator)),
    }[kind]
    return 0.02 * size * u / u.std()


def trained(kind, size, dtype=torch.bfloat16, master=None):
    """W0 on the grid of `dtype`, W0 + U and W0 + U as it is stored; all in float64."""
    generator = torch.Generator().manual_seed(0)
    w0 = (0.02 * torch.randn(SHAPE, generator=generator)).to(dtype)
    whole = (w0.double() + updates(kind, size)).float()
    return w0, whole, whole.to(master or dtype)


def share_and_truth(w0, whole, w1):
    record = tensor_record("w", w0, [w1], action="kept")
    dw = w1.double() - w0.double()
    return record.rounding_share, float((w1.double() - whole.double()).norm() / dw.norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_normal_updates_of_any_size(size, dtype):
    share, truth = share_and_truth(*trained("normal", size, dtype))
    assert share == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["heavy tails", "few rows", "rows of many sizes", "even steps"])
def test_other_updates(kind, size):
    share, truth = share_and_truth(*trained(kind, size))
    assert share == pytest.approx(truth, rel=0.3)


def test_far_below_the_spacing_uniform_noise_would_be_far_off():
    w0, whole, w1 = trained("normal", 3e-4)
    _, truth = share_and_truth(w0, whole, w1)
    spacing = torch.exp2(torch.floor(torch.log2(w1.double().abs().clamp(min=1e-30)))) * 2**-7
    uniform = float((spacing.square().sum() / 12).sqrt() / (w1.double() - w0.double()).norm())
    assert uniform > 4 * truth


def test_a_fine_tune_in_float32_has_none_and_the_base_does_not_count():
    share, truth = share_and_truth(*trained("normal", 1e-3, master=torch.float32))
    assert share < 1e-4
    assert truth == 0


def test_a_base_off_the_grid_makes_uniform_noise():
    w0 = 0.02 * torch.randn(SHAPE)
    whole = w0 + updates("normal", 1e-3).float()
    share, truth = share_and_truth(w0, whole, whole.bfloat16())
    assert share == pytest.approx(truth, rel=0.1)


def test_a_file_in_float32_that_holds_bfloat16_counts_as_bfloat16():
    w0, whole, w1 = trained("normal", 3e-3)
    narrow, _ = share_and_truth(w0, whole, w1)
    assert tensor_record("w", w0.float(), [w1.float()], action="kept").rounding_share == narrow
    assert storage_dtype(w1.float()) == torch.bfloat16
    assert storage_dtype(whole) == torch.float32
    assert storage_dtype(whole.double()) == torch.float64


def test_several_add_up_by_the_squares_of_their_weights():
    w0, whole, w1 = trained("normal", 1e-2)
    other = (w0.double() + 0.02 * 1e-2 * torch.randn(SHAPE, dtype=torch.float64)).float()
    w2 = other.bfloat16()
    weights = (3.0, 1.0)
    share = tensor_record("w", w0, [w1, w2], action="averaged", weights=weights).rounding_share
    noise = 0.75 * (w1.double() - whole.double()) + 0.25 * (w2.double() - other.double())
    dw = 0.75 * w1.double() + 0.25 * w2.double() - w0.double()
    assert share == pytest.approx(float(noise.norm() / dw.norm()), rel=0.1)


def test_nothing_to_go_by():
    w = torch.randn(50, 50)
    assert storage_noise(w, w) == (0.0, 0.0)
    empty = torch.zeros(0, 3)
    assert storage_noise(empty, empty) == (0.0, 0.0)
    assert tensor_record("w", w, [w], action="kept").rounding_share is None
    zero = torch.zeros(40, 40).bfloat16()
    assert math.isfinite(storage_noise(zero, torch.randn(40, 40).bfloat16())[0])
    assert math.isfinite(storage_noise(torch.randn(40, 40).bfloat16(), zero)[0])


def test_layout_does_not_matter():
    w0, _, w1 = trained("normal", 1e-3)
    turned = w1.T.contiguous().T
    share = tensor_record("w", w0, [turned], action="kept").rounding_share
    assert share == tensor_record("w", w0, [w1], action="kept").rounding_share
