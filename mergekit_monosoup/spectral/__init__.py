"""The mathematics of one update: matrix view, spectrum, split, mixing, edit.

This room knows tensors only; it imports neither mergekit nor anything that reads a file.
"""

from mergekit_monosoup.spectral.edit import (
    EditOptions,
    EditRecord,
    MatrixRecord,
    edit_update,
    edit_weight,
)
from mergekit_monosoup.spectral.mixing import Coefficients, Mixing, mixing_coefficients
from mergekit_monosoup.spectral.split import effective_rank, energy_rank, split_index

__all__ = [
    "Coefficients",
    "EditOptions",
    "EditRecord",
    "MatrixRecord",
    "Mixing",
    "edit_update",
    "edit_weight",
    "effective_rank",
    "energy_rank",
    "mixing_coefficients",
    "split_index",
]
