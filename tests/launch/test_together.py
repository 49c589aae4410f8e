"""Two processes of two devices: what they tell one another, decide, read, save and restore."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from launches import environment
from together_worker import digests

from moejax.launch.shares import free_port, shares
from moejax.launch.supervisor import Supervisor
from moejax.training.checkpoints import Checkpointer

WORKER = pathlib.Path(__file__).with_name("together_worker.py")


def state() -> dict[str, jax.Array]:
    """A state as one process has it."""
    matrix = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    return {"matrix": jax.numpy.asarray(matrix), "step": jax.numpy.int32(5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes work; one process has saved a checkpoint there."""
    path = tmp_path_factory.mktemp("together")
    with Checkpointer(path / "one") as checkpoints:
        checkpoints.save(5, state(), {"n": 5}, wait=True)
    return path


@pytest.fixture(scope="module")
def told(folder):
    """The answers of both processes."""
    port, lines = free_port(), []
    commands = [[sys.executable, str(WORKER), str(port), str(i), str(folder)] for i in (0, 1)]
    (folder / "signs").mkdir()
    with Supervisor(
        commands, shares(2, 2), folder / "signs", stall_seconds=60.0, environment=environment(),
        write=lines.append,
    ) as job:  # fmt: skip
        assert job.wait().status == 0, "".join(lines)
    answers = [
        line.partition("TOLD ")[2] for i in (0, 1) for line in lines if f"[{i}] TOLD" in line
    ]
    return [json.loads(answer) for answer in answers]


def test_every_process_knows_what_every_other_told(told):
    assert [answers["exchange"] for answers in told] == [True, True]
    assert [answers["agreed"] for answers in told] == ["0", "1"]


def test_a_failure_on_one_process_is_one_on_all_and_said_by_the_first(told):
    assert [answers["first fails"] for answers in told] == [
        "UserError: no such corpus", "PeerError: no such corpus",
    ]  # fmt: skip
    assert [answers["second fails"] for answers in told] == [
        "UserError: process 1: no such corpus", "PeerError: process 1: no such corpus",
    ]  # fmt: skip


def test_a_difference_is_named(told):
    assert told[0]["differ"].startswith(
        "UserError: process 1 has another corpus than process 0: 1 and 0; start all processes with"
    )


def test_process_0_decides(told):
    assert [answers["decide"] for answers in told] == [10, 10]
    assert [answers["decide fails"] for answers in told] == ["UserError: no such corpus"] * 2


def test_rows_are_those_that_a_process_s_devices_need(told):
    read = [{name: found["rows"] for name, found in answers["rows"].items()} for answers in told]
    assert read[0]["data 4"] == [0, 1, 4, 5] and read[1]["data 4"] == [2, 3, 6, 7]
    assert read[0]["tensor 4"] == read[1]["tensor 4"] == list(range(8))
    assert read[0]["fsdp 2, tensor 2"] == [0, 1, 4, 5]
    assert all(found["right"] for answers in told for found in answers["rows"].values())


def test_a_signal_to_one_process_stops_both_after_the_same_step(told):
    (first, found), (second, other) = (answers["signal"] for answers in told)
    assert first == second
    assert found == ["interrupted", "SIGTERM at another process"]
    assert other == ["interrupted", "SIGTERM"]


def test_process_0_s_budget_stops_both_after_the_same_step(told):
    (first, found), (second, other) = (answers["budget"] for answers in told)
    assert first == second
    assert found == ["budget", "budget.max_flops is spent"] and other[0] == "budget"


def test_one_process_s_checkpoint_is_restored_bit_equal_by_two(told):
    for answers in told:
        assert answers["restored"] == [5, 5, digests(state())]
        assert answers["messages"] == []


def test_two_processes_checkpoint_is_sealed_once_and_restored_bit_equal_by_two(told):
    for answers in told:
        assert answers["sealed"] == [3]
        assert answers["again"] == digests(state())


def test_what_process_0_cannot_save_is_saved_by_none(told):
    assert [answers["blocked"] for answers in told] == [[False, 1], [False, 1]]


def test_a_flipped_bit_is_refused_by_both(told):
    assert told[0]["damaged"] == told[1]["damaged"]
    assert "differs from its SHA-256 in the manifest" in told[0]["damaged"]


def test_votes_keep_apart_from_the_collectives_of_steps(told):
    assert [answers["busy"] for answers in told] == [1.0, 1.0]


def test_agreement_is_cheap(told):
    # Milliseconds: 4 to 5 were measured, on two cores that others used too.
    assert all(answers["cost"]["vote_ms"] < 100 for answers in told)
