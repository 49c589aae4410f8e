"""The MoE layer: shared experts, dispatchers that agree, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.moe.experts import SwiGLU
from moejax.moe.layer import MoELayer

VALID = jnp.asarray(np.arange(8)[None] < np.array([[8], [5]]))


def config(dispatch="blocks", **moe):
    moe = {"num_shared_experts": 2, "capacity_factor": 8.0, **moe}
    return tiny.moe_config(dispatch=dispatch, moe=moe).moe


@pytest.fixture(scope="module")
def layer():
    """Variables, inputs and a jitted run of the layer under a config."""
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))
    variables = tiny.draw(jax.eval_shape(MoELayer(config()).init, jax.random.key(0), x, VALID))

    def run(config, variables=variables):
        return jax.jit(MoELayer(config).apply)(variables, x, VALID)

    return variables, x, run


def test_dispatchers_agree(layer):
    _, _, run = layer
    wanted = run(config("dense_loop"))
    for name in ("blocks", "capacity"):
        tiny.assert_trees_close(run(config(name)), wanted, 1e-5)


def test_shared_experts_are_one_wide_one_added(layer):
    variables, x, run = layer
    params = dict(variables["params"])
    shared = params.pop("shared")
    assert shared["gate_up"].shape == (16, 2, 2 * 8)
    alone = run(config(num_shared_experts=0), {**variables, "params": params})[0]
    added = jax.jit(SwiGLU(16).apply)({"params": shared}, x)
    assert tiny.relative_error(alone + added, run(config())[0]) < 1e-6
    # Padding goes through the shared experts alone.
    assert not np.any(np.asarray(alone)[~np.asarray(VALID)])


def test_drops_are_counted_and_padding_is_not_among_them(layer):
    _, _, run = layer
    # One slot an expert and row, 8 experts: at most 16 of the 26 assignments find one.
    _, _, stats = run(config("capacity", capacity_factor=0.01))
    assert float(stats["assignments"]) == 2 * 13
    load = float(stats["assignments"])
    assert load - 16 <= float(stats["dropped"]) < load
