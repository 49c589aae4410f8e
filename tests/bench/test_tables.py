"""Aligned tables, and the summary of a folder of results."""

import json

import pytest

from moejax.bench import summary, tables
from moejax.bench.report import Report, row
from moejax.bench.timing import Times

SHAPE = {"name": "fine", "T": 8, "D": 4, "F": 2, "E": 2, "K": 1}


def a_row(dispatch="blocks", passes="forward_backward", **changes):
    base = dict(
        suite="moe", shape=SHAPE, load="balanced", dispatch=dispatch, passes=passes,
        dtype="float32", times=Times((4.0, 5.0, 6.0)), flops=1e9, dense=Times((2.0, 2.0, 2.0)),
        max_over_mean=1.0, dropped_share=0.0,
    )  # fmt: skip
    return row(**{**base, **changes})


def test_words_stand_left_and_numbers_right():
    columns = [("what", lambda r: r[0]), ("number", lambda r: r[1]), ("gone", lambda r: "")]
    text = tables.format_table([("a", "1.0"), ("bcdef", "1,000")], columns)
    assert text.splitlines() == ["what   number", "a         1.0", "bcdef   1,000"]


def test_a_row_has_both_ratios():
    one = a_row(times=Times((2.0, 30.0, 2.0)), dense=Times((1.0, 10.0, 1.0)))
    assert one["ratio_to_dense"] == 2.0 and one["ratio_to_dense_by_round"] == 2.0
    assert a_row(in_turns=False)["ratio_to_dense_by_round"] is None
    assert a_row(dense=None)["ratio_to_dense"] is None
    assert one["flops_per_s"] == pytest.approx(5e11)


def test_a_shape_spelled_out_is_not_named_twice():
    assert tables.describe_shape(SHAPE) == "fine: T8 D4 F2 E2 K1"
    assert tables.describe_shape({**SHAPE, "name": "T8-D4-F2-E2-K1"}) == "T8 D4 F2 E2 K1"


def test_auto_is_told_by_shape_where_it_differs():
    picks = {
        "a": {"dispatch": "blocks", "reason": "small"},
        "b": {"dispatch": "grouped", "reason": "large"},
    }
    record = {"auto": picks, "results": [], "notes": [], "failures": []}
    assert tables.closing_lines(record) == [
        "auto runs blocks for a: small",
        "auto runs grouped for b: large",
    ]


def test_a_failure_is_reported_in_one_line(capsys):
    report = Report()
    report.fail(RuntimeError("out of memory\nmany lines"), suite="moe", shape="fine")
    assert report.failures == [
        {"suite": "moe", "shape": "fine", "error": "RuntimeError: out of memory"}
    ]
    assert capsys.readouterr().err == "failed: moe fine: RuntimeError: out of memory\n"


def test_the_summary_of_a_folder(tmp_path):
    first = {"results": [a_row(), a_row(passes="forward"), a_row("dense")]}
    model = a_row(
        suite="model", passes="train_step", mfu=0.31, tokens_per_s=12345.6, load="untrained"
    )
    (tmp_path / "02_moe.json").write_text(json.dumps(first))
    (tmp_path / "03_model.json").write_text(json.dumps({"results": [model]}))
    (tmp_path / "04_agreement.json").write_text(json.dumps({"results": [{"errors": {}}]}))
    (tmp_path / "05_broken.json").write_text("")
    trained = {"status": "completed", "tokens_per_second": 777.0, "mfu": 0.4, "dispatch": "blocks"}
    (tmp_path / "06_train.json").write_text(json.dumps(trained))
    text = summary.summarize(tmp_path)
    lines = text.splitlines()
    assert [line.split()[2] for line in lines[1:4]] == ["blocks", "dense", "blocks"]
    assert "31.0%" in lines[3] and "12,346" in lines[3] and "0.2" in lines[1]
    assert lines[4].split() == ["06_train", "blocks", "completed", "40.0%", "777"]
    assert lines[5:] == ["05_broken.json: no results"]
