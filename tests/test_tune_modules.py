"""`tune` in memory: functions instead of commands, any module."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from commands import ROOT
from torch import nn
from transformers import AutoModelForCausalLM

from mergekit_monosoup import edit_state_dict, tune
from mergekit_monosoup.errors import ConfigurationError, InputError, ParameterError


class Vision(nn.Module):
    """A small convolutional classifier with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = x + block(x.relu())
        return self.head(x.mean((2, 3)))


@pytest.fixture
def task(one_thread):
    """A base, a fine-tuned module, and two losses whose best points lie between them."""
    torch.manual_seed(0)
    base = Vision().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        tuned.norm.running_mean += 0.3
    aims = {}
    for name, share in (("id", 0.9), ("ood", 0.4)):
        aims[name] = {
            key: w0.float() + share * (tuned.state_dict()[key].float() - w0.float())
            for key, w0 in base.state_dict().items()
        }
    seen = []

    def loss(name):
        def function(module):
            seen.append((name, id(module)))
            state = module.state_dict()
            return sum(float((state[k].float() - aim).square().sum()) for k, aim in aims[name].items())

        return function

    return base, tuned, {name: loss(name) for name in aims}, seen


def test_tunes_a_vision_model_in_place(task):
    base, tuned, scores, seen = task
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    result = tune(base, tuned, scores, lower_is_better=True, trials=8, seed=3, holdout={"late": scores["id"]})
    names = [trial.name for trial in result.trials]
    assert names[:3] == ["base", "fine-tuned", "Wise-FT 0.3"]
    assert len(names) == 6 + 8
    # One module for all candidates, and not the user's.
    assert len({identity for _, identity in seen}) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    best = result.outcome.best
    assert {name: function(result.module) for name, function in scores.items()} == best.scores
    # What the parameters make, decomposed anew.
    anew = edit_state_dict(base, tuned, **result.parameters).weights
    for name, tensor in result.module.state_dict().items():
        torch.testing.assert_close(tensor, anew[name], rtol=1e-5, atol=1e-6)
    assert {"base", "fine-tuned", best.name} <= result.holdout.keys()
    assert result.holdout[best.name]["late"] == best.scores["id"]
    # The grid's factors between the ends are the plain formula.
    half = next(trial for trial in result.trials if trial.name == "Wise-FT 0.5")
    plain = edit_state_dict(base, tuned, alpha=0.5, edit=False).weights
    module = copy.deepcopy(tuned)
    module.load_state_dict(plain)
    assert scores["id"](module) == half.scores["id"]


def test_goes_on_from_a_file_and_repeats_nothing(task, tmp_path):
    base, tuned, scores, seen = task
    options = {"lower_is_better": ["id", "ood"], "study": tmp_path / "study.db", "by": "depth"}
    tune(base, tuned, scores, trials=7, **options)
    seen.clear()
    first = tune(base, tuned, scores, trials=7, **options)
    assert not seen
    longer = tune(base, tuned, scores, trials=8, **options)
    assert len(seen) == 2
    assert longer.trials[:-1] == first.trials
    assert longer.trials[-1] == tune(base, tuned, scores, trials=8, **options).trials[-1]
    assert isinstance(longer.trials[-1].recipe["parameters"]["alpha"], list)
    with pytest.raises(ConfigurationError, match="another seed"):
        tune(base, tuned, scores, trials=7, seed=4, **options)


def test_refusals(task):
    base, tuned, scores, _ = task
    with pytest.raises(ParameterError, match="needs a score"):
        tune(base, tuned, {})
    with pytest.raises(ParameterError, match="'odd' is not the name"):
        tune(base, tuned, scores, lower_is_better=["odd"])
    with pytest.raises(InputError, match="score bad is nan"):
        tune(base, tuned, {"bad": lambda _: float("nan")})
    with pytest.raises(ConfigurationError, match="nothing is known"):
        tune(base, tuned, scores, method="model_stock")
    with pytest.raises(InputError, match="no trial meets"):
        tune(base, tuned, scores, trials=0, keep=["id>=1e9"])


@pytest.mark.slow
def test_on_the_shipped_pair_it_is_no_worse_than_wise_ft(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    demo = importlib.import_module("demo")
    pair = ROOT / "examples" / "models"
    base, tuned = (
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
        for name in ("base", "finetuned")
    )

    def cost(*names):
        texts = [(pair / "heldout" / f"{name}.txt").read_bytes()[:2048] for name in names]
        return lambda model: sum(demo.bits_per_byte(model, text) for text in texts) / len(texts)

    scores = {"id": cost("prose"), "ood": cost(*demo.SHIFTS)}
    result = tune(base, tuned, scores, lower_is_better=True, trials=10, seed=0, choose="sum")
    sums = {trial.name: sum(trial.scores.values()) for trial in result.trials}
    assert len(sums) >= 15
    chosen = sum(result.outcome.best.scores.values())
    assert chosen <= min(total for name, total in sums.items() if name.startswith("Wise-FT")) + 0.005
    assert chosen < min(sums["base"], sums["fine-tuned"])
    written = sum(function(result.module) for function in scores.values())
    assert written == pytest.approx(chosen, abs=1e-6)
