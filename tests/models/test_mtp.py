"""Multi-token prediction: by hand, masks, causality, gradients, drafting; depth 0 changes nothing.

Against Transformers' modules: test_mtp_parity.py. In training: tests/training/test_mtp_step.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.cost.counts import count
from moejax.models import AttentionConfig, Transformer, init_cache, update_router_state
from moejax.models.mtp import counted_segments, counted_targets, shift
from moejax.moe.diagnostics import stack_layers

DEPTH, LENGTH = 2, 12
# Documents of 5, 4 and 1 tokens, and padding; one document.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] + [0] * 2, [1] * LENGTH])
POSITIONS = np.array([[*range(5), *range(4), 0, 0, 0], range(LENGTH)])
DENSE = tiny.dense_config(num_layers=1, mtp_depth=DEPTH, loss_chunk=5)
MOE = tiny.moe_config(num_layers=1, first_k_dense=0, mtp_depth=DEPTH)


def text(seed=0):
    """(2, LENGTH + 1) ids: inputs are all but the last, targets all but the first."""
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, (2, LENGTH + 1))


def rows(ids):
    return tuple(map(jnp.asarray, (ids[:, :-1], ids[:, 1:], SEGMENTS, POSITIONS)))


@functools.cache
def loss_of(config):
    apply = functools.partial(Transformer(config).apply, mtp=True, method=Transformer.loss)
    return jax.jit(apply)


@functools.cache
def ahead_of(config):
    return jax.jit(functools.partial(Transformer(config).apply, method=Transformer.encode_ahead))


# --- The computation once more, in NumPy and row by row: no chunks, no scan, no packing tricks.


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, positions):
    """Rotary embedding of (S, H, d), channel i with channel i + d / 2."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] / 1e4 ** (np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def layer(p, x):
    """A dense layer over one document, alone in its row."""
    p = jax.tree.map(lambda leaf: leaf[0], p["layer_0"])
    inner, where = rms(x, p["attention_norm"]["scale"]), np.arange(len(x))
    heads = {name: np.einsum("sd,dhk->shk", inner, p["attention"][name]["kernel"])
             for name in ("query", "key", "value")}  # fmt: skip
    query, key = turn(heads["query"], where), np.repeat(turn(heads["key"], where), 2, axis=1)
    scores = np.einsum("shk,thk->hst", query, key) / np.sqrt(query.shape[-1])
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.einsum("hst,thk->shk", scores, np.repeat(heads["value"], 2, axis=1))
    x = x + np.einsum("shk,hkd->sd", mixed, p["attention"]["out"]["kernel"])
    inner = rms(x, p["ffn_norm"]["scale"])
    gate, up = np.moveaxis(np.einsum("sd,dgf->sgf", inner, p["ffn"]["gate_up"]), 1, 0)
    return x + (gate / (1 + np.exp(-gate)) * up) @ p["ffn"]["down"]


