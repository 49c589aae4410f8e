"""The exchange as a line of a run's bill: bytes counted by the routers, time by the links.

Bytes are those of the logged steps, for all of a run's tokens. How long they take is an estimate
like ``moejax.cost.exchange``'s: links at a share of their rating, both busy at once, and nothing
hidden behind computation, for moejax's own exchange hides nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.cost import hardware as chips
from moejax.cost.energy import SOURCE
from moejax.cost.exchange import LINK_EFFICIENCY, link_seconds
from moejax.cost.segments import Segment

LINKS = ("scale_up", "scale_out")


def exchange_bill(parts: Sequence[Segment]) -> dict[str, Any] | None:
    """What a run's tokens sent to experts on other devices, and what that took.

    Args:
      parts: the run's segments.

    Returns:
      None where nothing was sent. Else ``kind``, ``expert_devices`` and ``devices_per_node`` of
      the last segment that sent; ``bytes_per_token`` by link (``scale_up`` within a machine,
      ``scale_out`` between machines), forward and backward, all MoE layers; ``links``;
      ``device_hours`` and ``dollars`` of the time that is not hidden, and their ``share`` of
      training; ``source`` and ``assumption``. The three are None where a link is not known.
    """
    sending = [
        part for part in parts if part.charge.get("exchange") and part.header.get("exchange")
    ]
    if not sending:
        return None
    counted = [part.charge["exchange"] for part in sending]
    tokens = sum(sent["tokens"] for sent in counted)
    hours = [_hours(part) for part in sending]
    known = None not in hours
    train = sum(part.device_hours["train"] for part in parts)
    total = sum(hours) if known else None
    last = sending[-1].header
    chip = chips.lookup(last["hardware"])
    return {
        **last["exchange"],
        "bytes_per_token": {name: sum(sent[name] for sent in counted) / tokens for name in LINKS},
        "links": {name: link and dataclasses.asdict(link) for name, link in _links(chip).items()},
        "device_hours": total,
        "dollars": sum(h * p.rate for h, p in zip(hours, sending, strict=True)) if known else None,
        "share": total / train if known and train else None,
        "source": SOURCE,
        "assumption": f"links at {LINK_EFFICIENCY:g} of their rating, both at once, none hidden",
    }


def _links(chip: chips.Chip) -> dict[str, chips.Link | None]:
    return {name: getattr(chip, name) for name in LINKS}


def _hours(part: Segment) -> float | None:
    """Device-hours that a segment's tokens were under way."""
    sent = part.charge["exchange"]
    links = _links(chips.lookup(part.header["hardware"]))
    each = [link_seconds(sent[name] / sent["tokens"], links[name]) for name in LINKS]
    return None if None in each else max(each) * part.charge["tokens"] / 3600
