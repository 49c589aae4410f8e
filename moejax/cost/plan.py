"""The bill before a run: from FLOPs, utilisation and a rate to hours, dollars and energy."""

import dataclasses
import math
from typing import Any

from moejax.config import check
from moejax.cost import counts, energy, flops, grid, lenses, utilisation
from moejax.cost import hardware as chips
from moejax.cost.exchange import TRANSPORTS, Transport, exchange, key_gather
from moejax.cost.memory import Placement, memory_parts, usable_bytes
from moejax.cost.prices import Price, Purchase
from moejax.cost.utilisation import Utilisation
from moejax.models.model_config import ModelConfig


def make_plan(
    model_config: ModelConfig,
    *,
    tokens: float,
    seq_len: int,
    hardware: str,
    devices: int,
    price: Price,
    used: Utilisation | None = None,
    region: str = "world",
    peak_flops: float | None = None,
    peak_source: str | None = None,
    placement: Placement | None = None,
    how: Transport = TRANSPORTS["moejax"],
    expert_devices: int | None = None,
    purchase: Purchase | None = None,
    pue: float | None = None,
    dollars_per_kwh: float = energy.DOLLARS_PER_KWH,
    more_flops: float = 0.0,
    second: ModelConfig | None = None,
) -> dict[str, Any]:
    """Plans training a model on so many tokens, in sequences of ``seq_len``.

    Args:
      hardware: a chip's name.
      devices: devices used; on a CPU, cores.
      price: the rate of one device.
      used: utilisation of the dense peak to assume; None takes the published one or a default.
      region: whose grid the carbon is counted by.
      peak_flops: FLOP/s of all devices together; None takes the table's, or measures a CPU's.
      peak_source: where ``peak_flops`` is from.
      placement: what one device has of a step: the mesh, its rows, its optimizer's bytes; None
        means all of the model, and one row.
      how: how tokens travel to experts on other devices.
      expert_devices: devices that hold the experts; None takes the mesh's.
      purchase: what a device costs to buy; None takes the packaged book's.
      pue: power usage effectiveness of the data centre; None takes the chip's usual one.
      dollars_per_kwh: price of electricity, for the ``owned`` lens.
      more_flops: FLOPs of each token beside training and the second model's pass.
      second: a model that is run beside the one that is trained, such as a teacher.

    Returns:
      ``moejax plan --format=json``: ``Counts.to_dict`` with ``flops.per_token``, ``price_flops``,
      ``layout``, the estimates ``memory_bytes_per_device`` (``memory_fits`` None where the device's
      memory is not known), ``exchange`` (None where no token travels) and ``key_gather`` (None
      where rows are whole).

    Raises:
      ConfigError: a value out of range, an unknown chip or region.
    """
    check(tokens > 0, "tokens", tokens, "must be above zero")
    used = used or utilisation.assumed(hardware, model_config, seq_len)
    placement = placement or Placement()
    counted = counts.count(model_config, seq_len)
    if second is not None:
        more_flops += counts.count(second, seq_len).flops_per_token.forward
    bill = price_flops(
        tokens * (counted.flops_per_token.train + more_flops), hardware=hardware, devices=devices,
        price=price, used=used, region=region, peak_flops=peak_flops, peak_source=peak_source,
        purchase=purchase, pue=pue, dollars_per_kwh=dollars_per_kwh,
    )  # fmt: skip
    layout, compute_seconds = placement.layout, 3600 * bill["device_hours"] / tokens
    sent = exchange(
        model_config, hardware=hardware, how=how, tensor=layout.tensor,
        expert_devices=layout.expert if expert_devices is None else expert_devices,
        compute_seconds=compute_seconds,
    )  # fmt: skip
    keys = key_gather(
        model_config, hardware=hardware, context=layout.context, tensor=layout.tensor,
        compute_seconds=compute_seconds,
    )  # fmt: skip
    found = counted.to_dict()
    found["flops_per_token"] |= flops.per_token(model_config, seq_len)
    return found | {"tokens": tokens, "more_flops_per_token": more_flops} | bill | {
        "layout": dataclasses.asdict(layout),
        **_memory(model_config, second, hardware, seq_len, placement),
        "exchange": sent,
        "key_gather": keys,
    }  # fmt: skip


