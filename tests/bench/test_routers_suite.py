"""The suite of the routers on a tiny layer: rows, shares, the bar, and what they are run with."""

import functools

import pytest

from moejax import cli
from moejax.bench import command, routers_suite
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report
from moejax.bench.shapes import find_shape
from moejax.bench.tables import format_tables
from moejax.bench.timing import Times
from moejax.config import UserError
from moejax.moe.routers import REGISTRY

SHAPE = "T32-D20-F8-E8-K2"
ROUTERS = ("deepseek_v3", "switch", "expert_choice", "autonomy", "default_vector", "noisy_top_k")


def run(*words, routers=None):
    """The record of ``moejax bench --suite=routers``."""
    words = ["bench", "--suite=routers", *words]
    arguments = cli.parser_of_commands().parse_args(words)
    arguments.arguments, arguments.routers = words, routers
    return command.run(arguments)


@functools.cache
def record():
    return run(f"--shapes={SHAPE}", "--repeats=2", routers=",".join(ROUTERS))


def test_rows_have_the_contracts_keys():
    assert {"machine", "versions", "results", "seed", "date", "command"} <= record().keys()
    assert record()["failures"] == []
    rows = {row["dispatch"]: row for row in record()["results"]}
    assert list(rows) == ["experts (blocks)", *ROUTERS]
    for row in rows.values():
        assert row["suite"] == "routers" and row["pass"] == "forward_backward"
        assert row["shape"] == {"name": SHAPE, **find_shape(SHAPE).sizes}
        assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert row["rounds"] == 2 and row["dtype"] == "float32"
        share = row["ms"]["median"] / rows["experts (blocks)"]["ms"]["median"]
        assert row["share_of_experts"] == pytest.approx(share)
    # 32 tokens x a matrix of 20 x 8, two FLOPs each, three times that with backward.
    flops = rows["deepseek_v3"]["flops_per_s"] * rows["deepseek_v3"]["ms"]["median"] / 1e3
    assert flops == pytest.approx(32 * 20 * 8 * 2 * 3)
    assert record()["auto"][SHAPE]["dispatch"] == "blocks"


def test_the_bar_is_for_one_matrix_and_the_rest_says_what_it_needs():
    rows = {row["dispatch"]: row for row in record()["results"]}
    barred = {name for name, row in rows.items() if row["within_bar"] is not None}
    assert barred == {"deepseek_v3", "switch"}
    for name in barred:
        assert rows[name]["within_bar"] == (rows[name]["share_of_experts"] <= 0.05)
    needs = {name: row["needs"] for name, row in rows.items()}
    assert needs["deepseek_v3"] == needs["noisy_top_k"] == []
    assert needs["switch"] == ["K 1"] and rows["switch"]["top_k"] == 1
    assert needs["expert_choice"] == ["leaks"]
    assert needs["autonomy"] == ["gate_rank 2", "reads experts"]
    assert needs["default_vector"] == ["runs experts"]


def test_the_table():
    lines = format_tables(record()).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].split()[:4] == ["router", "ms", "p10", "p90"]
    (switch,) = (line for line in lines if line.startswith("switch"))
    assert switch.endswith("K 1") and "%" in switch
    assert any("the bar is 5%" in line for line in lines)


def test_every_router_finds_a_shape_that_it_can_run_at():
    """Without compiling. All are measured where none is named, but for the one that replays."""
    report = Report()
    found = routers_suite.candidates(BenchOptions(), find_shape(SHAPE), report)
    assert {one.name for one in found} == REGISTRY.keys() - {"trace"}
    assert [note.split()[0] for note in report.notes] == ["trace"]
    # One expert a token, where renormalised gates would all be 1.
    one = routers_suite.candidate("mixtral", find_shape("T32-D20-F8-E8-K1"))
    assert one.router.top_k == 1 and one.needs == ["gates as they are"]


def test_experts_get_few_rounds_unless_told(monkeypatch):
    seen = []

    def measure(windows, budget):
        seen.append(budget.rounds)
        return {name: Times((1.0,)) for name in windows}

    monkeypatch.setattr(routers_suite.timing, "measure", measure)
    run(f"--shapes={SHAPE}", routers="softmax_topk")
    run(f"--shapes={SHAPE}", "--repeats=7", routers="softmax_topk")
    assert seen == [routers_suite.EXPERT_ROUNDS, 0, 7, 7]


def test_a_router_that_fails_is_told_and_does_not_stop_the_rest(monkeypatch):
    real = routers_suite._program

    def broken(one, *arguments):
        if one.name == "switch":
            raise RuntimeError("no such kernel")
        return real(one, *arguments)

    monkeypatch.setattr(routers_suite, "_program", broken)
    out = run(f"--shapes={SHAPE}", "--repeats=1", routers="switch,softmax_topk")
    assert [row["dispatch"] for row in out["results"]][1:] == ["softmax_topk"]
    assert out["failures"][0]["router"] == "switch"


@pytest.mark.parametrize(
    ("words", "routers", "told"),
    [
        ((), "softmax_top", "--routers = 'softmax_top': no such router; did you mean"),
        ((), "a.B", "--routers = 'a.B': importing a raised ModuleNotFoundError"),
        ((), "trace", "--routers = 'trace': router.path = ''"),
        (("--shapes=T8-D4-F2-E2-K4",), None, "K is above E"),
        (("--shapes=olmo",), None, "no such shape"),
        (("--loads=balanced",), None, "--suite=routers has none"),
        (("--dispatch=blocks",), None, "--suite=routers has none"),
        (("--suite=moe",), "switch", "--routers: goes with --suite=routers"),
    ],
)
def test_bad_input_is_one_line(words, routers, told):
    with pytest.raises(UserError) as error:
        run(*words, routers=routers)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_on_the_command_line_is_status_2(capsys):
    assert cli.main(["bench", "--suite=routers", "--shapes=T8-D4-F2-E2-K4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
