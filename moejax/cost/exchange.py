"""What tokens cost on their way to experts on other devices: bytes, time, and what is not hidden.

An estimate from the config and the links: uniform routing, links at 0.8 of their rating, the fast
link and the network busy at the same time. How much of the time computation hides is an assumption,
named with every result: ``overlap`` times the computation's own time.
"""

import dataclasses
from typing import Any

from moejax.config import ConfigError, check, nearest
from moejax.cost import counts, reach
from moejax.cost import hardware as chips
from moejax.models.model_config import ModelConfig

# Share of a link's rating that an exchange reaches: 160 of the H800's 200 GB/s, 40 of a NIC's 50
# (arXiv 2505.09343, section 2.3.2).
LINK_EFFICIENCY = 0.8


@dataclasses.dataclass(frozen=True)
class Transport:
    """How rows travel.

    Attributes:
      name: as in ``--exchange``.
      by_node: a token goes to a node once and is handed on over the fast link there; else it goes
        to every device by itself.
      dispatch_bytes: of a value on its way to the experts; None means the compute type's.
      combine_bytes: of a value on its way back; None means the compute type's.
      overlap: seconds of exchange that one second of computation hides.
      again: whether rematerialisation sends the rows once more.
      source: who does so.
    """

    name: str
    by_node: bool
    dispatch_bytes: float | None
    combine_bytes: float | None
    overlap: float
    again: bool
    source: str


TRANSPORTS = {
    transport.name: transport
    for transport in (
        Transport(
            "moejax", False, None, None, 0.0, True,
            "moejax's own: each row to its device, in the compute type, nothing hidden",
        ),
        # FP8 in tiles of 128 values, each with a float32 scale; 3.2.1 hides all of the exchange.
        Transport(
            "deepseek_v3", True, 1 + 4 / 128, 2, 1.0, False,
            "DeepSeek-V3's (arXiv 2412.19437, sections 3.2 and 3.3): each row to a node once, FP8 "
            "there and BF16 back, hidden behind computation",
        ),
    )
}  # fmt: skip


def transport(name: str, overlap: float | None = None) -> Transport:
    """The transport of that name, with another overlap where one is given.

    Raises:
      ConfigError: no such transport, or an overlap that is not from 0 to 1.
    """
    known = name in TRANSPORTS
    check(known, "--exchange", name, f"no such transport; {nearest(name, TRANSPORTS)}")
    found = TRANSPORTS[name]
    if overlap is None:
        return found
    check(0 <= overlap <= 1, "--overlap", overlap, "must be from 0 to 1")
    return dataclasses.replace(found, overlap=float(overlap))


