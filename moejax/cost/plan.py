"""The bill before a run: from FLOPs, utilisation and a rate to hours, dollars and energy."""

from typing import Any

from moejax.config import check
from moejax.cost import counts, energy, prices, text
from moejax.cost import hardware as chips
from moejax.cost.attention_counts import attention_counts
from moejax.cost.prices import Price
from moejax.models.model_config import ModelConfig

# Assumed where nothing was measured. Published: DeepSeek-V3 38.94 % on 2048 H800 (ISCA 2025,
# table 4), Llama-3.1-405B 34.6 % over its whole bill (model card).
DEFAULT_MFU = {"cpu": 0.15}  # the quickstart on two shared cores: 0.12 to 0.22
DEFAULT_MFU_ELSEWHERE = 0.35
ADAM_BYTES = 8  # two FP32 moments of a parameter

# Epoch AI's amortised formula (training-cost-trends): value falls by 0.14 orders of magnitude a
# year, and 19 % of a cluster's cost is its network.
DEPRECIATION = 0.14
NETWORK_SHARE = 0.19
LN_10 = 2.302585092994046
HOURS_PER_YEAR = 8766


def make_plan(
    model_config: ModelConfig,
    *,
    tokens: float,
    seq_len: int,
    hardware: str,
    devices: int,
    price: Price,
    mfu: float | None = None,
    mfu_source: str | None = None,
    region: str = "world",
    peak_flops: float | None = None,
    peak_source: str | None = None,
    shards: int = 1,
    tokens_per_device: int | None = None,
    optimizer_bytes: int = ADAM_BYTES,
) -> dict[str, Any]:
    """Plans training a model on so many tokens, in sequences of ``seq_len``.

    Args:
      hardware: a chip's name.
      devices: devices used; on a CPU, cores.
      price: the rate of one device.
      mfu: utilisation of the dense peak to assume, 0 to 1; None takes a default.
      mfu_source: where ``mfu`` is from: ``config``, ``measured here``, ``published`` …
      region: whose grid the carbon is counted by.
      peak_flops: FLOP/s of all devices together; None takes the table's, or measures a CPU's.
      peak_source: where ``peak_flops`` is from.
      shards: devices that parameters, gradients and moments are split over (fsdp x expert x
        tensor).
      tokens_per_device: tokens of a micro-batch on one device; None means one sequence.
      optimizer_bytes: bytes of optimizer state for each parameter.

    Returns:
      ``moejax plan --format=json``: ``Counts.to_dict``, ``price_flops`` and the estimate
      ``memory_bytes_per_device`` (``memory_fits`` None where the device's memory is not known).

    Raises:
      ConfigError: a value out of range, an unknown chip or region.
    """
    check(tokens > 0, "tokens", tokens, "must be above zero")
    check(shards > 0, "shards", shards, "must be above zero")
    chip = chips.lookup(hardware)
    counted = counts.count(model_config, seq_len)
    parts = memory_parts(
        model_config, counted.params.total + counted.params.mtp, hardware=hardware, shards=shards,
        tokens_per_device=tokens_per_device or seq_len, optimizer_bytes=optimizer_bytes,
    )  # fmt: skip
    memory = sum(parts.values())
    bill = price_flops(
        tokens * counted.flops_per_token.train, hardware=hardware, devices=devices, price=price,
        mfu=mfu, mfu_source=mfu_source, region=region, peak_flops=peak_flops,
        peak_source=peak_source,
    )  # fmt: skip
    return counted.to_dict() | {"tokens": tokens} | bill | {
        "memory_bytes_per_device": memory,
        "memory_parts": parts,
        "memory_source": energy.SOURCE,
        "memory_fits": None if chip.memory_bytes is None else memory <= chip.memory_bytes,
    }  # fmt: skip


def price_flops(
    train_flops: float,
    *,
    hardware: str,
    devices: int,
    price: Price,
    mfu: float | None = None,
    mfu_source: str | None = None,
    region: str = "world",
    peak_flops: float | None = None,
    peak_source: str | None = None,
) -> dict[str, Any]:
    """Prices an amount of training FLOPs, whatever the model.

    Args: see ``make_plan``; ``train_flops`` are model FLOPs, all tokens together.

    Returns:
      ``train_flops``, ``hardware``, ``devices``, ``mfu``, ``mfu_source``, ``peak_flops`` (all
      devices together), ``peak_source``, ``device_hours``, ``wall_days``, ``price``,
      ``dollars.rental``, ``dollars.owned`` (None where no purchase price is known), and the
      estimates ``energy_kwh`` and ``co2_kg`` (None where the chip's power is not published).
      Start-up, compilation, evaluation and checkpoints are not in it.

    Raises:
      ConfigError: a value out of range, an unknown chip or region.
    """
    check(devices > 0, "devices", devices, "must be above zero")
    if mfu is None:
        mfu, mfu_source = DEFAULT_MFU.get(hardware, DEFAULT_MFU_ELSEWHERE), "default"
    check(0 < mfu <= 1, "cost.mfu", mfu, "must be above 0 and at most 1")
    if peak_flops is None:
        peak_flops, peak_source = chips.peak_flops(hardware, devices)
    wall_hours = train_flops / (peak_flops * mfu) / 3600
    device_hours = wall_hours * devices
    kwh = energy.kilowatt_hours(hardware, device_hours)
    return {
        "train_flops": train_flops,
        "hardware": hardware,
        "devices": devices,
        "mfu": mfu,
        "mfu_source": mfu_source or "given",
        "peak_flops": peak_flops,
        "peak_source": peak_source or "given",
        "device_hours": device_hours,
        "wall_days": wall_hours / 24,
        "price": price.to_dict(),
        "dollars": {
            "rental": device_hours * price.dollars_per_hour,
            "owned": owned_dollars(hardware, device_hours),
        },
        "energy_kwh": kwh,
        "co2_kg": energy.carbon_kg(kwh, region),
        "energy_source": energy.SOURCE,
        "region": region,
    }


