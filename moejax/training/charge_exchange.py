"""What a run's ledger is told of tokens that travel to experts on other devices."""

from collections.abc import Mapping
from typing import Any

from moejax.cost import counts
from moejax.cost.exchange import passes
from moejax.cost.ledger import Ledger
from moejax.training.prepare import Setup


def describe(setup: Setup) -> dict[str, Any] | None:
    """How tokens travel, for the ledger's ``open`` line; None where they do not."""
    devices, choice = setup.mesh.shape["expert"], setup.choice
    if choice is None or devices == 1 or choice.exchange == "none":
        return None
    return {
        "kind": choice.exchange,
        "expert_devices": devices,
        "devices_per_node": min(setup.config.model.moe.devices_per_node, devices),
    }


def charge(setup: Setup, ledger: Ledger, health: Mapping[str, Any], tokens: int) -> None:
    """Charges what tokens sent in all of their training.

    What a layer sends on average in its forward pass is sent by all MoE layers, in as many passes
    as ``moejax.cost.exchange.passes`` says, by every device that works on the same tokens.

    Args:
      health: ``router_health`` of a step that stands for the tokens.
      tokens: those trained on since the last charge.
    """
    if describe(setup) is None or not tokens:
        return
    model = setup.config.model
    times = counts.routed_layers(model) * passes(model) * setup.mesh.shape["tensor"] * tokens
    total, out = health["bytes_sent_per_token"], health["bytes_sent_out_per_token"]
    ledger.add_exchange(tokens, times * (total - out), times * out)
