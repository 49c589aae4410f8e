"""What a routing costs in traffic: devices and machines that tokens reach, rows sent."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.exchange.placement import expert_devices, parts_of_batch
from moejax.moe.exchange.rows import carried_choices, earlier_of_owner
from moejax.moe.moe_config import MoEConfig


def layer_traffic(
    config: MoEConfig,
    kind: str,
    x: Float[Array, "B S D"],
    expert: Int[Array, "T K"],
    beyond: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
    """The exchange's statistics of one MoE layer on the current mesh; sums over the whole batch.

    Args:
      config: options of the layer.
      kind: the exchange that runs.
      x: token vectors.
      expert: chosen experts that are left after drops; E and above for nobody.
      beyond: rows that the first round could not take.

    Returns:
      Those of ``traffic``; ``bytes_sent``, the vectors of the rows sent, there and back, in the
      forward pass (choices and the padding of rounds come on top), and ``bytes_sent_out``, those
      of them that go to another machine; ``exchange_overflow``, which is
      ``beyond``; ``exchange_dropped``, those of them that were left out.
    """
    devices = expert_devices()
    sums = traffic(
        expert, config.num_experts, devices=devices, devices_per_node=config.devices_per_node,
        parts=1 if kind == "none" else parts_of_batch(x.shape[0]),
    )  # fmt: skip
    row_bytes = 2.0 * x.shape[-1] * x.dtype.itemsize
    dropped = beyond if config.exchange_overflow == "drop" else jnp.zeros_like(beyond)
    return {
        **sums,
        "bytes_sent": sums["rows_sent"] * row_bytes,
        "bytes_sent_out": sums["rows_sent_out"] * row_bytes,
        "exchange_overflow": beyond,
        "exchange_dropped": dropped,
    }


def traffic(
    expert: Int[Array, "T K"],
    num_experts: int,
    *,
    devices: int,
    devices_per_node: int,
    parts: int,
) -> dict[str, Float[Array, ""]]:
    """Sums over tokens, of the whole batch.

    Args:
      expert: chosen experts; E and above for nobody (padding, dropped).
      num_experts: E.
      devices: size n of the mesh's ``expert`` axis, over which the experts are spread.
      devices_per_node: neighbours along that axis that share a machine.
      parts: parts that the tokens are cut into for the exchange, device by device, ``expert``
        running fastest; 1 where no token travels.

    Returns:
      ``devices_touched`` and ``nodes_touched``, the devices along ``expert`` and the machines that
      hold a token's experts; ``rows``, a token bound for one device, with as many of its choices
      as a row carries; ``rows_sent``, those of them that leave the token's own device, and
      ``rows_sent_out``, its machine.
    """
    total = lambda mask: jnp.sum(mask, dtype=jnp.float32)
    if devices == 1:
        one = total(jnp.any(expert < num_experts, axis=1))
        return {
            "devices_touched": one, "nodes_touched": one, "rows": one, "rows_sent": 0 * one,
            "rows_sent_out": 0 * one,
        }  # fmt: skip
    owner = jnp.where(expert < num_experts, expert // (num_experts // devices), devices)
    bound, nth = owner < devices, earlier_of_owner(owner)
    node = jnp.where(bound, owner // devices_per_node, devices)
    row = bound & (nth % carried_choices(num_experts, expert.shape[1], devices) == 0)
    tokens = len(expert)
    home = jnp.arange(tokens, dtype=jnp.int32)[:, None] // (tokens // parts) % devices
    return {
        "devices_touched": total(bound & (nth == 0)),
        "nodes_touched": total(bound & (earlier_of_owner(node) == 0)),
        "rows": total(row),
        "rows_sent": total(row & (owner != home) & (parts > 1)),
        "rows_sent_out": total(row & (node != home // devices_per_node) & (parts > 1)),
    }
