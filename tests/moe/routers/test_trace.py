"""Replayed loads: read from what a run writes, rounded to whole assignments, layer by layer."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.models import Transformer
from moejax.moe.diagnostics import router_health
from moejax.moe.routers import RouterInputs, TraceOptions, TraceRouter
from moejax.moe.routers.trace import MEASURE, round_loads
from moejax.training.metrics import MetricWriter

EXPERTS = 4
rounded = jax.jit(round_loads, static_argnums=2)


def write(path, values):
    path.write_text(json.dumps(values))
    return str(path)


@functools.cache
def measures():
    """Names of what an MoE layer reports."""
    config = tiny.moe_config()
    encode = functools.partial(Transformer(config).apply, method=Transformer.encode)
    out = jax.eval_shape(encode, tiny.shapes(config), jnp.ones((1, 2), jnp.int32))
    return list(out.router_stats["segment_1"]["layer_0"])


def metrics(folder, *loads):
    """What a run leaves that logged the loads (L, E) at steps 10, 20, ..., and its path."""
    with MetricWriter(folder, tensorboard=False) as writer:
        for step, load in enumerate(loads, start=1):
            stats = {name: np.ones(len(load), np.float32) for name in measures()}
            stats |= {
                "load": np.array(load, np.float32),
                "gate_mass": np.ones((len(load), EXPERTS)),
            }
            health = router_health({"segment_0": {"layer_0": stats}})
            writer.write(10 * step, {f"router/{k}": v for k, v in health.items()})
            writer.write(10 * step, {"val_loss": 1.0})
    return str(folder / "metrics.jsonl")


def test_loads_come_from_the_metrics_that_a_run_writes(tmp_path):
    path = metrics(tmp_path, [[5, 5, 10, 20], [10, 10, 10, 10]], [[1, 1, 1, 1], [4, 4, 1, 1]])
    first = TraceOptions(path=path, step=10).shares(EXPERTS, 2)
    np.testing.assert_allclose(first, [[0.125, 0.125, 0.25, 0.5], [0.25] * 4], atol=1e-4)
    last = TraceOptions(path=path).shares(EXPERTS, 2)
    np.testing.assert_allclose(last, [[0.25] * 4, [0.4, 0.4, 0.1, 0.1]], atol=1e-4)
    only = TraceOptions(path=path, layer=1).shares(EXPERTS, 2)
    np.testing.assert_allclose(only, last[1:])


def test_a_torn_last_line_is_left_out(tmp_path):
    path = metrics(tmp_path, [[1, 1, 2, 4]])
    with open(path, "a") as file:
        file.write(f'{{"step": 20, "{MEASURE}": [[0.25, ')
    np.testing.assert_allclose(
        TraceOptions(path=path).shares(EXPERTS, 2), [[0.125, 0.125, 0.25, 0.5]], atol=1e-4
    )


def test_json_and_npy_hold_one_layer_or_several(tmp_path):
    one = TraceOptions(path=write(tmp_path / "one.json", [1, 1, 2, 4])).shares(EXPERTS, 2)
    np.save(tmp_path / "two.npy", np.array([[1, 1, 2, 4], [0, 8, 8, 0]]))
    two = TraceOptions(path=str(tmp_path / "two.npy")).shares(EXPERTS, 2)
    np.testing.assert_allclose(one, [[0.125, 0.125, 0.25, 0.5]])
    np.testing.assert_allclose(two, [[0.125, 0.125, 0.25, 0.5], [0, 0.5, 0.5, 0]])


def test_what_rounding_put_above_the_limit_goes_where_there_is_room(tmp_path):
    # With K = 2 nobody can have more than a half: 0.001 too much is spread over the room left,
    # 0.001 at expert 1, 0.5 at experts 2 and 3 each.
    path = write(tmp_path / "loads.json", [0.501, 0.499, 0.0, 0.0])
    (shares,) = TraceOptions(path=path).shares(EXPERTS, 2)
    np.testing.assert_allclose(shares, [0.5, 0.499001, 0.0004995, 0.0004995], atol=1e-7)


@pytest.mark.parametrize(
    ("values", "options", "field", "message"),
    [
        (None, {}, "router.path", r"cannot be read \(No such file.*give another"),
        ([1, 2, 3], {}, "router.path", r"3 experts, but moe.num_experts is 4"),
        ([1, -1, 2, 2], {}, "router.path", "below zero"),
        ([1, None, 2, 2], {}, "router.path", "not finite"),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], {}, "router.path", "a layer without any"),
        ([1, 1, 1, 7], {}, "router.path", r"0.7000 of all.*moe.top_k = 2.*0.5000 at most"),
        ([[1, 1], [1]], {}, "router.path", "holds no table of loads"),
        ({"loads": [1, 1, 1, 1]}, {}, "router.path", "holds no table of loads"),
        ([[[1, 1, 1, 1]]], {}, "router.path", r"shape \(1, 1, 4\); give"),
        ([1, 1, 1, 1], {"layer": 1}, "router.layer", "not among the 1 layers"),
        ([1, 1, 1, 1], {"step": 3}, "router.step", "leave it 0"),
        ([1, 1, 1, 1], {"layer": -2}, "router.layer", "count from 0"),
        ([1, 1, 1, 1], {"step": -2}, "router.step", "below zero"),
    ],
)
def test_refusals(tmp_path, values, options, field, message):
    path = str(tmp_path / "loads.json")
    if values is not None:
        write(tmp_path / "loads.json", values)
    with pytest.raises(ConfigError, match=message) as error:
        TraceOptions(path=path, **options).check(EXPERTS, 2)
    assert error.value.field == field


def test_refusals_of_metrics(tmp_path):
    with pytest.raises(ConfigError, match=r"router.path = '': names no loads"):
        TraceOptions().check(EXPERTS, 2)
    with pytest.raises(ConfigError, match=r"router.path.*none of metrics.jsonl"):
        TraceOptions(path=str(tmp_path)).check(EXPERTS, 2)
    path = metrics(tmp_path, [[1, 1, 1, 1]], [[1, 1, 1, 1]])
    with pytest.raises(ConfigError, match=r"router.step = 15: .* 2 steps \(10 to 20\)"):
        TraceOptions(path=path, step=15).check(EXPERTS, 2)
    (tmp_path / "dense.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"router.path.*the metrics of an MoE run"):
        TraceOptions(path=str(tmp_path / "dense.jsonl")).check(EXPERTS, 2)
    (tmp_path / "damaged.jsonl").write_text(f'{{"{MEASURE}": \n{{"step": 1}}\n')
    with pytest.raises(ConfigError, match=r"router.path.*no table of loads"):
        TraceOptions(path=str(tmp_path / "damaged.jsonl")).check(EXPERTS, 2)


def test_rounding_by_hand():
    # 5 tokens, K = 2: 10 · (.46, .24, .13, .17) = 4.6, 2.4, 1.3, 1.7; floors 4, 2, 1, 1 leave 2,
    # for the remainders .7 and .6.
    got = rounded(jnp.array([0.46, 0.24, 0.13, 0.17]), 5, 2)
    np.testing.assert_array_equal(got, [5, 2, 1, 2])
    # One token, K = 2: 1, 0.5, 0.5, 0: the first half before the second; nobody above 1.
    np.testing.assert_array_equal(rounded(jnp.array([0.5, 0.25, 0.25, 0.0]), 1, 2), [1, 1, 0, 0])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
    st.one_of(st.integers(0, 300), st.sampled_from([2**16, 2**22 + 3])),
)
def test_rounding_is_exact_in_sum_capped_and_near(weights, tokens):
    top_k, limit = 3, 1 / 3
    shares = np.asarray(weights) + 1e-3
    shares = np.minimum(shares / shares.sum(), limit)
    shares += (1 - shares.sum()) * (limit - shares) / (limit - shares).sum()
    counts = np.asarray(rounded(jnp.asarray(shares, jnp.float32), tokens, top_k), np.int64)
    assert counts.sum() == top_k * tokens
    assert counts.min() >= 0 and counts.max() <= tokens
    assert np.abs(counts - shares * top_k * tokens).max() <= 1 + 1e-5 * tokens


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """A model of two MoE layers in one scan that replays three recorded layers, and those."""
    loads = np.array([[2, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 4, 4, 0, 0, 0], [1] * 8])
    path = tmp_path_factory.mktemp("trace") / "loads.npy"
    np.save(path, loads)
    config = tiny.moe_config("trace", options={"path": str(path)})
    variables = tiny.variables(config)
    encode = lambda *args: Transformer(config).apply(*args, method=Transformer.encode)
    return config, variables, jax.jit(encode), loads / loads.sum(axis=1, keepdims=True)


def test_each_layer_replays_its_own_load(replay):
    _, variables, encode, shares = replay
    segments = jnp.asarray(np.arange(8)[None] < np.array([[8], [5]]), jnp.int32)
    out = encode(variables, jnp.ones((2, 8), jnp.int32), segments)
    load = np.asarray(out.router_stats["segment_1"]["layer_0"]["load"])
    # 13 valid tokens, 2 experts each; a dense layer comes before the two MoE layers.
    assert load.sum(axis=1).tolist() == [26, 26]
    assert np.abs(load - 26 * shares[[0, 1]]).max() <= 1


def test_one_load_for_all_layers(tmp_path):
    options = TraceOptions(path=write(tmp_path / "loads.json", [[4, 0, 4, 0]] * 3), layer=2)
    router = TraceRouter(options, EXPERTS, 2)
    inputs = RouterInputs(jnp.ones((1, 6, 4)), jnp.ones((1, 6), bool))
    assert set(jax.eval_shape(router.init, jax.random.key(0), inputs)) == {"params"}
    out = jax.jit(router.apply)({"params": {"kernel": jnp.eye(4)}}, inputs)
    np.testing.assert_array_equal(out.stats["load"], [6, 0, 6, 0])
    np.testing.assert_array_equal(np.sort(out.expert, axis=1), [[0, 2]] * 6)
