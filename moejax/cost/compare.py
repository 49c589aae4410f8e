"""The same training on several chips: hours, dollars, and what the links add."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.cost import counts, energy, lenses, reach, text
from moejax.cost import hardware as chips
from moejax.cost.exchange import Transport, exchange
from moejax.cost.plan_text import exchange_bytes, wrapped
from moejax.cost.prices import Price, Purchase
from moejax.cost.utilisation import Utilisation
from moejax.models.model_config import ModelConfig


def compare(
    c: ModelConfig,
    *,
    hardware: Sequence[str],
    prices: dict[str, Price | None],
    purchases: dict[str, Purchase | None],
    tokens: float,
    seq_len: int,
    devices: int | None,
    used: Utilisation,
    how: Transport,
    expert_devices: int,
    pue: float | None = None,
    dollars_per_kwh: float = energy.DOLLARS_PER_KWH,
) -> dict[str, Any]:
    """What a training takes on each of several chips.

    Computation takes the same share of each chip's dense BF16 peak, and what the exchange takes
    beyond what computation hides comes on top: as ``how`` says, and at its two ends, with all
    hidden that there is time for, and with nothing.

    Args:
      c: the model.
      hardware: names of the chips; the first is what the others are compared with.
      prices: a rate for each, None where nobody says one.
      purchases: what one of each costs to buy, likewise.
      tokens: trained on.
      seq_len: positions of a sequence.
      devices: how many, for the days; None leaves them out.
      used: utilisation of the computation, on every chip.
      how: how tokens travel to experts on other devices.
      expert_devices: devices that hold the experts, on every chip.
      pue, dollars_per_kwh: of the energy that an owner pays for; see ``moejax.cost.lenses.owned``.

    Returns:
      ``moejax plan --compare --format=json``: what was assumed, and ``chips``, one entry each.

    Raises:
      ConfigError: an unknown chip, or devices that do not divide the experts.
    """
    per_token = counts.count(c, seq_len).flops_per_token.train
    rows = [_chip(c, name, tokens, per_token, used, how, expert_devices) for name in hardware]
    for row in rows:
        name, hours = row["hardware"], row["device_hours"]
        bought, owned = purchases[name], None
        if hours is not None and bought is not None:
            owned = lenses.owned(
                name, hours, purchase=bought, pue=pue, dollars_per_kwh=dollars_per_kwh
            )
        row |= _dollars(hours, prices[name], owned)
        row["wall_days"] = hours and devices and hours / devices / 24
    return {
        "tokens": tokens,
        "seq_len": seq_len,
        "flops_per_token": per_token,
        "train_flops": tokens * per_token,
        "devices": devices,
        "mfu": used.mfu,
        "mfu_source": used.source,
        "expert_devices": expert_devices if c.layers("moe") else 1,
        "chips": rows,
    }


def default_expert_devices(c: ModelConfig, hardware: str) -> int:
    """Devices to spread experts over where nobody says: a group of experts to a node, or one node.

    Groups that limit a token's reach are made to be nodes (DeepSeek-V3: 8 of them); without groups,
    or where they do not go into nodes, the most devices of one node that divide the experts.
    """
    if not c.layers("moe"):
        return 1
    link = chips.lookup(hardware).scale_up
    node = 1 if link is None else link.devices or 8
    groups, kept = reach.groups_of(c.moe)
    if kept < groups and c.moe.num_experts % (groups * node) == 0:
        return groups * node
    return max(n for n in range(1, node + 1) if c.moe.num_experts % n == 0)


def _chip(c, name, tokens, per_token, used, how, expert_devices) -> dict[str, Any]:
    """Seconds and hours on one chip."""
    peak, source = chips.peak_flops(name, 1)
    seconds = per_token / (peak * used.mfu)

    def sent(how: Transport) -> dict[str, Any] | None:
        return exchange(
            c, hardware=name, expert_devices=expert_devices, how=how, compute_seconds=seconds
        )

    def hours(found: dict[str, Any] | None) -> float | None:
        exposed = 0.0 if found is None else found["exposed_seconds"]
        return None if exposed is None else tokens * (seconds + exposed) / 3600

    found = sent(how)
    ends = [hours(sent(dataclasses.replace(how, overlap=overlap))) for overlap in (1.0, 0.0)]
    return {
        "hardware": name,
        "peak_flops": peak,
        "peak_source": source,
        "compute_seconds": seconds,
        "exchange": found,
        "device_hours": hours(found),
        "range": {"device_hours": {"low": ends[0], "high": ends[1]}},
    }


def _dollars(
    hours: float | None, price: Price | None, owned: lenses.OwnedCost | None
) -> dict[str, Any]:
    """What the hours cost, None where a rate or the hours are not known."""
    rental = None if hours is None or price is None else lenses.rental(hours, price)
    return {
        "price": None if price is None else price.to_dict(),
        "dollars": {"rental": rental, "owned": owned and owned.total},
    }


def format_compare(found: dict[str, Any]) -> str:
    """``compare``'s result as a table, with what it assumes."""
    head = ["", "peak", "compute", "fast link", "network", "not hidden", "device-hours",
            "none hidden", "rate", "rented", "owned"]  # fmt: skip
    table = [head, *(_row(row) for row in found["chips"])]
    lines = [
        f"{text.si(found['tokens'])} tokens, {text.si(found['flops_per_token'], 'FLOP')} each "
        f"(length {found['seq_len']}), at {text.percent(found['mfu'])} MFU on every chip "
        f"({found['mfu_source']})",
        text.columns(table),
        "compute, links, not hidden: µs of a device for each token; none hidden: device-hours then",
    ]
    if found["devices"]:
        days = ", ".join(f"{_days(row)} on {row['hardware']}" for row in found["chips"])
        lines.append(f"days on {found['devices']} devices: {days}")
    sent = found["chips"][0]["exchange"]
    if sent is None:
        return "\n".join([*lines, "no tokens travel: the model is dense, or one device has it all"])
    reached = (
        f"experts on {sent['expert_devices']} devices, {sent['devices_per_node']} a node: a token "
        f"reaches {sent['devices_reached']:.3g} devices on {sent['nodes_reached']:.3g} nodes and "
        f"sends {exchange_bytes(sent)}"
    )
    return "\n".join([*lines, *wrapped(reached), *wrapped(f"assumed: {sent['assumption']}")])


def _days(row: dict[str, Any]) -> str:
    return "unknown" if row["wall_days"] is None else f"{row['wall_days']:.1f}"


def _row(row: dict[str, Any]) -> list[str]:
    micro = lambda seconds: "unknown" if seconds is None else f"{1e6 * seconds:,.0f}"
    sent, price = row["exchange"], row["price"]
    links = {"scale_up": 0.0, "scale_out": 0.0} if sent is None else sent["seconds_per_token"]
    hours = lambda value: "unknown" if value is None else text.parameters(value)
    return [
        row["hardware"],
        text.si(row["peak_flops"], "FLOP/s"),
        micro(row["compute_seconds"]),
        micro(links["scale_up"]),
        micro(links["scale_out"]),
        micro(0.0 if sent is None else sent["exposed_seconds"]),
        hours(row["device_hours"]),
        hours(row["range"]["device_hours"]["high"]),
        "unknown" if price is None else f"${price['dollars_per_hour']:.4g}",
        text.dollars(row["dollars"]["rental"]),
        text.dollars(row["dollars"]["owned"]),
    ]