def document_sums(params, ids):
    """Of one document: (nll, targets, accepted) of each module, and the main model's nll."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    embedding, head = params["embedding"], params["head"]
    hidden = rms(layer(params["segment_0"], embedding[ids[:-1]]), params["final_norm"]["scale"])
    log_p = lambda h: h @ head - np.log(np.exp(h @ head).sum(-1, keepdims=True))
    nll = lambda h, targets: -log_p(h)[np.arange(len(targets)), targets].sum()
    main, guess, sums = nll(hidden, ids[1:]), np.argmax(hidden @ head, -1), []
    for k in range(DEPTH):
        # Position t has token t + k + 1 to look at and t + k + 2 to predict, while they last.
        count = len(ids) - (k + 2)
        if count <= 0:
            sums.append((0.0, 0, 0))
            continue
        p, hidden = params[f"mtp_{k}"], hidden[:count]
        both = [rms(embedding[ids[k + 1 : k + 1 + count]], p["embedding_norm"]["scale"]),
                rms(hidden, p["hidden_norm"]["scale"])]  # fmt: skip
        x = layer(params[f"mtp_{k}_layer"], np.concatenate(both, -1) @ p["projection"]["kernel"])
        hidden = rms(x, p["final_norm"]["scale"])
        # The main model's guess of token t + k + 2 is made at position t + k + 1.
        accepted = (np.argmax(hidden @ head, -1) == guess[k + 1 : k + 1 + count]).sum()
        sums.append((nll(hidden, ids[k + 2 :]), count, accepted))
    return main, np.array(sums)


def test_loss_counts_and_acceptance_by_hand():
    variables, ids = tiny.variables(DENSE), text()
    got = loss_of(DENSE)(variables, *rows(ids))
    # Documents with the token that follows each piece, which is its last target.
    pieces = [ids[0, :6], ids[0, 5:10], ids[0, 9:11], ids[1]]
    parts = [document_sums(variables["params"], piece) for piece in pieces]
    main, wanted = sum(part[0] for part in parts), sum(part[1] for part in parts)
    np.testing.assert_allclose(got.nll, main, rtol=1e-5)
    np.testing.assert_allclose(got.mtp.nll, wanted[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(got.mtp.targets, wanted[:, 1])
    np.testing.assert_array_equal(got.mtp.accepted, wanted[:, 2])
    # 5 + 4 + 1 + 12 targets of the main model; each document has one less at each depth.
    assert float(got.targets) == 22 and list(got.mtp.targets) == [4 + 3 + 11, 3 + 2 + 10]
    assert 0 < int(got.mtp.accepted.sum()) < 33, "a test of acceptance needs both outcomes"
    np.testing.assert_allclose(got.mtp.loss, np.mean(wanted[:, 0] / wanted[:, 1]), rtol=1e-5)


def test_what_a_module_says_like_the_main_model_is_accepted():
    # With no head at all every guess is token 0, the main model's too.
    variables = tiny.variables(DENSE)
    params = {**variables["params"], "head": jnp.zeros_like(variables["params"]["head"])}
    got = loss_of(DENSE)({"params": params}, *rows(text()))
    np.testing.assert_array_equal(got.mtp.accepted, got.mtp.targets)
    np.testing.assert_allclose(got.mtp.loss, np.log(tiny.VOCAB), rtol=1e-6)


def test_targets_end_with_their_document():
    segments = jnp.asarray(SEGMENTS)
    kept = [np.asarray(counted_segments(segments, k)) for k in range(3)]
    assert list(kept[0][0]) == [1, 1, 1, 1, 0, 2, 2, 2, 0, 0, 0, 0]
    assert list(kept[1][0]) == [1, 1, 1, 0, 0, 2, 2, 0, 0, 0, 0, 0]
    assert list(kept[2][0]) == [1, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert [int((k[1] > 0).sum()) for k in kept] == [11, 10, 9]
    np.testing.assert_array_equal(counted_targets(segments, 3), [18, 15, 12])
    # Leading axes (micro-batches) are added up as well, and a row may be shorter than the shift.
    assert list(counted_targets(jnp.stack([segments, segments]), 2)) == [36, 30]
    assert list(counted_targets(jnp.ones((1, 2), jnp.int32), 3)) == [1, 0, 0]
    assert shift(jnp.arange(3)[None], 5).tolist() == [[0, 0, 0]]


def test_targets_of_the_modules_are_the_texts_own():
    _, ahead = jax.eval_shape(ahead_of(DENSE), tiny.variables(DENSE), *rows(text()))
    assert ahead.hidden.shape == (DEPTH, 2, LENGTH, 16)
    ids = text()
    _, ahead = ahead_of(MOE)(tiny.variables(MOE), *rows(ids))
    for k in range(DEPTH):
        for row, t in np.argwhere(np.asarray(ahead.segment_ids[k])):
            assert int(ahead.targets[k, row, t]) == ids[row, t + k + 2]


def test_no_module_sees_beyond_the_token_before_its_target():
    variables, ids = tiny.variables(MOE), text()
    run = lambda ids: np.asarray(ahead_of(MOE)(variables, *rows(ids))[1].hidden)
    before = run(ids)
    counted = np.stack([counted_segments(jnp.asarray(SEGMENTS), k) for k in range(DEPTH)])
    for j in (0, 3, 5, 8, LENGTH):  # the last token is only ever a target
        changed = ids.copy()
        changed[:, j] = (ids[:, j] + 1) % tiny.VOCAB
        moved = np.any(run(changed) != before, axis=-1)
        for k in range(DEPTH):
            for row in range(2):
                # The end of one document is the beginning of the next one's inputs.
                here = SEGMENTS[row] == (SEGMENTS[row, j] if j < LENGTH else -1)
                sees = np.arange(LENGTH) + k + 1 >= j
                own = (counted[k, row] > 0) & here
                np.testing.assert_array_equal(moved[k, row][own], sees[own], f"{j} {k} {row}")
                assert not np.any(moved[k, row] & (counted[k, row] > 0) & ~sees)


@functools.cache
def gradients(which):
    """Gradients of the main loss, of the modules', or of their sum; of the sum without chunks."""
    variables, batch = tiny.variables(DENSE), rows(text())

    def chunked(params):
        out = Transformer(DENSE).apply(
            {"params": params}, *batch, mtp=True, method=Transformer.loss
        )
        parts = {"main": out.nll, "modules": out.mtp.loss}
        return parts[which] if which in parts else out.nll + out.mtp.loss

    def plain(params):
        out, ahead = Transformer(DENSE).apply(
            {"params": params}, *batch, method=Transformer.encode_ahead
        )
        hidden = jnp.concatenate([out.hidden[None], ahead.hidden])
        targets = jnp.concatenate([batch[1][None], ahead.targets])
        weights = jnp.concatenate([batch[2][None], ahead.segment_ids]) > 0
        chances = jax.nn.log_softmax(hidden @ params["head"], axis=-1)
        chosen = jnp.take_along_axis(chances, targets[..., None], axis=-1)[..., 0]
        nll = -jnp.sum(chosen * weights, axis=(1, 2))
        return nll[0] + jnp.mean(nll[1:] / jnp.sum(weights[1:], axis=(1, 2)))

    return jax.jit(jax.grad(plain if which == "plain" else chunked))(variables["params"])


