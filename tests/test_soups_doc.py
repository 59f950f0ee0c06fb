"""What docs/soups.md says about parameters, options and recipes is what there is."""

from __future__ import annotations

import re

import click
import pytest
import yaml
from commands import ROOT

from mergekit_monosoup.cli import main

TEXT = (ROOT / "docs" / "soups.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("registered")


def section(title):
    return TEXT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(text, *header):
    line = re.escape("| " + " | ".join(header) + " |")
    (body,) = re.findall(rf"^{line}\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()]


@pytest.mark.parametrize("method", ["model_stock_stable", "sfgs"])
def test_parameters(method):
    from mergekit import merge_methods

    stated = {
        name.strip("`"): None if default == "absent" else yaml.safe_load(default.strip("`"))
        for name, _, default in rows(section(f"`{method}`"), "parameter", "meaning", "default")
    }
    spec = merge_methods.get(method).spec
    assert stated == {p.name: p.default for p in spec.parameters if not p.name.startswith("_")}


@pytest.mark.parametrize("name", ["align", "greedy"])
def test_options(name):
    command = main.get_command(click.Context(main), name)
    options = {option for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"--[a-z-]+", section(f"`mergekit-monosoup {name}`")))
    assert named
    assert named <= options


def test_internal_parameters_are_not_listed():
    from click.testing import CliRunner

    result = CliRunner().invoke(main, ["methods"])
    assert "sfgs" in result.output
    assert "threshold" in result.output
    assert "_plan" not in result.output


def test_every_baseline_is_in_the_table():
    stated = {
        name
        for recipe, _ in rows(section("Baselines"), "recipe", "formula")
        for name in re.findall(r"`([^`]+)`", recipe)
    }
    assert stated == {file.stem for file in (ROOT / "examples" / "yaml" / "baselines").glob("*.yaml")}
