"""The door to scipy's compiled routines: what closes it, and that torch does the same work behind it."""

from __future__ import annotations

import pytest
import spectra
import torch
from environments import dependency_folders
from scipy.linalg import cython_blas
from stand_ins import script

from mergekit_monosoup.cli.diagnosis import notes
from mergekit_monosoup.spectral import Split, edit_update, edit_weight, kernels
from mergekit_monosoup.spectral.kernels import compiled

CPU = torch.device("cpu")


@pytest.fixture
def closed(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert not kernels.serve(CPU)


def test_it_is_open_here():
    assert compiled.PROBLEMS == []
    assert kernels.serve(CPU)
    assert not kernels.serve(torch.device("cuda"))


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("void (char *, int *, __pyx_t_5scipy_6linalg_11cython_blas_s *, double *)", "cisd"),
        ("void (int *, float *, __pyx_t_5scipy_6linalg_13cython_lapack_d *)", "isd"),
        ("void (char *, int64_t *, double *)", "c?d"),
        ("int (char *)", "?"),
    ],
)
def test_declarations_are_read(declaration, expected):
    assert compiled.signature(declaration) == expected


def test_what_is_declared_otherwise_is_not_called(monkeypatch):
    monkeypatch.setattr(compiled, "PROBLEMS", problems := [])
    assert compiled._routine(cython_blas, "dgemm", "cciiiddiddiddi") is None
    assert compiled._routine(cython_blas, "dnothing", "ii") is None
    assert "scipy declares dgemm as void (char *" in problems[0]
    assert problems[1] == "scipy exports no dnothing"
    monkeypatch.setattr(kernels, "PROBLEMS", problems)
    assert not kernels.serve(CPU)
    assert any("are left to torch" in note and "scipy declares dgemm" in note for note in notes())


def test_the_user_closes_it(closed):
    assert any(f"{kernels.VARIABLE} is set" in note for note in notes())


@pytest.mark.parametrize("split", [Split(), Split(energy=0.8), Split("donoho_gavish")], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", spectra.KINDS)
@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (384, 384), (9000, 64)], ids=str)
def test_torch_does_the_same_work(kind, shape, split, closed):
    dw = spectra.update(kind, *shape)
    edited, record = edit_update(dw, split=split)
    if split == Split():
        expected, values = spectra.exact(dw)
        assert record.k == values["k"]
        assert spectra.error(edited, expected, dw) <= 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(700, 300), (5, 60, 50), (3, 300, 280)], ids=str)
def test_with_the_door_open_and_closed(shape, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    w0 = torch.randn(shape, generator=generator).to(dtype)
    w1 = (w0.float() + 0.01 * torch.randn(shape, generator=generator)).to(dtype)
    opened, record = edit_weight(w0, [w1])
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    closed, again = edit_weight(w0, [w1])
    assert [m.k for m in again.matrices] == [m.k for m in record.matrices]
    assert float((opened != closed).float().mean()) <= (1e-2 if dtype == torch.bfloat16 else 1.0)
    assert torch.allclose(opened.float(), closed.float(), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.slow
def test_the_package_works_without_the_folder(environment):
    """One door: nothing else of the package reaches behind it."""
    environment.see(*dependency_folders())
    code = """
        import sys, types
        import torch
        from mergekit_monosoup.spectral import kernels
        from mergekit_monosoup.spectral.edit import edit_update
        def nothing(*a, **k): raise RuntimeError("behind the door")
        for name, module in list(sys.modules.items()):
            if name.startswith(kernels.__name__ + "."):
                for key, value in list(vars(module).items()):
                    if callable(value): setattr(module, key, nothing)
        for name, module in list(sys.modules.items()):
            if name.startswith("mergekit_monosoup.spectral."):
                for key in ("gemm", "syrk", "TridiagonalEigen"):
                    if hasattr(module, key): setattr(module, key, nothing)
        print(int(edit_update(torch.randn(700, 300))[1].k) > 0)
    """
    assert environment.output(*script(code), **{kernels.VARIABLE: "torch"}) == "True"
