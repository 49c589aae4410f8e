"""Plan against actual: the parts by hand, and that they add up whatever happened."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import charge, done, header, plan, write

from moejax.cost import redone, utilisation
from moejax.cost.bill import read
from moejax.cost.plan import price_flops
from moejax.cost.plan_against import PARTS, UNITS, against_plan, record, recorded
from moejax.cost.prices import Price
from moejax.cost.segments import PHASES, Segment


def price(dollars):
    return {"dollars_per_hour": dollars, "source": "a test", "date": "2025"}


def test_by_hand(tmp_path):
    """Planned 36 s on 2 devices at $1.8. Two segments, of which the second costs $3.6.

    First: start-up 2 s, compile 6 s, data 1 s, train 30 s, evaluation 3 s; 900 tokens, 8.1e11 FLOP
    (27 % of 1e11). Second: goes on from 600 tokens; start-up 2 s, compile 4 s, train 12 s,
    checkpoint 1 s; 400 tokens, 3.6e11 FLOP (30 %). The plan is the first one's.
    """
    second_plan = plan(mfu=0.5, device_hours=0.01)
    run = read(write(
        tmp_path,
        header("a", plan=plan()),
        charge(30, "a", seconds={"startup": 2, "compile": 6, "data_wait": 1, "train": 30,
                                 "eval": 3},
               tokens=900, flops=8.1e11, steps=9, from_step=0, from_tokens=0),
        header("b", plan=second_plan, price=price(3.6)),
        done(12, segment="b", seconds={"startup": 2, "compile": 4, "train": 12, "checkpoint": 1},
             tokens=400, flops=3.6e11, steps=4, from_step=6, from_tokens=600),
    ))  # fmt: skip
    found, hours = run["plan"], lambda seconds: pytest.approx(2 * seconds / 3600)
    assert found["planned"]["device_hours"] == hours(36)
    assert found["planned"]["wall_hours"] == pytest.approx(36 / 3600)
    assert found["actual"]["device_hours"] == hours(42 + 19)
    assert found["actual"]["wall_hours"] == pytest.approx(61 / 3600)
    assert found["actual"]["dollars"] == pytest.approx(1.8 * 84 / 3600 + 3.6 * 38 / 3600)
    assert found["difference"]["tokens"] == 300  # all of them trained again
    parts = found["parts"]
    # 600 tokens of the first in 20 s and 400 in 12 s: 9e11 FLOP in 32 s rather than 36.
    assert parts["utilisation"]["device_hours"] == hours(-4)
    assert found["actual"]["mfu"] == pytest.approx(9e11 / (32 * 1e11))
    assert parts["redone"]["device_hours"] == hours(10)
    assert (parts["redone"]["tokens"], parts["work"]["tokens"]) == pytest.approx((300, 0))
    assert parts["restarts"]["device_hours"] == hours(6)
    expected = {"startup": 2, "compile": 6, "data_wait": 1, "eval": 3, "checkpoint": 1}
    for phase, seconds in expected.items():
        assert parts[phase]["device_hours"] == hours(seconds)
        assert parts[phase]["dollars"] == pytest.approx(1.8 * 2 * seconds / 3600)
    for empty in ("work", "peak", "other", "rollout"):
        assert parts[empty]["device_hours"] == pytest.approx(0, abs=1e-12)
    assert parts["price"]["device_hours"] == 0
    assert parts["price"]["dollars"] == pytest.approx(1.8 * 2 * 19 / 3600)


def test_half_the_work_on_devices_of_half_the_peak_at_twice_the_utilisation(tmp_path):
    """Planned 36 s. Half the tokens would take 18; at half the peak 36; at twice the MFU 18."""
    run = read(write(
        tmp_path, header("a", plan=plan(), peak_flops=5e10),
        done(18, segment="a", tokens=500, flops=4.5e11),
    ))  # fmt: skip
    parts = {name: part["device_hours"] for name, part in run["plan"]["parts"].items()}
    assert parts["work"] == pytest.approx(-2 * 18 / 3600)
    assert parts["peak"] == pytest.approx(2 * 18 / 3600)
    assert parts["utilisation"] == pytest.approx(-2 * 18 / 3600)
    assert run["plan"]["parts"]["work"]["tokens"] == -500


def test_without_a_peak_speed_is_one_part(tmp_path):
    run = read(write(
        tmp_path, header("a", plan=plan(), peak_flops=None),
        done(40, segment="a", tokens=1000, flops=9e11),
    ))  # fmt: skip
    assert run["plan"]["parts"]["peak"]["device_hours"] == 0
    assert run["plan"]["parts"]["utilisation"]["device_hours"] == pytest.approx(2 * 4 / 3600)
    assert run["plan"]["actual"]["mfu"] is None


def test_a_run_that_never_trained(tmp_path):
    run = read(write(tmp_path, header("a", plan=plan())))
    assert run["plan"]["parts"]["work"]["device_hours"] == -0.02
    assert run["plan"]["difference"]["dollars"] == -0.036
    assert read(write(tmp_path, header("a")))["plan"] is None


seconds = st.floats(0, 1e7, allow_subnormal=False)
segment = st.fixed_dictionaries({
    "phases": st.fixed_dictionaries(dict.fromkeys(PHASES, seconds)),
    "devices": st.integers(1, 4096),
    "rate": st.floats(0, 100, allow_subnormal=False),
    "peak": st.one_of(st.none(), st.floats(1e9, 1e19)),
    "steps": st.integers(0, 1000), "back": st.integers(0, 500),
    "flops_a_token": st.floats(1.0, 1e13),
})  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(segment, min_size=1, max_size=5), known=st.booleans(),
    flops=st.floats(1.0, 1e26), devices=st.integers(1, 4096), rate=st.floats(0.001, 100),
    mfu=st.floats(0.01, 1.0),
)  # fmt: skip
def test_the_parts_add_up_to_the_difference(parts, known, flops, devices, rate, mfu):
    step, built = 0, []
    for values in parts:
        step = max(step - values["back"], 0)
        began = {"from_step": step, "from_tokens": 10 * step} if known else {}
        tokens = 10 * values["steps"]
        built.append(Segment(
            header(devices=values["devices"], peak_flops=values["peak"],
                   price=price(values["rate"])),
            charge(0, seconds=values["phases"], tokens=tokens, steps=values["steps"],
                   flops=tokens * values["flops_a_token"], **began),
        ))  # fmt: skip
        step += values["steps"]
    made = price_flops(
        flops, hardware="h100_sxm", devices=devices, price=Price(rate, "user", "test", "2025"),
        used=utilisation.given(mfu, "a test"),
    ) | {"tokens": 1000}  # fmt: skip
    built[0].header["plan"] = record(made)
    found = against_plan(recorded(built), built, redone.kept(built))
    assert found["parts"].keys() == PARTS.keys()
    for unit in UNITS:
        each = [part[unit] for part in found["parts"].values()]
        planned, actual = found["planned"][unit], found["actual"][unit]
        scale = max(map(abs, [*each, planned, actual]))
        assert found["difference"][unit] == pytest.approx(actual - planned)
        assert abs(sum(each) - (actual - planned)) <= 1e-9 * scale
