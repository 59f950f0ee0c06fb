"""Scores by tasks of lm_eval, on the demo's pair and a task whose data lies beside it."""

from __future__ import annotations

import json

import pytest
from commands import ROOT, recipe, write_config
from tuned import found, tune

from mergekit_monosoup.errors import ParameterError
from mergekit_monosoup.search.functions import Loaded
from mergekit_monosoup.search.scores import evaluation_of

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

MODELS = ROOT / "examples" / "models"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{right}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    higher_is_better: true
  - metric: acc_norm
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Which of two endings a model finds likelier, of sentences of two kinds."""
    folder = tmp_path_factory.mktemp("tasks")
    made = []
    for name, words in (
        ("everyday", ["the", "cat", "sat", "on"]),
        ("legal", ["the", "licensee", "shall", "not"]),
    ):
        rows = [
            {"start": " ".join(words[: 1 + i % 4]), "choices": [" and", " zq"], "right": i % 2}
            for i in range(12)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        made.append(folder / f"{name}.yaml")
        made[-1].write_text(TASK.format(name=name, data=data))
    return made


def test_tasks_are_scores(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = write_config(tmp_path, recipe(MODELS / "base", MODELS / "finetuned"))
    out = tmp_path / "tuned"
    tune(
        file,
        out,
        "--lm-eval",
        f"{tasks[0]}?metric=acc,{tasks[1]}?limit=6&batch_size=4",
        "--per-item",
        "--trials",
        1,
    )
    held = found(out)
    assert held["scores"] == [
        {"name": "everyday", "lower_is_better": False},
        {"name": "legal", "lower_is_better": False},
    ]
    for trial in held["trials"]:
        assert (trial["scores"]["everyday"] * 12) % 1 == pytest.approx(0, abs=1e-6)
        assert (trial["scores"]["legal"] * 6) % 1 == pytest.approx(0, abs=1e-6)
    assert {entry["items"] for entry in held["intervals"]} <= {12, 6}
    # What was written scores what lm_eval says of it.
    again = evaluation_of(f"lm-eval:{tasks[0]}?metric=acc", "--score x=")
    assert again.measure_loaded(Loaded(out)).value == pytest.approx(held["written"]["everyday"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no_such_task_at_all", "knows no task 'no_such_task_at_all'"),
        ("missing.yaml", "there is no file missing.yaml"),
        ("{task}?metric=bleu", "has no metric 'bleu'; it has acc, acc_norm"),
        ("{task}?limit=many", "limit=many is none of"),
        ("{task}?colour=red", "colour=red is none of"),
    ],
)
def test_slips_are_named(tasks, text, said):
    with pytest.raises(ParameterError, match=said.replace("?", r"\?")):
        evaluation_of("lm-eval:" + text.format(task=tasks[0]), "--lm-eval ")
