"""The notebooks: stored as executed, small, without logic of their own, and what they say is so."""

import ast
import copy
import json
import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in FILES]
MOST_BYTES = 400_000


def cells(path, kind):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def text_of(cell) -> str:
    """What a cell printed or returned as text; the sizes of figures left out."""
    words = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell["outputs"]]
    return re.sub(r"<Figure size .*>", "<Figure>", "".join("".join(part) for part in words))


def test_there_are_two():
    assert NAMES == ["does_5_6_million_add_up", "from_a_budget_to_a_model"]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_stored_as_executed_and_small(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert "error" not in kinds
    figures = [o for c in code for o in c["outputs"] if "image/png" in o.get("data", {})]
    assert len(figures) >= 3
    assert path.stat().st_size < MOST_BYTES
    words = "\n".join(map(text_of, code))
    source = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users|opt)/", words + source)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_logic_of_their_own(path):
    """Imports of moejax, calls and prints; a loop at most to print rows."""
    for cell in cells(path, "code"):
        lines = [line for line in cell["source"] if not line.startswith("%")]
        for node in ast.parse("".join(lines)).body:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.For), ast.dump(
                node
            )
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] == "moejax"
            if isinstance(node, ast.For):
                assert all(isinstance(inner, ast.Expr) for inner in node.body)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_running_them_again_gives_the_same(path):
    import nbformat
    from nbclient import NotebookClient

    stored = nbformat.read(path, as_version=4)
    again = copy.deepcopy(stored)
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(again, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env={**os.environ, "PYTHONPATH": paths})
    for old, new in zip(stored.cells, again.cells, strict=True):
        if old.cell_type == "code":
            assert text_of(new) == text_of(old), "".join(old.source)
