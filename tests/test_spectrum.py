"""All ways to a spectrum agree with the float64 SVD, and `auto` takes the right one."""

from __future__ import annotations

import numpy as np
import pytest
import spectra
import torch

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.spectral import edit_update, spectrum
from mergekit_monosoup.spectral.spectrum import decompose
from mergekit_monosoup.spectral.update import MatrixUpdate

# Around the size above which LAPACK is called step by step; tall, wide, square.
SMALL = 256
SHAPES = [
    (SMALL, SMALL),
    (SMALL + 1, SMALL),
    (SMALL + 1, SMALL + 1),
    (SMALL + 1, 400),
    (400, SMALL - 1),
    (320, 520),
    (640, 320),
    (384, 384),
]
ENERGIES = (None, 0.5, 0.9, 0.99)
# Promised are 1e-4 and 5e-5; this is what is aimed at.
COEFFICIENT = 2e-5
WEIGHT = 5e-5


def backend_of(record):
    (matrix,) = record.matrices
    return matrix.backend


def assert_agrees(dw, energy=None, **options):
    edited, record = edit_update(dw, energy=energy, **options)
    expected, values = spectra.exact(dw, energy)
    assert record.k == values["k"]
    for name in ("rho", "cos_alpha", "lambda_low", "lambda_high"):
        assert getattr(record, name) == pytest.approx(values[name], abs=COEFFICIENT), name
    assert spectra.error(edited, expected, dw) <= WEIGHT
    if energy is None:
        # Noise that does not reach k may reach the rank itself.
        assert record.effective_rank == pytest.approx(values["effective_rank"], rel=0.05)
    return backend_of(record)


@pytest.mark.parametrize("kind", spectra.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_auto_agrees_with_the_float64_svd(kind, shape):
    assert_agrees(spectra.update(kind, *shape))


@pytest.mark.parametrize("kind", spectra.KINDS)
@pytest.mark.parametrize("energy", ENERGIES[1:])
def test_auto_agrees_at_an_energy_threshold(kind, energy):
    dw = spectra.update(kind, 420, 320)
    if spectra.split_gap(dw, energy) < 1e-7:
        # Equal singular values: any basis of their space is as right as another.
        _, values = spectra.exact(dw, energy)
        record = edit_update(dw, energy=energy)[1]
        assert abs(record.k - values["k"]) <= 1
        assert record.lambda_low == pytest.approx(values["lambda_low"], abs=1e-2)
        return
    assert_agrees(dw, energy)


@pytest.mark.parametrize("backend", ["gram", "svd"])
@pytest.mark.parametrize("kind", [kind for kind in spectra.KINDS if kind != "flat"])
def test_named_backends_agree(kind, backend):
    used = assert_agrees(spectra.update(kind, 300, 270), spectrum=backend)
    assert used in {"gram": ("gram32", "gram64", "factor"), "svd": ("svd",)}[backend]


@pytest.mark.parametrize(
    ("kind", "shape", "backend"),
    [
        ("gauss", (400, 300), "gram32"),  # no singular value drowns in float32
        ("linear", (300, 400), "gram32"),
        ("1/i", (90, 60), "gram32"),
        ("low rank", (400, 300), "factor"),  # nothing but a few directions above the noise
        ("low rank + noise", (300, 400), "factor"),
    ],
)
def test_auto_takes_the_cheapest_safe_way(kind, shape, backend):
    assert backend_of(edit_update(spectra.update(kind, *shape))[1]) == backend


@pytest.mark.parametrize(
    ("kind", "shape", "backend"),
    [
        ("gauss", (640, 520), "gram32"),
        ("1/i", (520, 640), "gram64"),  # steep: float32 is not even tried
        ("low rank", (640, 520), "factor"),
        ("low rank + noise", (520, 640), "factor"),
    ],
)
def test_a_few_lines_tell_what_to_expect(kind, shape, backend, monkeypatch):
    tried = []
    by_gram = spectrum._by_gram
    monkeypatch.setattr(spectrum, "_by_gram", lambda *a: tried.append(a[1]) or by_gram(*a))
    assert assert_agrees(spectra.update(kind, *shape)) == backend
    assert (
        tried
        == {
            "gram32": [torch.float32],
            "gram64": [torch.float64],
            "factor": [],
        }[backend]
    )


@pytest.mark.parametrize("elsewhere", ["gauss", "1/i", "low rank"])
@pytest.mark.parametrize("sampled", ["zero", "low rank", "gauss"])
def test_lines_that_are_not_like_the_others_mislead_nobody(sampled, elsewhere):
    dw = spectra.update(elsewhere, 1024, 520)
    lines = torch.linspace(0, 1023, 256).long()
    dw[lines] = 0.0 if sampled == "zero" else spectra.update(sampled, 256, 520)
    assert_agrees(dw)


def test_float64_updates_take_the_svd():
    dw = spectra.update("gauss", 300, 280, dtype=torch.float64)
    assert assert_agrees(dw) == "svd"
    assert backend_of(edit_update(dw, spectrum="gram")[1]) == "gram64"


@pytest.mark.parametrize("size", [40, 300])
def test_a_tie_that_gram_matrices_cannot_decide_takes_the_svd(size):
    """Sixteen equal singular values have effective rank 16: k is 16, and 17 with any noise."""
    rng = np.random.default_rng(0)
    left, right = spectra.orthonormal(rng, size, 16), spectra.orthonormal(rng, size, 16)
    dw = torch.from_numpy(left @ right.T)
    assert edit_update(dw)[1].k == 16
    edited, record = edit_update(dw.float())
    assert backend_of(record) == "svd"
    assert record.k == spectra.exact(dw.float())[1]["k"]
    assert spectra.error(edited, dw.numpy(), dw) <= 1e-6


def test_a_tie_without_noise_needs_no_svd():
    dw = torch.zeros(300, 300)
    dw[20:36, 40:56] = torch.eye(16)
    edited, record = edit_update(dw)
    assert record.k == 16
    assert backend_of(record) != "svd"
    assert torch.equal(edited, dw)


def with_a_gap(shape, k, gap):
    """Return an update in float64 whose values k and k + 1 are close, and the threshold that splits there."""
    count = min(shape)
    s = spectra.singular_values("linear", count)
    s[k:] *= s[k - 1] * (1 - gap) / s[k]
    rng = np.random.default_rng(0)
    dw = (spectra.orthonormal(rng, shape[0], count) * s) @ spectra.orthonormal(rng, shape[1], count).T
    kept = np.cumsum(s**2) / np.sum(s**2)
    return torch.from_numpy(dw), float(kept[k - 2 : k].mean())


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (90, 60)], ids=str)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_small_gap_at_the_split_is_told_apart_in_float64(gap, shape, share):
    """k and the coefficients are certain here, the vectors on both sides of the split are not in float32."""
    k = round(share * min(shape))
    dw, energy = with_a_gap(shape, k, gap)
    assert spectra.exact(dw.float(), energy)[1]["k"] == k
    assert assert_agrees(dw.float(), energy) == "gram32"


