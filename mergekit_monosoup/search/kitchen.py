"""Make soups of checkpoints and score them, once for each content."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.merging.run import RunOptions, merge_to_folder
from mergekit_monosoup.search.evaluation import Evaluation, digest_of_model
from mergekit_monosoup.search.journal import Journal

LOG = logging.getLogger(__name__)


def soup_recipe(models: Sequence[str]) -> str:
    """Return the mergekit recipe of the plain mean of the models.

    Every model counts once, whatever the order in which it came in; mergekit's `linear` sums in
    float32 and rounds once to the dtype that the models are stored in.
    """
    recipe = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
    }
    return yaml.safe_dump(recipe, sort_keys=False)


class Kitchen:
    """The candidates of one search, their evaluation and its journal."""

    def __init__(
        self,
        candidates: Sequence[str],
        evaluation: Evaluation,
        journal: Journal,
        options: MergeOptions,
        workspace: Path,
        progress: Callable[[str], None] = LOG.info,
    ) -> None:
        """Look at the candidates' files.

        Args:
            candidates: models as recipes name them.
            evaluation: what scores a checkpoint.
            journal: what was scored before.
            options: mergekit's own options.
            workspace: an existing folder that the soups under test are written into.
            progress: told what is being done.

        Raises:
            ConfigurationError: a candidate is listed twice.
        """
        if len(set(candidates)) < len(candidates):
            raise ConfigurationError("a checkpoint is listed twice; list every candidate once")
        self.candidates = list(candidates)
        self._evaluation, self._journal, self._options = evaluation, journal, options
        self._workspace, self._progress = workspace, progress
        LoaderCache().setup(options)
        self._references = [ModelReference.parse(candidate) for candidate in candidates]
        progress(f"reading {len(self.candidates)} checkpoints")
        cache = options.transformers_cache
        self._contents = [digest_of_model(reference, cache) for reference in self._references]
        self._command = evaluation.digest()
        self.evaluations = 0

    def score(self, members: Sequence[int]) -> float:
        """Return the score of the mean of the members, from the journal where it is known.

        Raises:
            InputError: the evaluation fails.
        """
        key = self._key(members)
        known = self._journal.score(key)
        names = [self.candidates[index] for index in members]
        if known is not None:
            self._progress(f"{' + '.join(names)}: {known:g} (from the journal)")
            return known
        started = time.monotonic()
        score = self._evaluated(members)
        self.evaluations += 1
        seconds = round(time.monotonic() - started, 3)
        self._journal.add(key, score, models=names, command=self._evaluation.arguments, seconds=seconds)
        self._progress(f"{' + '.join(names)}: {score:g}")
        return score

    def serve(self, members: Sequence[int], out: Path, run_options: RunOptions) -> str:
        """Write the mean of the members, with its recipe, into `out`, and return the recipe."""
        recipe = soup_recipe([self.candidates[index] for index in members])
        merge_to_folder(recipe, out, self._options, run_options)
        return recipe

    def _evaluated(self, members: Sequence[int]) -> float:
        reference = self._references[members[0]]
        if len(members) == 1 and reference.lora is None:
            return self._evaluation.score(self._local(reference))
        folder = Path(tempfile.mkdtemp(prefix="soup-", dir=self._workspace))
        quiet = self._options.model_copy(update={"write_model_card": False, "quiet": True})
        try:
            merge_to_folder(soup_recipe([self.candidates[i] for i in members]), folder, quiet)
            return self._evaluation.score(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _key(self, members: Sequence[int]) -> str:
        # A mean does not depend on the order of its members.
        contents = sorted(self._contents[index] for index in members)
        return hashlib.sha256("\n".join([self._command, *contents]).encode()).hexdigest()

    def _local(self, reference: ModelReference) -> Path:
        return Path(reference.local_path(cache_dir=self._options.transformers_cache)).resolve()
