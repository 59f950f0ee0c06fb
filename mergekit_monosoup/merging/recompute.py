"""Compute tensors of a merged model again, from the recipe that it holds and the inputs that this names."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_monosoup import host
from mergekit_monosoup.errors import InputError
from mergekit_monosoup.merging.adapters import adapters_opened
from mergekit_monosoup.merging.prepared import Prepared
from mergekit_monosoup.merging.public_recipe import RECIPE
from mergekit_monosoup.merging.units import compute
from mergekit_monosoup.merging.verify import Recompute
from mergekit_monosoup.merging.writer import pieces


@contextmanager
def recomputing(folder: Path) -> Iterator[Recompute]:
    """Open the inputs of a merged model; yield what computes its tensors again, one core each.

    Args:
        folder: of the model, which holds its recipe. Relative paths in it count from the working directory.

    Raises:
        InputError: there is no recipe, or an input cannot be read.
    """
    file = folder / RECIPE
    if not file.is_file():
        raise InputError(f"{folder} holds no {RECIPE}, so nothing says what it was made of")
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text("utf-8")))
    options = MergeOptions(quiet=True)
    threads = torch.get_num_threads()
    # As the merge did it: the bytes depend on how many cores share a matrix.
    torch.set_num_threads(1)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="monosoup-verify-") as copies,
            adapters_opened(config, options, Path(copies)),
        ):
            host.open_models(config.referenced_models(), options)
            prepared = Prepared.of(config, options, [])
            units = {unit.name: unit for unit in prepared.units.units}

            def again(names: Sequence[str]) -> Iterator[tuple[str, str]]:
                for name in names:
                    if name in units:
                        digest = hashlib.sha256()
                        for piece in pieces(compute(units[name], prepared.units)):
                            digest.update(piece)
                        yield name, digest.hexdigest()

            yield again
    finally:
        torch.set_num_threads(threads)
