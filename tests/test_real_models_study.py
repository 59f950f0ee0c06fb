"""The study of real pretrained models, on a tiny one: all candidates, resuming, and the page."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from checkpoints import build_model, build_tokenizer
from commands import ROOT

from benchmarks.real_models import __main__ as study
from benchmarks.real_models import edits, report, sources
from benchmarks.real_models.edits import Pair, candidates
from benchmarks.real_models.learning import Piece, Size

SIZE = Size(length=16, batch=2, windows=3)
PIECE = Piece("pages-fr", 1e-2, steps=4)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny base, and text of this repository in the place of each domain."""
    folder = tmp_path / "base"
    torch.manual_seed(0)
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    text = (ROOT / "docs" / "lora.md").read_text("utf-8")
    monkeypatch.setattr(sources, "base_model", lambda work: folder)
    monkeypatch.setattr(sources, "text", lambda domain, split, work: text[len(domain) :])
    return tmp_path


@pytest.mark.parametrize("rank", [None, 2])
def test_a_piece_from_training_to_the_page(tiny, rank, monkeypatch):
    piece = Piece("pages-fr", 1e-2, steps=4, rank=rank)
    monkeypatch.setattr(report, "PIECES", (piece, Piece("arithmetic", 1e-3)))
    file = tiny / "out" / "results" / f"{piece.name}.json"
    study.run_piece(piece, tiny, file, SIZE)
    result = json.loads(file.read_text())
    assert result["complete"]
    labels = [row["label"] for row in result["rows"]]
    assert labels[:2] == ["base", "fine-tuned"]
    assert len(set(labels)) == len(labels) > 35
    for row in result["rows"]:
        assert set(row["bits"]) == {"pages-fr", sources.VALIDATION, *sources.TEST}
        assert all(len(bits) == 3 and all(map(math.isfinite, bits)) for bits in row["bits"].values()), row
    report.write_report(tiny / "out")
    page = (tiny / "out" / "RESULTS.md").read_text("utf-8")
    assert all(f"| {label} |" in page for label in labels)
    assert "Not run yet: arithmetic-0.001-seed0" in page
    assert (tiny / "out" / "figures" / f"{piece.name}.png").exists()
    assert " nan" not in page


def test_results_that_are_there_are_not_made_again(tiny, monkeypatch):
    from click.testing import CliRunner

    monkeypatch.setattr(study, "PIECES", (PIECE,))
    monkeypatch.setattr(report, "PIECES", (PIECE,))
    ran = []
    run = study.run_piece

    def counted(piece, *arguments):
        ran.append(piece)
        run(piece, tiny, arguments[1], SIZE, short=True)

    monkeypatch.setattr(study, "run_piece", counted)
    for _ in range(2):
        done = CliRunner().invoke(study.main, ["--work", str(tiny), "--out", str(tiny / "out")])
        assert done.exit_code == 0, done.output
    assert len(ran) == 1
    # Interrupted after its third candidate, it goes on with the same weights.
    file = tiny / "out" / "results" / f"{PIECE.name}.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "rows": whole["rows"][:3], "complete": False}))
    report.write_report(tiny / "out")
    assert "Interrupted before all candidates" in (tiny / "out" / "RESULTS.md").read_text("utf-8")
    done = CliRunner().invoke(study.main, ["--work", str(tiny), "--out", str(tiny / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text())["rows"] == whole["rows"]


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.layers.0.a.weight": (24, 40), "model.layers.3.b.weight": (40, 24), "norm.weight": (24,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
    early = {name: t + 0.25 * (tuned[name] - t) for name, t in base.items()}
    return Pair(base, tuned, early)


def updates(pair, weights):
    return {name: (weights[name] - w0).double() for name, w0 in pair.base.items() if w0.ndim == 2}


def test_all_candidates_are_of_the_base_and_the_update(pair):
    for candidate in candidates(pair):
        made = candidate.make()
        assert made.keys() == pair.base.keys(), candidate.label
        assert all(torch.isfinite(tensor.float()).all() for tensor in made.values()), candidate.label
    assert all(torch.allclose(pair.mixed(1.0)[n], t, atol=1e-6) for n, t in pair.tuned.items())


def test_the_norm_control_has_the_norm_of_the_edit_and_the_direction_of_the_update(pair):
    edited, control, plain = (updates(pair, w) for w in (pair.edited(), edits.norm_control(pair), pair.tuned))
    for name, update in control.items():
        assert float(update.norm()) == pytest.approx(float(edited[name].norm()), rel=1e-4)
        cosine = (update * plain[name]).sum() / (update.norm() * plain[name].norm())
        assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_star_keeps_the_nuclear_norm_of_leading_directions(pair):
    for name, update in updates(pair, pair.spectral(edits.star)).items():
        before = torch.linalg.svdvals(updates(pair, pair.tuned)[name])
        after = torch.linalg.svdvals(update)
        assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-3)
        kept = int((after > 1e-3 * after[0]).sum())
        assert before[:kept].sum() >= edits.STAR * before.sum() > before[: kept - 1].sum()


def test_swapped_coefficients_are_those_of_monosoup_the_other_way_round(pair):
    both = [updates(pair, w) for w in (pair.edited(), pair.spectral(edits.swapped))]
    for name, update in updates(pair, pair.tuned).items():
        # lambda_low + lambda_high = 1.
        assert torch.allclose(both[0][name] + both[1][name], update, atol=1e-5)


def test_optimal_shrinkage_is_zero_below_the_edge_and_the_closed_form_above():
    rows, columns, sigma = 30, 60, 0.5
    edge = sigma * (math.sqrt(rows) + math.sqrt(columns))
    values = torch.tensor([3 * edge, 1.01 * edge, 0.99 * edge], dtype=torch.float64)
    factors = edits.shrunk(values, (rows, columns), sigma)
    assert factors[2] == 0
    assert 0 < factors[1] < factors[0] < 1
    y, beta = float(values[0]) / (sigma * math.sqrt(columns)), rows / columns
    assert float(factors[0]) * y == pytest.approx(math.sqrt((y * y - beta - 1) ** 2 - 4 * beta) / y)


def test_equal_id_is_looked_for_on_every_branch_of_the_curve():
    # ID of base, then on the curve: it falls and rises again.
    ids = np.array([[3.0], [1.0], [2.0], [1.5], [4.0]])
    values = np.array([[0.0], [1.0], [3.0], [2.0], [0.0]])
    found = report.above_curve(ids, values, [0, 1, 2])
    # At 1.5 the first branch has 0.75 and the second 2.
    assert found[3, 0] == pytest.approx(2 - 0.75)
    assert np.isnan(found[4, 0])
    assert found[:3, 0] == pytest.approx([0, 0, 3 - 0.5])
