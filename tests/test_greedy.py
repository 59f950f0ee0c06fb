"""`mergekit-monosoup greedy` with evaluations that are real commands."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from checkpoints import load_tensors, write_adapter
from click.testing import CliRunner
from commands import forget_loaders
from rounding import as_float64
from soups import write_relatives

from mergekit_monosoup.cli import main
from mergekit_monosoup.errors import InputError, ParameterError
from mergekit_monosoup.search.evaluation import Evaluation, digest_of_checkpoint
from mergekit_monosoup.search.greedy import greedy_soup
from mergekit_monosoup.search.journal import Journal

TENSOR = "model.layers.1.mlp.up_proj.weight"

# Distance to a target, as a held-out loss would be; notes every call.
SCRIPT = f"""
import sys
import numpy as np
from safetensors.numpy import load_file
folder, target, log = sys.argv[1:]
with open(log, "a") as file:
    print(folder, file=file)
weight = load_file(folder + "/model.safetensors")["{TENSOR}"].astype(np.float64)
print("evaluating", folder)
print("loss:", np.sqrt(((weight - np.load(target)) ** 2).sum()))
"""


@pytest.fixture(scope="module")
def models(family, tmp_path_factory):
    base = family("qwen3-tied", "fp32").base
    return base, write_relatives(tmp_path_factory.mktemp("relatives"), base, (0.5, 0.7, -0.9, 0.6, 0.2))


@pytest.fixture
def scoring(tmp_path, models):
    """The evaluation's command, the target, and the file that lists its calls."""
    base, tuned = models
    script, target, log = tmp_path / "score.py", tmp_path / "target.npy", tmp_path / "calls.txt"
    script.write_text(SCRIPT)
    # Where the shared direction of the relatives leads.
    deltas = [array(folder) - array(base) for folder in tuned]
    np.save(target, array(base) + (deltas[0] + deltas[1] - deltas[2] + deltas[3]) / 4)
    return f"{sys.executable} {script} {{model}} {target} {log}", np.load(target), log


def array(folder):
    return as_float64(load_tensors(folder)[TENSOR])


def run(*arguments, code=0):
    forget_loaders()
    result = CliRunner().invoke(main, ["greedy", *map(str, arguments)])
    assert result.exit_code == code, result.output
    forget_loaders()
    return result.output


def reference(tuned, target):
    """Greedy soup by its definition: indices in the order they joined."""
    weights = [array(folder) for folder in tuned]
    loss = [float(np.linalg.norm(weight - target)) for weight in weights]
    order = sorted(range(len(tuned)), key=loss.__getitem__)
    members, best = [order[0]], loss[order[0]]
    for index in order[1:]:
        mean = sum(weights[i] for i in [*members, index]) / (len(members) + 1)
        if np.linalg.norm(mean - target) < best:
            members, best = [*members, index], float(np.linalg.norm(mean - target))
    return members, best


def test_finds_the_greedy_soup_and_writes_it_with_its_recipe(models, scoring, tmp_path):
    _, tuned = models
    command, target, log = scoring
    out = tmp_path / "soup"
    output = run(*tuned, "--eval", command, "--out", out, "--lower-is-better")
    members, best = reference(tuned, target)
    assert 1 < len(members) < len(tuned)
    recipe = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert [model["model"] for model in recipe["models"]] == [str(tuned[i]) for i in members]
    merged = load_tensors(out)
    for name, tensor in merged.items():
        mean = sum(as_float64(load_tensors(tuned[i])[name]) for i in members) / len(members)
        np.testing.assert_allclose(as_float64(tensor), mean, rtol=1e-6, atol=1e-7)
    assert float(np.linalg.norm(array(out) - target)) == pytest.approx(best, rel=1e-5)
    # Each candidate alone, and one soup for each but the best.
    assert len(log.read_text().splitlines()) == 2 * len(tuned) - 1
    table = output[output.index("checkpoints  ") :].splitlines()
    assert sum("alone" in line for line in table) == len(tuned)
    assert sum("kept" in line for line in table) == len(members) - 1
    assert "best alone" in table[1]
    assert f"the mean of {len(members)} checkpoints" in output
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".greedy")]


def test_higher_is_better_by_default(models, scoring, tmp_path):
    _, tuned = models
    command, target, _ = scoring
    run(*tuned[:3], "--eval", command, "--out", tmp_path / "soup")
    recipe = yaml.safe_load((tmp_path / "soup" / "mergekit_config.yml").read_text())
    losses = [np.linalg.norm(array(folder) - target) for folder in tuned[:3]]
    assert recipe["models"][0]["model"] == str(tuned[int(np.argmax(losses))])


def test_an_interrupted_search_goes_on_where_it_stopped(models, scoring, tmp_path):
    _, tuned = models
    command, _, log = scoring
    out, journal = tmp_path / "soup", tmp_path / "soup.journal.jsonl"
    arguments = (*tuned, "--eval", command, "--out", out, "--lower-is-better")
    run(*arguments)
    first = load_tensors(out)
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == len(log.read_text().splitlines())
    # Interrupted in the middle of writing the seventh entry.
    journal.write_text("".join(lines[:6]) + lines[6][:20])
    log.unlink()
    output = run(*arguments, "--overwrite")
    assert len(log.read_text().splitlines()) == len(lines) - 6
    assert output.count("(from the journal)") == 6
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_tensors(out).items())
    assert journal.read_text().count("\n") == len(lines)
    log.unlink()
    run(*arguments, "--overwrite")
    assert not log.exists()