def test_columns_that_are_not_touched_take_no_part_when_neighbours_are_told_apart():
    inner, energy = with_a_gap((400, 300), 100, 1e-6)
    dw = torch.zeros(450, 330)
    rows, columns = torch.arange(0, 450, 9), torch.arange(5, 330, 11)
    kept_rows = torch.ones(450, dtype=torch.bool).index_fill(0, rows, False)
    kept_columns = torch.ones(330, dtype=torch.bool).index_fill(0, columns, False)
    dw[kept_rows[:, None] & kept_columns] = inner.float().flatten()
    assert assert_agrees(dw, energy) == "gram32"


@pytest.mark.parametrize("shape", [(400, 300), (90, 60)], ids=str)
def test_a_doubtful_rank_asks_for_float64(shape):
    """One direction and a tail that float32 cannot see, but that decides between k = 1 and k = 2."""
    rng = np.random.default_rng(0)
    count = min(shape)
    s = np.where(np.arange(count) < 1, 1.0, 1e-5)
    dw = (spectra.orthonormal(rng, shape[0], count) * s) @ spectra.orthonormal(rng, count, count).T
    _, record = edit_update(torch.from_numpy(dw).float())
    assert (record.k, backend_of(record)) == (2, "gram64")


@pytest.mark.parametrize("noise", [1e-5, 3e-5])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_noise_below_a_low_rank_counts_as_low_energy(noise, power):
    """The factor backend leaves it out of its spectrum, not out of the edit."""
    left, right = torch.linalg.qr(spectra.update("gauss", 420, 320))[0], torch.eye(320)
    i = torch.arange(1.0, 321.0)
    dw = (left * torch.where(i <= 30, i**-power, torch.tensor(noise))) @ right
    for energy in (None, 0.95, 0.99):
        assert_agrees(dw, energy)


