"""The transformer: causality and document masks, packing, cached decoding, layouts, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.models import Transformer, init_cache, update_router_state

LENGTH = 12
# Every token differs, so that the gradient of the embedding's row is that of a position.
TOKENS = jnp.asarray(np.random.default_rng(0).permutation(tiny.VOCAB)[:LENGTH])[None]
# Documents of 5 and 4 tokens and padding.
SEGMENTS = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
POSITIONS = jnp.array([[*range(5), *range(4), *range(3)]])


def forward(config, variables, tokens, segments=None, positions=None):
    """The forward pass of two rows; a single one is doubled, so that one program serves all."""
    two = lambda rows: jnp.tile(rows, (2 // len(rows), 1))
    segments = jnp.ones((2, LENGTH), jnp.int32) if segments is None else two(segments)
    positions = jnp.arange(LENGTH)[None] if positions is None else positions
    return tiny.forward(config)(variables, two(tokens), segments, two(positions))


@pytest.fixture(scope="module")
def moe():
    config = tiny.moe_config()
    return config, tiny.variables(config)


@pytest.fixture(scope="module")
def position_gradients(moe):
    """|d sum(logits at t) / d embedding at s| of a packed row, as a (t, s) table."""
    config, variables = moe

    @jax.jit
    def gradient(embedding, t):
        def objective(embedding):
            params = {**variables["params"], "embedding": embedding}
            out = Transformer(config).apply(
                {**variables, "params": params}, TOKENS, SEGMENTS, POSITIONS
            )
            return jnp.sum(out.logits[0, t])

        return jnp.abs(jax.grad(objective)(embedding)[TOKENS[0]]).sum(axis=-1)

    embedding = variables["params"]["embedding"]
    return np.stack([gradient(embedding, t) for t in range(LENGTH)])


def test_a_position_sees_its_own_documents_past_and_nothing_else(position_gradients):
    segments = np.asarray(SEGMENTS[0])
    visible = np.tri(LENGTH, dtype=bool) & (segments[:, None] == segments[None, :])
    assert np.all(position_gradients[~visible] == 0)
    assert np.all(position_gradients[visible] > 0)


CAUSAL = {
    "deepseek_v3, blocks": tiny.moe_config(),
    "softmax_topk, blocks": tiny.moe_config("softmax_topk"),
    # Half the fair share of slots: many assignments are dropped, the latest positions first.
    "deepseek_v3, capacity": tiny.moe_config(dispatch="capacity", moe={"capacity_factor": 0.5}),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_no_logit_before_a_changed_token_moves(name):
    config = CAUSAL[name]
    variables = tiny.variables(config)
    run = functools.partial(forward, config, variables)
    tokens = jnp.tile(TOKENS, (2, 1))
    out = run(tokens)
    if config.moe.dispatch == "capacity":
        assert float(out.router_stats["segment_1"]["layer_0"]["dropped"].sum()) > 0
    for t in (0, 4, LENGTH - 1):
        changed = run(tokens.at[0, t].add(1) % tiny.VOCAB).logits
        np.testing.assert_array_equal(changed[0, :t], out.logits[0, :t])
        assert np.any(changed[0, t] != out.logits[0, t])
        np.testing.assert_array_equal(changed[1], out.logits[1])


def test_packed_rows_equal_separate_rows(moe):
    config, variables = moe
    run = functools.partial(forward, config, variables)
    packed = run(TOKENS, SEGMENTS, POSITIONS)
    apart = np.zeros((2, LENGTH), np.int32)
    apart[0, :5], apart[1, :4] = TOKENS[0, :5], TOKENS[0, 5:9]
    valid = np.arange(LENGTH)[None] < [[5], [4]]
    alone = run(jnp.asarray(apart), jnp.asarray(valid, jnp.int32))
    assert tiny.relative_error(packed.logits[0, :5], alone.logits[0, :5]) < 1e-5
    assert tiny.relative_error(packed.logits[0, 5:9], alone.logits[1, :4]) < 1e-5
    load = lambda out: out.router_stats["segment_1"]["layer_0"]["load"]
    np.testing.assert_array_equal(load(packed), 2 * load(alone))


def test_cached_decoding_equals_the_full_pass(moe):
    config, variables = moe
    tokens = jnp.stack([TOKENS[0], TOKENS[0, ::-1]])
    full = forward(config, variables, tokens).logits
    step = jax.jit(lambda tokens, cache: Transformer(config).apply(variables, tokens, cache=cache))
    # A prompt of six at once, then one token after another.
    out = step(tokens[:, :6], init_cache(config, 2, LENGTH))
    assert tiny.relative_error(out.logits, full[:, :6]) < 1e-5
    for t in range(6, LENGTH):
        out = step(tokens[:, t : t + 1], out.cache)
        assert tiny.relative_error(out.logits[:, 0], full[:, t]) < 1e-5, t
    np.testing.assert_array_equal(out.cache["index"], [LENGTH] * 2)


def test_loss_equals_the_logits_and_counts_no_padding(moe):
    config, variables = moe
    two = lambda a: jnp.tile(a, (2, 1))
    targets = jnp.roll(two(TOKENS), -1, axis=1)
    out = forward(config, variables, TOKENS, SEGMENTS, POSITIONS)
    chances = jax.nn.log_softmax(out.logits, axis=-1)
    chosen = jnp.take_along_axis(chances, targets[..., None], axis=-1)[..., 0]
    # Chunks of 5 do not divide the row.
    model = Transformer(dataclasses.replace(config, loss_chunk=5))
    loss = jax.jit(functools.partial(model.apply, method=Transformer.loss))
    got = loss(variables, two(TOKENS), targets, two(SEGMENTS), two(POSITIONS))
    assert float(got.targets) == 2 * 9
    np.testing.assert_allclose(got.nll, -jnp.sum(chosen * (two(SEGMENTS) > 0)), rtol=1e-5)
    np.testing.assert_allclose(got.aux_loss, out.aux_loss, rtol=1e-5)


def test_auxiliary_losses_add_up_over_layers(moe):
    # Two MoE layers at weight 1e-4: with probabilities near uniform each is near 1e-4.
    config, variables = moe
    out = forward(config, variables, TOKENS)
    assert 1.5e-4 < float(out.aux_loss) < 4e-4


@functools.cache
def loss_gradients(remat, dispatch, **changes):
    changes = {"num_layers": 1, "first_k_dense": 0, **changes}
    config = tiny.moe_config(remat=remat, dispatch=dispatch, **changes)
    variables = tiny.variables(config)

    def loss(params):
        out = Transformer(config).apply(
            {**variables, "params": params}, TOKENS, TOKENS[:, ::-1], method=Transformer.loss
        )
        return out.nll + out.aux_loss

    return jax.jit(jax.grad(loss))(variables["params"])


SLOW = [("dots", "dense_loop"), ("full", "blocks"), ("dots", "blocks")]
REMAT = [("full", "dense_loop"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("remat", "dispatch"), REMAT)
def test_rematerialisation_changes_no_gradient(remat, dispatch):
    wanted = loss_gradients("none", dispatch)
    tiny.assert_trees_close(loss_gradients(remat, dispatch), wanted, 1e-5)


def test_a_tied_head_is_the_embeddings_transpose():
    config = tiny.dense_config(tie_embeddings=True, num_layers=1)
    variables = tiny.variables(config)
    assert "head" not in variables["params"]
    out = forward(config, variables, TOKENS)
    wanted = np.asarray(out.hidden) @ np.asarray(variables["params"]["embedding"]).T
    assert tiny.relative_error(out.logits, wanted) < 1e-5
    assert tiny.variables(tiny.dense_config())["params"]["head"].shape == (16, tiny.VOCAB)


def paths(tree):
    """``a/b/c`` -> shape."""
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(part.key for part in path): leaf.shape for path, leaf in leaves}


def test_the_parameter_tree_of_a_layout():
    segments = ((("dense",), 1), (("dense", "moe"), 2))
    config = tiny.moe_config(num_layers=5, segments=segments)
    variables = tiny.variables(config)
    found = paths(variables["params"])
    assert found["embedding"] == (tiny.VOCAB, 16)
    assert found["head"] == (16, tiny.VOCAB)
    assert found["final_norm/scale"] == (16,)
    assert found["segment_0/layer_0/ffn/gate_up"] == (1, 16, 2, 24)
    assert found["segment_1/layer_0/ffn/down"] == (2, 24, 16)
    assert found["segment_1/layer_0/attention_norm/scale"] == (2, 16)
    assert found["segment_1/layer_1/attention/query/kernel"] == (2, 16, 4, 4)
    assert found["segment_1/layer_1/attention/key/kernel"] == (2, 16, 2, 4)
    assert found["segment_1/layer_1/attention/out/kernel"] == (2, 4, 4, 16)
    assert found["segment_1/layer_1/ffn_norm/scale"] == (2, 16)
    assert found["segment_1/layer_1/moe/router/kernel"] == (2, 16, 8)
    assert found["segment_1/layer_1/moe/experts/gate_up"] == (2, 8, 16, 2, 8)
    assert found["segment_1/layer_1/moe/experts/down"] == (2, 8, 8, 16)
    assert found["segment_1/layer_1/moe/shared/gate_up"] == (2, 16, 2, 8)
    assert paths(variables["router_state"]) == {"segment_1/layer_1/moe/router/bias": (2, 8)}
    # Every layer of attention has 6 leaves with its norms, a dense one 2 more, a MoE one 5.
    assert len(found) == 3 + 3 * 6 + 2 * 2 + 5


def test_a_dense_model_is_the_same_code_without_moe():
    variables = tiny.variables(tiny.dense_config())
    assert "router_state" not in variables
    assert not any("moe" in path for path in paths(variables["params"]))
    shape = jax.eval_shape(Transformer(tiny.dense_config()).apply, variables, TOKENS)
    assert shape.router_stats == {}


def test_the_softmax_router_keeps_no_state():
    variables = tiny.variables(tiny.moe_config("softmax_topk"))
    assert "router_state" not in variables
    assert update_router_state(tiny.moe_config("softmax_topk"), {}, {}) == {}


def test_apply_only_reads_the_router_state(moe):
    config, variables = moe
    apply = functools.partial(Transformer(config).apply, mutable=["router_state"])
    _, changed = jax.eval_shape(apply, variables, TOKENS)
    assert paths(changed["router_state"]) == paths(variables["router_state"])
    # Without ``mutable`` a write would raise; that every other test passes shows there is none.


def test_router_state_moves_in_every_moe_layer(moe):
    config, variables = moe
    out = forward(config, variables, TOKENS)
    old = variables["router_state"]["segment_1"]["layer_0"]["moe"]["router"]["bias"]
    new = update_router_state(config, variables["router_state"], out.router_stats)
    new = new["segment_1"]["layer_0"]["moe"]["router"]["bias"]
    load = np.asarray(out.router_stats["segment_1"]["layer_0"]["load"])
    wanted = old + 1e-3 * np.sign(load.mean(axis=1, keepdims=True) - load)
    np.testing.assert_allclose(new, wanted, atol=1e-7)
    assert load.shape == (2, 8) and np.all(load.sum(axis=1) == 2 * LENGTH * 2)


def test_bfloat16_computes_narrow_and_gives_float32_logits(moe):
    config, variables = moe
    narrow = tiny.moe_config(dtype="bfloat16", dispatch="dense_loop")
    out = forward(narrow, variables, TOKENS)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == out.aux_loss.dtype == jnp.float32
    assert np.isfinite(out.logits).all()
    # A token near a tie may change an expert; half the positions agree closely at the least.
    wide = np.asarray(forward(config, variables, TOKENS).logits)
    error = np.linalg.norm(out.logits - wide, axis=-1) / np.linalg.norm(wide, axis=-1)
    assert np.median(error) < 0.05


def test_embeddings_are_multiplied(moe):
    # Twice the embedding with multiplier 1 is the embedding with multiplier 2.
    config = tiny.dense_config(num_layers=1)
    twice = tiny.dense_config(num_layers=1, embedding_multiplier=2.0)
    variables = tiny.variables(config)
    doubled = {**variables["params"], "embedding": 2 * variables["params"]["embedding"]}
    got = forward(twice, variables, TOKENS).logits
    wanted = forward(config, {"params": doubled}, TOKENS).logits
    assert tiny.relative_error(got, wanted) < 1e-6


def test_a_loop_that_is_unrolled_changes_no_gradient():
    two = {"num_layers": 2, "dispatch": "capacity", "remat": "none"}
    wanted = loss_gradients(**two)
    tiny.assert_trees_close(loss_gradients(**two, unroll=0), wanted, 1e-5)


@pytest.mark.parametrize(("unroll", "loops"), [(1, 1), (2, 1), (0, 0)])
def test_unrolling_all_layers_leaves_no_loop(unroll, loops):
    config = tiny.dense_config(num_layers=4, unroll=unroll)
    tokens = jnp.zeros((1, 8), jnp.int32)
    model = Transformer(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    run = jax.jit(lambda variables, tokens: model.apply(variables, tokens).hidden)
    assert run.lower(variables, tokens).as_text().count("stablehlo.while") == loops
