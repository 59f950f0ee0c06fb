"""Score a model by a task of lm_eval, in this process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mergekit_monosoup.errors import InputError, ParameterError
from mergekit_monosoup.report.versions import installed_version
from mergekit_monosoup.search.evaluation import Measured
from mergekit_monosoup.search.functions import InMemory, Loaded

PREFIX = "lm-eval:"
_KEYS = {"metric": str, "limit": int, "num_fewshot": int, "batch_size": int}
# Where a task has several: what leaderboards show.
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "word_perplexity", "perplexity")


class LmEvaluation(InMemory):
    """A task of lm_eval: one that it brings, or that a YAML file describes."""

    def __init__(self, text: str, option: str, per_item: bool = False) -> None:
        """Load the task.

        Args:
            text: `lm-eval:TASK[?metric=acc_norm&limit=200&num_fewshot=5&batch_size=8]`, where the task is a
                name or a YAML file.
            option: that gave it, for messages.
            per_item: whether the scores of single documents are wanted.

        Raises:
            ParameterError: lm_eval is not installed, or knows no such task or metric.
        """
        self.text, self.option, self.per_item = text, option, per_item
        if importlib.util.find_spec("lm_eval") is None:
            raise ParameterError(f"{option}{text} needs lm_eval: pip install mergekit-monosoup[lm-eval]")
        from lm_eval.tasks import TaskManager

        name, _, query = text.removeprefix(PREFIX).partition("?")
        self._settings = _settings(query, f"{option}{text}")
        self._file = Path(name) if name.endswith((".yaml", ".yml")) else None
        if self._file is not None and not self._file.is_file():
            raise ParameterError(f"{option}{text}: there is no file {name}")
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self._manager = TaskManager(include_path=str(self._file.parent) if self._file else None)
        self._name = _task_of(self._file) if self._file else name
        if self._name not in self._manager.all_subtasks:
            raise ParameterError(
                f"{option}{text}: lm_eval knows no task {self._name!r} (a group is no task; name its tasks)"
            )
        try:
            task = self._manager.load_task_or_group(self._name)[self._name]
        except Exception as error:
            # Whatever the loading of data raises, or the code of a task.
            raise ParameterError(f"{option}{text}: the task cannot be loaded: {error}") from error
        directions: dict[str, bool] = task.higher_is_better()
        wanted = self._settings.pop("metric", None)
        self._metric = wanted or next((m for m in _PREFERRED if m in directions), next(iter(directions), ""))
        if self._metric not in directions:
            raise ParameterError(
                f"{option}{text}: the task has no metric {self._metric!r}; it has {', '.join(directions)}"
            )
        self.lower_is_better = not directions[self._metric]

    def digest(self) -> str:
        """Return a digest of the task's name, its settings, its file, and the version of lm_eval."""
        total = hashlib.sha256(b"per item" if self.per_item else b"")
        total.update(json.dumps([self._name, self._metric, sorted(self._settings.items())]).encode())
        total.update((installed_version("lm_eval") or "").encode())
        if self._file is not None:
            total.update(self._file.read_bytes())
        return total.hexdigest()

    def measure_loaded(self, loaded: Loaded) -> Measured:
        """Return the task's metric for a model as it is now.

        Raises:
            InputError: lm_eval fails, or its metric is not finite.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if loaded.tokenizer is None:
            raise InputError(f"{self.option}{self.text} needs a tokenizer, and the checkpoint has none")
        settings = {"batch_size": 1, **self._settings}
        model = HFLM(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=settings.pop("batch_size"),
            device=str(loaded.model.device),
        )
        try:
            found = simple_evaluate(
                model, tasks=[self._name], task_manager=self._manager, bootstrap_iters=0, **settings
            )
        except Exception as error:
            # Data and metrics of tasks are code of many authors.
            raise InputError(f"{self.option}{self.text} failed: {type(error).__name__}: {error}") from error
        value = _of_metric(found["results"][self._name], self._metric)
        if not math.isfinite(value):
            raise InputError(f"{self.option}{self.text}: {self._metric} is {value}, not a finite number")
        if not self.per_item:
            return Measured(value)
        samples = sorted(found["samples"][self._name], key=lambda sample: sample["doc_id"])
        items = [sample.get(self._metric) for sample in samples]
        if not all(isinstance(item, int | float) for item in items):
            raise InputError(f"{self.option}{self.text}: {self._metric} is no mean over documents")
        return Measured.of_items([float(item) for item in items], self.text)


def _settings(query: str, said: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        kind = _KEYS.get(key)
        if kind is None or (kind is int and not value.isdecimal()):
            raise ParameterError(f"{said}: {key}={value} is none of {', '.join(_KEYS)} with a fitting value")
        settings[key] = kind(value)
    return settings


def _task_of(file: Path) -> str:
    """Return the name that a task's file gives it."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Knows that `!function` is lm_eval's own tag, and not what it names."""

    Loader.add_constructor("!function", lambda loader, node: None)
    try:
        content = yaml.load(file.read_text("utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{file} is not valid YAML: {error}") from error
    name = content.get("task") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ParameterError(f"{file} has no `task:` with a name")
    return name


def _of_metric(results: dict[str, Any], metric: str) -> float:
    # Keys are of the form `acc,none`, with the filter behind the comma.
    values = [value for key, value in results.items() if key.partition(",")[0] == metric]
    return float(values[0]) if values and isinstance(values[0], int | float) else math.nan
