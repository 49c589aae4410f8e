"""Soft MoE: weights that sum to one, a loop over slots, permutations, the leak and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.soft_moe import SoftMoEOptions, SoftMoERouter

# The second row ends in padding, the third is padding alone.
VALID = jnp.asarray(np.arange(6)[None] < np.array([[6], [4], [0]]))


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def router():
    """A router of four experts with two slots each, its variables, and a jitted run."""
    module = SoftMoERouter(SoftMoEOptions(slots_per_expert=2), 4, 1)
    variables = {"params": {"kernel": noise(16, 8, seed=1), "scale": jnp.float32(3.0)}}
    return variables, jax.jit(
        lambda variables, x, valid: module.apply(variables, RouterInputs(x, valid))
    )


@pytest.fixture(scope="module")
def layer():
    """Soft MoE in a layer: variables, inputs, and a jitted run with its gradient into x."""
    config = tiny.moe_config(
        router="moejax.moe.routers.soft_moe.SoftMoERouter", options={"slots_per_expert": 2},
        moe={"allow_leak": True, "num_shared_experts": 0},
    ).moe  # fmt: skip
    module, x = MoELayer(config), noise(3, 6, 16)
    variables = tiny.draw(jax.eval_shape(module.init, jax.random.key(0), RouterInputs(x, VALID)))

    def value(variables, x, valid):
        y = module.apply(variables, RouterInputs(x, valid)).y
        return jnp.sum(jnp.sin(y)), y

    return variables, x, jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))


def test_two_tokens_and_two_slots_by_hand():
    # Tokens (3, 0) and (0, 4) become (1, 0) and (0, 1), the columns (2, 0) and (0, 5) likewise.
    # With scale log 3 the logits are (log 3, 0; 0, log 3): both softmaxes are (.75 .25; .25 .75),
    # over tokens as over slots.
    module = SoftMoERouter(SoftMoEOptions(), 2, 1)
    params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 5.0]]), "scale": jnp.log(3.0)}
    x = jnp.array([[[3.0, 0.0], [0.0, 4.0]]])
    out = jax.jit(module.apply)({"params": params}, RouterInputs(x, jnp.ones((1, 2), bool)))
    wanted = [[[0.75, 0.25], [0.25, 0.75]]]
    np.testing.assert_allclose(out.rows.dispatch, wanted, rtol=1e-5)
    np.testing.assert_allclose(out.rows.combine, wanted, rtol=1e-5)
    np.testing.assert_array_equal(out.expert, [[0], [1]])
    np.testing.assert_array_equal(out.gate, [[1.0], [1.0]])


def test_columns_and_rows_sum_to_one_and_padding_has_no_weight(router):
    variables, run = router
    out = run(variables, noise(3, 6, 16), VALID)
    dispatch, combine = np.asarray(out.rows.dispatch), np.asarray(out.rows.combine)
    np.testing.assert_allclose(dispatch.sum(axis=1)[:2], 1, rtol=1e-5)
    np.testing.assert_allclose(combine.sum(axis=2)[np.asarray(VALID)], 1, rtol=1e-5)
    for weights in (dispatch, combine):
        np.testing.assert_array_equal(weights[~np.asarray(VALID)], 0)
    # Two rows with a token, each with 2 slots of every expert; slots of the third are nobody's.
    np.testing.assert_array_equal(out.stats["load"], [4, 4, 4, 4])
    np.testing.assert_array_equal(out.expert[:8, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(out.expert[16:, 0], np.full(8, 4))
    assert float(out.stats["tokens"]) == 10 and float(out.stats["unrouted"]) == 0


def test_the_length_of_tokens_and_columns_does_not_matter(router):
    variables, run = router
    x = noise(3, 6, 16)
    longer = {"params": {**variables["params"], "kernel": 7 * variables["params"]["kernel"]}}
    one, two = run(variables, x, VALID), run(longer, 100 * x, VALID)
    np.testing.assert_allclose(one.rows.dispatch, two.rows.dispatch, rtol=1e-4, atol=1e-7)


def test_permuting_the_tokens_permutes_the_outputs(layer):
    variables, x, run = layer
    full = jnp.ones((3, 6), bool)
    order = np.array([3, 0, 5, 1, 4, 2])
    y = run(variables, x, full)[1]
    assert tiny.relative_error(run(variables, x[:, order], full)[1], y[:, order]) < 1e-5


def test_the_output_is_a_loop_over_slots(layer):
    variables, x, run = layer
    params = variables["params"]
    weights = {name: np.asarray(values) for name, values in params["experts"].items()}
    y = np.asarray(run(variables, x, VALID)[1])
    unit = lambda values, axis: values / np.linalg.norm(values, axis=axis, keepdims=True)
    columns = unit(np.asarray(params["router"]["kernel"]), 0) * float(params["router"]["scale"])
    for row, length in ((0, 6), (1, 4)):
        tokens = np.asarray(x[row, :length], np.float64)
        scores = np.exp(unit(tokens, 1) @ columns)
        wanted = np.zeros((length, 16))
        for slot in range(16):  # 8 experts, 2 slots each
            mixed = scores[:, slot] / scores[:, slot].sum() @ tokens
            gate_up = np.einsum("d,dgf->gf", mixed, weights["gate_up"][slot // 2])
            hidden = gate_up[0] / (1 + np.exp(-gate_up[0])) * gate_up[1]
            share = scores[:, slot] / scores.sum(axis=1)
            wanted += share[:, None] * (hidden @ weights["down"][slot // 2])[None]
        assert tiny.relative_error(y[row, :length], wanted) < 1e-5
    assert not np.any(y[~np.asarray(VALID)])


def test_it_learns_padding_gets_no_gradient_and_evaluation_leaks(layer):
    variables, x, run = layer
    (to_variables, to_x), y = run(variables, x, VALID)
    router = to_variables["params"]["router"]
    assert np.any(router["kernel"]) and np.any(router["scale"])
    assert not np.any(to_x[~np.asarray(VALID)]) and np.all(np.isfinite(to_x))
    # No causal form exists: the last token changes the first one's output, training or not.
    moved = run(variables, x.at[0, -1].add(1.0), VALID)[1]
    assert tiny.relative_error(moved[0, 0], y[0, 0]) > 1e-3
    # Padding and other rows do not.
    padded = run(variables, x.at[1, -1].add(1.0).at[2].add(1.0), VALID)[1]
    np.testing.assert_array_equal(padded[:2], y[:2])


def test_options_and_counts():
    with pytest.raises(ConfigError, match="slots_per_expert"):
        SoftMoEOptions(slots_per_expert=0)
    # 16 · 8 columns' entries and the scale; logits, dispatch and combine are 2 · 16 · 8 each.
    counts = SoftMoEOptions(slots_per_expert=2).counts(16, 4, 2)
    assert (counts.params, counts.flops_per_token) == (129, 768.0) and counts.measured
    assert SoftMoEOptions.leaks
