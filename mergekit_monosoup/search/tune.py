"""Tune a recipe by commands: from the recipe to the chosen model in its folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from mergekit.options import MergeOptions

from mergekit_monosoup.checkpoint.output import free_bytes, gigabytes
from mergekit_monosoup.checkpoint.work_folder import WorkFolder
from mergekit_monosoup.errors import ConfigurationError
from mergekit_monosoup.merging.run import RunOptions, merge_to_folder
from mergekit_monosoup.report.page.folder import write_page_into
from mergekit_monosoup.search import outcome_file
from mergekit_monosoup.search.bench import Bench, as_yaml
from mergekit_monosoup.search.candidates import Candidates, Models
from mergekit_monosoup.search.card import describe
from mergekit_monosoup.search.choice import Rule
from mergekit_monosoup.search.fisher import guess
from mergekit_monosoup.search.intervals import Interval, intervals
from mergekit_monosoup.search.on_ray import WORKERS, scored_on_ray
from mergekit_monosoup.search.parts_on_disk import PartsOnDisk
from mergekit_monosoup.search.scores import Keep, Score, parse_keep
from mergekit_monosoup.search.space import GROUPS, By, Space, default_space, space_of_file
from mergekit_monosoup.search.study import Study
from mergekit_monosoup.search.tuning import Outcome, conclude, in_words, key_of, one_by_one, search

WORK = ".tune"
STUDY = "study.db"
_PARTS, _CHOSEN, _CANDIDATE = "parts", "chosen", "candidate"
# A written model is what the trial was but for the order of a few sums.
_SAME = 1e-3


@dataclass(frozen=True)
class TuneOptions:
    """How a search goes.

    Args:
        scores: what it goes by.
        trials: proposals to try, beside the plain alternatives.
        seed: of the proposals.
        keep: demands on the scores of the chosen one, as `--keep` has them.
        choose: the rule among the trials of the front.
        holdout: scored at the end only, on base, fine-tuned checkpoint, best Wise-FT and the chosen one.
        by: what the strength of the edit depends on besides.
        space: content of a file that describes what is searched; absent: the method's own space.
        scratch: bytes for decompositions; absent: half of what is free.
        resume, restart: go on with, or delete, what an earlier search has left.
        overwrite: the result may replace what lies in its place.
    """

    scores: tuple[Score, ...]
    trials: int = 20
    seed: int = 0
    keep: tuple[str, ...] = ()
    choose: Rule = "nearest"
    holdout: tuple[Score, ...] = ()
    by: By | None = None
    space: Any = None
    scratch: int | None = None
    resume: bool = False
    restart: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Tuned:
    """What a search found and what was written of it."""

    outcome: Outcome
    written: dict[str, float]
    holdout: dict[int, dict[str, float]]
    intervals: tuple[Interval, ...] = ()


def work_folder(out: Path) -> Path:
    """Return the folder beside the result that keeps a search's trials."""
    return out.with_name(out.name + WORK)


def tune_to_folder(
    recipe: str,
    out_path: Path,
    options: MergeOptions,
    tune: TuneOptions,
    run_options: RunOptions,
    progress: Callable[[str], None],
) -> Tuned:
    """Search the parameters of a recipe and write the model that was chosen.

    The trials lie in `OUT.tune/study.db` (Optuna, SQLite) and stay there. The chosen model is written by an
    ordinary merge, scored once more, and put into its place whole.

    Args:
        recipe: the YAML text.
        out_path: folder of the result.
        options: mergekit's own.
        tune: how the search goes.
        run_options: how merges run.
        progress: is told what happens.

    Raises:
        ConfigurationError: recipe, scores, space or folder are not usable.
        InputError: an evaluation fails, or no trial meets the demands.
    """
    content = yaml.safe_load(recipe)
    if not isinstance(content, dict):
        raise ConfigurationError("the recipe is not a mapping")
    keep = parse_keep(tune.keep, tune.scores)
    models = Models(content)
    space = _space(tune, content, models, options)
    out = Path(os.path.realpath(out_path))
    work = work_folder(out)
    _take(work, tune)
    ours = tune.resume and (out / outcome_file.FILE_NAME).exists()
    place = WorkFolder(out)
    place.open(overwrite=tune.overwrite or ours, restart=tune.restart or tune.resume)
    try:
        work.mkdir(parents=True, exist_ok=True)
        result = _tuned(content, models, space, work, place, options, tune, keep, run_options, progress)
        place.finish()
    except BaseException:
        place.abandon(keep=False)
        raise
    shutil.rmtree(work / _PARTS, ignore_errors=True)
    return result


