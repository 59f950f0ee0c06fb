"""Look at an adapter: the spectra of its modules, and what a smaller rank would lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_monosoup.inspected import Question
from mergekit_monosoup.lora.adapter import PREFIX, Adapter, read_adapter
from mergekit_monosoup.lora.factors import LowRankUpdate, edit_factors
from mergekit_monosoup.lora.single_file import SingleFile, read_single_file
from mergekit_monosoup.report.measure import edit_fields
from mergekit_monosoup.report.schema import TensorRecord
from mergekit_monosoup.report.table import text_table
from mergekit_monosoup.spectral.crew import at_work, crew
from mergekit_monosoup.spectral.mixing import mixing_coefficients
from mergekit_monosoup.spectral.record import EditRecord
from mergekit_monosoup.spectral.split import Split, energy_rank

# Parts of the nominal rank for which it is said what they would lose, and energies for which a rank is named.
PARTS = (2, 4, 8)
ENERGIES = (0.9, 0.99)


@dataclass(frozen=True)
class AdapterInspection:
    """An adapter that has been read: its modules by name, and the tensors that are no factors."""

    source: str
    place: Path
    modules: tuple[str, ...]
    others: dict[str, str]
    _held: SingleFile | Adapter

    @classmethod
    def open(cls, source: str) -> AdapterInspection:
        """Read an adapter: a `.safetensors` file, or the folder or Hub id of a PEFT adapter.

        Raises:
            AdapterError: neither of these, or damaged; UnsupportedAdapterError: no plain LoRA.
        """
        path = Path(source)
        if path.suffix == ".safetensors" or path.is_file():
            file = read_single_file(path)
            return cls(source, path, tuple(file.pairs), dict(file.kept), file)
        adapter = read_adapter(source)
        others = {key.removeprefix(PREFIX): "stored whole" for key in (*adapter.full, *adapter.biases)}
        names = tuple(module.module for module in adapter.modules)
        return cls(source, adapter.folder, names, others, adapter)

    def records(self, names: Sequence[str], question: Question) -> Iterator[TensorRecord]:
        """Yield a record for each of these modules, and one for each tensor that is no factor.

        Beside the figures of every edit, `figures` has the nominal rank, the rank that keeps 90 % and 99 % of
        the energy (`rank_for_0.9`), and the relative error at a half, a quarter and an eighth of the nominal
        rank (`lost_at_1/2`).

        Raises:
            NonFiniteError: NaN or infinity in a factor.
        """
        with at_work(torch.device("cpu")):
            yield from crew().map(lambda name: self._record(name, question), names)
        for key, kind in self.others.items():
            reason = kind or "no LoRA by any name known here"
            dtype, shape = self._stored(key)
            yield TensorRecord(
                tensor=key, shape=shape, dtype=dtype, action="kept", reason=reason, method="inspect"
            )

    def _update(self, name: str) -> LowRankUpdate:
        if isinstance(self._held, SingleFile):
            return self._held.update(self._held.pairs[name])
        module = next(m for m in self._held.modules if m.module == name)
        return module.update(self._held.tensors)

    def _stored(self, key: str) -> tuple[str, tuple[int, ...]]:
        if isinstance(self._held, SingleFile):
            return self._held.tensors[key].dtype, self._held.tensors[key].shape
        tensor = self._held.tensors[PREFIX + key]
        return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)

    def _record(self, name: str, question: Question) -> TensorRecord:
        update = self._update(name)
        _, edit = edit_factors(update, split=question.split, mixing=question.mixing)
        spectra = [m.values for m in edit.matrices if m.values is not None]
        figures: dict[str, float | None] = {"nominal_rank": float(update.rank)}
        for energy in ENERGIES if spectra else ():
            figures[f"rank_for_{energy:g}"] = float(max(energy_rank(values, energy) for values in spectra))
        for part in PARTS if spectra else ():
            figures[f"lost_at_1/{part}"] = lost_at(spectra, math.ceil(update.rank / part))
        return TensorRecord(
            tensor=name,
            shape=update.shape[1:] if len(update.shape) == 3 and update.shape[0] == 1 else update.shape,
            dtype=str(update.left.dtype).removeprefix("torch."),
            action="edited",
            reason="" if spectra else "zero update",
            method="inspect",
            update_norm=edit.norm,
            figures=figures,
            sweep=_sweep(edit, spectra, question) if spectra else {},
            **edit_fields(edit),
        )


def lost_at(spectra: Sequence[Tensor], rank: int) -> float:
    """Return ||dW - dW_rank||_F / ||dW||_F of all matrices of a module together, each cut off at a rank."""
    total = math.fsum(float(values.square().sum()) for values in spectra)
    return math.sqrt(math.fsum(float(values[rank:].square().sum()) for values in spectra) / total)


def _sweep(
    edit: EditRecord, spectra: Sequence[Tensor], question: Question
) -> dict[str, dict[str, float | None]]:
    # Of a stack of experts, the first one stands for all.
    values, shape = spectra[0], (edit.rank, edit.rank)
    swept: dict[str, dict[str, float | None]] = {}
    for energy in question.energies:
        k = Split(energy=energy).index(values, shape)
        c = mixing_coefficients(values, k, "monosoup")
        swept[f"{energy:g}"] = {
            "k": float(k),
            "p_k": c.energy_kept,
            "rho": c.rho,
            "cos_alpha": c.cos_alpha,
            "lambda_low": c.lambda_low,
            "lambda_high": c.lambda_high,
        }
    return swept


def adapter_table(records: Sequence[TensorRecord]) -> str:
    """Return one row a module: nominal rank, effective rank, and what smaller ranks would lose."""
    heads = ["module", "shape", "rank", "erank", "k", *(f"r({e:.0%})" for e in ENERGIES)]
    heads += [f"lost at r/{part}" for part in PARTS]
    rows = []
    for record in records:
        if record.k is None or record.effective_rank is None:
            continue
        found = record.figures
        cells = [record.tensor, "x".join(map(str, record.shape)), _whole(found["nominal_rank"])]
        cells += [f"{record.effective_rank:.1f}", f"{record.k:g}"]
        cells += [_whole(found[f"rank_for_{energy:g}"]) for energy in ENERGIES]
        rows.append([*cells, *(f"{found[f'lost_at_1/{part}'] or 0.0:.2%}" for part in PARTS)])
    return text_table(heads, rows)


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
