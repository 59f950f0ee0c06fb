"""One decomposition of an update, looked at with many thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_monosoup.spectral.crew import at_work
from mergekit_monosoup.spectral.matrix import MatrixView, choose_view
from mergekit_monosoup.spectral.mixing import Mixing
from mergekit_monosoup.spectral.record import EditRecord, MatrixRecord
from mergekit_monosoup.spectral.spectrum import Spectrum, decompose
from mergekit_monosoup.spectral.split import EFFECTIVE_RANK, Split
from mergekit_monosoup.spectral.update import MatrixUpdate


@dataclass(frozen=True)
class Analysis:
    """What is in an update: its spectra, and the edit record under each rule for the split."""

    singular_values: tuple[Tensor, ...]
    """Of each matrix with an update, `[r]`, descending, float64, relative to the largest."""
    record: EditRecord
    """Under the rule that was asked for."""
    fixed: dict[float, EditRecord]


def analyse_update(
    dw: Tensor,
    energies: Sequence[float] = (),
    view: MatrixView | None = None,
    split: Split = EFFECTIVE_RANK,
    mixing: Mixing = "monosoup",
) -> Analysis:
    """Decompose an update once and split it by a rule and by each threshold R.

    Args:
        dw: `[out, in]`, `[out, in, k, ...]` or `[experts, out, in]`; float32 or float64.
        energies: thresholds R in (0, 1].
        view: how `dw` is read as matrices; by its shape alone where absent.
        split: the rule.
        mixing: of the record under that rule.

    Raises:
        NonFiniteError: NaN or infinity in `dw`.
        ParameterError: a threshold is out of range.
    """
    rules = {energy: Split(energy=energy) for energy in energies}
    spectra: list[Spectrum] = []
    view = view or choose_view(tuple(dw.shape))
    with at_work(dw.device, dw.numel()):
        for matrix in view.of(dw):
            # In float64 the spectrum serves every threshold; in float32 each would need a check of its own.
            update = MatrixUpdate(None, [matrix.double()])
            spectrum = decompose(update, split, backend="gram")
            if spectrum is not None and split.threshold(*update.shape) and not spectrum.decides(split):
                # The noise drowns in the rounding of a Gram matrix.
                spectrum = decompose(update, split, backend="svd")
            if spectrum is not None:
                spectra.append(spectrum)

    def record(rule: Split, mixing: Mixing = "monosoup") -> EditRecord:
        found = (MatrixRecord.of(s.singular_values, s.shape, rule, mixing, s.backend) for s in spectra)
        return EditRecord(tuple(found), view.kind)

    return Analysis(
        tuple(s.singular_values / s.singular_values[0] for s in spectra),
        record(split, mixing),
        {energy: record(rule) for energy, rule in rules.items()},
    )


def spectrum_points(values: Tensor, count: int = 96) -> tuple[list[int], list[float], list[float]]:
    """Return a spectrum at some of its indices, dense at both ends of a logarithmic scale.

    Args:
        values: `[r]`, descending, not all zero.
        count: about how many points.

    Returns:
        Indices from 1 to r, s_i / s_1 there, and the share of the energy up to there.
    """
    r = len(values)
    half = count // 2
    even = torch.linspace(1, r, half, dtype=torch.float64, device=values.device)
    logarithmic = (
        torch.logspace(0, math.log10(r), half, dtype=torch.float64, device=values.device) if r > 1 else even
    )
    index = sorted({int(i) for i in torch.cat([even, logarithmic]).round().clamp(1, r)})
    relative = values.double() / values[0].double()
    energy = relative.square().cumsum(0)
    energy = energy / energy[-1]
    picked = torch.tensor(index, device=values.device) - 1
    return index, relative[picked].tolist(), energy[picked].tolist()
