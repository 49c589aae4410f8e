"""Top-p and DynMoE: how many experts a token gets, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.moe.routers import adaptive
from moejax.moe.routers.adaptive import DynMoEOptions, DynMoERouter, TopPOptions, TopPRouter
from moejax.moe.routers.base import RouterInputs

kept_of = jax.jit(adaptive.fewest)

P = np.array([[[0.5, 0.3, 0.15, 0.05], [0.3, 0.2, 0.35, 0.15], [0.25, 0.25, 0.25, 0.25]]])


def route(x, valid=None, router=TopPRouter, params=None, **options):
    made = router(router.Options(**options), x.shape[-1], 2, parent=None)
    params = {"kernel": jnp.eye(x.shape[-1]), **(params or {})}
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.asarray(valid)
    run = jax.jit(lambda x: made.apply({"params": params}, RouterInputs(x, valid)))
    return run(jnp.asarray(x, jnp.float32))


def test_top_p_keeps_the_fewest_experts_that_sum_to_more():
    # Above .4: token 0: .5 alone; token 1: .35 + .3; token 2: .25 + .25, ties by index.
    out = route(np.log(P))
    np.testing.assert_array_equal(out.expert, [[0, 4, 4, 4], [0, 4, 2, 4], [0, 1, 4, 4]])
    wanted = [[0.5, 0, 0, 0], [0.3, 0, 0.35, 0], [0.25, 0.25, 0, 0]]
    np.testing.assert_allclose(out.gate, wanted, rtol=1e-5)
    assert float(out.stats["assignments"]) == 5


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 8), min_size=6, max_size=6), min_size=4, max_size=4),
    st.integers(0, 64),
)
def test_the_fewest_are_those_of_a_sorted_row(rows, total):
    # Eighths, whose sums are exact; many are equal, and the first of those come first.
    p, limit = np.array(rows) / 8, total / 8
    order = np.argsort(-p, axis=1, kind="stable")
    sorted_ = np.take_along_axis(p, order, 1)
    kept = np.cumsum(sorted_, axis=1) - sorted_ <= limit
    wanted = np.zeros(p.shape, bool)
    np.put_along_axis(wanted, order, kept, 1)
    got = kept_of(jnp.asarray(p, jnp.float32), jnp.float32(limit))
    np.testing.assert_array_equal(got, wanted)


def test_top_p_at_its_ends_and_with_a_longest_list():
    assert (np.asarray(route(np.log(P), top_p=0.0).expert) < 4).sum(axis=1).tolist() == [1, 1, 1]
    assert (np.asarray(route(np.log(P), top_p=1.0).expert) < 4).sum(axis=1).tolist() == [4, 4, 4]
    out = route(np.log(P), top_p=0.9, max_experts=2)
    np.testing.assert_array_equal(out.expert, [[0, 1], [2, 0], [0, 1]])


def test_fewer_experts_run_the_more_confident_a_token_is():
    logits = np.arange(8.0)[None, None, :] * np.linspace(0, 2, 9)[None, :, None]
    counts = (np.asarray(route(logits).expert) < 8).sum(axis=1)
    assert counts[0] == 4 and counts[-1] == 1, "uniform: .125 · 4 is the first sum above .4"
    assert np.all(np.diff(counts) <= 0)


def test_top_p_losses_by_hand():
    # Entropy over tokens 0 and 1; padding has none.
    entropy = -(P[0, :2] * np.log(P[0, :2])).sum(axis=1).mean()
    valid = [[True, True, False]]
    out = route(np.log(P), valid, entropy_loss_weight=0.5, balance_loss_weight=0.0)
    np.testing.assert_allclose(out.aux_loss, 0.5 * entropy, rtol=1e-5)
    # Loads of those tokens (2, 0, 1, 0) / 3, mean p (.4, .25, .25, .1): 4 (.8 + .25) / 3 = 1.4.
    out = route(np.log(P), valid, entropy_loss_weight=0.0, balance_loss_weight=1.0)
    np.testing.assert_allclose(out.aux_loss, 1.4, rtol=1e-5)


def test_certain_tokens_give_finite_losses_and_gradients():
    logits = jnp.array([[[200.0, 0, 0, -200]]])
    router = TopPRouter(TopPOptions(entropy_loss_weight=1.0), 4, 2, parent=None)
    run = lambda kernel: router.apply(
        {"params": {"kernel": kernel}}, RouterInputs(logits, jnp.ones((1, 1), bool))
    )
    gradient = jax.jit(jax.grad(lambda k: run(k).aux_loss + run(k).gate.sum()))(jnp.eye(4))
    assert np.isfinite(gradient).all()


# Unit columns along the axes: a token's cosines are its unit vector's entries.
X = np.array([[[0.6, 0.8, 0.0], [-0.6, -0.8, 0.0], [0.0, 0.6, 0.8]]])


def dynmoe(x=X, threshold=(0.0, 0.7, 0.3), **options):
    params = {"threshold": jnp.asarray(threshold, jnp.float32)}
    return route(x, router=DynMoERouter, params=params, **options)


def test_dynmoe_runs_what_exceeds_its_threshold_with_equal_gates_else_the_best():
    # Thresholds 0, .7, .3. Token 0: .6 > 0 and .8 > .7, 0 not: gates 1/2. Token 1: none, the best
    # cosine is 0 at expert 2. Token 2: 0 and .6 no, .8 > .3. Lengths do not matter.
    for scale in (1.0, 100.0):
        out = dynmoe(scale * X)
        np.testing.assert_array_equal(out.expert, [[0, 1, 3], [3, 3, 2], [3, 3, 2]])
        np.testing.assert_allclose(out.gate, [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 1]], rtol=1e-6)


def test_dynmoe_passes_gradients_straight_to_router_and_thresholds():
    router = DynMoERouter(DynMoEOptions(), 3, 2, parent=None)
    inputs = RouterInputs(jnp.asarray(X, jnp.float32), jnp.ones((1, 3), bool))
    threshold = jnp.array([0.0, 0.7, 0.3])

    def total(kernel, threshold):
        params = {"kernel": kernel, "threshold": threshold}
        return jnp.sum(router.apply({"params": params}, inputs).gate[0] * jnp.array([1.0, 2, 3]))

    to_kernel, to_threshold = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.eye(3), threshold)
    # Token 0's gates are half of each switch: d / d G_i = -w_i sigmoid'(G_i) / 2 for those on.
    slope = np.exp(-threshold) / (1 + np.exp(-threshold)) ** 2
    np.testing.assert_allclose(to_threshold, -slope * np.array([0.5, 1, 0]), rtol=1e-5)
    assert np.any(to_kernel[:, 0]) and np.any(to_kernel[:, 1]) and not np.any(to_kernel[:, 2])


def test_dynmoe_loss_by_hand():
    # Columns (2, 0) and (3, 3): cosine sqrt(1/2), twice off the diagonal: norm sqrt(2 · 1/2) = 1;
    # mean norm (2 + sqrt 18) / 2.
    kernel = jnp.array([[2.0, 3], [0, 3]])
    np.testing.assert_allclose(adaptive.diversity_loss(kernel), 1 + 1 + np.sqrt(18) / 2, rtol=1e-6)
    # Orthonormal columns: the first part 0 with a finite gradient, the second 1.
    value, gradient = jax.value_and_grad(adaptive.diversity_loss)(jnp.eye(2))
    np.testing.assert_allclose(value, 1, rtol=1e-6)
    assert np.isfinite(gradient).all()
    # 4 of 9 switches are on; of the first token alone 2 of 3.
    share = dynmoe(diversity_loss_weight=0.0, efficiency_loss_weight=1.0).aux_loss
    np.testing.assert_allclose(share, 4 / 9, rtol=1e-6)


def test_dynmoe_starts_orthogonal_and_zero_tokens_are_harmless():
    router = DynMoERouter(DynMoEOptions(), 4, 2, parent=None)
    inputs = RouterInputs(jnp.zeros((1, 2, 8)), jnp.array([[True, False]]))
    params = jax.jit(router.init)(jax.random.key(0), inputs)["params"]
    kernel = params["kernel"].unbox()
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(4), atol=1e-5)
    assert not np.any(params["threshold"].unbox())

    def total(x):
        out = router.apply({"params": params}, inputs.replace(x=x))
        return out.gate.sum() + out.aux_loss

    assert np.isfinite(jax.jit(jax.grad(total))(inputs.x)).all()


@pytest.mark.parametrize("router", [TopPRouter, DynMoERouter])
def test_no_token_depends_on_later_ones_or_on_padding(router):
    x = np.random.default_rng(0).normal(size=(1, 6, 4))
    other = np.where(np.arange(6)[None, :, None] < 4, x, -3 * x)
    extra = {"threshold": jnp.zeros(4)} if router is DynMoERouter else {}
    valid = np.arange(6)[None] < 5
    one, two = (route(v, valid, router=router, params=extra) for v in (x, other))
    np.testing.assert_array_equal(one.expert[:4], two.expert[:4])
    np.testing.assert_array_equal(one.gate[:4], two.gate[:4])
    assert np.all(np.asarray(one.expert)[5] == 4)


def test_values_out_of_range_are_refused():
    for options in ({"top_p": 1.5}, {"max_experts": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            TopPOptions(**options)
    with pytest.raises(ConfigError, match="max_experts"):
        TopPOptions(max_experts=9).check(8, 2)
    assert TopPOptions(max_experts=3).counts(16, 8, 4).expected_experts == 3
    assert DynMoEOptions().counts(16, 8, 2).params == 16 * 8 + 8
