"""Every router learns a fixed batch by heart: a few steps of a tiny model, with a falling loss."""

import jax
import numpy as np
import optax
import pytest
import tiny
from routed import QUICK

from moejax.config import ConfigError
from moejax.moe.routers import REGISTRY
from moejax.parallel import MeshConfig, make_mesh
from moejax.training.state import make_init
from moejax.training.step import make_train_step

STEPS, RATE = 8, 0.02
IN_EVERY_RUN = ("softmax_topk", "deepseek_v3", "expert_choice", "remoe", "moe_plus_plus")


def model(name, recorded):
    """Two MoE layers with what the router needs: two experts a token, or one."""
    kind = REGISTRY[name].Options
    settings = {"path": recorded} if name == "trace" else {}
    needs = {"allow_leak": kind.leaks, "gate_rank": 4 if kind.needs_gate_rank else 0}
    try:
        return tiny.moe_config(name, moe=needs, options=settings)
    except ConfigError:
        return tiny.moe_config(name, moe={**needs, "top_k": 1}, options=settings)


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow)
        for name in REGISTRY
    ],
)
def test_the_loss_falls(name, recorded, unoptimised):
    config = model(name, recorded)
    optimizer, batch = optax.adam(RATE), tiny.batch()
    mesh = make_mesh(MeshConfig())
    init, abstract = make_init(config, optimizer, mesh)
    step = make_train_step(config, optimizer, optax.constant_schedule(RATE))
    step = jax.jit(step, compiler_options=QUICK)
    with jax.set_mesh(mesh):
        state, losses = init(jax.random.key(0)), []
        assert jax.tree.structure(state) == jax.tree.structure(abstract)
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    # Targets are drawn from 32 tokens, so that only memory gets below log 32 = 3.47.
    assert losses[-1] < losses[0] - 0.3, losses
    assert int(state.step) == STEPS