def owned_dollars(
    hardware: str,
    device_hours: float,
    purchase_dollars: float | None = None,
    years_since_acquisition: float = 0.0,
) -> float | None:
    """What device-hours cost an owner: depreciation, network and energy.

    Args:
      hardware: a chip's name.
      device_hours: hours, all devices together.
      purchase_dollars: price of one device; None takes the table's.
      years_since_acquisition: age of the hardware when the run starts.

    Returns:
      US dollars, or None where the price or the power is not known.

    Source: Epoch AI, training-cost-trends (amortised hardware, network share, energy).
    """
    if purchase_dollars is None:
        purchase_dollars = prices.PURCHASE_DOLLARS.get(hardware)
    kwh = energy.kilowatt_hours(hardware, device_hours)
    if purchase_dollars is None or kwh is None:
        return None
    value_at_start = purchase_dollars * 10 ** (-DEPRECIATION * years_since_acquisition)
    chip_dollars = value_at_start * DEPRECIATION * LN_10 / HOURS_PER_YEAR * device_hours
    return chip_dollars / (1 - NETWORK_SHARE) + kwh * energy.DOLLARS_PER_KWH


def memory_parts(
    model_config: ModelConfig,
    params: int,
    *,
    hardware: str,
    shards: int,
    tokens_per_device: int,
    optimizer_bytes: int = ADAM_BYTES,
) -> dict[str, float]:
    """Bytes on one device while training: FP32 weights and gradients, moments, activations.

    Activations are a rough estimate from the widths that a layer keeps for its backward pass
    under the model's ``remat``; attention's scores are taken as not kept.

    Args: see ``make_plan``; ``params`` are those of the whole model.
    """
    c = model_config
    on_cpu = c.dtype == "auto" and hardware == "cpu"
    item = 4 if on_cpu or c.dtype == "float32" else 2
    sparse = counts.routed_layers(c)
    widths = (c.num_layers + c.mtp_depth - sparse) * _kept_width(c, c.dense_width)
    if c.moe is not None:
        width = (c.moe.top_k + c.moe.num_shared_experts) * c.moe.d_expert
        widths += sparse * (_kept_width(c, width) + c.moe.num_experts)
    widths += c.mtp_depth * 4 * c.d_model  # normalised and joined inputs of the modules
    # FP32 logits and their gradient, of as many positions as the loss keeps at once
    loss_share = 1.0 + c.mtp_depth
    if c.loss_chunk:
        loss_share = min(1.0, c.loss_chunk / tokens_per_device)
    logits = 2 * 4 * c.vocab_size * loss_share
    return {
        "weights": 4 * params / shards,
        "gradients": 4 * params / shards,
        "optimizer": optimizer_bytes * params / shards,
        "activations": tokens_per_device * (item * widths + logits),
    }


def _kept_width(c: ModelConfig, ffn_width: int) -> int:
    """Values that one layer keeps of each token for the backward pass."""
    if c.remat == "full":
        return c.d_model  # the layer's input
    inner = attention_counts(c).outputs
    products = c.d_model + inner + c.d_model + 2 * ffn_width + c.d_model
    if c.remat == "dots":
        return products
    return products + 2 * c.d_model + c.head_dim * c.attention.num_heads + 2 * ffn_width


def format_plan(plan: dict[str, Any]) -> str:
    """``make_plan``'s result as a compact table for people."""
    params, flops, dollars = plan["params"], plan["flops_per_token"], plan["dollars"]
    active, price = params["active"], plan["price"]
    owned = "" if dollars["owned"] is None else f", {text.dollars(dollars['owned'])} owned"
    fits = {True: ", fits", False: ", DOES NOT FIT", None: ""}[plan["memory_fits"]]
    mtp = f", {text.parameters(params['mtp'])} MTP" if params["mtp"] else ""
    rows = [
        ("parameters", f"{text.parameters(params['total'])}{mtp}; active "
         f"{text.parameters(active['no_embedding'])} without embeddings, "
         f"{text.parameters(active['with_head'])} with head, "
         f"{text.parameters(active['with_embeddings'])} with both"),
        ("per token", f"{text.si(flops['train'], 'FLOP')} training at length {plan['seq_len']}, "
         f"{text.si(plan['kv_cache_bytes_per_token'], 'B')} KV cache"),
        ("training", f"{text.si(plan['tokens'])} tokens, {text.si(plan['train_flops'], 'FLOP')}"),
        ("on", f"{plan['devices']} x {plan['hardware']}, {text.si(plan['peak_flops'], 'FLOP/s')} "
         f"({plan['peak_source']}) at {text.percent(plan['mfu'])} MFU ({plan['mfu_source']})"),
        ("time", f"{text.duration(plan['wall_days'] * 86400)}, "
         f"{plan['device_hours']:,.4g} device-hours"),
        ("cost", f"{text.dollars(dollars['rental'])} rented{owned}"),
        ("rate", f"${price['dollars_per_hour']:g} per device-hour ({price['source']}, "
         f"{price['date']})"),
        ("energy", f"{text.energy(plan['energy_kwh'])}, {text.carbon(plan['co2_kg'])} in region "
         f"{plan['region']} ({plan['energy_source']})"),
        ("memory", f"{text.si(plan['memory_bytes_per_device'], 'B')} a device{fits} "
         f"({plan['memory_source']})"),
    ]  # fmt: skip
    return "\n".join(f"{name:<11} {value}" for name, value in rows)