@pytest.mark.parametrize("exponent", [-30, -20, -12, 12, 20, 30])
@pytest.mark.parametrize("kind", ["gauss", "1/i", "low rank"])
@pytest.mark.parametrize("shape", [(300, 280), (64, 90)])
def test_any_magnitude(exponent, kind, shape):
    """Squares of these neither overflow nor vanish."""
    dw = spectra.update(kind, *shape) * 10.0**exponent
    assert dw.isfinite().all()
    assert_agrees(dw)


@pytest.mark.parametrize("shape", [(300, 280), (64, 90)])
def test_subnormal_updates(shape):
    dw = spectra.update("gauss", *shape) * 1e-40
    edited, record = edit_update(dw)
    _, values = spectra.exact(dw)
    assert record.k == values["k"]
    assert record.lambda_low == pytest.approx(values["lambda_low"], abs=COEFFICIENT)
    assert edited.isfinite().all()


@pytest.mark.parametrize("shape", [(300, 280), (280, 300), (40, 30)])
@pytest.mark.parametrize("backend", ["auto", "gram", "svd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused(shape, backend, value):
    dw = spectra.update("gauss", *shape)
    dw[7, 11] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        edit_update(dw, spectrum=backend)


@pytest.mark.parametrize("backend", ["auto", "gram", "svd"])
@pytest.mark.parametrize("shape", [(300, 280), (40, 30)])
def test_no_update_has_no_spectrum(shape, backend):
    assert decompose(MatrixUpdate(None, [torch.zeros(shape)]), backend=backend) is None
    w = torch.randn(shape)
    assert decompose(MatrixUpdate(w, [w.clone()]), backend=backend) is None


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (90, 60)])
@pytest.mark.parametrize("k", [3, 200])
def test_basis_is_orthonormal_and_spans_one_side(shape, k):
    dw = spectra.update("linear", *shape)
    k = min(k, min(shape) - 2)
    found = decompose(MatrixUpdate(None, [dw]))
    basis, complement = found.basis(k)
    columns = min(shape)
    assert complement == (columns - k < k)
    assert basis.shape == (columns, columns - k if complement else k)
    gram = basis.double().T @ basis.double()
    assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-5)
    tall = dw.double() if shape[0] >= shape[1] else dw.double().T
    energy = (tall @ basis.double()).square().sum()
    side = found.singular_values[k:] if complement else found.singular_values[:k]
    assert float(energy) == pytest.approx(float(side.square().sum()), rel=1e-4)


def test_singular_values_are_float64_on_the_cpu_and_descend():
    for kind in ("gauss", "1/i", "low rank"):
        values = decompose(MatrixUpdate(None, [spectra.update(kind, 300, 280)])).singular_values
        assert values.dtype == torch.float64
        assert values.device.type == "cpu"
        assert (values.diff() <= 0).all()
        assert (values >= 0).all()


@pytest.mark.parametrize("moved", [0, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("energy", [None, 0.6, 0.9])
def test_blocks_that_are_nearly_equal(moved, energy):
    """Pairs of directions that agree to many digits: either is right, or they are told apart."""
    block = spectra.update("gauss", 200, 160)
    other = block.clone()
    other[7, 11] += moved * float(block.abs().max())
    dw = torch.block_diag(block, other)
    edited, record = edit_update(dw, energy=energy)
    expected, values = spectra.exact(dw, energy)
    assert abs(record.k - values["k"]) <= (1 if moved == 0 else 0)
    if spectra.split_gap(dw, energy) > 1e-9:
        assert spectra.error(edited, expected, dw) <= WEIGHT


@pytest.mark.parametrize("exponent", [-160, 155])
def test_a_small_gap_in_the_extremes_of_float64(exponent):
    dw, energy = with_a_gap((90, 60), 30, 1e-9)
    plain, record = edit_update(dw, energy=energy, spectrum="gram")
    scaled, of_scaled = edit_update(dw * 10.0**exponent, energy=energy, spectrum="gram")
    assert record.k == of_scaled.k == 30
    assert torch.allclose(scaled / 10.0**exponent, plain, atol=1e-6 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("size", [100, 300])
def test_a_multiple_of_the_identity_is_cut_somewhere(size):
    """All directions are equal: which of them are kept is free, their number is not."""
    dw = 0.25 * torch.eye(size)
    edited, record = edit_update(dw, energy=0.5)
    assert record.k == size // 2
    assert backend_of(record) == "svd"
    values = torch.linalg.svdvals(edited.double())
    sides = (record.lambda_high, record.lambda_low)
    expected = torch.cat([torch.full((size // 2,), 0.25 * side, dtype=torch.float64) for side in sides])
    assert torch.allclose(values, expected.sort(descending=True)[0], atol=1e-6)
