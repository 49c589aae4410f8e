"""The README's table is that of the registry."""

import pathlib
import subprocess
import sys

from moejax.moe.routers import REGISTRY, table

README = pathlib.Path(__file__).parents[3] / "README.md"


def test_the_readmes_table_is_current():
    _, _, rest = README.read_text().partition(table.BEGIN)
    shown, _, _ = rest.partition(table.END)
    assert shown.strip() == table.table(), (
        f"README.md shows another table; put what `{sys.executable} -m moejax.moe.routers.table` "
        "prints between its two comment lines"
    )


def test_every_router_has_one_line():
    lines = table.table().splitlines()
    names = [line.split("`")[1] for line in lines[2:]]
    assert names == list(REGISTRY)
    assert {line.count("|") for line in lines} == {len(table.HEADER) + 1}
    (leaking,) = (line for line in lines if line.startswith("| `expert_choice`"))
    assert "| no |" in leaking and "(https://arxiv.org/abs/2202.09368)" in leaking


def test_the_command_prints_it():
    command = [sys.executable, "-m", "moejax.moe.routers.table"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == table.table() and not printed.stderr