def test_gradients_are_those_of_the_loss_without_chunks():
    tiny.assert_trees_close(gradients("sum"), gradients("plain"), 1e-5)


@pytest.mark.slow
def test_embedding_and_head_learn_from_both_losses():
    main, modules, both = gradients("main"), gradients("modules"), gradients("sum")
    for name in ("embedding", "head", "segment_0", "final_norm"):
        added = jax.tree.map(jnp.add, main[name], modules[name])
        tiny.assert_trees_close(both[name], added, 1e-5)
        assert all(np.any(leaf) for leaf in jax.tree.leaves((main[name], modules[name]))), name
    for k in range(DEPTH):
        for name in (f"mtp_{k}", f"mtp_{k}_layer"):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(main[name]))
            assert all(np.any(leaf) for leaf in jax.tree.leaves(modules[name])), name


def test_the_parameter_tree_of_the_modules():
    params = tiny.shapes(MOE)["params"]
    found = {
        "/".join(part.key for part in path if hasattr(part, "key")): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    for k in range(DEPTH):
        norms = [
            f"mtp_{k}/{name}/scale" for name in ("hidden_norm", "embedding_norm", "final_norm")
        ]
        assert [found[name] for name in norms] == [(16,)] * 3
        assert found[f"mtp_{k}/projection/kernel"] == (32, 16)
        assert found[f"mtp_{k}_layer/layer_0/moe/experts/gate_up"] == (1, 8, 16, 2, 8)
    held = sum(np.prod(shape) for name, shape in found.items() if name.startswith("mtp_"))
    assert held == count(MOE, LENGTH).params.mtp
    own = lambda k: {name.split("/", 1)[1] for name in found if name.startswith(f"mtp_{k}_layer/")}
    main = {name.split("/", 1)[1] for name in found if name.startswith("segment_0/")}
    assert own(0) == own(1) == main
    # The kind is that of the last layer, whatever stands before it.
    assert tiny.moe_config(mtp_depth=1).mtp_kind == "moe" and DENSE.mtp_kind == "dense"


def program(config, **options):
    """The jaxpr of a loss, of shapes alone."""
    run = functools.partial(Transformer(config).apply, method=Transformer.loss, **options)
    return str(jax.make_jaxpr(run)(tiny.variables(config), *rows(text())))


def test_without_modules_nothing_is_computed_for_them():
    none = dataclasses.replace(MOE, mtp_depth=0)
    assert program(none, mtp=True) == program(none)
    # A model with modules that are not asked for runs the same operations on the same parameters.
    shared = {
        name: leaf for name, leaf in tiny.variables(MOE)["params"].items() if "mtp" not in name
    }
    state = {"segment_0": tiny.variables(MOE)["router_state"]["segment_0"]}
    of = lambda config, variables: jax.make_jaxpr(
        functools.partial(Transformer(config).apply, train=True, method=Transformer.loss)
    )(variables, *rows(text()))
    count = lambda jaxpr: [equation.primitive.name for equation in jaxpr.eqns]
    variables = {"params": shared, "router_state": state}
    assert count(of(MOE, tiny.variables(MOE))) == count(of(none, variables))
    assert "argmax" not in program(dataclasses.replace(DENSE, mtp_depth=0), mtp=True)


def test_routers_of_modules_join_the_others():
    variables = tiny.variables(MOE)
    out = loss_of(MOE)(variables, *rows(text()))
    assert set(out.router_stats) == {"segment_0", "mtp_0_layer", "mtp_1_layer"}
    stats = stack_layers(out.router_stats)
    # What lies beyond the documents' ends is padding to the modules' routers.
    np.testing.assert_array_equal(stats["tokens"], [22, 18, 15])
    np.testing.assert_array_equal(stats["load"].sum(axis=1), [44, 36, 30])
    state = variables["router_state"]
    new = update_router_state(MOE, state, out.router_stats)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), new, state)
    assert all(jax.tree.leaves(moved)) and len(jax.tree.leaves(moved)) == 3
    # A pass without the modules leaves their state.
    main = {"segment_0": out.router_stats["segment_0"]}
    kept = update_router_state(MOE, state, main)["mtp_0_layer"]
    jax.tree.map(np.testing.assert_array_equal, kept, state["mtp_0_layer"])
    # The balance losses of all three layers, each about 1e-4, are in the auxiliary loss.
    alone = loss_of(dataclasses.replace(MOE, mtp_depth=0))
    one = alone({"params": variables["params"], "router_state": state}, *rows(text()))
    assert 2e-4 < float(out.aux_loss - one.aux_loss) < 4e-4


