"""Softmax attention by whichever implementation the config and the platform say."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.models.causal_attention import causal_attention
from moejax.models.context import attend_from_here, is_cut


def attend(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B M N d"],
    value: Float[Array, "B M N v"],
    mask: Bool[Array, "..."],
    *,
    name: str,
    scale: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    window: int = 0,
    whole: bool = True,
) -> Float[Array, "B S H v"]:
    """softmax(scale · query · key) · value over the keys that each query sees.

    Args:
      query: queries; head h uses key/value head h // (H / N).
      key: keys.
      value: values, no wider than keys.
      mask: True where a query (third axis) sees a key (last), broadcastable to (B, H, S, M).
      name: ``model.attention.implementation``.
      scale: factor on the scores; None means 1 / sqrt(d).
      sinks: a logit a head that takes part in the softmax and has no value.
      window: with ``whole``, positions back that ``mask`` lets a query see at most, its own
        included; 0 says nothing. The mask decides: this is for leaving work out.
      whole: the keys are the queries' own positions, and no query sees a later one. Then the length
        may be cut over the mesh (``moejax.models.context``).

    Returns:
      The mixed values, in the queries' type.
    """
    if not (whole and is_cut(query.shape[1])):
        return attend_on_device(
            query, key, value, mask, name=name, scale=scale, sinks=sinks, window=window, whole=whole
        )
    heads = ("tensor", None)
    weights = () if sinks is None else ((sinks, ("tensor",)),)

    def run(query, mask, key, value, sinks=None):
        return attend_on_device(query, key, value, mask, name=name, scale=scale, sinks=sinks)

    return attend_from_here(run, query, mask, ((key, heads), (value, heads)), weights)


def attend_on_device(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B M N d"],
    value: Float[Array, "B M N v"],
    mask: Bool[Array, "..."],
    *,
    name: str,
    scale: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    window: int = 0,
    whole: bool | None = None,
) -> Float[Array, "B S H v"]:
    """As ``attend``, where every key is at hand.

    ``whole`` None: the queries are some of a row's positions, M is all of them, and only the mask
    knows which a query may see. cuDNN's kernels are then not told that attention is causal, since
    to them query 0 would stand at key 0; they take the mask as a bias and leave no key out.
    """
    name = implementation(name, query, sinks)
    if name == "xla" and whole is not False and jax.default_backend() == "cpu":
        return causal_attention(query, key, value, mask, sinks, scale, window)
    width, scale = value.shape[-1], query.shape[-1] ** -0.5 if scale is None else scale
    if width < key.shape[-1]:
        # jax.nn's attention takes values as wide as keys; the columns added come out as zeros.
        value = _pad(value, axis=3, count=key.shape[-1] - width)
    bias = None
    if sinks is not None:
        # A key more, whose score is the sink for every query and whose value is zero. jax.nn has
        # no sinks, and the sum that it returns beside the output has no gradient.
        bias = _pad(jnp.zeros((1, len(sinks), 1, key.shape[1]), jnp.float32), axis=3, count=1)
        bias = bias.at[:, :, :, -1].set(sinks.astype(jnp.float32)[None, :, None])
        key, value = _pad(key, axis=1, count=1), _pad(value, axis=1, count=1)
        mask = _pad(mask, axis=3, count=1, fill=True)
    # The mask says as much, but cuDNN's kernels leave out the half above the diagonal only if told.
    causal = bool(whole) and name == "cudnn"
    mixed = jax.nn.dot_product_attention(
        query, key, value, bias, mask, scale=scale, is_causal=causal, implementation=name
    )
    return mixed[..., :width]


def _pad(x: Array, axis: int, count: int, fill: float = 0) -> Array:
    """``count`` entries more at the end of an axis."""
    widths = [(0, count if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def implementation(name: str, query: Array, sinks: Array | None = None) -> str:
    """Resolves ``auto``: cuDNN on a GPU, where its kernels take the type and width of the heads.

    Args:
      name: ``auto``, ``xla`` or ``cudnn``.
      query: queries, (B, S, H, d).
      sinks: logits of the sinks, which cuDNN's kernels do not have.
    """
    if name != "auto":
        return name
    width = query.shape[-1]
    fits = query.dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128 and sinks is None
    return "cudnn" if jax.default_backend() == "gpu" and fits else "xla"
