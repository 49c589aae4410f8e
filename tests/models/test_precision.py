"""The FP8 mode of a model: what it reaches and what it leaves, and the same on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError, build
from moejax.models import AttentionConfig, ModelConfig, Transformer
from moejax.models.layers import Linear
from moejax.moe.experts import SwiGLU
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs
from moejax.parallel import MeshConfig, axis_rules, make_mesh

# Sizes that tell everything apart: 31 words, width 20, 5 experts of width 6, dense width 14.
SIZES = dict(
    vocab_size=31, d_model=20, d_ff=14,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=dict(num_experts=5, d_expert=6),
)  # fmt: skip
MLA = AttentionConfig(
    kind="mla", num_heads=2, q_lora_rank=10, kv_lora_rank=12, nope_head_dim=4, rope_head_dim=2,
    v_head_dim=3,
)  # fmt: skip


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def _is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def held_arrays(function, *arguments):
    """Shapes that a program holds in FP8, each with its last two sides put back together."""
    found = set()
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        for out in equation.outvars:
            if out.aval.dtype == jnp.float8_e4m3fn:
                # (n, tile) an axis, as ``quantize`` cuts it.
                shape = out.aval.shape
                found.add(tuple(np.prod(np.reshape(shape, (-1, 2)), axis=1)))
    return found


def loss(config, params, variables, tokens):
    out = Transformer(config).apply({**variables, "params": params}, tokens)
    return jnp.sum(out.logits**2) * 1e-3 + out.aux_loss


def held_by(config):
    variables = tiny.shapes(config)
    variables = tiny.draw(variables)
    tokens = jnp.zeros((2, 4), jnp.int32)
    return held_arrays(
        jax.grad(functools.partial(loss, config)), variables["params"], variables, tokens
    )


def test_what_is_held_in_fp8_is_the_linear_maps_alone():
    config = tiny.moe_config(precision="fp8", dispatch="dense_loop", **SIZES)
    # Activations and gradients, once along the channels and once along the tokens: 2 rows of 4.
    rows = lambda *widths: {(2, 4, width) for width in widths}
    wanted = rows(20, 16, 8)  # attention: into and out of its projections
    wanted |= rows(14)  # the dense layer's hidden values
    wanted |= rows(6)  # the shared expert's
    wanted |= {(8, 20), (8, 6)}  # routed experts: 8 tokens
    wanted |= {(20, 16), (20, 8), (16, 20)}  # query; key and value; out
    wanted |= {(20, 14), (14, 20), (20, 6), (6, 20)}
    wanted |= {(5, 20, 2, 6), (5, 6, 20)}
    # Nothing with 31 words (embedding, head) and nothing with 5 logits (router), no norm's scale.
    assert held_by(config) == wanted


def test_latent_attention_is_low_in_its_projections():
    config = tiny.dense_config(
        precision="fp8", vocab_size=31, d_model=20, d_ff=14, num_layers=1, attention=MLA
    )
    matrices = {shape for shape in held_by(config) if len(shape) == 2}
    attention = {(20, 10), (10, 2 * 6), (20, 12 + 2), (12, 2 * 7), (2 * 3, 20)}
    assert matrices == attention | {(20, 14), (14, 20)}


def test_native_holds_nothing_in_fp8():
    assert held_by(tiny.moe_config(dispatch="dense_loop", **SIZES)) == set()


def test_a_router_sees_the_weights_themselves_and_no_latent_map_is_low():
    moe = tiny.moe_config(moe=dict(latent_dim=6, num_shared_experts=0)).moe
    x, valid = jnp.ones((1, 4, 16)), jnp.ones((1, 4), bool)
    layer = MoELayer(moe, precision="fp8")
    variables = tiny.draw(jax.eval_shape(layer.init, jax.random.key(0), RouterInputs(x, valid)))
    held = held_arrays(lambda v: layer.apply(v, RouterInputs(x, valid)).y, variables)
    assert (16, 6) not in held and (6, 16) not in held and (8, 6, 2, 8) in held


def test_layers_are_near_their_native_selves():
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    for make, more in (
        (SwiGLU, dict(width=24)),
        (Linear, dict(features=(3, 8), axes=("embed", "heads", "head_dim"), bias=True)),
    ):
        native, low = make(**more), make(**more, precision="fp8")
        variables = tiny.draw(jax.eval_shape(native.init, jax.random.key(0), x))
        error = tiny.relative_error(low.apply(variables, x), native.apply(variables, x))
        assert 1e-3 < error < 0.1, make


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match=r"model\.precision = 'fp9'.*did you mean 'fp8'"):
        build(ModelConfig, {"vocab_size": 8, "precision": "fp9"}, "model")


def on(mesh):
    """Loss and gradients of a model whose experts are reached by exchange, over a mesh."""
    config = tiny.moe_config(
        precision="fp8", dispatch="blocks", moe=dict(exchange="all_to_all"), d_model=32
    )
    run = jax.jit(jax.value_and_grad(functools.partial(loss, config)))
    variables = tiny.variables(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 8)), jnp.int32)
    with jax.set_mesh(make_mesh(mesh)), axis_rules():
        return jax.device_get(run(variables["params"], variables, tokens))


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
    (value, wanted), (loss, got) = on(MeshConfig()), on(MeshConfig(fsdp=2, expert=4))
    # The whole forward pass, which the head's gradient shows as well.
    assert abs(loss - value) < 1e-6 * abs(value)
    assert tiny.relative_error(got["head"], wanted["head"]) < 1e-5
    # Backward, sums in another order push a few numbers over an edge of FP8, and with one goes what
    # follows from it in its sequence, by up to some 2^-4: the other words' gradients are the same.
    words = [row for row in range(tiny.VOCAB) if np.any(wanted["embedding"][row])]
    pairs = [(got["embedding"][row], wanted["embedding"][row]) for row in words]
    errors = np.array([tiny.relative_error(*pair) for pair in pairs])
    assert np.mean(errors < 1e-5) > 0.5 and errors.max() < 0.2
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        # Tiles along the tokens of an expert are of those that stand on a device: another cut.
        assert tiny.relative_error(a, b) < 0.05, jax.tree_util.keystr(path)
