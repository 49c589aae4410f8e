"""Sums over runs: by stage, by status, and what makes all-in more than the headline."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import charge, done, header, write

from moejax.cost import totals
from moejax.cost.bill import summarize
from moejax.cost.segments import PHASES, Segment

HOUR = 3600.0


@pytest.fixture
def project(tmp_path):
    """A final run of two stages with a redone hour, an ablation, and three that went wrong."""
    a = header("a", run_id="base", final=True)
    b = header("b", run_id="base", final=True)
    begun = {"from_step": 0, "from_tokens": 0}
    write(
        tmp_path / "base", a,
        charge(2 * HOUR, "a", seconds={"train": 2 * HOUR, "compile": HOUR}, tokens=200, steps=2,
               **begun),
        b,
        done(HOUR, segment="b", seconds={"train": HOUR, "data_wait": HOUR}, tokens=100,
             from_step=1, from_tokens=100),
    )  # fmt: skip
    write(tmp_path / "sft", header(run_id="sft", stage="sft", final=True), done(HOUR))
    write(tmp_path / "grid", header(run_id="grid"), done(HOUR, status="budget"))
    write(tmp_path / "bad", header(run_id="bad"), done(HOUR, status="failed"))
    write(tmp_path / "dead", header(run_id="dead", stage="sft"), charge(HOUR))
    write(tmp_path / "stopped", header(run_id="s", stage="mine"), done(HOUR, status="interrupted"))
    return summarize([tmp_path])["total"]


def test_all_in_is_made_of_parts(project):
    """$3.6 an hour: 5 + 1 hours are final, 4 more are not."""
    assert project["headline"]["dollars"] == pytest.approx(6 * 3.6)
    assert project["all_in"]["dollars"] == pytest.approx(10 * 3.6)
    assert project["ratio"] == pytest.approx(10 / 6)
    hours = {name: piece["dollars"] / 3.6 for name, piece in project["made_of"].items()}
    assert hours == pytest.approx({
        "steps": 1 + 1 + 1, "redone": 1, "around": 1, "stalls": 1, "ablations": 1, "failed": 1,
        "killed": 1, "interrupted": 1,
    })  # fmt: skip
    assert project["made_of"]["killed"]["runs"] == 1
    assert sum(p["device_hours"] for p in project["made_of"].values()) == pytest.approx(20)


def test_by_stage_and_by_status(project):
    stages, statuses = project["by_stage"], project["by_status"]
    assert list(stages) == ["pretrain", "sft", "mine"]  # the model's own order, then others
    assert [group["runs"] for group in stages.values()] == [3, 2, 1]
    assert stages["sft"]["dollars"] == pytest.approx(2 * 3.6)
    assert {name: group["runs"] for name, group in statuses.items()} == {
        "completed": 2, "budget": 1, "failed": 1, "killed": 1, "interrupted": 1,
    }  # fmt: skip
    for groups in (stages, statuses):
        for unit in totals.SUMS:
            found = sum(group[unit] for group in groups.values())
            assert found == pytest.approx(project["all_in"][unit])


def test_rollouts_are_a_stage_of_their_own(tmp_path):
    """3 hours of rollouts and 1 of training in one process."""
    line = done(0, seconds={"rollout": 3 * HOUR, "train": HOUR})
    line["rollout"] = {"tokens": 40, "model_flops": 8.0}
    write(tmp_path, header(stage="rl_train"), line)
    summary = summarize([tmp_path])
    stages = summary["total"]["by_stage"]
    assert list(stages) == ["rl_rollout", "rl_train"]
    assert stages["rl_rollout"]["dollars"] == pytest.approx(3 * 3.6)
    assert stages["rl_train"]["dollars"] == pytest.approx(3.6)
    assert (stages["rl_rollout"]["tokens"], stages["rl_train"]["tokens"]) == (40, 10)
    assert stages["rl_rollout"]["model_flops"] == 8.0
    assert summary["total"]["all_in"]["tokens"] == 50
    assert summary["runs"][0]["goodput"] == 1.0


def test_no_headline_has_no_ratio(tmp_path):
    write(tmp_path, header(), done(HOUR))
    assert summarize([tmp_path])["total"]["ratio"] is None


def test_runs_of_two_price_books(tmp_path):
    """The same hour at each one's own rate."""
    dear = {"dollars_per_hour": 3.0, "source": "another", "date": "2026"}
    write(tmp_path / "a", header(final=True), done(HOUR))
    write(tmp_path / "b", header(price=dear, hardware="h100_sxm"), done(HOUR))
    total = summarize([tmp_path])["total"]
    assert total["all_in"]["dollars"] == pytest.approx(2 * 1.8 + 2 * 3.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 50), st.lists(st.floats(0, 1e6),
       min_size=len(PHASES), max_size=len(PHASES))), min_size=1, max_size=4))  # fmt: skip
def test_uses_add_up_to_the_bill(pieces):
    parts = [
        Segment(
            header(devices=devices, price={"dollars_per_hour": rate}),
            charge(0, seconds=dict(zip(PHASES, seconds, strict=True))),
        )
        for devices, rate, seconds in pieces
    ]
    found = totals.use(parts, None)
    for unit in ("device_hours", "dollars"):
        wanted = sum(part.bill()[unit] for part in parts)
        assert sum(use[unit] for use in found.values()) == pytest.approx(wanted)
