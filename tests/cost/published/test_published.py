"""Bills in print: what has to reproduce, within which tolerance, and what is an echo only."""

import json
import pathlib

import pytest

from moejax import cli
from moejax.config import UserError
from moejax.cost.published import BILLS, Bill, find, published
from moejax.cost.published.figures import Figure
from moejax.cost.published.table import amount, format_published

FOLDER = pathlib.Path(__file__).parents[3] / "experiments" / "published"
ALL = {bill.name: bill for bill in find("all")}


@pytest.mark.parametrize(
    "bill, figure, reported, tolerance",
    [
        # arXiv 2412.19437, table 1, from tokens, FLOPs, the measured 38.94 % and $2
        ("deepseek_v3", "pre-training", 2.664e6, 0.01),
        ("deepseek_v3", "pre-training, dollars", 5.328e6, 0.01),
        ("deepseek_v3", "days, a trillion tokens", 3.7, 0.01),
        # ISCA 2025, tables 1, 2 and 4
        ("deepseek_v3", "TFLOP/s a GPU, causal", 385, 0.01),
        ("deepseek_v3", "MFU, causal", 38.94, 0.01),
        ("deepseek_v3", "tokens a day", 272.80e9, 0.01),
        ("deepseek_v3", "seconds a step", 19.926, 0.01),
        ("deepseek_v3", "training FLOPs a token", 250e9, 0.005),
        ("deepseek_v2", "training FLOPs a token", 155e9, 0.005),
        ("deepseek_v3", "KV cache a token", 70_272, 0.0),
        ("deepseek_v3", "KV cache, Qwen2.5-72B", 327_680, 0.0),
        ("deepseek_v3", "KV cache, Llama-3.1-405B", 516_096, 0.0),
        # arXiv 2405.04434, abstract: against a dense model, at 6 bits a value
        ("deepseek_v2", "KV cache less than DeepSeek 67B's", 93.3, 0.01),
        # arXiv 2401.06066, section 5
        ("deepseek_moe", "TFLOP of 4K tokens", 74.4, 0.025),
        ("deepseek_moe", "TFLOP of 4K tokens, LLaMA2 7B", 187.9, 0.025),
        # arXiv 2407.21783, section 3.2; arXiv 2005.14165, table D.1
        ("llama3_1", "training FLOPs, 405B", 3.8e25, 0.01),
        ("gpt3", "training FLOPs", 3.14e23, 0.01),
        ("gpt3", "days", 14.8, 0.01),
    ],
)
def test_derived_figures_reproduce(bill, figure, reported, tolerance):
    found = ALL[bill].figure(figure)
    assert found.kind == "derived" and found.reported == pytest.approx(reported)
    assert found.tolerance <= tolerance and found.reproduced
    assert abs(found.computed / reported - 1) <= tolerance + 1e-12


@pytest.mark.parametrize(
    "bill, figure, reported",
    [
        ("deepseek_v3", "context extension, dollars", 0.238e6),
        ("deepseek_v3", "post-training, dollars", 0.01e6),
        ("deepseek_v3", "all stages, dollars", 5.576e6),
        ("deepseek_r1_zero", "reinforcement learning, dollars", 202e3),
        ("deepseek_r1", "R1, dollars", 82e3),
        ("deepseek_r1", "R1-Zero, SFT data and R1, dollars", 294e3),
        ("llama3_1", "emissions, 405B", 8930),
        ("llama2_70b", "emissions", 291.42),
        ("gpt3", "energy", 1287),
    ],
)
def test_echoes_are_shown_and_are_no_proof(bill, figure, reported):
    found = ALL[bill].figure(figure)
    assert found.kind == "echoed" and found.reported == reported
    assert found.computed == pytest.approx(reported, rel=0.01)


