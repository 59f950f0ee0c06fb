"""Runs of `mergekit-monosoup lora`, and what they should give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner, Result
from oracle import monosoup_update

from mergekit_monosoup.cli import main


def run(*arguments: object) -> Result:
    """Run `mergekit-monosoup lora` in this process."""
    return CliRunner().invoke(main, ["lora", *map(str, arguments)])


def edit(*arguments: object) -> Result:
    """The same, and it must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def oracle_edit(dw: torch.Tensor, **options: object) -> np.ndarray:
    """The oracle's edit; three axes are a stack of experts, except in the one Conv1d there is."""
    array = dw.double().numpy()
    if array.ndim == 3 and array.shape != (16, 12, 3):
        return np.stack([monosoup_update(m, **options)[0] for m in array])
    flat = array.reshape(array.shape[0], -1)
    return monosoup_update(flat, **options)[0].reshape(array.shape)


def compare(got: dict[str, torch.Tensor], want: dict[str, np.ndarray], tolerance: float) -> None:
    """Fail unless the tensors are those, up to a share of the largest entry of each."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        error = np.abs(got[name].double().numpy() - array).max()
        assert error <= tolerance * np.abs(array).max(), name


def truncated(array: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrices of this rank."""
    u, s, vt = np.linalg.svd(array, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def refuse(source: Path, out: Path, *words: str, arguments: tuple[object, ...] = ()) -> None:
    """Expect an error that says these words, and leaves nothing behind."""
    result = run(source, out, *arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.output
    assert not out.exists()
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]
