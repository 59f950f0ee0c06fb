"""Score the candidates of a search on the workers of a Ray cluster, several at once.

Each worker makes whole candidates in a folder of its own and runs the evaluations beside it. The driver keeps
journal and trials. A candidate that is made twice comes to the same, so what a lost worker had is done again.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoint.pinned import revisions_of
from mergekit_monosoup.cluster.connection import RayOptions, connected
from mergekit_monosoup.cluster.pool import Driver, Pool
from mergekit_monosoup.merging.run import RunOptions
from mergekit_monosoup.search.bench import Bench
from mergekit_monosoup.search.candidates import Candidates, Models
from mergekit_monosoup.search.evaluation import Measured
from mergekit_monosoup.search.parts_on_disk import PartsOnDisk
from mergekit_monosoup.search.scores import Score, evaluation_of
from mergekit_monosoup.search.tuning import Candidate, Scored, Scoring

WORKERS = "workers"
_TOKEN = "token"


@dataclass(frozen=True)
class Place:
    """Where a search lies: its folder, what a file in it says, the decompositions below it and their room."""

    work: str
    token: str
    parts: str
    scratch: int


@dataclass(frozen=True)
class Asked:
    """A candidate to be scored: its place in the order, its recipe, and the names of the scores."""

    index: int
    recipe: Mapping[str, Any]
    scores: tuple[str, ...]


class Scorer:
    """What an actor does: make candidates and score them, one at a time."""

    def __init__(
        self,
        scores: Sequence[tuple[str, str, str, bool]],
        options: dict[str, Any],
        run: tuple[bool, str | None],
        like: str,
        place: Place,
        cpus: float,
        driver: Driver,
    ) -> None:
        """Look for the search's folder; without it, work in a temporary one.

        Args:
            scores: name, text and option of each, and whether it is of items.
            options: mergekit's own, as JSON.
            run: `force_base` and `files_from` of the merges.
            like: model that functions are handed with the weights of a candidate.
            place: where the search lies.
            cpus: processors to compute on.
            driver: the process that these come from.
        """
        from mergekit_monosoup.registry import register

        register()
        # Commands and modules of functions are named from there.
        driver.follow()
        torch.set_num_threads(max(1, int(cpus)))
        self._scores = {
            name: Score(name, evaluation_of(text, option, items)) for name, text, option, items in scores
        }
        shared = _says(Path(place.work) / WORKERS / _TOKEN, place.token)
        parent = Path(place.work) / WORKERS if shared else None
        self._folder = Path(tempfile.mkdtemp(prefix="scorer-", dir=parent))
        parts = Path(place.parts) if shared else self._folder / "parts"
        self._bench = Bench(
            self._folder / "candidate",
            MergeOptions.model_validate(options),
            PartsOnDisk(parts, place.scratch),
            RunOptions(force_base=run[0], files_from=run[1]),
            Path(ModelReference.parse(like).local_path(cache_dir=options.get("transformers_cache"))),
        )

    def score(self, asked: Asked) -> tuple[int, list[Measured], float]:
        """Return the place of a candidate, its scores in the order asked for, and the seconds they took."""
        started = time.monotonic()
        scores = [self._scores[name] for name in asked.scores]
        values = list(self._bench.measured(asked.recipe, scores))
        return asked.index, values, round(time.monotonic() - started, 3)

    def leave(self) -> None:
        """Delete what lies here."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _says(file: Path, text: str) -> bool:
    try:
        return file.read_text("utf-8") == text
    except OSError:
        return False


@contextmanager
def scored_on_ray(
    candidates: Candidates,
    models: Models,
    scores: Sequence[Score],
    options: MergeOptions,
    run_options: RunOptions,
    place: tuple[Path, PartsOnDisk],
    most: int,
    cluster: RayOptions,
) -> Iterator[tuple[Scoring, int]]:
    """Yield what scores candidates on a cluster, and how many at once.

    Args:
        candidates: with the journal.
        models: of the recipe.
        scores: what to score.
        options: mergekit's own.
        run_options: how candidates are merged.
        place: the search's folder, and the decompositions in it.
        most: candidates at once, where the cluster has room for more.
        cluster: where the workers run.

    Raises:
        ConfigurationError: the cluster cannot be reached, or is too small.
    """
    work, parts = place
    token = secrets.token_hex(16)
    (work / WORKERS).mkdir(parents=True, exist_ok=True)
    (work / WORKERS / _TOKEN).write_text(token, "utf-8")
    references = (models.base, *models.finetuned)
    folders = {m: Path(models.local(m, options)) for m in references if m.lora is None}
    pins = revisions_of(references, folders, options.transformers_cache)
    said = {score.name: score.evaluation for score in scores if score.evaluation is not None}
    asked = [(name, e.text, e.option, e.per_item) for name, e in said.items()]
    arguments = (
        asked,
        options.model_dump(mode="json"),
        (run_options.force_base, run_options.files_from),
        _pinned(str(models.like), pins),
        Place(str(work), token, str(parts.folder), parts.room),
        cluster.cpus or 1,
        Driver.here(),
    )
    with connected(cluster):
        pool = Pool(Scorer, arguments, cluster, most=most, on_gpu=options.cuda, in_flight=1)
        try:
            yield lambda batch: _scored(pool, candidates, scores, pins, batch), pool.size
            pool.on_all("leave")
        finally:
            pool.close()
            shutil.rmtree(work / WORKERS, ignore_errors=True)


def _scored(
    pool: Pool,
    candidates: Candidates,
    scores: Sequence[Score],
    pins: Mapping[str, str],
    batch: Sequence[Candidate],
) -> Iterator[Scored]:
    """Yield what comes of candidates, in their order; what the journal has is not asked for again."""
    missing = [candidates.missing(candidate.recipe, scores) for candidate in batch]
    jobs = [
        (Asked(i, _pinned(candidate.recipe, pins), tuple(score.name for score in missing[i])),)
        for i, candidate in enumerate(batch)
        if missing[i]
    ]
    seconds = {i: 0.0 for i in range(len(batch)) if not missing[i]}
    awaited = 0
    for came in chain([None], pool.each("score", jobs)):
        if came is not None:
            index, values, seconds[came[0]] = came
            for score, value in zip(missing[index], values, strict=True):
                candidates.note(batch[index].recipe, score, value)
        while awaited in seconds:
            yield Scored(candidates.known(batch[awaited].recipe, scores), seconds[awaited])
            awaited += 1


def _pinned(value: Any, pins: Mapping[str, str]) -> Any:
    """Return a recipe, or a part of one, whose models are at the driver's commits on the Hub."""
    if isinstance(value, Mapping):
        return {key: _pinned(part, pins) for key, part in value.items()}
    if isinstance(value, list):
        return [_pinned(part, pins) for part in value]
    if not isinstance(value, str) or not pins:
        return value
    parts = [f"{part.partition('@')[0]}@{pins[part]}" if part in pins else part for part in value.split("+")]
    return "+".join(parts)
