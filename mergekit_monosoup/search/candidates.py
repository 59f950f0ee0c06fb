"""Which candidates a recipe gives without any edit, and the scores of candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoint.headers import read_folder
from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.merging.opened import finetuned_models
from mergekit_monosoup.search.bench import Bench
from mergekit_monosoup.search.evaluation import Measured, digest_of_model
from mergekit_monosoup.search.journal import Journal
from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.search.space import Space
from mergekit_monosoup.search.tuning import GRID, Candidate, key_of

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

    @property
    def like(self) -> ModelReference:
        """The first fine-tuned checkpoint, the base where that is an adapter: loaded as candidates are."""
        return self.finetuned[0] if self.finetuned[0].lora is None else self.base

    @staticmethod
    def local(model: ModelReference, options: MergeOptions) -> Path:
        """Return the folder that a model without an adapter lies in."""
        return Path(model.local_path(cache_dir=options.transformers_cache))

    def tensors(self, options: MergeOptions) -> list[str]:
        """Return the names of the base's tensors."""
        return sorted(read_folder(str(self.base), self.local(self.base, options)).tensors)

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
    """Has candidates scored, each once for each content."""

    def __init__(self, work: Path, scores: Sequence[Score], contents: str, bench: Bench) -> None:
        """Open the journal in the folder.

        Args:
            work: the search's own folder.
            scores: what to score.
            contents: digest of the models; see `Models.digest`.
            bench: makes candidates.
        """
        self._scores, self._contents, self._bench = scores, contents, bench
        self._journal = Journal(work / "journal.jsonl")

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
        missing = self.missing(recipe, scores, folder)
        for score, value in zip(missing, self._bench.measured(recipe, missing, folder), strict=True):
            self.note(recipe, score, value, folder)
        return self.known(recipe, scores, folder)

    def missing(
        self, recipe: Mapping[str, Any], scores: Sequence[Score], folder: Path | None = None
    ) -> list[Score]:
        """Return the scores that the journal does not have of a recipe."""
        return [s for s in scores if self._journal.score(self._key(recipe, s, folder)) is None]

    def known(
        self, recipe: Mapping[str, Any], scores: Sequence[Score], folder: Path | None = None
    ) -> dict[str, float]:
        """Return the scores that the journal has of a recipe, by their names."""
        found = {s.name: self._journal.score(self._key(recipe, s, folder)) for s in scores}
        return {name: value for name, value in found.items() if value is not None}

    def items(self, recipe: Mapping[str, Any], score: Score) -> tuple[float, ...]:
        """Return the scores of items of what a recipe makes, by the journal; empty where it has none."""
        for folder in (None, Path()):
            found = self._journal.details(self._key(recipe, score, folder)).get("items")
            if found:
                return tuple(map(float, found))
        return ()

    def note(
        self, recipe: Mapping[str, Any], score: Score, found: Measured, folder: Path | None = None
    ) -> None:
        """Write a score into the journal."""
        items = {"items": list(found.items)} if found.items else {}
        self._journal.add(self._key(recipe, score, folder), found.value, name=score.name, **items)

    def _key(self, recipe: Mapping[str, Any], score: Score, folder: Path | None) -> str:
        written = "" if folder is None else "written"
        parts = (score.digest, self._contents, written, key_of(recipe))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
