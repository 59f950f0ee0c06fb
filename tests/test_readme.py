"""What the README and the page of the method say about the code is what the code does."""

from __future__ import annotations

import re

import click
import pytest
import yaml
from commands import ROOT
from documents import blocks, check_command, check_recipe, command_lines, links, read

README = read("README.md")
METHOD = read("docs", "method.md")
pytestmark = pytest.mark.usefixtures("registered")


def table(*header):
    """The rows of the table with this header, cells stripped of code marks."""
    line = re.escape("| " + " | ".join(header) + " |")
    (body,) = re.findall(rf"^ *{line}\n *\|[-|]+\|\n((?: *\|.*\n)+)", METHOD, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in row.strip(" |").split("|")] for row in body.splitlines()]


def spec():
    from mergekit import merge_methods

    return merge_methods.get("monosoup").spec


def test_recipe_is_five_lines_that_mergekit_accepts():
    (recipe,) = blocks(README, "yaml")
    assert len(recipe.splitlines()) == 5
    config = check_recipe(recipe)
    assert config.merge_method == spec().name
    assert config.base_model
    assert len(config.models) == 1


def test_recipe_is_the_first_example():
    (recipe,) = blocks(README, "yaml")
    example = read("examples", "yaml", "01-automatic.yaml")
    assert [line for line in example.splitlines() if not line.startswith("#")] == recipe.splitlines()


def test_parameter_table_is_the_specification():
    rows = table("parameter", "meaning", "range", "default")
    stated = {name: None if default == "absent" else yaml.safe_load(default) for name, _, _, default in rows}
    actual = {parameter.name: parameter.default for parameter in spec().parameters}
    assert stated == actual
    assert list(stated) == list(actual)


def test_mixing_table_is_what_the_code_computes():
    import math
    from typing import get_args

    import torch

    from mergekit_monosoup.spectral.mixing import Mixing, mixing_coefficients

    rows = table("`mixing`", "λ_high", "λ_low")
    assert [name for name, _, _ in rows] == list(get_args(Mixing))
    values = torch.tensor([3.0, 2.0, 1.0, 0.5])
    rho, cos = 1 / 9, math.sqrt(1.25 / 14.25)
    for name, high, low in rows:
        found = mixing_coefficients(values, 2, name)
        known = {"ρ": rho, "cos_α": cos, "λ_low": found.lambda_low}
        for formula, value in ((low, found.lambda_low), (high, found.lambda_high)):
            text = formula.replace("cos α", "cos_α").replace("−", "-").replace(") cos", ") * cos")
            assert value == pytest.approx(eval(text, {}, known))


def test_behaviour_table_is_what_the_code_computes():
    import torch

    from mergekit_monosoup import edit_update

    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def with_spectrum(values):
        left, right = (torch.linalg.qr(gaussian(512, 512))[0] for _ in range(2))
        return left * values @ right

    count = torch.arange(1, 513, dtype=torch.float64)
    square = gaussian(512, 512)
    updates = {
        "Gaussian, 512 × 512": square,
        "Gaussian, 1024 × 256": gaussian(1024, 256),
        "sᵢ = 1/i": with_spectrum(1 / count),
        "s linear from 1 to 0.8": with_spectrum(1 - 0.2 * (count - 1) / 511),
        "flat": with_spectrum(torch.ones(512, dtype=torch.float64)),
    }
    *rows, low_rank = table("update", "r", "k", "λ_high")
    assert [name for name, *_ in rows] == list(updates)
    for name, r, k, high in rows:
        _, record = edit_update(updates[name])
        slack = 2 if k.startswith("about") else 0
        assert record.rank == int(r)
        assert abs(record.k - int(k.removeprefix("about "))) <= slack
        digits = re.match(r"(?:about )?([\d.]+)", high)[1]
        assert record.lambda_high == pytest.approx(float(digits), abs=0.011 if slack else 6e-4)
    _, record = edit_update(square, energy=0.8)
    assert "(R = 0.8: about 0.41)" in rows[0][3]
    assert record.lambda_high == pytest.approx(0.41, abs=0.011)
    assert low_rank == ["exact rank 16", "any", "≤ 16", "1 when k equals the rank"]
    _, record = edit_update(gaussian(512, 16) @ gaussian(16, 512))
    assert (record.k, record.lambda_high) == (16, pytest.approx(1))


def test_commands_exist():
    from mergekit_monosoup.cli import main

    for words in command_lines(README):
        check_command(words)
    named = set(re.findall(r"mergekit-monosoup ([a-z]+)\b", README))
    assert named == set(main.list_commands(click.Context(main)))


def test_links_lead_to_files():
    found = links(README)
    assert found
    assert len(README.splitlines()) < 150
    for link in found:
        assert (ROOT / link).exists(), link


def test_opt_out_variable():
    from mergekit_monosoup import autoload

    assert f"`{autoload.OPT_OUT_VARIABLE}=0`" in README
