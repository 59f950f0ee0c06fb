"""`mergekit-monosoup tune` with scores that are real commands."""

from __future__ import annotations

import importlib.util
import os
import sys

import optuna
import pytest
import torch
import yaml
from checkpoints import load_tensors
from click.testing import CliRunner
from commands import ROOT, our_command, run, write_config
from huggingface_hub import ModelCard, metadata_load
from safetensors.torch import save_file
from tuned import GRID, SCRIPT, calls, found, pair_of, tune, write_task

from mergekit_monosoup.cli import main
from mergekit_monosoup.search.space import default_space

models = pytest.fixture(scope="module")(pair_of)
task = pytest.fixture(write_task)


def test_searches_and_writes_what_merge_would(task, models, tmp_path):
    file, options, log = task
    out = tmp_path / "tuned"
    output = tune(file, out, *options, "--trials", 3, "--seed", 1)
    held = found(out)
    trials = held["trials"]
    assert [trial["name"] for trial in trials[:6]] == ["base", "fine-tuned", *GRID]
    assert [trial["wise_ft"] for trial in trials[:6]] == [0, 1, 0.3, 0.5, 0.7, 0.9]
    assert [trial["searched"] for trial in trials] == [False] * 6 + [True] * 3
    assert all(set(trial["scores"]) == {"id", "ood"} and trial["seconds"] > 0 for trial in trials)
    assert held["seed"] == 1
    assert "optuna" in held["versions"]
    # Each candidate is scored once by each command, the written model once more.
    assert len(calls(log)) == 2 * len(trials) + 2
    # The choice, by its definition.
    values = [(trial["scores"]["id"], trial["scores"]["ood"]) for trial in trials]
    on_front = [not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in values) for a in values]
    assert [trial["on_front"] for trial in trials] == on_front
    best = [min(value[j] for value in values) for j in (0, 1)]
    unit = [abs(values[0][j] - values[1][j]) for j in (0, 1)]
    distance = [sum(((v[j] - best[j]) / unit[j]) ** 2 for j in (0, 1)) for v in values]
    assert held["chosen"] == min((i for i, good in enumerate(on_front) if good), key=distance.__getitem__)
    chosen = trials[held["chosen"]]
    # What lies there is the ordinary merge of the recipe that lies beside it.
    made = yaml.safe_load((out / "mergekit_config.yml").read_text())
    result = our_command(tmp_path / "again", made, "--quiet")
    assert result.exit_code == 0, result.output
    for name, tensor in load_tensors(tmp_path / "again" / "out").items():
        assert torch.equal(tensor, load_tensors(out)[name]), name
    assert (out / "monosoup_report.jsonl").exists() is (made["merge_method"] == "monosoup")
    assert held["written"] == pytest.approx(chosen["scores"], rel=1e-5)
    page = (out / "monosoup_report.html").read_text("utf-8")
    assert f"chosen among {len(trials)} trials of a search: {chosen['name']} (" in page
    assert str(tmp_path) not in page
    assert "the written model scores" not in output
    table = output[output.index("trial ", output.index("trial 3 of 3")) :]
    assert sum("CHOSEN" in line for line in output.splitlines()) == 1
    assert chosen["name"] in table
    # The search stays, its scratch does not.
    assert sorted(path.name for path in (tmp_path / "tuned.tune").iterdir()) == ["journal.jsonl", "study.db"]
    assert not (tmp_path / "tuned.partial").exists()
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'tuned.tune' / 'study.db'}")
    assert len(study.trials) == len(trials)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]


def test_resume_repeats_nothing_and_goes_where_a_longer_search_would_have(task, tmp_path):
    file, options, log = task
    tune(file, tmp_path / "long", *options, "--trials", 8)
    log.unlink()
    short = tmp_path / "short"
    tune(file, short, *options, "--trials", 7)
    log.unlink()
    assert "pass --resume" in tune(file, short, *options, "--trials", 7, "--overwrite", code=1)
    tune(file, short, *options, "--trials", 7, "--resume")
    assert not log.exists()
    tune(file, short, *options, "--trials", 8, "--resume")
    assert sum("candidate" in call for call in calls(log)) == 2

    def parameters(out):
        return [(trial["parameters"], trial["scores"]) for trial in found(out)["trials"]]

    assert parameters(short) == parameters(tmp_path / "long")
    # Another seed, recipe or command is another search.
    assert "another seed" in tune(file, short, *options, "--seed", 5, "--resume", code=1)
    other = write_config(tmp_path, {**yaml.safe_load(file.read_text()), "dtype": "float32"})
    assert "another recipe" in tune(other, short, *options, "--resume", code=1)
    (tmp_path / "score.py").write_text(SCRIPT + "\n# changed")
    assert "another score id, another score ood" in tune(file, short, *options, "--resume", code=1)
    log.unlink()
    tune(file, short, *options, "--trials", 0, "--restart", "--overwrite")
    assert len(calls(log)) == 2 * 6 + 2


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes(task, tmp_path):
    file, options, log = task
    out = tmp_path / "tuned"
    arguments = [str(file), str(out), *options, "--trials", "2"]
    whole = 2 * (6 + 2) + 2
    for moment in (3, 14, whole):
        (tmp_path / "stop").write_text(str(moment))
        command = [sys.executable, "-m", "mergekit_monosoup", "tune", *arguments, "--resume"]
        done = run(command, ROOT, check=False)
        assert done.returncode == -9, done.stdout
        assert len(calls(log)) == moment
        assert not out.exists()
        # The call in which the search was killed has no answer, and is all that is asked again.
        log.write_text("".join(line + "\n" for line in calls(log)[:-1]))
    (tmp_path / "stop").unlink()
    tune(*arguments, "--resume")
    assert len(calls(log)) == whole
    assert len(found(out)["trials"]) == 8
    assert not (tmp_path / "tuned.partial").exists()


