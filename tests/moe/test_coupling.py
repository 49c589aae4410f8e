"""The expert-router coupling loss by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.moe.coupling import coupling_loss, noise_bound
from moejax.moe.experts import ExpertWeights
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.base import ExpertProbe
from moejax.moe.routers.top_k import TopKOptions, TopKRouter

loss = jax.jit(coupling_loss, static_argnums=2)


def experts(matrix):
    """Gate projections (E, D, 1) with column j of a matrix as expert j's only neuron, so that
    with an identity router M_ij = |matrix_ij|."""
    return jnp.asarray(matrix, jnp.float32).T[:, :, None]


def test_by_hand():
    # R = 1, so M = |W|, rows the columns of the router, columns the experts:
    #   M = 3 1 0      entry ij over alpha M_ii, alpha = 1: 4 in row 1 by 4 - 2 = 2
    #       4 2 1      entry ij over alpha M_jj: 4 in column 0 by 4 - 3 = 1
    #       0 1 5      sum 3, over E² = 9: 1/3.
    m = [[3.0, 1, 0], [-4, 2, 1], [0, 1, 5]]
    np.testing.assert_allclose(loss(jnp.eye(3), experts(m), 1.0), 3 / 9, rtol=1e-6)
    # alpha = 1/2: thresholds 1.5, 1, 2.5. Rows: 4 - 1 = 3 (entry 10), 1 - 1 = 0 (entry 12);
    # columns: entry 10 over 1.5 = 2.5; entries 01 and 21 against 1: 0. Sum 5.5, over 9.
    np.testing.assert_allclose(loss(jnp.eye(3), experts(m), 0.5), 5.5 / 9, rtol=1e-6)


def test_zero_exactly_where_the_diagonal_dominates_and_then_without_gradient():
    m = [[3.0, 1, 0], [-1, 2, 1], [0, 1, 5]]
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.eye(3), experts(m), 1.0)
    assert float(value) == 0
    assert not any(np.any(g) for g in gradients)
    assert float(loss(jnp.ones((3, 1)), jnp.ones((1, 3, 2)), 1.0)) == 0  # one expert alone


def test_the_noise_is_bounded_by_half_the_way_to_the_nearest_column():
    # Columns (3, 0), (0, 4), (3, 1): distances 5, 1, sqrt(18):
    # eps = 1 / 6, sqrt(18) / 8, 1 / (2 sqrt(10)).
    columns = jnp.array([[3.0, 0], [0, 4], [3, 1]])
    wanted = [1 / 6, np.sqrt(18) / 8, 1 / (2 * np.sqrt(10))]
    np.testing.assert_allclose(noise_bound(columns), wanted, rtol=1e-5)
    rng = np.random.default_rng(0)
    kernel, gate = rng.normal(size=(8, 4)), rng.normal(size=(4, 8, 5))
    values = [float(loss(kernel, gate, 1.0, jax.random.key(i))) for i in range(4)]
    assert len(set(values)) == 4
    assert np.all(np.isfinite(values))


def test_equal_columns_and_zero_columns_give_finite_gradients():
    gate = jnp.ones((3, 2, 2))
    for kernel in (jnp.ones((2, 3)), jnp.zeros((2, 3))):
        g = jax.grad(loss, argnums=(0, 1))(kernel, gate, 0.5, jax.random.key(0))
        assert all(np.isfinite(leaf).all() for leaf in g)


@functools.cache
def run(train, width=4):
    router = TopKRouter(TopKOptions(coupling_loss_weight=2.0), 3, 1)
    gate_up = jax.random.normal(jax.random.key(1), (3, width, 2, 5))
    x = jax.random.normal(jax.random.key(2), (1, 6, 4))

    def run(kernel, gate_up, key):
        probe = ExpertProbe(ExpertWeights(gate_up, jnp.zeros((3, 5, width))), None, None)
        inputs = RouterInputs(x, jnp.ones((1, 6), bool), experts=probe, train=train)
        rngs = {"router": key} if train else None
        return router.apply({"params": {"kernel": kernel}}, inputs, rngs=rngs).aux_loss

    kernel = jax.random.normal(jax.random.key(3), (4, 3))
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1))), kernel, gate_up


def test_as_a_routers_loss_it_reaches_router_and_experts_and_draws_in_training_only():
    step, kernel, gate_up = run(False)
    value, (to_router, to_experts) = step(kernel, gate_up, jax.random.key(0))
    plain = loss(kernel, gate_up[:, :, 0], 1.0)
    np.testing.assert_allclose(value, 2 * plain, rtol=1e-6)
    assert np.any(to_router) and np.any(to_experts[:, :, 0])
    assert not np.any(to_experts[:, :, 1]), "the up projection has no part in it"
    assert float(step(kernel, gate_up, jax.random.key(1))[0]) == float(value)
    noisy, kernel, gate_up = run(True)
    assert float(noisy(kernel, gate_up, jax.random.key(0))[0]) != float(value)
