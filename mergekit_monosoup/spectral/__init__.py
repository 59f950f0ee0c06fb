"""The mathematics of one update: matrix view, spectrum, split, mixing, edit.

This room knows tensors only; it imports neither mergekit nor anything that reads a file. Its names are
imported on first use: the matrix view serves plans as well, which do without torch.
"""

from typing import TYPE_CHECKING

from mergekit_monosoup.spectral.idle import let_threads_sleep

if TYPE_CHECKING:
    from mergekit_monosoup.spectral.edit import EditOptions, edit_update, edit_weight
    from mergekit_monosoup.spectral.mixing import Coefficients, Mixing, mixing_coefficients
    from mergekit_monosoup.spectral.record import EditRecord, MatrixRecord
    from mergekit_monosoup.spectral.split import Split, effective_rank, energy_rank, split_index

# Before anything in this room brings scipy.
let_threads_sleep()

__all__ = [
    "Coefficients",
    "EditOptions",
    "EditRecord",
    "MatrixRecord",
    "Mixing",
    "Split",
    "edit_update",
    "edit_weight",
    "effective_rank",
    "energy_rank",
    "mixing_coefficients",
    "split_index",
]

_HOMES = {
    "edit": ("EditOptions", "edit_update", "edit_weight"),
    "mixing": ("Coefficients", "Mixing", "mixing_coefficients"),
    "record": ("EditRecord", "MatrixRecord"),
    "split": ("Split", "effective_rank", "energy_rank", "split_index"),
}


def __getattr__(name: str) -> object:
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