def exchange(
    c: ModelConfig,
    *,
    hardware: str,
    expert_devices: int,
    how: Transport,
    compute_seconds: float,
    tensor: int = 1,
) -> dict[str, Any] | None:
    """Bytes and seconds of a training token's exchange, forward and backward, all MoE layers.

    Args:
      c: the model.
      hardware: a chip's name.
      expert_devices: devices that the experts are spread over, those of a node side by side.
      how: how rows travel.
      compute_seconds: of one token on one device.
      tensor: devices that work on the same tokens, each of which sends them.

    Returns:
      None for a dense model, or with the experts on one device. Else ``expert_devices``,
      ``devices_per_node``, ``transport``, ``overlap``, ``assumption``, ``devices_reached`` and
      ``nodes_reached`` of a token in a layer; by link (``scale_up`` within a node, ``scale_out``
      between nodes) ``links``, ``bytes_per_token`` and ``seconds_per_token``; ``longest_seconds``
      of them, ``exposed_seconds`` not hidden, and ``exposed_share`` of the computation's time.
      Seconds are None where a link is needed and not known.

    Raises:
      ConfigError: no such chip, or devices that do not divide the experts.
    """
    if not c.layers("moe") or expert_devices == 1:
        return None
    check(expert_devices > 0, "--expert-devices", expert_devices, "must be above zero")
    if c.moe.num_experts % expert_devices:
        raise ConfigError(
            "--expert-devices", expert_devices,
            f"does not divide moe.num_experts = {c.moe.num_experts}; choose a divisor",
        )  # fmt: skip
    chip = chips.lookup(hardware)
    links = {"scale_up": chip.scale_up, "scale_out": chip.scale_out}
    per_node = _per_node(chip, expert_devices)
    devices, copies = _copies(c, expert_devices, per_node, how.by_node)
    value = 4 if c.dtype == "float32" else 2
    width = c.moe.latent_dim or c.d_model
    there, back = (value if b is None else b for b in (how.dispatch_bytes, how.combine_bytes))
    each = counts.routed_layers(c) * passes(c, how) * width * (there + back) * tensor
    sent = {name: each * copies[name] for name in links}
    seconds = {name: link_seconds(sent[name], link) for name, link in links.items()}
    longest = None if None in seconds.values() else max(seconds.values())
    exposed = None if longest is None else max(0.0, longest - how.overlap * compute_seconds)
    return {
        "expert_devices": expert_devices,
        "devices_per_node": per_node,
        "transport": how.name,
        "overlap": how.overlap,
        "assumption": _assumption(c, how),
        "devices_reached": devices,
        "nodes_reached": reach.expected_parts(c.moe, expert_devices // per_node),
        "links": {name: link and dataclasses.asdict(link) for name, link in links.items()},
        "bytes_per_token": sent,
        "seconds_per_token": seconds,
        "compute_seconds": compute_seconds,
        "longest_seconds": longest,
        "exposed_seconds": exposed,
        "exposed_share": None if exposed is None else exposed / compute_seconds,
    }


def key_gather(
    c: ModelConfig, *, hardware: str, context: int, tensor: int, compute_seconds: float
) -> dict[str, Any] | None:
    """Bytes and seconds of a training token's keys and values, where rows are cut over ``context``.

    Each layer sends them to the other devices along ``context``, or what MLA makes them of (the
    latent and the shared key), once forward, once more where a rematerialised layer asks again; and
    their gradients come back. Devices along ``tensor`` each send their heads', or all the latents.

    Args:
      c: the model.
      hardware: a chip's name.
      context: devices that share a row.
      tensor: devices that share a token, side by side on the fast link.
      compute_seconds: of one token on one device.

    Returns:
      None where rows are whole. Else ``context``, ``values_per_layer`` (numbers of a token that a
      device sends to each other one), ``bytes_per_token`` (all layers, both passes), the ``link``
      (the slowest that it takes; None where it is not known), ``seconds_per_token`` and its
      ``share`` of the computation's time, of which nothing is hidden.
    """
    if context == 1:
        return None
    chip = chips.lookup(hardware)
    joined = 1 if chip.scale_up is None else chip.scale_up.devices or context * tensor
    link = chip.scale_up if context * tensor <= joined else chip.scale_out
    if c.attention.kind == "mla":
        values = c.attention.kv_lora_rank + c.attention.rope_head_dim
    else:
        values = 2 * c.attention.kv_heads * c.head_dim / tensor
    value = 4 if c.dtype == "float32" else 2
    times = 2 + (c.remat != "none")
    sent = (c.num_layers + c.mtp_depth) * times * (context - 1) * values * value * tensor
    seconds = link_seconds(sent, link)
    return {
        "context": context,
        "values_per_layer": values,
        "bytes_per_token": sent,
        "link": link and dataclasses.asdict(link),
        "seconds_per_token": seconds,
        "share": None if seconds is None else seconds / compute_seconds,
    }


def passes(c: ModelConfig, how: Transport = TRANSPORTS["moejax"]) -> int:
    """How often a training token's rows travel there and back in a layer.

    Backward mirrors forward, gradients of outputs travel as inputs did, and back; a
    rematerialised layer may send its inputs once more.
    """
    return 3 if how.again and c.remat != "none" else 2


def link_seconds(sent: float, link: chips.Link | None) -> float | None:
    """How long a device sends so many bytes; None where the link is not known."""
    if not sent:
        return 0.0
    return None if link is None else sent / (LINK_EFFICIENCY * link.bytes_per_s)


def _per_node(chip: chips.Chip, expert_devices: int) -> int:
    """The most devices on one fast link that divide the ones that hold the experts."""
    joined = 1 if chip.scale_up is None else chip.scale_up.devices or expert_devices
    return max(n for n in range(1, expert_devices + 1) if expert_devices % n == 0 and n <= joined)


def _copies(
    c: ModelConfig, devices: int, per_node: int, by_node: bool
) -> tuple[float, dict[str, float]]:
    """Devices that hold a token's experts, and times that the token is sent over each link."""
    nodes = devices // per_node
    reached = reach.expected_parts(c.moe, devices)
    if by_node:
        # It arrives at one device of a node, which may be the one that it is for.
        return reached, {
            "scale_up": reached * (1 - 1 / per_node),
            "scale_out": reach.expected_parts(c.moe, nodes) * (1 - 1 / nodes),
        }
    return reached, {
        "scale_up": reached * (per_node - 1) / devices,
        "scale_out": reached * (devices - per_node) / devices,
    }


def _assumption(c: ModelConfig, how: Transport) -> str:
    limit = reach.node_limit(c)
    return (
        f"{how.source}; uniform routing{', ' + limit if limit else ''}; links at "
        f"{LINK_EFFICIENCY:g} of their rating; {how.overlap:g} s hidden by a second of computation"
    )
