"""Candidates of one recipe as folders that commands can score."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoint.headers import read_folder
from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.merging.in_memory import merge_in_memory
from mergekit_monosoup.merging.opened import finetuned_models
from mergekit_monosoup.merging.run import RunOptions, merge_to_folder
from mergekit_monosoup.search.evaluation import digest_of_model
from mergekit_monosoup.search.functions import FunctionEvaluation, Loaded
from mergekit_monosoup.search.journal import Journal
from mergekit_monosoup.search.parts_on_disk import PartsOnDisk
from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.search.space import Space
from mergekit_monosoup.search.tuning import GRID, Candidate, key_of

_CANDIDATE = "candidate"
# Of a recipe, what says which models go in and how they are mixed.
_MAKING = ("merge_method", "base_model", "models", "slices", "modules", "parameters")


class Models:
    """The base and the fine-tuned checkpoints of a recipe, and what they are without any edit."""

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        """Read which models a recipe names.

        Raises:
            ConfigurationError: there is no base, no other model, or they come by slices or modules.
        """
        if recipe.get("slices") or recipe.get("modules"):
            raise ConfigurationError(
                "tune takes recipes with `models:`; write yours without slices and modules"
            )
        config = MergeConfiguration.model_validate(recipe)
        if config.base_model is None:
            raise ConfigurationError(
                "the recipe has no `base_model`; tune compares with it, so name the checkpoint that the "
                "fine-tuning started from"
            )
        self.base, self.finetuned = config.base_model, finetuned_models(config)
        if not self.finetuned:
            raise ConfigurationError("the recipe lists no model besides its base")
        self._recipe = recipe

    def digest(self, options: MergeOptions) -> str:
        """Return a digest of all that lies in the checkpoints' folders."""
        cache = options.transformers_cache
        contents = [digest_of_model(model, cache) for model in (self.base, *self.finetuned)]
        return hashlib.sha256("\n".join(contents).encode()).hexdigest()

    def folder(self, options: MergeOptions) -> Path:
        """Return the folder of the first fine-tuned checkpoint, of the base where that is an adapter."""
        model = self.finetuned[0] if self.finetuned[0].lora is None else self.base
        return Path(model.local_path(cache_dir=options.transformers_cache))

    def tensors(self, options: MergeOptions) -> list[str]:
        """Return the names of the base's tensors."""
        folder = Path(self.base.local_path(cache_dir=options.transformers_cache))
        return sorted(read_folder(str(self.base), folder).tensors)

    def always(self, space: Space) -> list[Candidate]:
        """Return the plain alternatives: base, fine-tuned checkpoints, and Wise-FT between them."""
        tuned = [str(model) for model in self.finetuned]
        names = ["fine-tuned"] if len(tuned) == 1 else [f"fine-tuned {i}" for i in range(1, len(tuned) + 1)]
        result = [Candidate("base", {}, self._linear({str(self.base): 1.0}), plain=0.0)]
        for index, (name, model) in enumerate(zip(names, tuned, strict=True)):
            plain = 1.0 if index == 0 else None
            result.append(Candidate(name, {}, self._linear({model: 1.0}), plain=plain))
        for factor in GRID:
            name = f"Wise-FT {factor:g}"
            if space.plain is not None:
                values = space.plain(factor)
                made = space.apply(dict(self._recipe), values)
                result.append(Candidate(name, {"wise_ft": factor}, made, factor, values))
            else:
                weights = {str(self.base): 1 - factor} | {model: factor / len(tuned) for model in tuned}
                result.append(Candidate(name, {"wise_ft": factor}, self._linear(weights), factor))
        return result

    def _linear(self, weights: Mapping[str, float]) -> dict[str, Any]:
        rest = {key: value for key, value in self._recipe.items() if key not in _MAKING}
        models = [{"model": model, "parameters": {"weight": w}} for model, w in weights.items()]
        return {"merge_method": "linear", "models": models, **rest}


class Candidates:
    """Makes candidates in a folder, one at a time, and has each scored once for each content."""

    def __init__(
        self,
        work: Path,
        scores: Sequence[Score],
        contents: str,
        options: MergeOptions,
        parts: PartsOnDisk,
        run_options: RunOptions,
        folder: Path,
    ) -> None:
        """Open the journal in the folder.

        Args:
            work: the search's own folder.
            scores: what to score.
            contents: digest of the models; see `Models.digest`.
            options: mergekit's own.
            parts: keeps the decompositions.
            run_options: how each candidate is merged.
            folder: of a model like the candidates, for functions that score one in memory.
        """
        self._work, self._scores, self._contents = work, scores, contents
        self._options = options.model_copy(update={"write_model_card": False, "quiet": True})
        self._run = RunOptions(
            overwrite=True,
            restart=True,
            force_base=run_options.force_base,
            report=False,
            files_from=run_options.files_from,
            parts=parts,
        )
        self._journal = Journal(work / "journal.jsonl")
        self._folder = folder
        self._model: Loaded | None = None
        LoaderCache().setup(options)
        #: seconds that candidates took to be made, without their evaluation
        self.making: list[float] = []

    def evaluate(self, candidate: Candidate) -> dict[str, float]:
        """Return the scores of a candidate, from the journal where they are known.

        Raises:
            InputError: an evaluation fails.
        """
        return self.scored(candidate.recipe, self._scores)

    def scored(
        self, recipe: Mapping[str, Any], scores: Sequence[Score], folder: Path | None = None
    ) -> dict[str, float]:
        """Return scores of what a recipe makes, which lies in `folder` or is made for it."""
        place = folder
        found: dict[str, float] = {}
        loaded: Loaded | None = None
        try:
            for score in scores:
                written = "" if folder is None else "written"
                parts = (score.digest, self._contents, written, key_of(recipe))
                key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
                known = self._journal.score(key)
                if known is None:
                    if score.evaluation is None:
                        raise ConfigurationError(f"score {score.name} has no command")
                    if folder is None and isinstance(score.evaluation, FunctionEvaluation):
                        loaded = loaded or self._loaded(recipe)
                        known = score.evaluation.score_loaded(loaded)
                    else:
                        place = place or self._made(recipe)
                        known = score.evaluation.score(place)
                    self._journal.add(key, known, name=score.name)
                found[score.name] = known
        finally:
            if folder is None:
                shutil.rmtree(self._work / _CANDIDATE, ignore_errors=True)
        return found

    def _loaded(self, recipe: Mapping[str, Any]) -> Loaded:
        """Return the model in memory with the weights that a recipe makes; nothing is written."""
        if self._model is None:
            self._model = Loaded(self._folder)
        merge_in_memory(dict(recipe), self._options, self._model.put, self._work, self._run.parts)
        return self._model

    def _made(self, recipe: Mapping[str, Any]) -> Path:
        started = time.monotonic()
        folder = self._work / _CANDIDATE
        merge_to_folder(as_yaml(recipe), folder, self._options, self._run)
        self.making.append(time.monotonic() - started)
        return folder


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as its file would have it."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
