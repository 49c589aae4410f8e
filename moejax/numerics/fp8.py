"""DeepSeek-V3's FP8 recipe, simulated: exact products of numbers that FP8 can hold.

Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3). Operands are E4M3 with one float32 scale a
tile, max|x| / 448, computed online. Of a product y = x W:

* forward: x in tiles of 1 token x 128 channels, W in blocks of 128 x 128;
* gradient of x: that of y in tiles of 1 x 128 along its channels, W in the same blocks;
* gradient of W: both operands in tiles of 128 tokens x 1 channel. x is quantised again from what
  the forward pass held, since that is what the recipe keeps; y's gradient from itself.

Values are quantised and put back at once, and multiplied and added up in float32. A scale belongs
to 128 terms of every sum, so that this is what FP8 products whose partial sums are scaled and added
up in float32 every 128 terms give, but for float32's own rounding. Tensor cores keep fewer bits
inside those 128 terms (about 14, says the report); that is not simulated. Gradients pass quantising
itself as if it were nothing.

Tiles end where what they are cut from ends: a sequence; an expert's rows on one device, so that the
gradients of experts' weights differ from mesh to mesh by what FP8 leaves open; and, along an
expert's hidden width, the share of it that a device has under ``mesh.tensor``.

It runs anywhere and saves no time: it is for the study of the error. No library that can be called
from JAX multiplies by this recipe: ``jax.nn.scaled_matmul`` has kernels for blocks of 32 with
powers of two as scales, on Blackwell only; XLA's own FP8 products (those of ``flax.linen``'s FP8
operations) take one scale a tensor; Transformer Engine's block scaling is not offered for JAX.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TILE = 128
DTYPE = jnp.float8_e4m3fn
# The largest number of E4M3.
LARGEST = 448.0


def quantize(values: Float[Array, "..."], tile: tuple[int, ...]) -> Float[Array, "..."]:
    """What is left of values that were held in E4M3, one scale a tile, in float32.

    Args:
      values: any array.
      tile: sides of a tile, one an axis; the last tile of an axis may be smaller. A tile of zeros
        stays zeros; one with a number that is not finite holds no promise for its others.
    """
    wide = values.astype(jnp.float32)
    sides = [max(1, min(side, size)) for side, size in zip(tile, values.shape, strict=True)]
    short = [-size % side for side, size in zip(sides, values.shape, strict=True)]
    if any(short):
        wide = jnp.pad(wide, [(0, n) for n in short])
    split = [n for side, size in zip(sides, wide.shape, strict=True) for n in (size // side, side)]
    tiles = wide.reshape(split)
    inside = tuple(range(1, len(split), 2))
    scale = jnp.max(jnp.abs(tiles), axis=inside, keepdims=True) / LARGEST
    scale = jnp.where(scale > 0, scale, 1.0)
    # Behind a barrier: a compiler that may keep more bits than asked for would drop both casts.
    narrow = jax.lax.optimization_barrier((tiles / scale).astype(DTYPE))
    kept = (narrow.astype(jnp.float32) * scale).reshape(wide.shape)
    return kept[tuple(slice(size) for size in values.shape)] if any(short) else kept


def by_row(values: Float[Array, "*rows A"]) -> Float[Array, "*rows A"]:
    """``quantize`` in tiles of one row and 128 channels: for products along the channels."""
    return quantize(values, (1,) * (values.ndim - 1) + (TILE,))


def by_column(values: Float[Array, "*rows M A"]) -> Float[Array, "*rows M A"]:
    """``quantize`` in tiles of 128 rows and one channel: for products along the rows."""
    return quantize(values, (1,) * (values.ndim - 2) + (TILE, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(values: Float[Array, "..."], tile: tuple[int, ...]) -> Float[Array, "..."]:
    """``quantize`` with the gradient of the identity."""
    return quantize(values, tile)


# The empty array carries the type of what was quantised.
straight_through.defvjp(
    lambda values, tile: (quantize(values, tile), jnp.zeros(0, values.dtype)),
    lambda tile, like, gradient: (gradient.astype(like.dtype),),
)


def held_weights(weights: Float[Array, "..."], axes: tuple[int, int]) -> Float[Array, "..."]:
    """A matrix, or many, as the recipe holds it: in blocks of 128 x 128, float32.

    Args:
      weights: one matrix, or several stacked along other axes; best the float32 master.
      axes: of inputs and of outputs, counted from 0.
    """
    tile = tuple(TILE if axis in axes else 1 for axis in range(weights.ndim))
    return straight_through(weights, tile)


def _dot(a, b, contract: tuple[tuple[int, ...], tuple[int, ...]]):
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


@jax.custom_vjp
def held_matmul(
    x: Float[Array, "*rows M A"], held: Float[Array, "A N"]
) -> Float[Array, "*rows M N"]:
    """x times a matrix of ``held_weights``, and both gradients, by the recipe; in float32.

    Args:
      x: vectors; tiles of 128 tokens are cut along the axis M.
      held: the matrix.
    """
    return _forward(x, held)[0]


def _forward(x, held):
    kept = by_row(x)
    return _dot(kept, held, ((x.ndim - 1,), (0,))), (kept, held, jnp.zeros(0, x.dtype))


def _backward(saved, d_y):
    kept, held, like = saved
    rows = tuple(range(d_y.ndim - 1))
    d_x = _dot(by_row(d_y), held, ((d_y.ndim - 1,), (1,)))
    d_held = _dot(by_column(kept), by_column(d_y), (rows, rows))
    return d_x.astype(like.dtype), d_held


held_matmul.defvjp(_forward, _backward)


def quantized_matmul(
    x: Float[Array, "*rows M A"], weights: Float[Array, "A N"]
) -> Float[Array, "*rows M N"]:
    """x times a matrix by the recipe, forward and backward, in x's type.

    Args:
      x: vectors; tiles of 128 tokens are cut along the axis M: never across sequences, so that
        they are the same however a batch is spread over devices.
      weights: the matrix, best the float32 master.
    """
    return held_matmul(x, held_weights(weights, (0, 1))).astype(x.dtype)
