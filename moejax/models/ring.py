"""How a cache takes new positions, each row its own, and how few queries attend to what it holds.

A row's position p stands in slot p mod M of M. A cache of a whole row has room for all positions;
that of a layer with a window is a ring, in which later positions take the place of those that no
query will see again.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Place:
    """Where a call's tokens stand.

    Attributes:
      at: position of each token in its row, -1 for what is not to be kept. Those kept are a row's
        first ones of the call, and stand side by side.
      whole: rows begin with this call and attention is over its own tokens, as without a cache; the
        cache only takes what it is given.
    """

    at: Int[Array, "B S"]
    whole: bool = struct.field(pytree_node=False, default=False)


def slot_positions(newest: Int[Array, " B"], room: int) -> Int[Array, "B M"]:
    """Position that each slot holds where ``newest`` is the last one; below 0 for none."""
    newest = newest[:, None]
    return newest - (newest - jnp.arange(room)[None, :]) % room


def write(
    old: Float[Array, "B *n M w"], new: Float[Array, "B S *n w"], place: Place
) -> Float[Array, "B *n M w"]:
    """A cache's array with a call's tokens in it; what a row's last M positions are not is lost.

    Args:
      old: slots on the last axis but one, after any heads.
      new: tokens on the second axis.
      place: where they stand.
    """
    room, new = old.shape[-2], jnp.moveaxis(new.astype(old.dtype), 1, -2)
    if place.whole and new.shape[-2] <= room:
        return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)
    newest = jnp.max(place.at, axis=1)
    if place.whole:
        held = jnp.maximum(slot_positions(newest, room), 0)
        held = held.reshape(len(held), *(1,) * (old.ndim - 3), room, 1)
        return jnp.take_along_axis(new, held, axis=-2)
    kept = (place.at >= 0) & (place.at > newest[:, None] - room)
    slot = jnp.where(kept, place.at % room, room)
    into = lambda old, new, slot: old.at[..., slot, :].set(new, mode="drop")
    return jax.vmap(into)(old, new, slot)


def appends(window: int, length: int) -> bool:
    """Whether ``length`` queries see a cache and their own keys beside it, before it takes them.

    In a ring the later ones' keys take places that the earlier ones still see.
    """
    return window > 0 and length > 1


def attend_cached(
    query: Float[Array, "B S H d"],
    key: Float[Array, "B N M d"],
    value: Float[Array, "B N M v"],
    mask: Bool[Array, "B 1 S M"],
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H v"]:
    """softmax(query · key / sqrt(d)) · value, for few queries over a cache's slots.

    Sums and the softmax are in float32, products in the inputs' type.

    Args:
      query: queries; head h uses key/value head h // (H / N).
      key: keys.
      value: values.
      mask: True where a query sees a slot.
      sinks: a logit a head that takes part in the softmax and has no value.

    Returns:
      The mixed values, in the queries' type.
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bngsd,bnmd->bngsm", grouped, key, preferred_element_type=jnp.float32)
    unseen = 0.7 * jnp.finfo(jnp.float32).min
    scores = jnp.where(mask[:, :, None], scores * width**-0.5, unseen)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks - largest)
    mixed = jnp.einsum(
        "bngsm,bnmv->bngsv", weights.astype(value.dtype), value,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    mixed = (mixed / total).astype(query.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)
