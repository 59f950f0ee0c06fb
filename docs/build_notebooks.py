"""Run the notebooks and store their outputs, so that they can be read on the web: needs the extra `test`.

python docs/build_notebooks.py [NAME ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"


def main(names: list[str]) -> None:
    """Run the notebooks of these names, or all."""
    for file in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        execute(notebook)
        nbformat.write(notebook, file)
        print(file.relative_to(ROOT))


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook as in its own folder, and leave in it the outputs that a reader needs."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    resources = {"metadata": {"path": str(FOLDER)}}
    metadata = notebook.metadata.copy()
    with tempfile.TemporaryDirectory() as folder:
        # Sockets that are files: others on the machine could use a port. Their paths must be short.
        manager = AsyncKernelManager(
            kernel_name="python3", transport="ipc", ip=f"{folder}/k", connection_file=f"{folder}/k.json"
        )
        client = NotebookClient(notebook, manager, timeout=300, coalesce_streams=True, resources=resources)
        client.execute(env=environment)
    notebook.metadata = metadata
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # Progress and warnings.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


if __name__ == "__main__":
    main(sys.argv[1:])
