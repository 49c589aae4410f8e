"""A run's back ends on the machine that restores it."""

import pytest

from moejax.training import run_config
from moejax.training.restore import exact_as_auto
from moejax.training.run_config import differences


def config(**moe):
    values = {
        "model": {"vocab_size": 32, "d_model": 16, "num_layers": 1, "attention": {"num_heads": 2}},
        "moe": {"num_experts": 4, "top_k": 2, "d_expert": 8, **moe},
        "train": {"steps": 1},
    }
    return run_config.from_dict(values)


@pytest.mark.parametrize(
    ("dispatch", "restored"),
    [("grouped", "auto"), ("blocks", "auto"), ("auto", "auto"), ("capacity", "capacity")],
)
def test_what_drops_nothing_is_computed_by_what_runs_here(dispatch, restored):
    before = config(dispatch=dispatch, exchange="ragged_all_to_all")
    after = exact_as_auto(before)
    assert after.model.moe.dispatch == restored and after.model.moe.exchange == "auto"
    changed = differences(before.to_dict(), after.to_dict())
    assert all(line.startswith("moe.dispatch") for line in changed)


def test_a_resumed_run_may_change_its_exchange_but_not_what_it_computes():
    lines = lambda **moe: differences(config().to_dict(), config(**moe).to_dict())
    assert lines(exchange="none", devices_per_node=4) == []
    assert lines(exchange_overflow="drop") == ["moe.exchange_overflow ('exact' -> 'drop')"]
    assert lines(drop_policy="choice", allow_leak=True)[1].startswith("moe.drop_policy")