def _tuned(
    content: dict[str, Any],
    models: Models,
    space: Space,
    work: Path,
    place: WorkFolder,
    options: MergeOptions,
    tune: TuneOptions,
    keep: Sequence[Keep],
    run_options: RunOptions,
    progress: Callable[[str], None],
) -> Tuned:
    progress("reading the checkpoints")
    contents = models.digest(options)
    settings = {
        "recipe": key_of(content),
        "checkpoint": contents,
        "seed": str(tune.seed),
        "space": json.dumps([tune.by, tune.space, sorted(map(repr, space.ranges.items()))]),
        **{f"score {s.name}": f"{s.digest} {s.sign}" for s in tune.scores},
    }
    study = Study(work / STUDY, tune.scores, space, tune.seed, settings)
    scratch = free_bytes(work) // 2 if tune.scratch is None else tune.scratch
    digest = hashlib.sha256(contents.encode()).hexdigest()[:16]
    parts = PartsOnDisk(work / _PARTS / digest, scratch)
    bench = Bench(work / _CANDIDATE, options, parts, run_options, models.local(models.like, options))
    candidates = Candidates(work, tune.scores, contents, bench)
    always = models.always(space)
    if run_options.ray is None:
        search(study, space, content, always, tune.trials, one_by_one(candidates.evaluate), progress)
    else:
        most = max(tune.trials, len(always))
        with scored_on_ray(
            candidates, models, tune.scores, options, run_options, (work, parts), most, run_options.ray
        ) as (score, at_once):
            search(study, space, content, always, tune.trials, score, progress, at_once)
    if parts.held:
        progress(f"kept {gigabytes(parts.held)} of decompositions in {work / _PARTS} meanwhile")
    outcome = conclude(study, tune.scores, keep, tune.choose)
    written = _write(outcome, candidates, work / _CHOSEN, options, tune, run_options)
    for line in differences(outcome, written):
        progress(line)
    holdout: dict[int, dict[str, float]] = {}
    if tune.holdout:
        for index in dict.fromkeys((outcome.base, outcome.finetuned, outcome.wise_ft, outcome.chosen)):
            trial = outcome.trials[index]
            folder = work / _CHOSEN if index == outcome.chosen else None
            holdout[index] = candidates.scored(trial.recipe, tune.holdout, folder)
            progress(f"{trial.name}, not seen by the search: {in_words(holdout[index])}")
    scored = (*tune.scores, *tune.holdout)
    sure = intervals(outcome, scored, lambda trial, score: candidates.items(trial.recipe, score), tune.seed)
    if options.write_model_card:
        describe(work / _CHOSEN, place.out.name, outcome, tune.scores, holdout, sure)
    held = outcome_file.content(outcome, tune.scores, keep, tune.seed, written, holdout, sure)
    outcome_file.write(work / _CHOSEN / outcome_file.FILE_NAME, held)
    write_page_into(work / _CHOSEN, place.out.name)
    place.path.rmdir()
    shutil.move(work / _CHOSEN, place.path)
    return Tuned(outcome, written, holdout, sure)


def differences(outcome: Outcome, written: dict[str, float]) -> list[str]:
    """Return a line for each score of the written model that is not what its trial said."""
    said = outcome.best.scores
    return [
        f"{name}: the written model scores {value:g}, its trial {said[name]:g}"
        for name, value in written.items()
        if abs(value - said[name]) > _SAME * max(abs(said[name]), _SAME)
    ]


def _write(
    outcome: Outcome,
    candidates: Candidates,
    folder: Path,
    options: MergeOptions,
    tune: TuneOptions,
    run_options: RunOptions,
) -> dict[str, float]:
    """Write the chosen model as `merge` would, with its recipe, and score what was written."""
    recipe = outcome.best.recipe
    merge_to_folder(
        as_yaml(recipe), folder, options, replace(run_options, overwrite=True, restart=True, parts=None)
    )
    return candidates.scored(recipe, tune.scores, folder)


def _space(tune: TuneOptions, recipe: dict[str, Any], models: Models, options: MergeOptions) -> Space:
    if tune.space is not None:
        if tune.by is not None:
            raise ConfigurationError("--by and --space exclude each other; write all ranges into --space")
        return space_of_file(tune.space, recipe)
    names = models.tensors(options) if tune.by == "module" else ()
    factors: list[float] = []
    if tune.by == "fisher":
        if any(model.lora is not None for model in models.finetuned):
            raise ConfigurationError(
                "--by fisher loads the fine-tuned checkpoint whole; merge the adapter first"
            )
        factors = guess(models.local(models.base, options), models.local(models.like, options), GROUPS)
    return default_space(recipe, tune.by, names, factors)


def _take(work: Path, tune: TuneOptions) -> None:
    """Refuse what an earlier search has left, or delete it, as was asked for."""
    if not (work / STUDY).exists():
        return
    if tune.restart:
        for name in (_PARTS, _CHOSEN, _CANDIDATE, WORKERS):
            shutil.rmtree(work / name, ignore_errors=True)
        for file in (work / STUDY, work / "journal.jsonl"):
            file.unlink(missing_ok=True)
    elif not tune.resume:
        raise ConfigurationError(
            f"{work} holds an earlier search; pass --resume to go on with it, or --restart to delete it and "
            "begin again"
        )
