"""The notebooks run from the first cell to the last."""

from __future__ import annotations

import os

import pytest
from commands import ROOT

nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
pytest.importorskip("ipykernel", reason="needs the extra `notebooks`")
pytest.importorskip("matplotlib", reason="needs the extra `plot`")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "anatomy"])
def test_notebook(name, tmp_path, monkeypatch):
    import nbformat

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    # The kernel's connection goes through files, not through a port that others could use.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert not any(
        cell.get("outputs")
        for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
        if cell.cell_type == "code"
    ), "notebooks are stored without outputs"
