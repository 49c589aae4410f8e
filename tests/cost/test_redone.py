"""Steps trained again after a resume from an older checkpoint."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import charge, header, write

from moejax.cost import redone
from moejax.cost.bill import read
from moejax.cost.segments import Segment


def segment(steps, begin=None, tokens_a_step=100, **changes):
    began = {} if begin is None else {"from_step": begin, "from_tokens": begin * tokens_a_step}
    lines = charge(1.0, steps=steps, tokens=steps * tokens_a_step, **began, **changes)
    return Segment(header(), lines)


def kept_steps(*parts):
    found = redone.kept(parts)
    assert all(entry.tokens == 100 * entry.steps for entry in found)
    return [entry.steps for entry in found]


def test_by_hand():
    # 10 steps, back to 6, 5 more (to 11), back to 9, 1 more: of the first six are in the last
    # state, of the second three (7 to 9), of the third one.
    assert kept_steps(segment(10, 0), segment(5, 6), segment(1, 9)) == [6, 3, 1]
    # The newest checkpoint was damaged: the third begins before the second did.
    assert kept_steps(segment(10, 0), segment(5, 6), segment(1, 4)) == [4, 0, 1]
    # No checkpoint yet: all over again.
    assert kept_steps(segment(10, 0), segment(12, 0)) == [0, 12]
    assert kept_steps(segment(10, 0)) == [10]


def test_a_segment_that_never_trained_throws_nothing_away_unless_it_is_the_last():
    assert kept_steps(segment(10, 0), segment(0, 4), segment(3, 10)) == [10, 0, 3]
    assert kept_steps(segment(10, 0), segment(0, 4)) == [4, 0]
    assert kept_steps(segment(0), segment(10, 0), segment(0)) == [0, 10, 0]  # died compiling


def test_a_checkpoint_newer_than_the_last_charge_loses_nothing():
    parts = [segment(10, 0), segment(5, 12)]
    assert kept_steps(*parts) == [10, 5]
    assert redone.tokens_seen(parts) == 1700


def test_a_ledger_that_does_not_say_where_it_went_on_from():
    assert redone.kept([segment(10), segment(5)]) is None
    assert kept_steps(segment(10)) == [10]  # one process alone began at the beginning


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=6))
def test_what_is_kept_and_redone_is_what_was_billed(pieces):
    """Each segment goes back by so many steps; a walk over the steps themselves as reference."""
    parts, owner, step = [], {}, 0
    for i, (steps, back) in enumerate(pieces):
        step = max(step - back, 0)
        parts.append(segment(steps, step))
        owner = {s: j for s, j in owner.items() if s < step} | {step + k: i for k in range(steps)}
        step += steps
    counted = [sum(j == i for j in owner.values()) for i in range(len(parts))]
    assert kept_steps(*parts) == counted
    again = redone.summary(parts, redone.kept(parts))
    assert again["steps"] == sum(steps for steps, _ in pieces) - len(owner)
    assert redone.tokens_seen(parts) == 100 * len(owner) == sum(counted) * 100
    assert again["tokens"] + redone.tokens_seen(parts) == sum(p.charge["tokens"] for p in parts)


def test_the_bill_of_what_was_redone(tmp_path):
    """4 of 10 steps in 10 s on 2 devices at $1.8: 8 device-seconds."""
    run = read(write(
        tmp_path, header("a"), charge(10.0, "a", steps=10, tokens=1000, flops=1e11, from_step=0,
                                      from_tokens=0),
        header("b"), charge(5.0, "b", steps=5, tokens=500, flops=5e10, from_step=6,
                            from_tokens=600),
    ))  # fmt: skip
    assert run["tokens"] == 1500 and run["tokens_seen"] == 1100
    assert run["redone"] == {
        "steps": 4, "tokens": 400, "model_flops": pytest.approx(4e10),
        "seconds": pytest.approx(4.0), "device_hours": pytest.approx(8 / 3600),
        "dollars": pytest.approx(1.8 * 8 / 3600),
    }  # fmt: skip
    assert run["use"]["redone"]["dollars"] == pytest.approx(1.8 * 8 / 3600)
    assert run["use"]["steps"]["dollars"] == pytest.approx(1.8 * 22 / 3600)


def test_a_run_that_does_not_say_says_so(tmp_path):
    run = read(write(tmp_path, header("a"), charge(10.0, "a"), header("b"), charge(5.0, "b")))
    assert run["redone"] is None and run["tokens_seen"] is None
    assert run["use"]["redone"]["dollars"] == 0


def test_a_segment_that_went_back_itself(tmp_path):
    """10 steps, back to 6, then 3 more; the next process goes on from 8: of the first piece 6 are
    in the last state, of the second 2."""
    first = charge(13.0, "a", steps=13, tokens=1300, flops=1.3e11, from_step=6, from_tokens=600,
                   pieces=[[0, 0, 10, 1000]])  # fmt: skip
    alone = read(write(tmp_path / "alone", header("a"), first))
    assert alone["redone"]["steps"] == 4 and alone["tokens_seen"] == 900
    then = charge(2.0, "b", steps=2, tokens=200, flops=2e10, from_step=8, from_tokens=800)
    run = read(write(tmp_path / "two", header("a"), first, header("b"), then))
    assert run["redone"]["steps"] == 5 and run["tokens_seen"] == 1000
    assert run["redone"]["seconds"] == pytest.approx(5.0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 30), st.booleans()), min_size=1, max_size=8
    )
)
def test_it_does_not_matter_whether_a_process_or_a_rewind_went_back(pieces):
    """The same walk in segments of their own, and with some of them joined."""
    alone, joined, step = [], [], 0
    for steps, back, same in pieces:
        step = max(step - back, 0)
        alone.append(segment(steps, step))
        if joined and same:
            joined[-1].append((step, steps))
        else:
            joined.append([(step, steps)])
        step += steps
    parts = []
    for walk in joined:
        *before, (begin, _) = walk
        more = {"pieces": [[s, 100 * s, n, 100 * n] for s, n in before]} if before else {}
        parts.append(segment(sum(n for _, n in walk), begin, **more))
    again, wanted = (redone.summary(p, redone.kept(p)) for p in (parts, alone))
    assert (again["steps"], again["tokens"]) == (wanted["steps"], wanted["tokens"])
    assert redone.tokens_seen(parts) == redone.tokens_seen(alone)
