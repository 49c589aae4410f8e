"""A user's own router: the README's lines, named by their path, trained by the command."""

import json
import pathlib
import re
import sys

import pytest
import runs

from moejax.moe.routers import Router, registry

README = pathlib.Path(__file__).parents[3] / "README.md"


def readme_router() -> str:
    """The code block of the README that is a file ``my_routers.py``."""
    blocks = re.findall(r"```python\n(# my_routers\.py.*?)```", README.read_text(), re.DOTALL)
    (code,) = blocks
    return code


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with the user's modules; none of them stays imported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_routers.py").write_text(readme_router() + "\n\nNOT_A_ROUTER = dict\n")
    (tmp_path / "broken_router.py").write_text("import no_such_package\n")
    yield tmp_path
    for name in ("my_routers", "broken_router"):
        sys.modules.pop(name, None)


def test_the_readmes_router_has_fifteen_lines():
    lines = [line for line in readme_router().splitlines() if line.strip()]
    assert len(lines) <= 15


def test_it_trains_and_is_named_in_the_runs_config(here, capsys):
    config = runs.write_config(here)
    settings = ["router.name=my_routers.NearestRouter", "router.balance_loss_weight=0.01"]
    # The tiny config's router has a selection bias, this one has none.
    config.write_text(config.read_text().replace(', "bias_step": 0.01', ""))
    assert runs.train(config, here / "run", *settings) == 0, capsys.readouterr().err
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    recorded = json.loads((here / "run" / "config.json").read_text())
    assert "my_routers.NearestRouter" in json.dumps(recorded)
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    kind = registry.find("my_routers.NearestRouter")
    assert issubclass(kind, Router) and kind is registry.find("my_routers.NearestRouter")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module.NearestRouter", "importing no_such_module raised ModuleNotFoundError"),
        ("broken_router.NearestRouter", "no_such_package"),
        ("my_routers.FarthestRouter", "my_routers has no Router class FarthestRouter"),
        ("my_routers.NOT_A_ROUTER", "give the path of a subclass of moejax.moe.routers.Router"),
        ("nearest", "or give a path such as my_module.MyRouter"),
    ],
)
def test_a_path_that_leads_to_no_router_is_one_line_and_status_2(here, capsys, name, told):
    config = runs.write_config(here)
    assert runs.train(config, here / "run", f"router.name={name}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "router.name" in error and told in error
    assert not (here / "run").exists()