def test_scores_are_kept_by_content_not_by_name(models, scoring, tmp_path):
    _, tuned = models
    command, _, log = scoring
    import shutil

    copies = [shutil.copytree(folder, tmp_path / f"copy{i}") for i, folder in enumerate(tuned[:2])]
    options = ("--eval", command, "--lower-is-better", "--journal", tmp_path / "journal.jsonl")
    run(*tuned[:2], *options, "--out", tmp_path / "a")
    log.unlink()
    run(*copies[::-1], *options, "--out", tmp_path / "b")
    assert not log.exists()
    # Another file among the arguments, another model: both are other evaluations.
    (tmp_path / "score.py").write_text(SCRIPT + "\n# changed\n")
    run(*copies, *options, "--out", tmp_path / "c")
    assert len(log.read_text().splitlines()) == 3
    log.unlink()
    shutil.copy(tuned[2] / "model.safetensors", copies[0] / "model.safetensors")
    run(*copies, *options, "--out", tmp_path / "d")
    assert len(log.read_text().splitlines()) == 2


def test_adapters_are_merged_for_their_own_score(family, models, scoring, tmp_path):
    base = family("qwen3-tied", "fp32").base
    command, _, log = scoring
    adapters = [f"{base}+{write_adapter(tmp_path / f'lora{seed}', base, seed=seed)}" for seed in (1, 2)]
    cache = ("--lora-merge-cache", tmp_path / "cache")
    run(*adapters, "--eval", command, "--lower-is-better", "--out", tmp_path / "soup", *cache)
    evaluated = log.read_text().split()
    assert len(evaluated) == 3
    assert all("soup-" in folder for folder in evaluated)


def test_failures_of_the_evaluation_leave_nothing_and_lose_nothing(models, scoring, tmp_path):
    _, tuned = models
    out = tmp_path / "soup"
    cases = {
        "print('no number')": "must print its score last, a finite number, not 'number'",
        "print(float('nan'))": "not 'nan'",
        "pass": "not ''",
        "print('why it failed'); raise SystemExit(3)": "ended with status 3\nwhy it failed",
    }
    for number, (code, message) in enumerate(cases.items()):
        script = tmp_path / f"bad{number}.py"
        script.write_text(code)
        output = run(*tuned[:2], "--eval", f"{sys.executable} {script} {{model}}", "--out", out, code=1)
        assert message in output
    assert not out.exists()
    assert "cannot run" in run(*tuned[:2], "--eval", "no-such-command {model}", "--out", out, code=1)
    assert "write {model}" in run(*tuned[:2], "--eval", "echo 1", "--out", out, code=1)
    assert "is not a command line" in run(*tuned[:2], "--eval", "echo '{model}", "--out", out, code=1)
    assert "listed twice" in run(tuned[0], tuned[0], "--eval", "echo {model}", "--out", out, code=1)
    assert "at least two" in run(tuned[0], "--eval", "echo {model}", "--out", out, code=2)
    out.mkdir()
    (out / "file").write_text("")
    assert "not empty" in run(*tuned[:2], "--eval", "echo {model}", "--out", out, code=1)


def test_the_search_counts_every_member_once_and_keeps_only_strict_gains():
    asked = []

    def score(members):
        asked.append(tuple(members))
        return {(0,): 1.0, (1,): 3.0, (2,): 2.0, (3,): 2.0, (1, 2): 3.0, (1, 3): 4.0, (1, 3, 0): 5.0}[
            tuple(members)
        ]

    soup = greedy_soup(4, score)
    assert soup.members == (1, 3, 0)
    assert soup.score == 5.0
    assert asked == [(0,), (1,), (2,), (3,), (1, 2), (1, 3), (1, 3, 0)]
    assert [trial.kept for trial in soup.trials] == [True, False, False, False, False, True, True]
    alone = [trial.score for trial in soup.trials[:4]]
    assert all(a >= b for a, b in pairwise(alone))


def test_lower_is_better():
    losses = {(0,): 1.0, (1,): 3.0, (1, 0): 0.0, (0, 1): 0.5}
    assert greedy_soup(2, lambda m: losses[tuple(m)], lower_is_better=True).members == (0, 1)
    assert greedy_soup(2, lambda m: losses[tuple(m)]).members == (1,)


def test_the_journal_refuses_what_it_did_not_write(tmp_path):
    file = tmp_path / "journal.jsonl"
    journal = Journal(file)
    assert journal.score("a") is None
    journal.add("a", 0.5, models=["x"])
    journal.add("a", 0.75)
    assert Journal(file).score("a") == 0.75
    assert json.loads(file.read_text().splitlines()[0])["models"] == ["x"]
    with pytest.raises(ValueError, match="not finite"):
        journal.add("b", float("inf"))
    file.write_text("nonsense\n" + file.read_text())
    with pytest.raises(InputError, match="line 1 is not an entry"):
        Journal(file)


def test_what_counts_as_content(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    first = digest_of_checkpoint(folder)
    (folder / "README.md").write_text("a card")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("y")
    assert digest_of_checkpoint(folder) == first
    (folder / "b").write_bytes(b"")
    assert digest_of_checkpoint(folder) != first
    assert Evaluation("echo {model}").digest() != Evaluation("echo  {model} x").digest()
    assert Evaluation("echo {model}").digest() == Evaluation("echo  '{model}'").digest()
    with pytest.raises(ParameterError):
        Evaluation("echo")


def test_what_an_interrupted_merge_has_left_is_named_before_anything_is_scored(tmp_path, models, scoring):
    command, _, log = scoring
    left = tmp_path / "out.partial" / "model" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("mine")
    arguments = [*models[1][:2], "--eval", command, "--out", tmp_path / "out"]
    said = run(*arguments, code=1)
    assert "--resume to go on with it, or --restart" in said
    assert left.read_text() == "mine"
    assert not log.exists()
    run(*arguments, "--restart")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out.partial").exists()
