"""Attention where the length of rows is cut over the mesh's ``context`` axis.

Queries stay where they are; what keys and values are made of is gathered from the devices along
``context``, and each device attends from its own positions to all, under its rows of the mask. The
first device has the first positions, and every device multiplies its queries with all keys: the
work is the same on each, and twice what a causal mask leaves over. A cut into 2 n pieces, of which
device i has the i-th and the last but i-th (zigzag), would halve it; but then neither packing, nor
MTP's shifted tokens, nor a checkpoint of the input would see positions in their order. Leaving out
the later keys of contiguous pieces would save nothing: the last device, which all wait for, sees
them all.

There is no ring: its point is that no device holds all keys at once, and gathered latents (MLA) or
a few key/value heads (GQA) of one layer are small beside the activations of a device's own tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from moejax.moe.exchange import cut_of_tokens, parts_of_length

Specs = Any


def is_cut(length: int) -> bool:
    """Whether rows of so many positions are cut on the current mesh."""
    return parts_of_length(length) > 1


def attend_from_here(
    run: Callable[..., Float[Array, "B t H v"]],
    query: Float[Array, "B S H d"],
    mask: Bool[Array, "#B 1 S S"],
    by_row: tuple[tuple[Array, Specs], ...],
    weights: tuple[tuple[Array, Specs], ...] = (),
) -> Float[Array, "B S H v"]:
    """Runs attention on every device, from the queries of its positions to all keys of its rows.

    Heads are cut over ``tensor``.

    Args:
      run: from one device's (query, mask, *by_row, *weights) to its outputs; the query and the
        mask's third axis have its own positions t, all else the whole S.
      query: queries.
      mask: True where a query (third axis) sees a key (last).
      by_row: arrays (B, S, ...) that keys and values are made of, with the mesh axes of those after
        S; they are gathered over ``context``, and their gradients summed over it.
      weights: arrays without rows, with the mesh axes of theirs.
    """
    rows, positions = cut_of_tokens(*query.shape[:2])
    mask_rows = rows if mask.shape[0] == query.shape[0] else None
    heads = PartitionSpec(rows, positions, "tensor", None)
    values = [value for value, _ in (*by_row, *weights)]
    specs = [PartitionSpec(rows, None, *axes) for _, axes in by_row]
    specs += [PartitionSpec(*axes) for _, axes in weights]
    return jax.shard_map(
        run,
        in_specs=(heads, PartitionSpec(mask_rows, None, positions, None), *specs),
        out_specs=heads,
        check_vma=False,
    )(query, mask, *values)
