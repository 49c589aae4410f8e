"""Hash and random routing: different experts, even loads, a table that never moves; V4's gates."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.fixed import (
    HashOptions,
    HashRouter,
    RandomOptions,
    RandomRouter,
    distinct,
    hashed,
)

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
IDS = np.arange(64).reshape(2, 32)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def compiled(router, train=False):
    def run(variables, x, valid, tokens, rngs):
        inputs = RouterInputs(x, valid, tokens=tokens, train=train)
        return router.apply(variables, inputs, rngs=rngs)

    return jax.jit(run)


def hash_route(tokens, experts=8, top_k=2, x=None, valid=None, **options):
    tokens = jnp.asarray(tokens)
    router = HashRouter(HashOptions(**options), experts, top_k)
    x = noise(*tokens.shape, 4) if x is None else x
    valid = jnp.ones(tokens.shape, bool) if valid is None else jnp.asarray(valid)
    has_matrix = router.options.learned_gate
    variables = {"params": {"kernel": noise(4, experts, seed=1)}} if has_matrix else {}
    return compiled(router)(variables, x, valid, tokens, {})


def random_route(shape=(2, 64), key=None, tokens=None, experts=8, top_k=3, seed=0):
    router = RandomRouter(RandomOptions(seed=seed), experts, top_k)
    rngs = {} if key is None else {"router": jax.random.key(key)}
    x, valid = jnp.zeros((*shape, 4)), jnp.ones(shape, bool)
    return compiled(router, key is not None)({}, x, valid, tokens, rngs)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_same_id_has_the_same_different_experts_whatever_the_vector(balanced):
    out = hash_route(IDS, balanced=balanced)
    other = hash_route(IDS[::-1], x=noise(2, 32, 4, seed=5), balanced=balanced)
    table, again = (np.asarray(r.expert).reshape(2, 32, 2) for r in (out, other))
    np.testing.assert_array_equal(table, again[::-1])
    assert np.all(table[..., 0] != table[..., 1]) and table.min() >= 0 and table.max() < 8
    changed = hash_route(IDS, balanced=balanced, seed=1)
    assert np.mean(np.asarray(changed.expert) == np.asarray(out.expert)) < 0.5


def test_the_balanced_hash_gives_every_expert_the_same_of_each_block_of_ids():
    # E = 8, K = 2: of ids 0 to 7, 8 to 15 and so on, each choice hits every expert once.
    table = np.asarray(hash_route(IDS).expert).reshape(8, 8, 2)
    for block in table:
        np.testing.assert_array_equal(np.sort(block, axis=0).T, [np.arange(8)] * 2)
    assert len({tuple(block[:, 0]) for block in table}) > 1, "blocks are shifted differently"
    np.testing.assert_array_equal(hash_route(IDS).stats["load"], np.full(8, 16.0))


def test_the_random_hash_is_near_even_over_many_ids():
    # 4096 ids, K = 2, E = 8: 1,024 each, with a deviation of about 28.
    out = hash_route(np.arange(4096)[None], balanced=False, learned_gate=False)
    np.testing.assert_allclose(out.stats["load"], 1024, rtol=0.12)


def test_gates_are_scores_of_the_chosen_or_equal():
    x = noise(2, 32, 4)
    logits = np.asarray(x @ noise(4, 8, seed=1)).reshape(-1, 8)
    out = hash_route(IDS, x=x)
    chosen = np.take_along_axis(logits, np.asarray(out.expert), axis=1)
    np.testing.assert_allclose(out.gate, 1 / (1 + np.exp(-chosen)), rtol=1e-4)
    # A softmax that is normalised is one over the chosen two.
    out = hash_route(IDS, x=x, score="softmax", normalize_gates=True, routed_scale=2.0)
    wanted = 2 * np.exp(chosen) / np.exp(chosen).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out.gate, wanted, rtol=1e-4)
    np.testing.assert_array_equal(hash_route(IDS, learned_gate=False).gate, np.full((64, 2), 0.5))


def test_the_gate_learns_and_padding_is_left_out():
    router = HashRouter(HashOptions(), 8, 2)
    valid = jnp.asarray(np.arange(32)[None] < np.array([[32], [20]]))

    def gates(variables, x):
        out = router.apply(variables, RouterInputs(x, valid, tokens=jnp.asarray(IDS)))
        return jnp.sum(jnp.sin(out.gate)), out

    gradient, out = jax.jit(jax.grad(gates, argnums=(0, 1), has_aux=True))(
        {"params": {"kernel": noise(4, 8)}}, noise(2, 32, 4)
    )
    assert np.any(gradient[0]["params"]["kernel"]) and not np.any(gradient[1][1, 20:])
    assert float(out.stats["assignments"]) == 52 * 2
    np.testing.assert_array_equal(out.expert[52:], np.full((12, 2), 8))


def test_without_a_learned_gate_there_is_no_parameter():
    router = HashRouter(HashOptions(learned_gate=False), 8, 2)
    inputs = RouterInputs(noise(2, 32, 4), jnp.ones((2, 32), bool), tokens=jnp.asarray(IDS))
    assert not jax.eval_shape(router.init, jax.random.key(0), inputs)
    assert HashOptions(learned_gate=False).counts(4, 8, 2).params == 0
    assert HashOptions().counts(4, 8, 2).params == 32


def test_equal_gates_are_no_constants_that_xla_would_fold():
    # Folding the sums over (T, E) zeros once took XLA half a minute to compile.
    router, x = HashRouter(HashOptions(learned_gate=False), 8, 2), noise(2, 32, 4)
    valid, tokens = jnp.ones((2, 32), bool), jnp.asarray(IDS)
    assert "optimization_barrier" in compiled(router).lower({}, x, valid, tokens, {}).as_text()


def test_token_ids_are_needed():
    router = HashRouter(HashOptions(), 8, 2)
    with pytest.raises(ValueError, match=r"RouterInputs\.tokens"):
        router.init(jax.random.key(0), RouterInputs(noise(1, 4, 4), jnp.ones((1, 4), bool)))


def test_one_expert_cannot_be_normalised():
    with pytest.raises(ConfigError, match="normalize_gates"):
        HashOptions(normalize_gates=True).check(8, 1)
    HashOptions(normalize_gates=True, learned_gate=False).check(8, 1)
    with pytest.raises(ConfigError, match="seed"):
        HashOptions(seed=-1)


def test_drawn_numbers_are_different_and_every_set_is_equally_likely():
    # All draws below 4 · 5 · 6 = 120 for K = 3 of 6: Floyd's sampling meets each of the 20 sets
    # 120 / 20 = 6 times.
    bits = jnp.asarray(list(itertools.product(range(4), range(5), range(6))), jnp.uint32)
    sets = [frozenset(row) for row in np.asarray(distinct(bits, 6)).tolist()]
    assert {len(s) for s in sets} == {3}
    assert sorted(sets.count(s) for s in set(sets)) == [6] * 20


def test_the_hash_spreads_neighbouring_keys():
    # 32 bits of 4,096 neighbouring keys: each is set in about half of them.
    bits = np.asarray(hashed(jnp.arange(4096, dtype=jnp.uint32), 0, 2))
    assert len(np.unique(bits)) == 2 * 4096
    ones = (bits[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_allclose(ones.mean(axis=0), 0.5, atol=0.04)


def test_random_is_uniform_new_in_training_and_fixed_in_evaluation():
    # 2,048 tokens, K = 3, E = 8: 768 each, with a deviation of about 22.
    one, two = random_route((8, 256), key=0), random_route((8, 256), key=1)
    assert np.mean(np.asarray(one.expert) == np.asarray(two.expert)) < 0.3
    np.testing.assert_allclose(one.stats["load"], 768, rtol=0.12)
    np.testing.assert_allclose(one.gate, 1 / 3, rtol=1e-6)
    fixed, again = random_route((8, 256)), random_route((8, 256))
    np.testing.assert_array_equal(fixed.expert, again.expert)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (8, 256)))
    by_id = random_route((8, 256), tokens=tokens)
    np.testing.assert_allclose(by_id.stats["load"], 768, rtol=0.12)
    for out in (one, fixed, by_id):
        assert np.all(np.diff(np.sort(out.expert, axis=1), axis=1) > 0), "a row's all different"
    # A later token's id changes nobody else's experts.
    other = random_route((8, 256), tokens=tokens.at[:, -1].add(1))
    same = lambda out: np.asarray(out.expert).reshape(8, 256, 3)[:, :-1]
    np.testing.assert_array_equal(same(by_id), same(other))


def test_v4s_hash_router():
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

    config = transformers.DeepseekV4Config(
        hidden_size=16, num_local_experts=8, num_experts_per_tok=2, vocab_size=64,
        routed_scaling_factor=1.5, scoring_func="sqrtsoftplus",
    )  # fmt: skip
    options = {"score": "sqrt_softplus", "normalize_gates": True, "routed_scale": 1.5}
    x = noise(2, 32, 16)
    kernel = noise(16, 8, seed=1)
    router = HashRouter(HashOptions(**options), 8, 2)
    valid = jnp.ones((2, 32), bool)
    ours = compiled(router)({"params": {"kernel": kernel}}, x, valid, jnp.asarray(IDS), {})
    theirs = hf.DeepseekV4HashRouter(config)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(kernel).T))
        theirs.tid2eid.copy_(torch.tensor(np.array(ours.expert)))  # ids 0 to 63 in order
        _, gates, indices = theirs(torch.tensor(np.asarray(x)), torch.tensor(IDS))
    np.testing.assert_array_equal(ours.expert, indices.numpy())
    assert tiny.relative_error(ours.gate, gates.numpy()) < 1e-5
