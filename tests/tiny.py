"""Tiny models, their batches, and a comparison by relative error: what several tests share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.models import AttentionConfig, ModelConfig, Transformer
from moejax.moe import MoEConfig, router_options
from moejax.training.step import Batch

VOCAB = 32


def dense_config(**changes) -> ModelConfig:
    """Two dense layers: 4 query heads over 2 key/value heads, untied head."""
    base = dict(
        vocab_size=VOCAB, d_model=16, num_layers=2, d_ff=24,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2), tie_embeddings=False,
    )  # fmt: skip
    return ModelConfig(**{**base, **changes})


def moe_config(router="deepseek_v3", dispatch="blocks", moe=None, options=None, **changes):
    """A dense layer, then two MoE layers of 8 experts, 2 chosen, and a shared one."""
    base = dict(
        num_experts=8, top_k=2, d_expert=8, num_shared_experts=1, dispatch=dispatch,
        router=router_options({"name": router, **(options or {})}),
    )  # fmt: skip
    moe = MoEConfig(**{**base, **(moe or {})})
    return dense_config(**{"num_layers": 3, "first_k_dense": 1, "moe": moe, **changes})


def draw(shapes, seed: int = 0):
    """Random values for a tree of shapes; drawn in NumPy, since an initializer takes seconds to
    compile. Norm scales lie around 1, biases around 0, matrices have deviation 0.3."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        name = path[-1].key
        values = {"scale": 1 + 0.1 * noise, "bias": 0.05 * noise}.get(name, 0.3 * noise)
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, nn.meta.unbox(dict(shapes)))


def shapes(config: ModelConfig):
    """Shapes of a model's variables, in their sharding boxes."""
    init = lambda key: Transformer(config).init(
        key, jnp.zeros((1, 2), jnp.int32), method=Transformer.encode
    )
    return jax.eval_shape(init, jax.random.key(0))


def variables(config: ModelConfig, seed: int = 0):
    """Random parameters and router state of a model."""
    return draw(shapes(config), seed)


@functools.cache
def forward(config: ModelConfig):
    """The jitted forward pass of a model, compiled once however many tests use it."""
    return jax.jit(lambda variables, *inputs: Transformer(config).apply(variables, *inputs))


def batch(parts: int = 1, rows: int = 8, length: int = 8, seed: int = 0) -> Batch:
    """``rows`` rows in ``parts`` micro-batches: two documents each, then row // 2 of padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length + 1))
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length), (rows, 1))
    for row in range(rows):
        second = 2 + row % 3
        segments[row, second:] = 2
        positions[row, second:] = np.arange(length - second)
        segments[row, length - row // 2 :] = 0
    split = lambda values: jnp.asarray(values.reshape(parts, rows // parts, length), jnp.int32)
    return Batch(split(tokens[:, :-1]), split(tokens[:, 1:]), split(segments), split(positions))


def relative_error(got, wanted) -> float:
    """Norm of the difference over the norm of what was wanted, in float64."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    scale = np.linalg.norm(wanted)
    return float(np.linalg.norm(got - wanted) / scale) if scale else float(np.abs(got).max())


def assert_trees_close(got, wanted, tolerance: float) -> None:
    """Every leaf by its own relative error; a leaf that should be zero has to be exactly zero."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        error = relative_error(a, b)
        limit = tolerance if np.any(np.asarray(b)) else 0.0
        assert error <= limit, f"{jax.tree_util.keystr(path)}: relative error {error:.2e}"
