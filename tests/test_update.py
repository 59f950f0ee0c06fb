"""Streaming: blocks, untouched lines, several tuned tensors, and the memory that all this saves."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import oracle
import pytest
import spectra
import torch
from commands import ROOT
from rounding import as_float64, assert_correctly_rounded

from mergekit_monosoup.errors import NonFiniteError
from mergekit_monosoup.spectral import EditOptions, Split, edit_update, edit_weight
from mergekit_monosoup.spectral import update as update_module
from mergekit_monosoup.spectral.update import MatrixUpdate

WEIGHT = 5e-5


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def pair(rows, columns, dtype=torch.float32, kind="gauss"):
    """W0 and W1 whose entries differ by a hundredth, whatever the dtype then leaves of it."""
    dw = spectra.update(kind, rows, columns, dtype=torch.float64)
    w0 = normal(rows, columns, seed=1, dtype=torch.float64)
    w1 = w0 + dw * (1e-2 / dw.square().mean().sqrt())
    return w0.to(dtype), w1.to(dtype)


def assert_edited(result, w0, w1s, **options):
    """`result` is the reference's weight, at the tolerance of its dtype."""
    expected = oracle.monosoup_weight(as_float64(w0), [as_float64(w1) for w1 in w1s], **options)
    largest = max(float((w1.double() - w0.double()).abs().max()) for w1 in w1s)
    if w0.dtype == torch.float32:
        # The sum with W0 is rounded to float32 once as well.
        allowed = WEIGHT * largest + np.spacing(np.abs(expected).max().astype(np.float32))
        assert np.abs(as_float64(result) - expected).max() <= allowed
    else:
        assert_correctly_rounded(result, expected, w0.dtype, 0.99, floor=WEIGHT * largest)


@pytest.fixture
def tiny_blocks(monkeypatch):
    """A few hundred lines a block, the least that is taken."""
    monkeypatch.setattr(update_module, "_CPU_BLOCK", 1)


SHAPES = [(700, 300), (300, 700), (520, 300), (530, 40), (40, 530)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_agree_with_the_reference(shape, dtype):
    w0, w1 = pair(*shape, dtype)
    result, record = edit_weight(w0, [w1])
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert record.rank == min(shape)
    assert_edited(result, w0, [w1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["gauss", "1/i", "low rank"])
@pytest.mark.usefixtures("tiny_blocks")
def test_small_blocks_agree_with_the_reference(shape, kind):
    w0, w1 = pair(*shape, kind=kind)
    assert len(list(MatrixUpdate(w0, [w1]).spans())) >= 2
    result, _ = edit_weight(w0, [w1])
    assert_edited(result, w0, [w1])


@pytest.mark.parametrize("shape", [(1100, 300), (300, 1100)], ids=str)
def test_the_block_size_changes_roundings_only(shape, monkeypatch):
    w0, w1 = pair(*shape)
    whole, record = edit_weight(w0, [w1])
    monkeypatch.setattr(update_module, "_CPU_BLOCK", 1)
    assert len(list(MatrixUpdate(w0, [w1]).spans())) == 9
    cut, of_cut = edit_weight(w0, [w1])
    assert of_cut.k == record.k
    assert of_cut.lambda_low == pytest.approx(record.lambda_low, abs=2e-6)
    assert float((cut - whole).abs().max()) <= 1e-5 * float((w1 - w0).abs().max()) + 2**-22


@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (40, 530)], ids=str)
@pytest.mark.usefixtures("tiny_blocks")
def test_blocks_cover_the_update_once(shape):
    w0, w1 = pair(*shape)
    update = MatrixUpdate(w0, [w1])
    blocks = [update.block(*span) for span in update.spans()]
    assert all(block.delta.shape[1] == min(shape) for block in blocks)
    tall = torch.cat([block.delta for block in blocks])
    assert torch.equal(tall if shape[0] > shape[1] else tall.T, w1 - w0)
    assert torch.equal(
        torch.cat([block.base for block in blocks]).T.reshape(-1).sort()[0], w0.flatten().sort()[0]
    )


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.7, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tuned_tensors_are_averaged(weights, dtype):
    w0 = normal(300, 280, dtype=dtype)
    tuned = [
        (w0.float() + normal(300, 280, seed=i, scale=0.01 * i)).to(dtype) for i in range(1, len(weights) + 1)
    ]
    result, _ = edit_weight(w0, tuned, weights)
    assert_edited(result, w0, tuned, weights=list(weights))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("mixing", oracle.MIXINGS)
def test_options_reach_the_result(alpha, mixing):
    w0, w1 = pair(300, 270)
    options = EditOptions(Split(energy=0.8), mixing=mixing, alpha=alpha)
    result, _ = edit_weight(w0, [w1], options=options)
    assert_edited(result, w0, [w1], energy=0.8, mixing=mixing, alpha=alpha)


@pytest.mark.parametrize("touched", [5, 60, 260, 900])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untouched_lines_keep_the_base(touched, axis, dtype):
    """An embedding of which few rows were seen; with fewer of them than columns, sides swap."""
    shape = (1000, 300)
    w0 = normal(*shape, dtype=dtype)
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:touched]
    w1 = w0.clone()
    w1[rows] = (w0[rows].float() + normal(touched, 300, seed=2, scale=0.05)).to(dtype)
    inputs = (w0, w1) if axis == 0 else (w0.T.contiguous(), w1.T.contiguous())
    result, record = edit_weight(inputs[0], [inputs[1]])
    untouched = torch.ones(1000, dtype=torch.bool)
    untouched[rows] = False
    kept = result[untouched] if axis == 0 else result.T[untouched]
    assert torch.equal(kept, w0[untouched])
    assert record.rank == 300
    assert record.k <= min(touched, 300)
    assert_edited(result, inputs[0], [inputs[1]])


