"""Runs notebooks where they stand and stores their outputs: ``python notebooks/execute.py FILE...``

Needs ``pip install '.[notebooks]'``; this checkout's moejax is used, installed or not. Nothing of
the machine is kept: no times, no paths, no ids.
"""

import os
import pathlib
import sys

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: pathlib.Path) -> None:
    """Runs one notebook in its own folder and writes it back; raises on the first error."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources=resources, record_timing=False
    )
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    client.execute(env={**os.environ, "PYTHONPATH": paths})
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        kept = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": kept} if kept else {})
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(pathlib.Path(name).resolve())
