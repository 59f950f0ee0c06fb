"""The documentation says what the commands and the code say, and its links lead somewhere."""

from __future__ import annotations

import importlib.util

import pytest
import yaml
from commands import ROOT
from documents import blocks, check_command, check_recipe, command_lines, links, read

PAGES = ("index.md", "tutorial.md", "answers.md", "choose-edit.md", "bad-result.md")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line_page_is_current():
    """If this fails, run `python docs/build_cli.py`."""
    build = script("build_cli")
    assert build.FILE.read_text("utf-8") == build.page()


@pytest.mark.parametrize("page", PAGES)
def test_recipes_and_commands_are_taken(page, registered):
    text = read("docs", page)
    for recipe in blocks(text, "yaml"):
        check_recipe(recipe)
    for words in command_lines(text):
        check_command(words)


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_links_lead_to_files(page):
    for link in links(read("docs", page)):
        assert (ROOT / "docs" / link).exists(), link


def test_every_page_is_in_the_site():
    assert {p.name for p in (ROOT / "docs").glob("*.md")} <= set(
        named(yaml.safe_load(read("mkdocs.yml"))["nav"])
    )


def named(nav):
    for entry in nav:
        for target in entry.values():
            yield from named(target) if isinstance(target, list) else [target]


def test_reference_has_every_parameter_field_and_function(registered):
    import mergekit_monosoup
    from mergekit_monosoup.registry import our_methods
    from mergekit_monosoup.report.schema import ReportHeader, TensorRecord

    pages = script("build_reference").pages()
    for method in our_methods():
        assert f"## `{method.spec.name}`" in pages["reference/methods.md"]
        for parameter in method.spec.parameters:
            assert (
                parameter.name.startswith("_") or f"| `{parameter.name}` |" in pages["reference/methods.md"]
            )
    for model in (ReportHeader, TensorRecord):
        for field in model.model_fields:
            assert f"| `{field}` |" in pages["reference/schema.md"]
    for name in set(mergekit_monosoup.__all__) - {"__version__"}:
        assert f".{name}\n" in pages["reference/python.md"]