def test_wise_ft_can_win_and_then_it_is_said(task, models, tmp_path):
    file, options, _ = task
    base, tuned = (load_tensors(folder) for folder in models)
    for name in ("id", "ood"):
        half = {n: (w0.double() + 0.5 * (tuned[n].double() - w0.double())).float() for n, w0 in base.items()}
        save_file(half, tmp_path / f"{name}.safetensors")
    output = tune(file, tmp_path / "tuned", *options, "--trials", 2)
    assert "plain Wise-FT wins: no edit that was tried is better by these scores than Wise-FT 0.5" in output
    held = found(tmp_path / "tuned")
    assert held["trials"][held["chosen"]]["name"] == "Wise-FT 0.5"
    assert held["best_wise_ft"] == held["chosen"]


def test_demands_and_what_the_search_must_not_see(task, tmp_path):
    file, options, log = task
    command = options[1].partition("=")[2]
    out = tmp_path / "tuned"
    output = tune(
        file,
        out,
        *options,
        "--trials",
        1,
        "--keep",
        "id>=-0.5",
        "--holdout",
        f"unseen={command}",
        "--seed",
        2,
    )
    held = found(out)
    trials = held["trials"]
    tuned = trials[1]["scores"]["id"]
    allowed = [i for i, trial in enumerate(trials) if trial["scores"]["id"] <= tuned + 0.5]
    assert held["chosen"] == min(allowed, key=lambda i: trials[i]["scores"]["ood"])
    assert held["keep"] == ["id>=-0.5"]
    seen = {i for i, trial in enumerate(trials) if "holdout" in trial}
    assert seen == {0, 1, held["best_wise_ft"], held["chosen"]}
    assert "on what the search has not seen" in output
    log.unlink()
    refused = tune(file, out, *options, "--trials", 1, "--seed", 2, "--keep", "id>=999", "--resume", code=1)
    assert "no trial meets --keep" in refused
    # All that was found is there for another demand.
    assert not log.exists()
    assert found(out) == held


def test_refusals_before_anything_is_asked(task, models, tmp_path):
    file, options, log = task
    out = tmp_path / "tuned"
    assert "NAME=COMMAND" in tune(file, out, "--score", "echo {model}", code=1)
    assert "there are id, ood" in tune(file, out, *options[:-1], "--lower-is-better", "odd", code=1)
    assert "exclude each other" in tune(file, out, *options, "--by", "depth", "--space", file, code=1)
    linear = write_config(tmp_path, {**yaml.safe_load(file.read_text()), "merge_method": "linear"})
    assert "pass it by --space" in tune(linear, out, *options, code=1)
    baseless = write_config(tmp_path, {"merge_method": "linear", "models": [{"model": str(models[1])}]})
    assert "no `base_model`" in tune(baseless, out, *options, code=1)
    assert "not a size" in tune(file, out, *options, "--scratch", "much", code=2)
    out.mkdir()
    (out / "file").write_text("")
    assert "not empty" in tune(file, out, *options, code=1)
    assert not log.exists()
    assert not (tmp_path / "tuned.tune").exists()


def test_a_failing_command_loses_nothing(task, tmp_path):
    file, options, _ = task
    out = tmp_path / "tuned"
    os.rename(tmp_path / "ood.safetensors", tmp_path / "away")
    # Not an argument that is a file: the search's settings stay what they are.
    assert "ended with status 1" in tune(file, out, *options, "--trials", 0, code=1)
    assert not out.exists()
    assert not (tmp_path / "tuned.partial").exists()


def test_strength_may_depend_on_the_place(task, tmp_path):
    file, options, _ = task
    out = tmp_path / "tuned"
    tune(file, out, *options, "--trials", 7, "--by", "module")
    trials = found(out)["trials"]
    assert {"attention", "mlp", "embeddings"} <= trials[-1]["parameters"].keys()
    assert len(trials) == 13


