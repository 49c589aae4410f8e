"""The smaller suites through the command line: agreement, attention, ceilings."""

import json

import jax
import jax.numpy as jnp
import pytest

from moejax import cli
from moejax.bench import agreement, ceilings, moe_suite
from moejax.bench.report import Report
from moejax.bench.tables import format_tables


def run(capsys, *flags, status=0):
    assert cli.main(["bench", *flags, "--format=json"]) == status
    return json.loads(capsys.readouterr().out)


def test_ceilings(capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(ceilings, "COPY", {"cpu": 4096})
    record = run(capsys, "--suite=ceilings", "--repeats=2")
    product, copy = record["results"]
    seconds = product["ms"]["median"] / 1e3
    assert product["flops_per_s"] == pytest.approx(2 * 64**3 / seconds)
    # Read and written.
    assert copy["bytes_per_s"] == pytest.approx(2 * 4096 / copy["ms"]["median"] * 1e3)
    text = format_tables(record)
    assert "product 64^3" in text and "GB/s" in text


def test_attention(capsys):
    record = run(capsys, "--suite=attention", "--shapes=B2-S8-H2-W8", "--repeats=2")
    rows = {row["pass"]: row for row in record["results"]}
    assert [row["dispatch"] for row in record["results"]] == ["xla", "xla"]
    # Two products of 8 x 8 x 8 for 2 rows and 2 heads, half of them left by causality.
    forward = rows["forward"]["flops_per_s"] * rows["forward"]["ms"]["median"] / 1e3
    assert forward == pytest.approx(2 * 2 * 8 * 8 * 8 * 2 * 2 / 2)
    both = rows["forward_backward"]
    assert both["flops_per_s"] * both["ms"]["median"] / 1e3 == pytest.approx(3 * forward)
    assert any("cudnn is left out" in note for note in record["notes"])


FLAGS = ("--suite=agreement", "--shapes=T21-D6-F4-E5-K2", "--dispatch=blocks")


def test_dispatchers_agree_with_the_reference(capsys):
    record = run(capsys, *FLAGS)
    found = {(row["dtype"], row["load"]) for row in record["results"]}
    assert len(found) == 6 and record["failures"] == []
    for row in record["results"]:
        assert row["padding_is_zero"]
        assert set(row["errors"]) == {"y", "d_x", "d_gate", "d_gate_up", "d_down"}
        assert 0 < max(row["errors"].values()) < row["tolerance"]
    assert "d_gate_up" in format_tables(record)


@pytest.mark.parametrize("fault", ["a gradient", "padding"])
def test_a_dispatcher_that_is_wrong_is_a_failure(fault, capsys, monkeypatch):
    real = moe_suite.moe_layer

    def wrong(name, shape, x, expert, gate, weights):
        if fault == "a gradient" and name != "dense_loop":
            # The gates as they are, but with a gradient of 1.01.
            gate = gate + 0.01 * (gate - jax.lax.stop_gradient(gate))
        y, dropped = real(name, shape, x, expert, gate, weights)
        if fault == "padding" and name != "dense_loop":
            # Token 3 is padding.
            y = y.at[3].add(1e-6)
        return y, dropped

    monkeypatch.setattr(moe_suite, "moe_layer", wrong)
    monkeypatch.setattr(agreement, "LOADS", ("balanced",))
    monkeypatch.setattr(agreement, "DTYPES", ("float32",))
    record = run(capsys, *FLAGS, status=1)
    (failure,) = record["failures"]
    found = "padding is not zero" if fault == "padding" else "d_gate is off by 1.0e-02"
    assert found in failure["error"]


@pytest.mark.parametrize("fault", [False, True])
def test_attention_is_held_to_the_reference(monkeypatch, fault):
    real = agreement.attend

    def wrong(query, key, value, mask, *, name):
        # The first document of each row sees the others' keys.
        seen = mask | jnp.tril(jnp.ones_like(mask)) if fault and query.dtype == "bfloat16" else mask
        return real(query, key, value, seen, name=name)

    monkeypatch.setattr(agreement, "attend", wrong)
    report = Report()
    agreement.compare_attention(report, "xla", seed=0)
    (row,) = report.results
    assert row["errors"].keys() == {"y", "d_query", "d_key", "d_value"}
    assert bool(report.failures) == fault
    assert fault or 0 < max(row["errors"].values()) < 0.01


def test_attention_that_does_not_run_is_a_failure():
    report = Report()
    agreement.compare_attention(report, "cudnn", seed=0)
    (failure,) = report.failures
    assert failure["dispatch"] == "attention:cudnn" and report.results == []
