"""Make candidates, one at a time, and have each scored."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.merging.in_memory import merge_in_memory
from mergekit_monosoup.merging.run import RunOptions, merge_to_folder
from mergekit_monosoup.search.evaluation import Measured
from mergekit_monosoup.search.functions import InMemory, Loaded
from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.spectral.parts import PartsStore


class Bench:
    """A place where one candidate lies at a time: in a folder for commands, in memory for functions."""

    def __init__(
        self, folder: Path, options: MergeOptions, parts: PartsStore, run_options: RunOptions, like: Path
    ) -> None:
        """Take what candidates are made with.

        Args:
            folder: of the candidate; deleted when it is scored.
            options: mergekit's own.
            parts: keeps the decompositions.
            run_options: how each candidate is merged.
            like: folder of a model like the candidates, for functions that score one in memory.
        """
        self._folder, self._like = folder, like
        self._options = options.model_copy(update={"write_model_card": False, "quiet": True})
        self._run = RunOptions(
            overwrite=True,
            restart=True,
            force_base=run_options.force_base,
            report=False,
            files_from=run_options.files_from,
            parts=parts,
        )
        self._model: Loaded | None = None
        LoaderCache().setup(options)
        #: seconds that candidates took to be made, without their evaluation
        self.making: list[float] = []

    def measured(
        self, recipe: Mapping[str, Any], scores: Sequence[Score], folder: Path | None = None
    ) -> Iterator[Measured]:
        """Yield scores of what a recipe makes, which lies in `folder` or is made for it.

        Raises:
            InputError: an evaluation fails.
        """
        place = folder
        loaded: Loaded | None = None
        try:
            for score in scores:
                if score.evaluation is None:
                    raise ConfigurationError(f"score {score.name} has no command")
                if folder is None and isinstance(score.evaluation, InMemory):
                    loaded = loaded or self._loaded(recipe)
                    yield score.evaluation.measure_loaded(loaded)
                else:
                    place = place or self._made(recipe)
                    yield score.evaluation.measure(place)
        finally:
            if folder is None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _loaded(self, recipe: Mapping[str, Any]) -> Loaded:
        """Return the model in memory with the weights that a recipe makes; nothing is written."""
        if self._model is None:
            self._model = Loaded(self._like)
        merge_in_memory(dict(recipe), self._options, self._model.put, self._folder.parent, self._run.parts)
        return self._model

    def _made(self, recipe: Mapping[str, Any]) -> Path:
        started = time.monotonic()
        merge_to_folder(as_yaml(recipe), self._folder, self._options, self._run)
        self.making.append(time.monotonic() - started)
        return self._folder


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as its file would have it."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
