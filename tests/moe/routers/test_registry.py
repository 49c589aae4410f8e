"""What every router in the registry has to pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.routers import REGISTRY, RouterInputs

ROWS, LENGTH, WIDTH, EXPERTS, TOP_K = 2, 8, 16, 8, 2
VALID = np.array([[True] * 8, [True] * 5 + [False] * 3])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Loads for the router that replays them, of two layers."""
    path = tmp_path_factory.mktemp("trace") / "loads.npy"
    np.save(path, [[1, 2, 3, 4, 5, 6, 7, 8], [8, 0, 0, 0, 8, 0, 0, 4]])
    return str(path)


def make(name, recorded):
    """A router by name with its default options."""
    kind = REGISTRY[name]
    options = kind.Options(path=recorded) if name == "trace" else kind.Options()
    return kind(options, EXPERTS, TOP_K)


@pytest.fixture(scope="module", params=REGISTRY)
def routed(request, recorded):
    """A router, its variables, tokens, and its decision with the gradients of the gates."""
    router = make(request.param, recorded)
    x = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, WIDTH))
    valid = jnp.asarray(VALID)
    variables = jax.jit(router.init)(jax.random.key(0), RouterInputs(x, valid))
    variables = jax.tree.map(lambda a: a, dict(variables))
    params = {"kernel": variables.pop("params")["kernel"].value}
    cotangent = jax.random.normal(jax.random.key(2), (ROWS * LENGTH, TOP_K))

    @jax.jit
    def run(params, x):
        def objective(params, x):
            out = router.apply({"params": params, **variables}, RouterInputs(x, valid))
            return jnp.sum(out.gate * cotangent), out

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)

    gradients, out = run(params, x)
    return lambda x=x: run(params, x), x, gradients, out


def test_shapes_and_types(routed):
    _, _, _, out = routed
    assert out.expert.shape == out.gate.shape == (ROWS * LENGTH, TOP_K)
    assert out.expert.dtype == jnp.int32
    assert out.gate.dtype == out.aux_loss.dtype == jnp.float32
    assert out.aux_loss.shape == ()
    assert out.stats["load"].shape == out.stats["gate_mass"].shape == (EXPERTS,)


def test_values_are_finite_and_a_tokens_experts_differ(routed):
    _, _, _, out = routed
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    valid = VALID.reshape(-1)
    chosen = np.asarray(out.expert)[valid]
    assert chosen.min() >= 0 and chosen.max() < EXPERTS
    assert all(len(set(row)) == TOP_K for row in chosen)
    assert np.all(np.asarray(out.gate)[valid] > 0)


def test_padding_is_neither_routed_nor_counted_and_gets_no_gradient(routed):
    run, x, (_, to_x), out = routed
    padding = ~VALID.reshape(-1)
    assert np.all(np.asarray(out.expert)[padding] == EXPERTS)
    assert np.all(np.asarray(out.gate)[padding] == 0)
    tokens = VALID.sum()
    assert float(out.stats["tokens"]) == tokens
    assert float(out.stats["load"].sum()) == float(out.stats["assignments"]) == tokens * TOP_K
    assert np.all(np.asarray(to_x)[~VALID] == 0)
    changed = run(jnp.where(jnp.asarray(VALID)[..., None], x, 7.0))[1]
    jax.tree.map(np.testing.assert_array_equal, changed, out)


def test_statistics_are_the_counts(routed):
    _, _, _, out = routed
    load = np.bincount(np.asarray(out.expert).reshape(-1), minlength=EXPERTS + 1)[:EXPERTS]
    np.testing.assert_array_equal(out.stats["load"], load)
    np.testing.assert_allclose(out.stats["gate_mass"].sum(), out.gate.sum(), rtol=1e-5)


def test_the_same_tokens_are_routed_the_same_way(routed):
    run, _, _, out = routed
    jax.tree.map(np.testing.assert_array_equal, run()[1], out)


def test_the_gates_reach_the_routers_kernel(routed):
    _, _, (to_params, to_x), _ = routed
    assert np.isfinite(to_params["kernel"]).all() and np.any(to_params["kernel"])
    assert np.all(np.any(np.asarray(to_x)[VALID] != 0, axis=-1))


def test_a_changed_token_moves_no_other_tokens_routing(routed):
    run, x, _, out = routed
    changed = run(x.at[0, 5].add(1.0))[1]
    others = np.arange(ROWS * LENGTH) != 5
    np.testing.assert_array_equal(changed.expert[others], out.expert[others])
    np.testing.assert_array_equal(changed.gate[others], out.gate[others])
    assert np.any(changed.gate[5] != out.gate[5])


@pytest.mark.parametrize("name", REGISTRY)
def test_scores_are_float32_whatever_the_compute_type(name, recorded):
    router = make(name, recorded)
    inputs = RouterInputs(
        jax.ShapeDtypeStruct((1, 4, WIDTH), jnp.bfloat16), jax.ShapeDtypeStruct((1, 4), bool)
    )
    out, _ = jax.eval_shape(router.init_with_output, jax.random.key(0), inputs)
    assert out.gate.dtype == out.aux_loss.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out.stats))


@pytest.mark.parametrize("name", REGISTRY)
def test_counts_are_those_of_one_matrix(name):
    counts = REGISTRY[name].Options().counts(64, EXPERTS, TOP_K)
    assert (counts.params, counts.flops_per_token, counts.expected_experts) == (512, 1024.0, 2.0)
    assert REGISTRY[name].Options().name == name
