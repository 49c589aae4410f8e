"""Which rows go from one device to another: their number, their contents, their order."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from moejax.moe.dispatch.sorting import SortedAssignments, sort_assignments

# Rows that a token may cost above one a device, so that a row has no more choices than it needs.
MORE_ROWS = 1.1


def expected_rows(carried: int, num_experts: int, top_k: int, devices: int) -> float:
    """Rows of a token for one device, on average over all sets of K different experts.

    With H of its experts there, a hypergeometric number, a token has ceil(H / carried) rows.

    Args:
      carried: choices that a row carries.
      num_experts: E.
      top_k: K.
      devices: n, each with E / n experts.
    """
    local = num_experts // devices
    chance = lambda there: (
        math.comb(local, there) * math.comb(num_experts - local, top_k - there)
        / math.comb(num_experts, top_k)
    )  # fmt: skip
    return sum(chance(h) * math.ceil(h / carried) for h in range(1, min(local, top_k) + 1))


def carried_choices(num_experts: int, top_k: int, devices: int) -> int:
    """Choices that a row carries: as few as cost at most ``MORE_ROWS`` times the rows of them all.

    A receiver has to lay out room for every choice that a row could carry, though most tokens have
    but one or two of their experts on one device; a token with more sends a further row.
    """
    most = min(num_experts // devices, top_k)
    least = expected_rows(most, num_experts, top_k, devices)
    few = (c for c in range(1, most) if _cheap(c, least, num_experts, top_k, devices))
    return next(few, most)


def _cheap(carried, least, num_experts, top_k, devices):
    return expected_rows(carried, num_experts, top_k, devices) <= MORE_ROWS * least


def most_rows(num_experts: int, top_k: int, devices: int) -> int:
    """The most rows that a token can have for one device."""
    most = min(num_experts // devices, top_k)
    return math.ceil(most / carried_choices(num_experts, top_k, devices))


def round_rows(factor: float, tokens: int, num_experts: int, top_k: int, devices: int) -> int:
    """Rows of one round between two devices: ``factor`` times those to be expected, at most all.

    Args:
      factor: rows over the number to be expected.
      tokens: T, of one device.
      num_experts: E.
      top_k: K.
      devices: n.
    """
    carried = carried_choices(num_experts, top_k, devices)
    rows = factor * tokens * expected_rows(carried, num_experts, top_k, devices)
    return min(tokens * most_rows(num_experts, top_k, devices), max(1, math.ceil(rows)))


def earlier_of_owner(owner: Int[Array, "T K"]) -> Int[Array, "T K"]:
    """How many of a token's earlier choices have the same owner, for each of its choices."""
    top_k = owner.shape[1]
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)[None]
    same = owner[:, :, None] == owner[:, None, :]
    return jnp.sum(same & earlier, axis=2, dtype=jnp.int32)


@struct.dataclass
class SendPlan:
    """Where a device's tokens go: up to J rows a token, in the order of its choices.

    Attributes:
      choice: choices (t · K + k) that a row carries; T · K for none.
      destination: device that a row goes to; n for no row.
      lines: the rows sorted by device: tokens wait for a device in their order.
      received: rows that each device sends here, over all rounds; None unless ``ragged``.
      top_k: K.
    """

    choice: Int[Array, "T J c"]
    destination: Int[Array, "T J"]
    lines: SortedAssignments
    received: Int[Array, " n"] | None
    top_k: int = struct.field(pytree_node=False)


@struct.dataclass
class Round:
    """Rows of one round; ``size`` for each destination, one after another, M together.

    Attributes:
      token: token of each row; T where the row is empty.
      row: rows of each token; M for those of other rounds, and for none.
      choice: choice in each place of a row; T · K where it is empty.
      slot: place of each choice; M · c where it is not of this round, or for nobody.
      sent: rows filled for each destination.
      received: rows filled by each source; None unless ``ragged``.
    """

    token: Int[Array, " M"]
    row: Int[Array, "T J"]
    choice: Int[Array, " M_c"]
    slot: Int[Array, "T_K 1"]
    sent: Int[Array, " n"]
    received: Int[Array, " n"] | None


def plan_sends(expert: Int[Array, "T K"], num_local: int, devices: int, ragged: bool) -> SendPlan:
    """The plan of all rounds, with one sort of at most T · K rows.

    Args:
      expert: chosen experts of this device's tokens; E and above for nobody.
      num_local: experts of one device.
      devices: n.
      ragged: also ask the other devices how many rows they send here.
    """
    tokens, top_k = expert.shape
    num_experts = num_local * devices
    carried = carried_choices(num_experts, top_k, devices)
    most = most_rows(num_experts, top_k, devices)
    owner = jnp.minimum(expert // num_local, devices)
    nth = earlier_of_owner(owner)
    # A row begins with every c-th choice of an owner; rows stand in the order of these.
    begins = (owner < devices) & (nth % carried == 0)
    number = jnp.cumsum(begins, axis=1) - 1
    width = min(top_k, devices * most)
    rows = jnp.arange(width, dtype=jnp.int32)[None, :, None]
    first = begins[:, None, :] & (number[:, None, :] == rows)
    pick = lambda values, none: jnp.min(jnp.where(first, values[:, None, :], none), axis=2)
    destination, begin = pick(owner, devices), pick(nth, top_k)
    # The choices of that owner from there on.
    place = nth[:, None, :] - begin[:, :, None]
    own = (owner[:, None, :] == destination[:, :, None]) & (destination < devices)[:, :, None]
    places = jnp.arange(carried, dtype=jnp.int32)[None, None, :, None]
    held = own[:, :, None, :] & (place[:, :, None, :] == places)
    ids = jnp.arange(tokens * top_k, dtype=jnp.int32).reshape(tokens, 1, 1, top_k)
    choice = jnp.min(jnp.where(held, ids, tokens * top_k), axis=3)
    lines = sort_assignments(destination, devices)
    # Where nothing else says how much arrives.
    arriving = lambda: jax.lax.all_to_all(lines.counts, "expert", 0, 0, tiled=True)
    return SendPlan(choice, destination, lines, arriving() if ragged else None, top_k)


def plan_round(plan: SendPlan, index: Int[Array, ""] | int, size: int) -> Round:
    """The rows of round ``index``: places index · size and on of every line."""
    tokens, width, carried = plan.choice.shape
    devices = len(plan.lines.counts)
    total, first = devices * size, index * size
    place = first + jnp.arange(size, dtype=jnp.int32)[None, :]
    filled = (place < plan.lines.counts[:, None]).reshape(-1)
    entry = jnp.minimum(plan.lines.starts[:, None] + place, tokens * width - 1)
    entry = plan.lines.order[entry.reshape(-1)]
    token = jnp.where(filled, entry // width, tokens)
    start = plan.lines.starts[jnp.minimum(plan.destination, devices - 1)]
    rank = plan.lines.row - start - first
    here = (plan.destination < devices) & (rank >= 0) & (rank < size)
    row = jnp.where(here, plan.destination * size + rank, total)
    none = tokens * plan.top_k
    choice = jnp.where(filled[:, None], plan.choice.reshape(-1, carried)[entry], none).reshape(-1)
    slot = jnp.full(none, total * carried, jnp.int32)
    slot = slot.at[choice].set(jnp.arange(total * carried, dtype=jnp.int32), mode="drop")
    part = lambda counts: None if counts is None else jnp.clip(counts - first, 0, size)
    return Round(
        token, row, choice, slot[:, None], part(plan.lines.counts), part(plan.received)
    )  # fmt: skip
