"""The MoE suite from end to end on a tiny layer: the JSON object, files, parts and text."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import relative_error

from moejax import cli
from moejax.bench import moe_suite
from moejax.bench.loads import draw_routing
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report
from moejax.bench.shapes import SHAPES, find_shape
from moejax.bench.tables import format_tables
from moejax.moe.experts import ExpertWeights

SHAPE = "T64-D16-F8-E4-K2"
FLAGS = ["bench", f"--shapes={SHAPE}", "--loads=balanced,skewed", "--repeats=2", "--profile"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The JSON object of one run, and the folder that it wrote."""
    folder, out = tmp_path_factory.mktemp("bench") / "new" / "results", io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = cli.main([*FLAGS, f"--output={folder}", "--format=json"])
    assert status == 0
    return json.loads(out.getvalue()), folder


def test_rows_have_the_contracts_keys(outcome):
    record, _ = outcome
    assert {"machine", "versions", "results", "seed", "date", "command"} <= record.keys()
    assert record["failures"] == []
    assert record["machine"]["platform"] == "cpu" and record["machine"]["cores"] >= 1
    assert record["versions"]["jax"] == jax.__version__
    for row in record["results"]:
        assert row["suite"] == "moe" and row["dtype"] == "float32" and row["rounds"] == 2
        assert {a: row["shape"][a] for a in "TDFEK"} == find_shape(SHAPE).sizes
        assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert row["temp_bytes"] >= 0 and row["output_bytes"] > 0 and row["compile_seconds"] > 0
        # 64 tokens x 2 experts x 3 products x 16 x 8 x 2 FLOPs; three times that with backward.
        flops = 98304 * {"forward": 1, "forward_backward": 3}[row["pass"]]
        assert row["flops_per_s"] == pytest.approx(flops / row["ms"]["median"] * 1e3)


def test_every_dispatcher_is_measured_beside_dense(outcome):
    rows = outcome[0]["results"]
    found = {(row["load"], row["pass"], row["dispatch"]) for row in rows}
    for load in ("balanced", "skewed"):
        for passes in ("forward", "forward_backward"):
            assert {(load, passes, name) for name in ("dense", "capacity", "blocks")} <= found
            (dense,) = (
                row
                for row in rows
                if (row["load"], row["pass"], row["dispatch"]) == (load, passes, "dense")
            )
            assert dense["ratio_to_dense"] == 1.0
            for row in rows:
                if (row["load"], row["pass"]) == (load, passes):
                    ratio = row["ms"]["median"] / dense["ms"]["median"]
                    assert row["ratio_to_dense"] == pytest.approx(ratio)
    # Its time does not depend on the load.
    assert {load for load, _, name in found if name == "dense_loop"} == {"balanced"}


def test_loads_and_drops_are_told(outcome):
    for row in outcome[0]["results"]:
        # E / K = 2 is the most that a skewed load can have here.
        assert row["max_over_mean"] == {"balanced": 1.0, "skewed": 2.0}[row["load"]]
        drops = (row["load"], row["dispatch"]) == ("skewed", "capacity")
        # 40 slots; counts 64, 36, 19, 9 or so: 24 of 128 find none.
        assert row["dropped_share"] == (pytest.approx(24 / 128) if drops else 0)


def test_it_says_what_auto_picks_and_what_is_left_out(outcome):
    record, _ = outcome
    assert record["auto"] == {
        SHAPE: {"dispatch": "blocks", "reason": record["auto"][SHAPE]["reason"]}
    }
    text = format_tables(record)
    assert f"auto runs blocks for every shape here: {record['auto'][SHAPE]['reason']}" in text
    assert any(note.startswith("grouped is left out") for note in record["notes"])


def test_the_parts_of_the_layer(outcome):
    rows = {row["piece"]: row for row in outcome[0]["profile"]}
    assert {
        "router softmax_topk",
        "router deepseek_v3",
        "sort",
        "gather rows",
        "combine",
    } <= rows.keys()
    products = {
        "gate-up product": 2, "down product": 1, "down, input gradient": 1,
        "down, weight gradient": 1, "gate-up, input gradient": 2, "gate-up, weight gradient": 2,
    }  # fmt: skip
    for name, matrices in products.items():
        # 128 rows x 16 x 8 multiply-adds for each matrix.
        flops = 2 * 128 * 16 * 8 * matrices
        row = rows[name]
        assert row["flops_per_s"] == pytest.approx(flops / row["ms"]["median"] * 1e3)
    exchanges = [name for name in rows if name.startswith("layer, expert=4")]
    assert sorted(exchanges) == ["layer, expert=4, all_to_all", "layer, expert=4, none"]
    assert any(note.startswith("exchange ragged_all_to_all") for note in outcome[0]["notes"])


def test_files_are_written(outcome):
    record, folder = outcome
    assert json.loads((folder / "results.json").read_text()) == record
    page = (folder / "README.md").read_text()
    for wanted in ("moejax bench", record["date"], f"jax {jax.__version__}", "seed", "x dense"):
        assert wanted in page
    (trace,) = (folder / "trace" / SHAPE).rglob("*.xplane.pb")
    # The programs stand in the trace under their names.
    content = trace.read_bytes()
    assert b"dense" in content and b"blocks" in content


def test_text_is_at_most_100_columns(outcome):
    lines = format_tables(outcome[0]).splitlines()
    assert max(map(len, lines)) <= 100
    header = next(line for line in lines if "x dense" in line)
    assert header.split()[:4] == ["load", "dispatch", "pass", "ms"]


