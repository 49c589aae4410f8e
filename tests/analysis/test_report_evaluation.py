"""What ``moejax evaluate`` left of a run, in the report on it, and damaged records of it."""

import copy
import json
import pathlib
import re

import pytest
from made_folders import metrics, write_evaluation, write_run
from report_pages import outline, refused, report

from moejax.analysis.report.evaluation import MOST_ROWS
from moejax.analysis.report.html import UNKNOWN


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "first", lines=metrics(8))


def cells(path) -> dict[str, list[list[str]]]:
    """The rows of each table, by its caption."""
    text = pathlib.Path(path).read_text()
    found = {}
    for table in re.findall("<table>(.*?)</table>", text, re.S):
        label = re.search('<span class="title">(.*?)</span>', table)[1]
        rows = re.findall("<tr.*?>(.*?)</tr>", table)
        found[label] = [re.findall("<t[hd].*?>(.*?)</t[hd]>", row) for row in rows]
    return found


def test_domains_and_tasks_stand_in_tables(run):
    write_evaluation(run)
    result = report(run)
    found = cells(result["output"])
    assert found["Held-out text by top-level folder library"] == [
        ["domain", "documents", "tokens", "bits per byte", "95 % interval", "unigram", "gzip -9"],
        ["library", "39", "6,000", "1.8000", "1.7375 to 1.8625", "4.0500", "2.9250"],
        ["tests", "1", "3,000", "2.1000", "one document", "4.3500", "3.2250"],
        ["(all)", "40", "9,000", "1.9000", "1.8375 to 1.9625", "4.1500", "3.0250"],
    ]
    assert found["Tasks of lm-evaluation-harness"][1:] == [
        ["arc_library", "1,250", "5", "acc", "0.4375", "0.0312"],
        ["arc_library", "1,250", "5", "f1/library", UNKNOWN, UNKNOWN],
    ]
    text = outline(result["output"]).text
    for part in (
        "Checkpoint of step 50, 2.5000 nats per token, on 3 of 7 held-out batches.",
        "Version 0.4.9, at most 1,024 tokens at once, only the first 250 samples of each task.",
        f"moejax evaluate --workdir={run} --step=50 --batches=3 --lm-eval=TASKS --limit=250",
        "its quality is its loss and its results in evaluate.json,",
    ):
        assert part in text, part
    assert "Leak: router library looks ahead." in result["warnings"]


def test_it_stands_between_learning_and_routers(run):
    write_evaluation(run)
    titles = re.findall('<h2 id="(.*?)">', pathlib.Path(report(run)["output"]).read_text())
    at = titles.index("evaluation")
    assert titles[at - 1] == "learning" and titles[at + 1] == "balance"


def test_without_domains_or_tasks(run):
    result = write_evaluation(run, tasks=False)
    result |= {"domains": [], "kind": None, "why": "the documents have no paths", "leaks": [],
               "batches": {"run": 7, "of": 7}}  # fmt: skip
    result["total"] |= {"bits_per_byte": None, "interval": [None, None]}  # a loss not finite
    (run / "evaluate.json").write_text(json.dumps(result))
    made = report(run)
    rows = cells(made["output"])["Held-out text"]
    assert rows[1:] == [["(all)", "40", "9,000", UNKNOWN, UNKNOWN, "4.1500", "3.0250"]]
    text = outline(made["output"]).text
    assert "No domains: the documents have no paths." in text
    assert "nothing else was measured here" in text and "the loss above" in text
    assert "held-out batches" not in text and "lm-evaluation-harness" not in text
    assert f"moejax evaluate --workdir={run} --step=50 moejax report" in text


def test_nothing_is_said_where_there_is_none(run):
    made = report(run)
    text = outline(made["output"]).text
    assert "Evaluation" not in text and "moejax evaluate" not in text


def test_many_tasks_are_folded(run):
    result = write_evaluation(run)
    tasks = result["lm_eval"]["tasks"]
    one = tasks["arc_library"]
    tasks |= {f"task{number}": one for number in range(MOST_ROWS // 2)}
    (run / "evaluate.json").write_text(json.dumps(result))
    assert f"All {MOST_ROWS + 2} results" in outline(report(run)["output"]).text


def test_an_evaluation_of_another_run_is_warned_of(run):
    result = write_evaluation(run)
    (run / "evaluate.json").write_text(json.dumps(result | {"fingerprint": "0" * 63 + "9"}))
    assert any("is of another run" in line for line in report(run)["warnings"])


def test_of_several_runs_no_evaluation_is_shown(run, tmp_path):
    write_evaluation(run)
    write_run(tmp_path / "second", lines=metrics(8), seed=1)
    made = report(tmp_path)
    assert not any("looks ahead" in line for line in made["warnings"])
    assert "Checkpoint of step 50" not in outline(made["output"]).text


# Damaged records: one line, status 2, nothing written.


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"null", b"\xff", b'{"step": 50}'])
def test_files_that_are_no_record(run, tmp_path, content, capsys):
    write_evaluation(run)
    (run / "evaluate.json").write_bytes(content)
    line = refused(capsys, run, root=tmp_path)
    assert "evaluate.json" in line and "restore" in line


MISSING = object()
DAMAGE = {
    ("total",): (MISSING, "lacks total"),
    ("batches", "of"): (MISSING, "lacks batches.of"),
    ("step",): ("50", "step is no whole number"),
    ("confidence",): (None, "confidence is no number"),
    ("leaks",): (["a", 3], "leaks[1] is no text"),
    ("domains",): ({}, "domains is no list"),
    ("domains", 1): ("tests", "domains[1] is no object"),
    ("domains", 1, "gzip"): (MISSING, "lacks domains[1].gzip"),
    ("domains", 0, "tokens"): (None, "domains[0].tokens is no whole number"),
    ("total", "bits_per_byte"): (True, "total.bits_per_byte is no number"),
    ("total", "unigram"): (10**400, "total.unigram is no number"),
    ("total", "interval"): ([1.0], "total.interval has 1 entries, not 2"),
    ("total", "interval", 0): ("low", "total.interval[0] is no number"),
    ("lm_eval", "tasks"): (MISSING, "lacks lm_eval.tasks"),
    ("lm_eval", "tasks", "a\nb"): ([], "lm_eval.tasks.'a\\nb' is no object"),
    ("lm_eval", "tasks", "arc_library", "metrics", "acc", "value"): (
        {}, "lm_eval.tasks.arc_library.metrics.acc.value is no number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", DAMAGE, ids=str)
def test_records_that_are_damaged_in_one_place(run, tmp_path, place, capsys):
    result = copy.deepcopy(write_evaluation(run))
    value, said = DAMAGE[place]
    inner = result
    for key in place[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    (run / "evaluate.json").write_text(json.dumps(result))
    line = refused(capsys, run, root=tmp_path)
    assert f"evaluate.json: {said}; restore the file" in line
