"""Where a run may branch off from a longer one, and what is refused."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import write_config

from moejax.config import ConfigError, UserError
from moejax.training import run_config
from moejax.training.fork import fork_run, fork_step
from moejax.training.optimizers import learning_rate


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 20 steps: 2 of warm-up, a decay over the last half."""
    path = write_config(tmp_path_factory.mktemp("config"))
    changes = ["optim.schedule=wsd", "optim.decay_fraction=0.5", "train.steps=20"]
    return run_config.load(str(path), changes)


def edited(config, **blocks):
    """The config with other fields of some blocks."""
    change = lambda name, fields: dataclasses.replace(getattr(config, name), **fields)
    return dataclasses.replace(config, **{n: change(n, f) for n, f in blocks.items()})


def test_it_leaves_where_its_decay_begins(config):
    assert fork_step(config) == 10
    assert fork_step(edited(config, optim={"decay_fraction": 0.0})) == 20
    assert fork_step(edited(config, optim={"decay_fraction": 1.0})) == 2  # after the warm-up


@settings(deadline=None, max_examples=40)
@given(
    warmup=st.integers(0, 30), share=st.floats(0, 1), steps=st.integers(1, 200),
    more=st.integers(1, 200),
)  # fmt: skip
def test_up_to_there_a_longer_run_has_the_same_learning_rates(config, warmup, share, steps, more):
    short = edited(
        config, optim={"warmup_steps": warmup, "decay_fraction": share}, train={"steps": steps}
    )
    if warmup > steps:
        with pytest.raises(ConfigError, match="ends before its warm-up is over"):
            fork_step(short)
        return
    shared = fork_step(short)
    ours, theirs = (learning_rate(short.optim, n) for n in (steps, steps + more))
    for step in {0, warmup, shared // 2, shared - 1} & set(range(shared)):
        assert float(ours(step)) == float(theirs(step))


def test_what_runs_of_several_lengths_cannot_share_is_refused(config):
    with pytest.raises(ConfigError, match=r"optim.schedule = 'cosine'"):
        fork_step(edited(config, optim={"schedule": "cosine"}))
    ahead = edited(config, model={"mtp_depth": 1})
    with pytest.raises(ConfigError, match=r"train.mtp_switch = 0.4: changes the MTP modules'"):
        fork_step(edited(ahead, train={"mtp_switch": 0.4}))
    assert fork_step(edited(ahead, train={"mtp_switch": 0.5})) == 10
    assert fork_step(edited(ahead, train={"mtp_switch": 0.4, "mtp_weight_final": 0.3})) == 10


def test_no_run_to_leave_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no run is there"):
        fork_run(tmp_path / "none", tmp_path / "target", 10, 5)
    assert list(tmp_path.iterdir()) == []