def _memory(
    model: ModelConfig, second: ModelConfig | None, hardware: str, seq_len: int,
    placement: Placement,
) -> dict[str, Any]:  # fmt: skip
    """What a device holds, of a second model its weights alone, and whether it fits."""
    parts = memory_parts(model, hardware=hardware, seq_len=seq_len, placement=placement)
    if second is not None:
        of_second = memory_parts(second, hardware=hardware, seq_len=seq_len, placement=placement)
        parts["second model"] = of_second["weights"]
    memory, usable = sum(parts.values()), usable_bytes(hardware)
    return {
        "memory_bytes_per_device": memory,
        "memory_parts": parts,
        "memory_usable_bytes": usable,
        "memory_source": energy.SOURCE,
        "memory_fits": None if usable is None else memory <= usable,
    }


def price_flops(
    train_flops: float,
    *,
    hardware: str,
    devices: int,
    price: Price,
    used: Utilisation | None = None,
    region: str = "world",
    peak_flops: float | None = None,
    peak_source: str | None = None,
    purchase: Purchase | None = None,
    pue: float | None = None,
    dollars_per_kwh: float = energy.DOLLARS_PER_KWH,
) -> dict[str, Any]:
    """Prices an amount of training FLOPs, whatever the model.

    Args: see ``make_plan``; ``train_flops`` are model FLOPs, all tokens together.

    Returns:
      ``train_flops``, ``hardware``, ``devices``, ``mfu``, ``mfu_source``, ``peak_flops`` (all
      devices together), ``peak_source``, ``device_hours``, ``wall_days``, ``price``,
      ``dollars.rental``, ``dollars.owned`` and the ``purchase`` price that it is from (None where
      that or the chip's power is not known), the estimates ``energy_kwh`` and ``co2_kg`` (None
      where the chip's power is not published; ``co2_source`` is the grid's), and ``range``.
      Start-up, compilation, evaluation and checkpoints are not in it.

    Raises:
      ConfigError: a value out of range, an unknown chip or region.
    """
    check(devices > 0, "devices", devices, "must be above zero")
    good = 0 <= train_flops < math.inf
    check(
        good, "train_flops", train_flops, "must be a finite number, 0 or above; give fewer tokens"
    )
    used = used or utilisation.assumed(hardware)
    if peak_flops is None:
        peak_flops, peak_source = chips.peak_flops(hardware, devices)
    wall_hours = train_flops / (peak_flops * used.mfu) / 3600
    device_hours = wall_hours * devices
    kwh = energy.kilowatt_hours(hardware, device_hours, pue)
    owned = lenses.owned(
        hardware, device_hours, purchase=purchase, pue=pue, dollars_per_kwh=dollars_per_kwh
    )
    return {
        "train_flops": train_flops,
        "hardware": hardware,
        "devices": devices,
        "mfu": used.mfu,
        "mfu_source": used.source,
        "peak_flops": peak_flops,
        "peak_source": peak_source or "given",
        "device_hours": device_hours,
        "wall_days": wall_hours / 24,
        "price": price.to_dict(),
        "dollars": {
            "rental": lenses.rental(device_hours, price),
            "owned": owned and owned.total,
        },
        "purchase": owned and dataclasses.asdict(owned.purchase),
        "energy_kwh": kwh,
        "co2_kg": energy.carbon_kg(kwh, region),
        "co2_source": grid.source(region),
        "energy_source": energy.SOURCE,
        "region": region,
        "range": _ranges(used, price, device_hours, devices),
    }


def _ranges(used: Utilisation, price: Price, device_hours: float, devices: int) -> dict[str, Any]:
    """What follows from the utilisation's range and the rate's, both at their best or worst."""
    low, high = (device_hours * used.mfu / mfu for mfu in (used.high, used.low))
    rate = price.dollars_per_hour
    cheap = rate if price.low is None else price.low
    dear = rate if price.high is None else price.high
    return {
        "mfu": {"low": used.low, "high": used.high, "source": used.range_source},
        "price": {"low": cheap, "high": dear},
        "device_hours": {"low": low, "high": high},
        "wall_days": {"low": low / devices / 24, "high": high / devices / 24},
        "dollars": {"low": low * cheap, "high": high * dear},
    }
