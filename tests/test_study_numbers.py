"""Numbers of the study that are quoted in the documentation are those of its result files."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
from commands import ROOT

from mergekit_monosoup.alignment.selection import DEFAULT_THRESHOLD

RESULTS = ROOT / "benchmarks" / "robustness" / "results"
METHODS = {
    "base: in / out of distribution": "base",
    "MonoSoup": "MonoSoup",
    "MonoSoup, `energy: 0.8`": "MonoSoup R=0.8",
    "Wise-FT, α = 0.5": "Wise-FT α=0.5",
}


@pytest.fixture(scope="module")
def results():
    names = ("language", "vit", "convnet")
    return [json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in names]


def change(result, method):
    """Mean changes in and out of distribution against the fine-tuned checkpoint, as README prints them."""
    full = {recipe["name"] for recipe in result["recipes"] if recipe["lora_rank"] is None}
    by_method = {(row["recipe"], row["seed"], row["method"]): row["scores"] for row in result["rows"]}
    pairs = []
    for recipe in sorted(full):
        for seed in result["seeds"]:
            before = by_method[recipe, seed, "fine-tuned"]
            after = result["base"]["scores"] if method == "base" else by_method[recipe, seed, method]
            pairs.append({name: after[name] - before[name] for name in before})
    inside = fmean(pair[result["in_distribution"]] for pair in pairs)
    outside = fmean(pair[name] for pair in pairs for name in result["shifts"])
    text = "{:+.3f} / {:+.3f}" if result["track"] == "language" else "{:+.1f} / {:+.1f}"
    scale = 1 if result["track"] == "language" else 100
    return text.format(scale * inside, scale * outside).replace("-", "−")


def test_the_table_in_the_readme(results):
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    for label, method in METHODS.items():
        cells = " | ".join(change(result, method) for result in results)
        assert f"| {label} | {cells} |" in lines


def test_every_run_is_there(results):
    for result in results:
        full = [recipe["name"] for recipe in result["recipes"] if recipe["lora_rank"] is None]
        assert not result["short"]
        assert len(full) == len(result["seeds"]) == 3
        tuned = [(row["recipe"], row["seed"]) for row in result["rows"] if row["method"] == "fine-tuned"]
        assert {(name, seed) for name in full for seed in result["seeds"]} <= set(tuned)


def test_monosoup_improved_every_full_fine_tune_out_of_distribution(results):
    for result in results:
        sign = 1 if result["higher_is_better"] else -1
        rows = {(row["recipe"], row["seed"], row["method"]): row["scores"] for row in result["rows"]}
        for recipe, seed, method in list(rows):
            if method == "MonoSoup":
                before, after = rows[recipe, seed, "fine-tuned"], rows[recipe, seed, method]
                assert sign * fmean(after[name] - before[name] for name in result["shifts"]) > 0


def test_the_default_threshold_refuses_nothing_that_greedy_soup_keeps(results):
    """And is the largest that was tried of which this holds."""
    harmless = {}
    for pool in (pool for result in results for pool in result["pools"]):
        kept = set(pool["greedy"]["taken"])
        for decision in pool["sfgs"]:
            threshold = decision["threshold"]
            harmless[threshold] = harmless.get(threshold, True) and kept <= set(decision["taken"])
    assert max(threshold for threshold, fine in harmless.items() if fine) == DEFAULT_THRESHOLD
