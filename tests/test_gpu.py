"""On an accelerator: the CPU's results, without copies to the host on the way."""

from __future__ import annotations

import oracle
import pytest
import spectra
import torch

from mergekit_monosoup.spectral import Split, edit_update, edit_weight
from mergekit_monosoup.spectral.precision import full_float32
from mergekit_monosoup.spectral.storing import Storage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
SHAPES = [(700, 300), (300, 700), (384, 384), (200, 90)]


@pytest.fixture(autouse=True)
def _restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", spectra.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_as_the_reference(kind, shape):
    dw = spectra.update(kind, *shape)
    edited, record = edit_update(dw.to(CUDA))
    expected, values = spectra.exact(dw)
    assert edited.device.type == "cuda"
    assert record.k == values["k"]
    assert record.lambda_low == pytest.approx(values["lambda_low"], abs=2e-5)
    assert spectra.error(edited.cpu(), expected, dw) <= 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 300, 280), (64, 32, 3, 3)], ids=str)
def test_same_as_the_cpu(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(shape, generator=generator).to(dtype)
    w1 = (w0.float() + 0.05 * torch.randn(shape, generator=generator)).to(dtype)
    here, record = edit_weight(w0, [w1])
    there, of_there = edit_weight(w0.to(CUDA), [w1.to(CUDA)])
    assert there.device.type == "cuda"
    assert [m.k for m in of_there.matrices] == [m.k for m in record.matrices]
    if dtype in (torch.float32, torch.float64):
        assert float((here - there.cpu()).abs().max()) <= 5e-5 * float((w1 - w0).abs().max()) + 1e-6
    else:
        # Rounded from values a few 1e-6 apart: the same but for the odd tie.
        assert float((here != there.cpu()).float().mean()) <= 1e-2


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_users_precision_does_not_reach_the_spectrum(precision):
    dw = spectra.update("gauss", 512, 384)
    torch.set_float32_matmul_precision(precision)
    _, record = edit_update(dw.to(CUDA))
    assert torch.get_float32_matmul_precision() == precision
    _, values = spectra.exact(dw)
    assert record.k == values["k"]
    assert record.lambda_low == pytest.approx(values["lambda_low"], abs=2e-5)


def test_precision_is_restored_after_an_error():
    torch.set_float32_matmul_precision("high")

    def fail():
        with full_float32(CUDA):
            assert torch.get_float32_matmul_precision() == "highest"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.filterwarnings("ignore:.*prototype feature.*")
@pytest.mark.parametrize("shape", [(4096, 512), (512, 4096)], ids=str)
def test_synchronisations_do_not_grow_with_the_number_of_blocks(shape, monkeypatch):
    """A few numbers decide about the split and have to be waited for; blocks have not."""
    from mergekit_monosoup.spectral import update as update_module

    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(shape, generator=generator).to(CUDA)
    w1 = w0 + 0.05 * torch.randn(shape, generator=generator).to(CUDA)
    edit_weight(w0, [w1])

    def synchronisations(block):
        monkeypatch.setattr(update_module, "_DEVICE_BLOCK", block)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
                edit_weight(w0, [w1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len(caught)

    one, many = synchronisations(1 << 26), synchronisations(1)
    assert many <= one <= 20


def test_no_matrix_is_copied_to_the_host():
    """What goes to the host is the spectrum and a few numbers, far less than a matrix would take."""
    w0 = torch.randn(16384, 1024, device=CUDA)
    w1 = w0 + 0.05 * torch.randn(16384, 1024, device=CUDA)
    edit_weight(w0, [w1])
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        edit_weight(w0, [w1])
        torch.cuda.synchronize()
        small = w0[:1024, :256].cpu()
    # The last copy, a megabyte, is the measure: all others together take less.
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    copies = [event.device_time for event in events if "Memcpy DtoH" in event.name]
    assert small.shape == (1024, 256)
    assert 0 < sum(copies[:-1]) < 2 * copies[-1]


@pytest.mark.parametrize("kind", spectra.KINDS)
def test_noise_thresholds_are_the_cpus(kind):
    dw = spectra.update(kind, 700, 300)
    split = Split("donoho_gavish")
    _, here = edit_update(dw, split=split, mixing="high")
    edited, there = edit_update(dw.to(CUDA), split=split, mixing="high")
    assert there.k == here.k
    assert there.noise == pytest.approx(here.noise, rel=1e-4, abs=1e-12)
    expected, _ = oracle.monosoup_update(dw.double().numpy(), mixing="high", threshold={})
    assert spectra.error(edited.cpu(), expected, dw) <= 5e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_rounding_draws_the_same_numbers(shape):
    value = torch.randn(shape)
    storage = Storage("stochastic", "w")
    here = storage.rounded(value, torch.bfloat16, 5)
    assert torch.equal(storage.rounded(value.to(CUDA), torch.bfloat16, 5).cpu(), here)