def test_whatever_does_not_reproduce_says_why():
    figures = [figure for bill in ALL.values() for figure in bill.figures]
    wrong = [figure for figure in figures if figure.reproduced is False]
    assert {figure.name for figure in wrong} == {
        "FLOPs a token, Llama-3.1-405B",
        "pre-training, 405B",
        "emissions, 70B",
    }
    assert all(figure.why for figure in wrong)
    for figure in figures:
        assert figure.how and figure.source
        assert (figure.kind == "implied") == (figure.reported is None) == (figure.deviation is None)


def test_implied_utilisations():
    """FACTS of the sources' hours: 39.06 % V3, 25.2 % V2, 34.6 % Llama-3.1-405B by 6N."""
    implied = lambda bill, figure: ALL[bill].figure(figure).computed
    assert implied("deepseek_v3", "utilisation by the report's hours") == pytest.approx(
        39.06, abs=0.01
    )
    assert implied("deepseek_v2", "utilisation") == pytest.approx(25.2, abs=0.05)
    assert implied("llama3_1", "utilisation by 6N, 405B") == pytest.approx(34.6, abs=0.05)


def test_a_deviation_that_is_too_large_is_marked():
    figure = Figure("hours", "GPU-hours", 100.0, 102.0, "derived", "by hand", "nowhere", 0.01, "so")
    assert figure.reproduced is False and figure.deviation == pytest.approx(0.02)
    bill = Bill("one", "One", ("here",), ("this",), (figure,))
    summary = {"derived": 1, "reproduced": 0, "echoed": 0, "implied": 0}
    found = format_published({"bills": [bill.to_dict()], "summary": summary})
    assert "+2.00 % !" in found and "! hours: so" in found
    assert "0 of 1 derived figures reproduced" in found


def test_every_bill_has_a_file_of_its_own():
    files = {path.stem: path for path in FOLDER.glob("*.py")}
    assert files.keys() == BILLS.keys() == ALL.keys()
    for name, path in files.items():
        (bill,) = find(str(path))
        assert bill == ALL[name]


def test_the_summary_counts_only_what_is_derived():
    found = published("all")["summary"]
    figures = [figure for bill in ALL.values() for figure in bill.figures]
    assert found["derived"] == sum(figure.kind == "derived" for figure in figures)
    assert found["reproduced"] == found["derived"] - 2
    assert sum(found[kind] for kind in ("derived", "echoed", "implied")) == len(figures)


def test_the_command(capsys):
    assert cli.main(["plan", "--published", "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [bill["name"] for bill in found["bills"]] == list(BILLS)
    assert cli.main(["plan", "--published=deepseek_v3"]) == 0
    text = capsys.readouterr().out
    assert "5.328M" in text and "echoed" in text and "derived" in text
    assert text.count("\n") < 40  # one screen
    assert all(len(line) < 120 for line in text.splitlines())


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--published=deepseek_v33"], "no such bill; did you mean 'deepseek_v3'?"),
        (["--published=none.py"], "no such file; give a Python file with get_bill()"),
        (["--published", "--model=deepseek_v3"], "changes no published bill"),
        (["--published", "--price=3"], "changes no published bill"),
        (["--published", "--compare=h100_sxm"], "changes no published bill"),
    ],
)
def test_bad_requests_are_one_line(flags, reason, capsys):
    assert cli.main(["plan", *flags]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and reason in found.err


def test_a_file_that_gives_no_bill(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_bill():\n    return 5\n")
    with pytest.raises(UserError, match="must return a Bill"):
        find(str(path))
    path.write_text("def get_bill():\n    return 1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError at line 2"):
        find(str(path))


@pytest.mark.parametrize(
    "value, unit, shown",
    [
        (70_272, "B", "70,272 B"),
        (5.328e6, "USD", "$5.328M"),
        (2.664e6, "GPU-hours", "2.664M h"),
        (250.48e9, "FLOP", "250.5 GFLOP"),
        (3.8e25, "FLOP", "38 YFLOP"),
        (671.03e9, "", "671B"),
        (38.94, "%", "38.94 %"),
    ],
)
def test_amounts(value, unit, shown):
    assert amount(value, unit) == shown