def test_recipes_of_a_place():
    plain = {"merge_method": "monosoup", "parameters": {"energy": 0.8, "min_relative_update": 0.1}}
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    cases = {
        "depth": (["first layer", "last layer"], [0.25, 0.5]),
        "layer-group": ([f"layers {i} of 4" for i in (1, 2, 3, 4)], [0.25, 0.5, 0.75, 1.0]),
        "module": (
            ["attention", "mlp"],
            [
                {"filter": "self_attn", "value": 0.25},
                {"filter": "attn", "value": 0.25},
                {"filter": "mlp", "value": 0.5},
                {"value": 0.5},
            ],
        ),
    }
    for by, (factors, alpha) in cases.items():
        space = default_space(plain, by, names)
        assert list(space.ranges)[3:] == factors
        values = {"alpha": 0.5, "split": "effective_rank", "mixing": "high"}
        values |= {name: (i + 1) / 2 for i, name in enumerate(factors)}
        made = space.apply(plain, values)["parameters"]
        assert made == {"min_relative_update": 0.1, "mixing": "high", "alpha": alpha}
        even = space.apply(plain, space.plain(0.3))["parameters"]
        assert even == {"min_relative_update": 0.1, "alpha": 0.3, "edit": False}
        assert space.factor(space.plain(0.3)) == 0.3
        assert space.factor(values) is None


def test_a_file_describes_the_space_of_any_method(task, models, tmp_path):
    _, options, _ = task
    base, tuned = models
    ties = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"density": 0.5, "weight": 1.0}}],
    }
    space = tmp_path / "space.yaml"
    space.write_text(
        yaml.safe_dump(
            {
                "parameters": {"normalize": [True, False]},
                "models": {
                    str(tuned): {"density": {"low": 0.2, "high": 1.0}, "weight": {"low": 0.1, "high": 1}}
                },
            }
        )
    )
    out = tmp_path / "tuned"
    tune(write_config(tmp_path, ties), out, *options, "--trials", 2, "--space", space)
    trials = found(out)["trials"]
    assert [trial["name"] for trial in trials[:6]] == ["base", "fine-tuned", *GRID]
    assert set(trials[-1]["parameters"]) == {"normalize", f"density of {tuned}", f"weight of {tuned}"}
    for wrong, message in (
        ("[1]", "is a mapping with"),
        ("parameters: {alpha: {low: 2, high: 1}}", "low must be below high"),
        ("parameters: {alpha: 3}", "write a list of choices"),
        ("models: {./other: {weight: [1]}}", "the recipe lists no model"),
    ):
        space.write_text(wrong)
        output = tune(write_config(tmp_path, ties), tmp_path / "b", *options, "--space", space, code=1)
        assert message in output


def test_without_optuna_the_remedy_is_named(task, tmp_path, monkeypatch):
    file, options, _ = task
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "pip install mergekit-monosoup[tune]" in tune(file, tmp_path / "out", *options, code=1)


def test_the_card_shows_the_search(task, tmp_path):
    file, options, _ = task
    out = tmp_path / "tuned"
    tune(file, out, *options, "--trials", 1)
    held = found(out)
    chosen = held["trials"][held["chosen"]]
    card = ModelCard.load(out / "README.md")
    results = {result.dataset_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == chosen["scores"]
    (index,) = metadata_load(out / "README.md")["model-index"]
    assert index["name"] == "tuned"
    assert f"**{chosen['name']}** (chosen)" in card.text
    assert card.text.index("### Search") < card.text.index("### Configuration")
    assert (out / "tune_front.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in card.text
    assert str(tmp_path) not in (out / "tune.json").read_text()
    result = CliRunner().invoke(main, ["verify", str(out)])
    assert result.exit_code == 0, result.output


def test_functions_score_one_model_in_memory(task, models, tmp_path, monkeypatch):
    file, options, _ = task
    aim = tmp_path / "id.safetensors"
    (tmp_path / "scoring_functions.py").write_text(
        f"""
from safetensors.torch import load_file
seen = []
def distance(model, tokenizer):
    seen.append(id(model))
    aim = load_file({str(aim)!r})
    state = model.state_dict()
    total = sum(float((state[n].double() - aim[n].double()).square().sum()) for n in aim)
    return 1e3 * (total / sum(float(t.double().square().sum()) for t in aim.values())) ** 0.5
def nothing(model, tokenizer):
    return "much"
"""
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "tuned"
    both = ("--score", "in_memory=python:scoring_functions:distance", *options[:2], "--lower-is-better")
    tune(file, out, *both, "--trials", 1)
    trials = found(out)["trials"]
    for trial in trials:
        assert trial["scores"]["in_memory"] == pytest.approx(trial["scores"]["id"], rel=1e-6), trial["name"]
    seen = sys.modules["scoring_functions"].seen
    assert len(seen) == len(trials) + 1
    assert len(set(seen[:-1])) == 1
    for wrong, message in (
        ("python:scoring_functions:absent", "cannot be imported"),
        ("python:scoring_functions", "is not of the form python:package.module:function"),
        ("python:scoring_functions:seen", "is no function"),
        ("python:scoring_functions:nothing", "must return a finite number, not 'much'"),
    ):
        assert message in tune(file, tmp_path / "other", "--score", f"a={wrong}", "--restart", code=1)