def test_lines_are_found_between_the_sampled_ones():
    """A sample decides whether to look; then every line is looked at."""
    w0 = normal(1000, 30)
    w1 = w0.clone()
    w1[::7] += 0.1 * normal(143, 30, seed=3)
    update = MatrixUpdate(w0, [w1]).without_untouched_lines()
    assert torch.equal(update.lines, torch.arange(0, 1000, 7))
    assert MatrixUpdate(w0, [w0 + 1]).without_untouched_lines().lines is None


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (90, 60)], ids=str)
def test_dead_lines_of_the_shorter_side(shape):
    """Columns that the fine-tuning left alone leave the decomposition, not the result."""
    w0, w1 = pair(*shape)
    short = 1 if shape[0] >= shape[1] else 0
    dead = torch.arange(0, min(shape), 2)
    w1.index_copy_(short, dead, w0.index_select(short, dead))
    result, record = edit_weight(w0, [w1])
    assert torch.equal(result.index_select(short, dead), w0.index_select(short, dead))
    assert record.k <= min(shape) // 2
    assert_edited(result, w0, [w1])


@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (50, 70), (7, 5, 4), (12, 6, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_inputs_are_left_alone(shape, dtype):
    w0, w1 = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    before = w0.clone(), w1.clone()
    result, _ = edit_weight(w0, [w1])
    edited, _ = edit_update(w1)
    result.zero_()
    edited.zero_()
    assert torch.equal(w0, before[0])
    assert torch.equal(w1, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
def test_any_memory_layout(layout, dtype):
    def arranged(tensor):
        if layout == "transposed":
            return tensor.T.contiguous().T
        if layout == "strided":
            return torch.stack([tensor, tensor], dim=2)[..., 1]
        if layout == "offset":
            return torch.nn.functional.pad(tensor, (3, 2, 1, 4))[1:-4, 3:-2]
        return tensor

    w0, w1 = pair(320, 300, dtype)
    if layout == "expanded":
        w0 = w0[:1].expand(320, 300)
    result, _ = edit_weight(arranged(w0), [arranged(w1)])
    plain, _ = edit_weight(w0.contiguous(), [w1])
    tolerance = 0.0 if dtype == torch.bfloat16 else 1e-6
    assert result.is_contiguous()
    assert (
        float((result.double() - plain.double()).abs().max())
        <= tolerance + float(dtype == torch.bfloat16) * 0.02
    )
    edited, record = edit_update(arranged(w1))
    assert spectra.error(edited, spectra.exact(w1)[0], w1) <= WEIGHT
    assert record.rank == 300


@pytest.mark.parametrize("where", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (900, 20)], ids=str)
def test_not_finite_is_refused(where, value, shape):
    w0, w1 = pair(*shape)
    (w0 if where == "base" else w1)[17, 13] = value
    with pytest.raises(NonFiniteError):
        edit_weight(w0, [w1])


def test_infinity_on_both_sides_of_an_untouched_line_is_refused():
    w0 = normal(900, 300)
    w1 = w0.clone()
    w1[5] += 1
    w0[700, 3] = w1[700, 3] = float("inf")
    with pytest.raises(NonFiniteError):
        edit_weight(w0, [w1])


def test_parameters_of_a_module_are_taken_as_they_are():
    layer, tuned = torch.nn.Linear(300, 320), torch.nn.Linear(300, 320)
    result, _ = edit_weight(layer.weight, [tuned.weight])
    assert not result.requires_grad
    assert_edited(result, layer.weight.detach(), [tuned.weight.detach()])
    assert not edit_update(layer.weight)[0].requires_grad


_MEASURE = """
import sys, torch
from mergekit_monosoup.spectral import edit_weight

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

torch.manual_seed(0)
rows, columns = 100_000, 256
w0 = torch.empty(rows, columns, dtype=torch.bfloat16).normal_()
w1 = torch.empty(rows, columns, dtype=torch.bfloat16)
for i in range(0, rows, 1000):
    w1[i : i + 1000] = w0[i : i + 1000] + 0.05 * torch.randn(1000, columns)
edit_weight(w0[:600], [w1[:600]])
# What the libraries took on the way counts as used: the peak starts where the process stands.
ballast = bytearray(max(0, status("VmHWM") - status("VmRSS")))
before = max(status("VmHWM"), status("VmRSS"))
out, record = edit_weight(w0, [w1])
print((status("VmHWM") - before) / (rows * columns * 4), record.k)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak memory that Linux reports"
)
def test_an_embedding_needs_no_float32_copy_of_itself():
    """Half a copy is the result itself, in bfloat16; blocks and Gram matrix come on top."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # Freed memory goes back at once, so that none is hidden from the measurement or added to it.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    copies, k = done.stdout.split()
    assert 0.4 < float(copies) < 0.9, "the bound, or the measurement, is wrong"
    assert 1 <= int(k) <= 256
