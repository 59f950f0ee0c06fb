"""The notebooks run from the first cell to the last, and show what is stored in them."""

from __future__ import annotations

import re

import pytest
from commands import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
pytest.importorskip("ipykernel", reason="needs the extra `notebooks`")
pytest.importorskip("matplotlib", reason="needs the extra `plot`")

NAMES = sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb"))
_OF_A_MACHINE = re.compile(r"/tmp/|/home/|/work/|/Users/|/var/|[A-Z]:\\")


def _read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def _kinds(notebook):
    return [[o.output_type for o in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from build_notebooks import execute

    notebook = _read(name)
    execute(notebook)
    assert _kinds(notebook) == _kinds(_read(name))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_can_be_read_anywhere(name):
    notebook = _read(name)
    assert any(_kinds(notebook))
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr"
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            assert not _OF_A_MACHINE.search(text)
