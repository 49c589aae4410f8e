"""metrics.jsonl at the resolution of a figure: nothing is lost that a reader has to see."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.analysis.report.curves import POINTS, read_curves
from moejax.config import UserError


def write(folder, rows, tail=b"") -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "metrics.jsonl").write_bytes(data + tail)


def training(steps: int, **changes) -> list[dict]:
    return [{"step": s, "loss": 1.0 + 1 / s, "tokens": 10 * s, **changes}
            for s in range(1, steps + 1)]  # fmt: skip


def test_a_spike_and_a_gap_stay_in_a_long_run(tmp_path):
    rows = training(5000)
    rows[2500]["loss"] = 77.0
    rows[3000]["loss"] = None
    rows.insert(4000, {"step": 4000, "val_loss": 2.0, "val_bits_per_byte": 3.0})
    write(tmp_path, rows)
    curves = read_curves(tmp_path)
    assert len(curves.steps) == len(curves.rows) == POINTS and curves.logged == 5000
    assert np.max(curves.high) == 77.0 and np.min(curves.low) == 1 + 1 / 5000
    assert np.isfinite(curves.loss).all()  # one value of a stretch is missing, not the stretch
    assert [row["step"] for row in curves.validation] == [4000]
    assert curves.rows[0]["step"] == 1 and curves.rows[-1]["step"] == 5000
    # The mean of all stretches, weighted by their lengths, is the mean of all lines.
    lengths = np.diff(curves.steps, prepend=0)
    lengths[np.searchsorted(curves.steps, 3001)] -= 1
    whole = np.mean([row["loss"] for row in rows if row.get("loss") is not None])
    assert np.average(curves.loss, weights=lengths) == pytest.approx(whole)
    assert curves.at("tokens", [2500])[0] == pytest.approx(25_000, rel=0.01)
    assert np.isnan(curves.at("dollars", [2500])).all()


def test_a_loss_that_was_never_finite_is_a_gap(tmp_path):
    write(tmp_path, training(3, loss=None))
    curves = read_curves(tmp_path)
    assert np.isnan(curves.loss).all() and np.isnan(curves.high).all() and curves.logged == 3


def test_nothing_logged_is_no_error(tmp_path):
    curves = read_curves(tmp_path)
    assert len(curves.steps) == 0 and curves.rows == [] and curves.validation == []


def test_a_torn_last_line_is_left_out(tmp_path):
    write(tmp_path, training(4), tail=b'{"step": 5, "lo')
    assert read_curves(tmp_path).steps[-1] == 4


@pytest.mark.parametrize("line", [b"{}", b"[1]", b"x", b"", b'{"step": "a", "loss": 1}',
                                  b'{"step": 7, "loss": oops}', b'{"step": 7}}x'])  # fmt: skip
@pytest.mark.parametrize("steps", [3, 2000])
def test_a_damaged_line_is_named(tmp_path, line, steps):
    write(tmp_path, training(steps), tail=line + b"\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line {steps + 1}: .*restore"):
        read_curves(tmp_path)


@settings(max_examples=40, deadline=None)
@given(losses=st.lists(st.floats(-1e6, 1e6) | st.none(), min_size=1, max_size=700))
def test_stretches_hold_what_lines_say(tmp_path_factory, losses):
    folder = tmp_path_factory.mktemp("curves")
    write(folder, [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)])
    curves = read_curves(folder)
    known = [loss for loss in losses if loss is not None]
    assert curves.logged == len(losses) and curves.steps[-1] == len(losses)
    assert len(curves.steps) == min(len(losses), POINTS)
    assert (np.diff(curves.steps) > 0).all()
    if known:
        assert np.nanmin(curves.low) == min(known) and np.nanmax(curves.high) == max(known)
        inside = np.isfinite(curves.loss)
        room = 1e-9 * (1 + np.abs(curves.loss[inside]))
        assert (curves.low[inside] <= curves.loss[inside] + room).all()
        assert (curves.loss[inside] <= curves.high[inside] + room).all()
