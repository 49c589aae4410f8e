"""The notebooks: stored as executed, small, without logic of their own, and what they say is so."""

import ast
import copy
import json
import os
import pathlib
import re

import pytest
from made_ablation import made_grid, write_ablation

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in FILES]
# Made of calls only; their outputs never change.
CALLS = {"does_5_6_million_add_up", "from_a_budget_to_a_model", "r1_zero_in_an_afternoon"}
# Those that teach: a few lines of NumPy, and runs trained as they are read.
LESSONS = {
    "anatomy_of_an_moe_layer", "balance_without_a_loss", "routing_strategies_compared",
    "what_experts_learn",
}  # fmt: skip
MOST_BYTES, MOST_FIGURE, MOST_LINES = 600_000, 100_000, 14
STATEMENTS = ast.Import | ast.ImportFrom | ast.Expr | ast.For
ARITHMETIC = STATEMENTS | ast.Assign | ast.AugAssign


def cells(path, kind):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def text_of(cell) -> str:
    """What a cell printed or returned as text; the sizes of figures left out."""
    words = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell["outputs"]]
    return re.sub(r"<Figure size .*>", "<Figure>", "".join("".join(part) for part in words))


def changing(cell) -> bool:
    """Whether outputs depend on a training run, or on what has been recorded by now."""
    return bool({"live", "recorded"} & set(cell["metadata"].get("tags", [])))


def code_of(cell) -> str:
    """A cell's code without the lines that only a kernel understands."""
    lines = "".join(cell["source"]).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("%"))


def test_there_are_seven():
    assert set(NAMES) == CALLS | LESSONS


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_stored_as_executed_and_small(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert "error" not in kinds
    data = [output.get("data", {}) for cell in code for output in cell["outputs"]]
    figures = [parts["image/png"] for parts in data if "image/png" in parts]
    assert len(figures) >= 3
    if path.stem in LESSONS:
        assert max(len("".join(figure)) for figure in figures) * 3 / 4 < MOST_FIGURE
    assert path.stat().st_size < MOST_BYTES
    words = "\n".join(map(text_of, code))
    source = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users|opt)/", words + source)
    assert "stderr" not in [o.get("name") for c in code for o in c["outputs"]]
    # Every check that a notebook prints says True; what a run prints may be a token.
    assert "False" not in "\n".join(text_of(cell) for cell in code if not changing(cell))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_logic_of_their_own(path):
    """Calls and prints; in the lessons arithmetic too, but no functions and no branches."""
    lesson = path.stem in LESSONS
    for cell in cells(path, "code"):
        code = code_of(cell)
        assert len(code.splitlines()) <= MOST_LINES, code
        for node in ast.parse(code).body:
            assert isinstance(node, ARITHMETIC if lesson else STATEMENTS), ast.dump(node)
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] == "moejax"
            if isinstance(node, ast.For):
                inside = ARITHMETIC if lesson else ast.Expr
                assert all(isinstance(inner, inside) for inner in node.body)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", "".join(cell["source"])):
            assert (path.parent / target).exists(), target


def recorded_cells(monkeypatch, results):
    """What the cells on the recorded shoot-out leave, run with another folder of records."""
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("MOEJAX_ABLATIONS", str(results))
    path = ROOT / "notebooks" / "routing_strategies_compared.ipynb"
    code = cells(path, "code")
    chosen = [code[0], *(c for c in code if "recorded" in c["metadata"].get("tags", []))]
    assert len(chosen) == 3
    names = {}
    for cell in chosen:
        exec(compile(code_of(cell), path.name, "exec"), names)
    return names


def test_without_a_record_the_command_is_said(tmp_path, monkeypatch, capsys):
    assert recorded_cells(monkeypatch, tmp_path)["shootout"] is None
    assert (
        "moejax ablate --config=experiments/ablations/router_shootout.py" in capsys.readouterr().out
    )


def test_a_record_is_read_where_there_is_one(tmp_path, monkeypatch, capsys):
    made_shootout(tmp_path)
    found = recorded_cells(monkeypatch, tmp_path)["shootout"]
    assert found["variants"]["random"]["difference"]["verdict"] == "worse"
    assert "random against deepseek_v3: worse" in capsys.readouterr().out


def made_shootout(folder):
    """A record of three routers of which one is worse, as `moejax ablate` leaves it."""
    means = {"deepseek_v3": 2.0, "hash": 2.001, "random": 2.3}
    rows = made_grid(means, range(5), cost=lambda _: {"max_violation": 0.5})
    write_ablation(
        folder / "router_shootout", rows, variants=list(means), seeds=range(5), amounts=[1e6]
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_running_them_again_gives_the_same(path, tmp_path):
    """The same text, or where it depends on a small run, outputs of the same kinds."""
    import nbformat
    from nbclient import NotebookClient

    stored = nbformat.read(path, as_version=4)
    again = copy.deepcopy(stored)
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": paths}
    if path.stem in LESSONS:
        made_shootout(tmp_path / "ablations")
        env |= {
            "MOEJAX_NOTEBOOK_SMALL": "1", "MOEJAX_NOTEBOOK_RUNS": str(tmp_path / "runs"),
            "MOEJAX_ABLATIONS": str(tmp_path / "ablations"),
            # One device, and half the time to compile.
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }  # fmt: skip
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(again, timeout=600, kernel_name="python3", resources=resources)
    client.execute(env=env)
    for old, new in zip(stored.cells, again.cells, strict=True):
        if old.cell_type != "code":
            continue
        if not changing(old):
            assert text_of(new) == text_of(old), "".join(old.source)
        elif "recorded" not in old.metadata.tags:
            kinds = lambda cell: [(o.output_type, set(o.get("data", {}))) for o in cell.outputs]
            assert kinds(new) == kinds(old), "".join(old.source)
