"""``moejax plan --serve``: what tokens cost to make, and the volume that beats buying them."""

import math
from typing import Any

from moejax.config import check, nearest
from moejax.cost import hardware as chips
from moejax.cost import serving, text
from moejax.cost.prices import Price
from moejax.cost.serving import LIST_PRICES


def plan_serving(
    tokens_per_second: float,
    *,
    hardware: str,
    devices: int,
    price: Price,
    list_price: str | None = None,
    input_per_output: float = 0.0,
    cache_hit_share: float = 0.0,
) -> dict[str, Any]:
    """The bill of a deployment from its throughput.

    Args:
      tokens_per_second: output tokens of one device, averaged over the hours that are paid for.
      hardware: a chip's name.
      devices: of the deployment.
      price: the rate of one device.
      list_price: a model of ``LIST_PRICES``, or dollars for a million output tokens.
      input_per_output: input tokens that come with each output token; the throughput includes the
        time that they take, and a model's list price is of both.
      cache_hit_share: share of the input that the seller would find in its cache, 0 to 1.

    Returns:
      ``moejax plan --serve --format=json``: ``hardware``, ``devices``, ``price``,
      ``tokens_per_second``, ``dollars_per_million_tokens``, ``dollars_per_day``,
      ``capacity_per_day``; and ``list_price`` (``name``, ``dollars_per_million_tokens``,
      ``source``, ``date``) with ``break_even`` (``tokens_per_day``, ``load``, ``possible``), both
      None without a list price.

    Raises:
      ConfigError: a value out of range, an unknown chip or list price.
    """
    chips.lookup(hardware)
    good = math.isfinite(tokens_per_second) and tokens_per_second > 0
    check(good, "--serve", tokens_per_second, "must be a finite number of tokens above zero")
    check(devices > 0, "devices", devices, "must be above zero")
    rate = price.dollars_per_hour
    found: dict[str, Any] = {
        "hardware": hardware,
        "devices": devices,
        "price": price.to_dict(),
        "tokens_per_second": tokens_per_second,
        "dollars_per_million_tokens": serving.dollars_per_million_tokens(tokens_per_second, rate),
        "dollars_per_day": devices * rate * serving.HOURS_PER_DAY,
        "capacity_per_day": devices * tokens_per_second * 86_400,
        "list_price": None,
        "break_even": None,
    }
    if list_price is None:
        return found
    sold = _sold(list_price, input_per_output, cache_hit_share)
    even = serving.break_even(devices, rate, tokens_per_second, sold["dollars_per_million_tokens"])
    values = {"tokens_per_day": even.tokens_per_day, "load": even.load, "possible": even.possible}
    return found | {"list_price": sold, "break_even": values}


def _sold(list_price: str, input_per_output: float, cache_hit_share: float) -> dict[str, Any]:
    """What a million output tokens cost to buy, from a model's name or a number."""
    good = math.isfinite(input_per_output) and input_per_output >= 0
    check(good, "--input-per-output", input_per_output, "must be a finite number, 0 or above")
    good = 0 <= cache_hit_share <= 1
    check(good, "--cache-hit-share", cache_hit_share, "must be from 0 to 1")
    if list_price in LIST_PRICES:
        price = LIST_PRICES[list_price]
        dollars = price.blended(input_per_output, cache_hit_share)
        return {
            "name": list_price, "dollars_per_million_tokens": dollars, "source": price.source,
            "date": price.date,
        }  # fmt: skip
    try:
        dollars = float(list_price)
    except ValueError:
        dollars = math.nan
    check(
        math.isfinite(dollars) and dollars > 0, "--list-price", list_price,
        f"neither dollars above zero for a million tokens nor a model whose price is known; "
        f"{nearest(list_price, LIST_PRICES)}",
    )  # fmt: skip
    return {"name": None, "dollars_per_million_tokens": dollars, "source": "user", "date": None}


def format_serving(plan: dict[str, Any]) -> str:
    """``plan_serving``'s result for people."""
    price, sold, even = plan["price"], plan["list_price"], plan["break_even"]
    rows = [
        ("on", f"{plan['devices']} x {plan['hardware']}, {plan['tokens_per_second']:,.6g} tokens/s "
         "a device, averaged over the hours that are paid for"),
        ("cost", f"{text.dollars(plan['dollars_per_million_tokens'])} a million tokens at full "
         f"load; {text.dollars(plan['dollars_per_day'])} a day, whatever the load"),
        ("rate", f"${price['dollars_per_hour']:g} per device-hour ({price['source']}, "
         f"{price['date']})"),
        ("capacity", f"{text.si(plan['capacity_per_day'])} tokens a day"),
    ]  # fmt: skip
    if sold is not None:
        dated = f"{sold['source']}, {sold['date']}" if sold["name"] else "given"
        whose = f" of {sold['name']}" if sold["name"] else ""
        rows.append(("list price", f"{text.dollars(sold['dollars_per_million_tokens'])} a million "
                     f"tokens{whose} ({dated}): a price, not a cost"))  # fmt: skip
        reach = f"{text.percent(even['load'])} of the capacity"
        if not even["possible"]:
            reach = f"{even['load']:.3g} times the capacity: it never pays"
        rows.append(("break-even", f"{text.si(even['tokens_per_day'])} tokens a day, {reach}"))
    return "\n".join(f"{name:<11} {line}" for name, line in rows)


__all__ = ["format_serving", "plan_serving"]
