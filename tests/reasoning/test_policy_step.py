"""An optimizer step of a policy: parts add up, nothing leaks past a mask, and replay is replay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moejax.models.decode import sample
from moejax.models.sampling_config import SamplingConfig
from moejax.reasoning.policy_step import make_policy_step, make_scorer, parts_of, rows_of
from moejax.reasoning.rl_config import RLConfig
from moejax.reasoning.rollouts import PolicyRows
from moejax.training.schedules import LearningRate
from moejax.training.state import TrainState

MODEL = tiny.moe_config()
OPTIMIZER = optax.sgd(0.1)
SCHEDULE = LearningRate.of("cosine", peak=0.1, final_fraction=1.0, warmup=0, start=0, length=1)
MAX_TOKENS = 6


def config(**changes):
    return RLConfig(**{"kl_weight": 0.0, "group_size": 4, "clip_high": 0.28, **changes}).resolved()


@functools.cache
def step(rl):
    made = make_policy_step(
        MODEL, rl, OPTIMIZER, SCHEDULE, max_tokens=MAX_TOKENS, vocab_size=tiny.VOCAB - 2
    )
    return jax.jit(made)


@pytest.fixture(scope="module")
def state():
    variables = tiny.variables(MODEL)
    params = variables["params"]
    return TrainState(
        jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), variables["router_state"]
    )


@pytest.fixture(scope="module")
def rows(state):
    """Eight responses of 1 to 6 tokens to prompts of 2 to 4, as the sampler gave them."""
    rng = np.random.default_rng(0)
    lengths = np.array([2, 3, 4, 2, 3, 4, 2, 3], np.int32)
    prompts = rng.integers(1, tiny.VOCAB - 2, (8, 4)) * (np.arange(4)[None] < lengths[:, None])
    found = sample(
        MODEL, {"params": state.params, "router_state": state.router_state},
        prompts.astype(np.int32), lengths, np.arange(8, dtype=np.uint32),
        options=SamplingConfig(max_tokens=MAX_TOKENS), stop_ids=(0, 1, 2, 3),
        vocab_size=tiny.VOCAB - 2, keep_experts=True,
    )  # fmt: skip
    target = np.arange(1, found.tokens.shape[1] + 1)[None]
    begin, end = np.asarray(found.prompt_lengths), np.asarray(found.lengths)
    mask = (target >= begin[:, None]) & (target < end[:, None])
    advantages = jnp.asarray(rng.normal(size=8), jnp.float32)
    return PolicyRows(
        found.tokens, found.lengths, jnp.asarray(mask, jnp.float32), advantages, found.log_probs,
        experts=found.experts,
    )  # fmt: skip


def without_replay(rows):
    return rows.replace(experts=None)


def test_the_first_update_is_on_policy(state, rows):
    _, found = step(config())(state, parts_of(without_replay(rows), 1))
    values = found.values
    assert values["gap/max"] < 1e-5  # the sampler's log-probabilities are the trainer's
    assert values["ratio/mean"] == pytest.approx(1.0)
    assert values["clip/low"] == values["clip/high"] == 0
    assert found.gradient_norm > 0
    assert found.tokens == np.sum(np.asarray(rows.lengths) - 1)


GSPO = {"algorithm": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
SLOW = [{"aggregate": "token_mean"}, {"aggregate": "constant"}, GSPO]


@pytest.mark.parametrize("changes", [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)])
def test_parts_of_a_batch_add_up_to_it(state, rows, changes):
    rows, run = without_replay(rows), step(config(**changes))
    (whole, one), (cut, two) = run(state, parts_of(rows, 1)), run(state, parts_of(rows, 4))
    tiny.assert_trees_close(cut.params, whole.params, 1e-5)
    for name, value in one.values.items():  # gaps are rounding, and k3 is their square
        assert two.values[name] == pytest.approx(float(value), rel=2e-4, abs=1e-6), name
    # Balance losses are means over rows, part by part; what is counted adds up.
    counted = lambda found: {
        name: found.router_stats["segment_1"]["layer_0"][name] for name in ("load", "tokens")
    }
    tiny.assert_trees_close(counted(two), counted(one), 1e-6)


def test_what_follows_a_response_changes_nothing(state, rows):
    rows = without_replay(rows)
    beyond = np.arange(rows.tokens.shape[1])[None] >= np.asarray(rows.lengths)[:, None]
    other = rows.replace(
        tokens=jnp.where(beyond, 7, rows.tokens), sampler=jnp.where(beyond, 3.0, rows.sampler)
    )
    run = step(config())
    (a, one), (b, two) = run(state, parts_of(rows, 1)), run(state, parts_of(other, 1))
    tiny.assert_trees_close(b.params, a.params, 0.0)
    tiny.assert_trees_close(two.router_stats, one.router_stats, 0.0)


def test_no_advantage_moves_nothing_but_what_balances(state, rows):
    rows = without_replay(rows).replace(advantages=jnp.zeros(8))
    new, found = step(config())(state, parts_of(rows, 1))
    for name in ("head", "final_norm"):  # no balance loss reaches them
        tiny.assert_trees_close(new.params[name], state.params[name], 0.0)
    assert found.values["loss"] == 0


def test_a_policy_that_replays_its_own_choices_is_itself(state, rows):
    run = step(config(routing_replay="rollout"))
    (a, one), (b, two) = (run(state, parts_of(r, 2)) for r in (rows, without_replay(rows)))
    tiny.assert_trees_close(a.params, b.params, 1e-6)
    for name, value in one.values.items():
        assert two.values[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_choices_of_an_old_policy_are_replayed_after_it_moved(state, rows):
    """The experts that are loaded are those that were kept, whatever the router would choose."""
    rl = config(routing_replay="old_policy", minibatches=2)
    score = jax.jit(make_scorer(MODEL, rl, tiny.VOCAB - 2, keep_experts=True))
    old, chosen = score(state.params, state.router_state, without_replay(rows))
    tiny.assert_trees_close(old * rows.mask, rows.sampler, 1e-5)
    moved = state.replace(params=jax.tree.map(lambda a: -a, state.params))
    run = step(rl)
    kept = without_replay(rows).replace(old=old, experts=chosen)
    _, replayed = run(moved, parts_of(kept, 1))
    _, live = run(moved, parts_of(kept.replace(experts=None), 1))
    _, before = run(state, parts_of(kept, 1))
    load = lambda found: np.asarray(found.router_stats["segment_1"]["layer_0"]["load"])
    np.testing.assert_array_equal(load(replayed), load(before))
    assert (load(live) != load(before)).any()


def test_rows_are_picked_with_their_experts(rows):
    picked = rows_of(rows, np.array([5, 2]))
    for leaf, whole in zip(jax.tree.leaves(picked.experts), jax.tree.leaves(rows.experts),
                           strict=True):  # fmt: skip
        np.testing.assert_array_equal(leaf, whole[:, [5, 2]])
    np.testing.assert_array_equal(picked.tokens, rows.tokens[np.array([5, 2])])
    cut = parts_of(rows, 4)
    for leaf, whole in zip(jax.tree.leaves(cut.experts), jax.tree.leaves(rows.experts),
                           strict=True):  # fmt: skip
        np.testing.assert_array_equal(leaf[3], whole[:, 6:])


def test_an_update_raises_what_was_rewarded(state, rows):
    """After a small step, rewarded responses are likelier and punished ones less so."""
    rl = config()
    rows = without_replay(rows)
    new, _ = step(rl)(state, parts_of(rows, 1))
    small = jax.tree.map(lambda a, b: a + 0.01 * (b - a), state.params, new.params)
    score = jax.jit(make_scorer(MODEL, rl, tiny.VOCAB - 2))
    before, _ = score(state.params, state.router_state, rows)
    after, _ = score(small, state.router_state, rows)
    gain = jnp.sum((after - before) * rows.mask, axis=1) / jnp.sum(rows.mask, axis=1)
    assert float(jnp.sum(gain * rows.advantages)) > 0


def test_with_several_updates_the_old_policy_stays(state, rows):
    """A second step on the same rollout has ratios that are not 1."""
    rl = config(epochs=2)
    rows = without_replay(rows).replace(old=rows.sampler)
    run = step(rl)
    new, _ = run(state, parts_of(rows, 1))
    _, found = run(dataclasses.replace(new), parts_of(rows, 1))
    assert abs(float(found.values["ratio/max"]) - 1) > 1e-3