def test_layers_stand_in_order_of_depth():
    stats = {name: {"layer_0": {"load": np.full((1, 2), i)}} for i, name in enumerate(
        ["segment_0", "segment_2", "segment_10", "mtp_0_layer", "mtp_2_layer", "mtp_10_layer"]
    )}  # fmt: skip
    shuffled = dict(sorted(stats.items()))
    np.testing.assert_array_equal(stack_layers(shuffled)["load"][:, 0], np.arange(6))


LATENT = tiny.dense_config(
    num_layers=1, mtp_depth=DEPTH,
    attention=AttentionConfig(
        num_heads=2, kind="mla", kv_lora_rank=8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    "config", [DENSE, pytest.param(LATENT, marks=pytest.mark.slow)], ids=["gqa", "mla"]
)
def test_drafting_with_a_cache_equals_the_pass_over_the_text(config):
    variables, ids = tiny.variables(config), text()
    ones = jnp.ones((2, LENGTH), jnp.int32)
    tokens, targets = jnp.asarray(ids[:, :-1]), jnp.asarray(ids[:, 1:])
    out, ahead = ahead_of(config)(variables, tokens, targets, ones, jnp.arange(LENGTH)[None] * ones)
    wanted = np.asarray(ahead.hidden) @ np.asarray(variables["params"]["head"])
    apply = functools.partial(Transformer(config).apply, method=Transformer.draft)
    draft = jax.jit(apply, static_argnums=1)
    cache, hidden = init_cache(config, 2, LENGTH, mtp=True), out.hidden
    for k in range(DEPTH):
        found, following = [], shift(targets, k)
        for piece in (slice(0, 4), slice(4, 8), slice(8, 12)):
            found.append(draft(variables, k, hidden[:, piece], following[:, piece], cache=cache))
            cache = found[-1].cache
        logits = np.concatenate([got.logits for got in found], axis=1)
        end = LENGTH - 1 - k  # the positions with a target
        assert tiny.relative_error(logits[:, :end], wanted[k][:, :end]) < 1e-5
        hidden = jnp.concatenate([got.hidden for got in found], axis=1)
    for k in range(DEPTH):
        np.testing.assert_array_equal(cache[f"mtp_{k}"], [LENGTH] * 2)
    assert "mtp_0" not in init_cache(config, 2, LENGTH)
