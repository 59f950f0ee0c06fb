"""Scores of single items and what they say of differences; factors from the Fisher information."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tuned import calls, found, pair_of, tune, write_task

from mergekit_monosoup.errors import InputError
from mergekit_monosoup.search.evaluation import Measured
from mergekit_monosoup.search.fisher import group_factors, sensitivities
from mergekit_monosoup.search.intervals import intervals
from mergekit_monosoup.search.scores import Score
from mergekit_monosoup.search.study import Trial
from mergekit_monosoup.search.tuning import Outcome

models = pytest.fixture(scope="module")(pair_of)
task = pytest.fixture(write_task)

# Each tensor is an item: its distance from the target.
ITEMS = """
import sys
import numpy as np
from safetensors.numpy import load_file
weights, aim = load_file(sys.argv[1] + "/model.safetensors"), load_file(sys.argv[2])
for name in sorted(aim):
    a, b = weights[name].astype(np.float64), aim[name].astype(np.float64)
    print(name, "scores", 1e3 * float(((a - b) ** 2).sum() / (b**2).sum()) ** 0.5)
"""


def test_scores_of_items_bring_intervals(task, tmp_path):
    file, options, _ = task
    (tmp_path / "score.py").write_text(ITEMS)
    out = tmp_path / "tuned"
    held_out = options[1].replace("id=", "unseen=")
    output = tune(file, out, *options, "--per-item", "--holdout", held_out, "--trials", 2)
    content = found(out)
    assert {entry["score"] for entry in content["intervals"]} == {"id", "ood", "unseen"}
    for entry in content["intervals"]:
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert entry["items"] > 10
        assert entry["sure"] == (not entry["low"] <= 0 <= entry["high"])
        line = next(
            line
            for line in output.splitlines()
            if line.startswith(f"{entry['score']}, chosen less {entry['against']}:")
        )
        assert ("inside the noise" in line) != entry["sure"]
        assert line in (out / "README.md").read_text()
    chosen, base = (content["trials"][i]["scores"]["id"] for i in (content["chosen"], 0))
    first = next(e for e in content["intervals"] if (e["score"], e["against"]) == ("id", "base"))
    assert first["difference"] == pytest.approx(chosen - base)
    # Of one of the scores only.
    (tmp_path / "score.py").write_text(ITEMS + "\nprint(1.5)")
    tune(file, tmp_path / "one", *options, "--per-item", "id", "--trials", 0)
    assert {entry["score"] for entry in found(tmp_path / "one")["intervals"]} <= {"id"}
    (tmp_path / "score.py").write_text("print('nothing')")
    said = tune(file, tmp_path / "none", *options, "--per-item", "--trials", 0, code=1)
    assert "score of each of at least two items" in said
    assert "'other' is not the name" in tune(file, tmp_path / "x", *options, "--per-item", "other", code=1)
    assert calls(tmp_path / "calls.txt") == []


def trial(name, plain):
    return Trial(name, {}, {}, {"a": 0.0}, 0.0, plain)


@pytest.mark.parametrize(("effect", "sure"), [(0.5, True), (0.02, False)])
def test_intervals_tell_effects_from_noise(effect, sure):
    generator = np.random.default_rng(5)
    hard = generator.normal(size=400) * 10
    items = {
        "base": hard + generator.normal(size=400),
        "tuned": hard + generator.normal(size=400),
        "edit": hard + effect + generator.normal(size=400),
    }
    trials = (trial("base", 0.0), trial("tuned", 1.0), trial("edit", None))
    outcome = Outcome(trials, (True,) * 3, chosen=2, base=0, finetuned=1, wise_ft=1)
    made = intervals(outcome, [Score("a")], lambda trial, _: items[trial.name])
    assert [interval.against for interval in made] == ["base", "tuned"]
    assert all(interval.sure == sure for interval in made)
    # Item by item: the spread of hard and easy ones does not count.
    assert all(interval.high - interval.low < 0.4 for interval in made)
    again = intervals(outcome, [Score("a")], lambda trial, _: items[trial.name])
    assert made == again
    items["base"] = items["base"][:-1]
    with pytest.raises(InputError, match="on the same"):
        intervals(outcome, [Score("a")], lambda trial, _: items[trial.name])
    assert intervals(outcome, [Score("a")], lambda *_: ()) == ()


@pytest.mark.parametrize("items", [[], [1.0], [1.0, float("nan")]])
def test_items_are_several_finite_numbers(items):
    with pytest.raises(InputError, match="at least two items"):
        Measured.of_items(items, "command")


class Words(torch.nn.Module):
    """Logits of a linear model with two layers' names."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 7})()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5, bias=False) for _ in range(2))
        self.embed, self.head = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7, bias=False)

    def forward(self, input_ids):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = states + layer(states)
        return type("Output", (), {"logits": self.head(states)})()


def test_the_fisher_information_is_the_curvature_of_the_divergence():
    """1/2 sum F dW^2 of one layer against the KL divergence of the changed model, off-diagonals aside."""
    torch.manual_seed(0)
    model = Words()
    update = torch.randn(5, 5)
    name = "layers.1.weight"
    found = sensitivities(model, [(name, update), ("head.weight", torch.ones(7, 5))])
    assert list(found) == [1]
    weighted, plain = found[1]
    assert plain == pytest.approx(float(update.square().sum()), rel=1e-5)
    # Random signs make the entries of dW independent, so the off-diagonal part has mean zero.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (40, 64), generator=generator)
    kept, sums = model.layers[1].weight.detach().clone(), []
    with torch.no_grad():
        before = torch.log_softmax(model(tokens).logits, -1)
        for _ in range(60):
            signs = torch.randint(2, update.shape, generator=generator) * 2 - 1
            model.layers[1].weight.copy_(kept + 0.01 * update.abs() * signs)
            after = torch.log_softmax(model(tokens).logits, -1)
            sums.append(float((before.exp() * (before - after)).sum(-1).mean()))
    measured = np.mean(sums) / 0.01**2 * 64
    assert weighted / 2 == pytest.approx(measured, rel=0.5)


def test_factors_are_less_where_the_base_depends_on_more():
    assert group_factors({}, 4) == [1.0] * 4
    even = group_factors(dict.fromkeys(range(8), (2.0, 4.0)), 4)
    assert even == pytest.approx([1.0] * 4)
    first, *_, last = group_factors({layer: (2.0**-layer, 1.0) for layer in range(8)}, 4)
    assert first < 1 < last <= 1.5


def test_a_search_begins_with_those_factors(task, tmp_path):
    file, options, _ = task
    tune(file, tmp_path / "tuned", *options, "--by", "fisher", "--trials", 2)
    one, two = found(tmp_path / "tuned")["trials"][-2:]
    factors = [value for name, value in two["parameters"].items() if re.match("layers", name)]
    assert len(factors) == 4
    assert len(set(factors)) > 1
    assert all(0 < factor <= 1.5 for factor in factors)
    assert {value for name, value in one["parameters"].items() if re.match("layers", name)} == {1.0}