def test_the_dense_layer_has_the_same_flops_and_arithmetic():
    """With two experts that every token runs through, equal gates and their matrices side by side,
    the MoE layer is half the dense one."""
    shape = find_shape("T8-D6-F4-E2-K2")
    arrays = moe_suite.layer_arrays(shape, "float32", 0)
    weights: ExpertWeights = arrays["moe"]
    gate_up = jnp.concatenate(list(weights.gate_up), axis=-1).reshape(6, 16)
    down = weights.down.reshape(8, 6)
    expert = jnp.tile(jnp.array([[0, 1]]), (8, 1))
    y, dropped = moe_suite.moe_layer(
        "blocks", shape, arrays["x"], expert, jnp.full((8, 2), 0.5), weights
    )
    assert relative_error(y, moe_suite.dense_layer(arrays["x"], (gate_up, down)) / 2) < 1e-5
    assert dropped == 0
    assert [w.shape for w in arrays["dense"]] == [gate_up.shape, down.shape]


def test_forward_backward_gives_every_gradient():
    shape = find_shape("T8-D6-F4-E2-K1")
    arrays = moe_suite.layer_arrays(shape, "float32", 0)
    expert, gate = map(jnp.asarray, draw_routing("balanced", 8, 2, 1))
    layer = lambda x, gate, weights, expert: moe_suite.moe_layer(
        "dense_loop", shape, x, expert, gate, weights
    )
    function = jax.jit(moe_suite.with_pass(layer, "forward_backward", 3))
    arguments = (arrays["x"], gate, arrays["moe"], expert)
    y, _, gradients = function(arrays["cotangent"], *arguments)
    assert y.shape == (8, 6)
    shapes = jax.tree.map(jnp.shape, gradients)
    assert shapes == jax.tree.map(jnp.shape, arguments[:3])
    # Along x, by the definition of a derivative.
    step = 1e-3 * arrays["cotangent"]
    run = lambda x: jnp.sum(layer(x, *arguments[1:])[0] * arrays["cotangent"])
    slope = (run(arrays["x"] + step) - run(arrays["x"] - step)) / 2
    assert float(jnp.sum(gradients[0] * step)) == pytest.approx(float(slope), rel=1e-2)


def test_the_reference_is_left_out_where_it_is_slow():
    report = Report()
    assert "dense_loop" not in moe_suite.dispatchers(SHAPES["fine_e128"], (), report)
    assert any("dense_loop is left out" in note for note in report.notes)
    assert "dense_loop" in moe_suite.dispatchers(SHAPES["fine_e32"], (), report)
    asked = moe_suite.dispatchers(SHAPES["fine_e128"], ("dense_loop",), report)
    assert asked == ["dense_loop"]


def test_a_dispatcher_that_fails_is_told_and_does_not_stop_the_rest(monkeypatch, capsys):
    real = moe_suite.moe_layer

    def broken(name, *arguments):
        if name == "capacity":
            raise NotImplementedError("no such kernel")
        return real(name, *arguments)

    monkeypatch.setattr(moe_suite, "moe_layer", broken)
    flags = ["bench", "--shapes=T8-D6-F4-E2-K1", "--loads=worst", "--repeats=1"]
    assert cli.main([*flags, "--dispatch=capacity,dense_loop", "--format=json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert {row["dispatch"] for row in record["results"]} == {"dense", "dense_loop"}
    assert len(record["failures"]) == 2
    assert "no such kernel" in record["failures"][0]["error"]
    assert "failed: " in format_tables(record) and "no such kernel" in format_tables(record)


def test_capacity_counts_within_sequences():
    """4,096 tokens are two sequences: a load that fits over all of them does not within each."""
    shape = find_shape("T4096-D2-F2-E2-K1")
    arrays = moe_suite.layer_arrays(shape, "float32", 0)
    expert = jnp.asarray(np.repeat([[0], [1]], 2048, axis=0), jnp.int32)
    gate = jnp.ones((4096, 1))
    _, dropped = jax.jit(lambda *a: moe_suite.moe_layer("capacity", shape, *a))(
        arrays["x"], expert, gate, arrays["moe"]
    )
    # 1.25 x 2048 / 2 = 1,280 slots for the 2,048 that a sequence sends to one expert.
    assert dropped == 2 * (2048 - 1280)


def test_a_disk_that_fills_up_meanwhile_does_not_lose_the_measurement(
    tmp_path, monkeypatch, capsys
):
    from moejax.training import manifest

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_whole", full)
    flags = ["bench", "--shapes=T8-D6-F4-E2-K1", "--loads=worst", "--repeats=1", "--format=json"]
    status = cli.main([*flags, "--dispatch=dense_loop", f"--output={tmp_path / 'results'}"])
    record = json.loads(capsys.readouterr().out)
    assert status == 1 and len(record["results"]) == 4
    assert "No space left" in record["failures"][0]["error"]


def test_a_part_that_fails_does_not_lose_the_rest(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no such profiler")

    monkeypatch.setattr(moe_suite, "write_trace", broken)
    monkeypatch.setattr(moe_suite.exchanges, "run", lambda *_: None)
    monkeypatch.setattr(moe_suite.pieces, "run", lambda *arguments: arguments[-1].profile.append(1))
    report, shape = Report(), find_shape("T8-D6-F4-E2-K1")
    options = BenchOptions(output=tmp_path)
    moe_suite._take_apart(options, shape, {}, {}, tmp_path, report)
    assert report.profile == [1]
    assert [(failure["part"], failure["shape"]) for failure in report.failures] == [
        ("trace", shape.name)
    ]


def test_a_trace_that_is_not_there_is_noticed(monkeypatch, tmp_path):
    from moejax.bench import tracing

    monkeypatch.setattr(jax.profiler, "trace", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(tracing.TraceMissing, match="left no trace"):
        tracing.write_trace(tmp_path / "trace", {"sum": lambda: jnp.zeros(3) + 1})
