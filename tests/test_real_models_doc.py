"""The page on real models: its recipes and commands are what mergekit and this package take."""

from __future__ import annotations

import re

import click
import pytest
from commands import ROOT
from documents import blocks, check_command, check_recipe, command_lines, links, read

PAGE = read("docs", "real-models.md")
SHELL = {"for", "done", "sed", "evaluate", "evaluate()", "}", "lm_eval"}
pytestmark = pytest.mark.usefixtures("registered")


def test_first_recipe_is_that_of_the_readme():
    first, *_ = blocks(PAGE, "yaml")
    assert [first] == blocks(read("README.md"), "yaml")


def test_recipes_are_accepted():
    for recipe in blocks(PAGE, "yaml"):
        assert check_recipe(recipe).merge_method == "monosoup"


def test_one_loop_over_the_second_recipe_gives_monosoup_and_wise_ft():
    _, recipe = blocks(PAGE, "yaml")
    (substitution,) = re.findall(r'sed "(.*?)" wise-ft', PAGE)
    changes = [change.split("/")[1:3] for change in substitution.split("; ")]
    for old, new in changes:
        assert recipe.count(old) == 1
        recipe = recipe.replace(old, new.replace("$alpha", "0.3").replace("$edit", "false"))
    assert check_recipe(recipe).parameters == {"alpha": 0.3, "edit": False}


def test_commands_exist():
    seen = set()
    for words in command_lines(PAGE):
        if "=" in words[0] or words[0] in SHELL:
            continue
        check_command(words)
        seen.add(words[0])
    assert seen == {"pip", "hf", "mergekit-yaml", "mergekit-monosoup"}


@pytest.mark.parametrize(
    "line",
    ["merge recipe.yaml merged --no-such", "push merged", "report a b c", "nothing", "inspect"],
)
def test_a_wrong_command_would_be_noticed(line):
    with pytest.raises((click.UsageError, AssertionError)):
        check_command(["mergekit-monosoup", *line.split()])


def test_evaluations_of_all_models_are_the_same():
    runs = [words for words in command_lines(PAGE) if words[0] == "lm_eval"]
    assert len(runs) == 3
    for words in runs:
        assert words[:4] == ["lm_eval", "run", "--model", "hf"]
        options = [word for word in words if word.startswith("--")]
        assert options == [
            "--model",
            "--model_args",
            "--batch_size",
            "--seed",
            "--tasks",
            "--num_fewshot",
            "--output_path",
        ]


def test_authors_scores_are_those_on_file():
    import json

    rows = json.loads(read("benchmarks", "robustness", "paper.json"))["rows"]
    metrics = (
        "GSM8K (ID)",
        "MGSM mean",
        "ARC-Challenge",
        "HellaSwag",
        "MMLU humanities",
        "MMLU social sciences",
    )
    stated = re.findall(r"^\| (base|fine-tuned|MonoSoup) \|((?: [\d.]+ \|){6})$", PAGE, re.MULTILINE)
    assert [name for name, _ in stated] == ["base", "fine-tuned", "MonoSoup"]
    for name, cells in stated:
        for metric, cell in zip(metrics, cells.split("|"), strict=False):
            found = {row["value"] for row in rows if (row["method"], row["metric"]) == (name.lower(), metric)}
            assert found == {float(cell)}, (name, metric)


def test_links_lead_to_files():
    for link in links(PAGE):
        assert (ROOT / "docs" / link).exists(), link
