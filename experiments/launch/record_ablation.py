"""Keeps what an ablation found: its record, its figures and a page, without its runs.

    python experiments/launch/record_ablation.py runs/loss_free_bias 2026-11-27

writes ``experiments/results/ablations/loss_free_bias``: the record that
``moejax.analysis.ablation`` reads, ``analysis.json``, the report's figures, and ``README.md`` with
the command, the versions and the tables. What stands under the page's heading "What it says" is written by hand and stays.
"""

import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from moejax import cli
from moejax.analysis.ablation import analyse
from moejax.analysis.ablation_text import format_analysis
from moejax.cost.hardware import cpu_cores

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "ablations"
RECORD = ("ablation.json", "plan.json", "results.jsonl")
HEADING = "## What it says\n"


def record(folder: pathlib.Path, date: str, results: pathlib.Path = RESULTS) -> pathlib.Path:
    """Copies an ablation's record, draws its figures and writes its page.

    Args:
      folder: what ``moejax ablate`` wrote.
      date: of the runs, for the page.
      results: where ablations are kept.

    Returns:
      The folder of the result.
    """
    analysis = analyse(folder)
    target = results / analysis["name"]
    target.mkdir(parents=True, exist_ok=True)
    for name in RECORD:
        shutil.copyfile(folder / name, target / name)
    (target / "analysis.json").write_text(json.dumps(analysis, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        page = pathlib.Path(scratch) / "report.html"
        flags = ["report", str(folder), f"--output={page}", "--figures=svg", "--no-inspect"]
        if cli.main(flags) != 0:
            raise SystemExit(f"no report of {folder}")
        for figure in pathlib.Path(scratch).rglob("*.svg"):
            shutil.copyfile(figure, target / figure.name)
    words = target / "README.md"
    said = words.read_text().partition(HEADING)[2] if words.exists() else "\n"
    ablation = json.loads((folder / "ablation.json").read_text())
    words.write_text(format_page(ablation, analysis, date) + HEADING + said)
    return target


def format_page(ablation: dict[str, Any], analysis: dict[str, Any], date: str) -> str:
    """The page up to its last heading."""
    versions = {"Python": ablation["python"], **ablation["packages"]}
    shown = ", ".join(f"{name} {versions[name]}" for name in ("Python", "jax", "flax", "optax"))
    seeds = ", ".join(map(str, analysis["seeds"]))
    where = f"{cpu_cores()} cores of a shared machine ({ablation['machine']})"
    return (
        f"# {analysis['name']}\n\n"
        f"    {ablation['command']}\n\n"
        f"{date}, {where}, {shown}, moejax\n"
        f"at {ablation['code']['revision'][:12]}; seeds {seeds}.\n"
        "Losses do not depend on what else the machine did; seconds and dollars do, and other\n"
        "work ran beside these runs.\n\n"
        "![Differences from the reference, with intervals](differences.svg)\n\n"
        f"```text\n{format_analysis(analysis)}\n```\n\n"
    )


if __name__ == "__main__":
    print(record(pathlib.Path(sys.argv[1]), sys.argv[2]))
