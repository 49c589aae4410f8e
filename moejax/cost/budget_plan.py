"""``moejax plan --budget``: which model a budget is best spent on, by published scaling laws.

``--format=json`` has

- ``budget``: ``text``, ``dollars`` or ``flops`` as given, the other None.
- ``flops`` (as moejax counts them) and ``dollars`` (rental): ``low``, ``expected``, ``high``,
  from the ranges ``mfu`` and ``dollars_per_hour``; what was given has no range.
- ``laws``, by name, each with
  - its facts (``title``, ``source``, ``equation``, ``parameters`` (what its N means),
    ``corpus``, ``tokenizer``, ``fitted``, ``inverse``, ``reading``, ``caveat``);
  - ``optimum``, with ``low`` and ``high`` for the ends of ``flops``: what the paper's own
    arithmetic gives, in its own meaning of parameters and FLOPs (``active_params``,
    ``total_params``, ``num_experts``, ``top_k``, ``num_shared_experts``, ``granularity``,
    ``tokens``, ``loss`` or None, ``leverage`` or None, ``flops``);
  - ``extrapolated``: in which of these ``optimum`` is beyond the law's experiments;
  - ``model``: the same as a model of moejax: ``config`` (d_model, num_layers, num_heads,
    head_dim, d_ff, num_experts, top_k, num_shared_experts, d_expert, vocab_size),
    ``params`` as ``moejax plan`` has them, ``granularity``, ``flops_per_token``, ``tokens``
    (which use up ``flops.expected``) and ``loss``.
- ``disagreement``: the smallest and the largest of the laws' optimal ``active_params``,
  ``total_params`` and ``tokens``.
- ``law``: the chosen one; ``plan``: ``make_plan``'s result for its model.
- ``note``: which losses can be compared.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from moejax.config import check, nearest
from moejax.cost import budget_models, text
from moejax.cost import hardware as chips
from moejax.cost.budget import (
    FLAG,
    Budget,
    Spread,
    assumed_mfu,
    buy,
    mfu_spread,
    parse,
    price_spread,
)
from moejax.cost.budget_models import Choice
from moejax.cost.cost_config import CostConfig
from moejax.cost.memory import Layout, Placement
from moejax.cost.plan import make_plan
from moejax.cost.scaling_laws import LAWS
from moejax.cost.scaling_laws.law import Law, Optimum
from moejax.models.model_config import ModelConfig

DEFAULT_LAW = "krajewski_2024"

MOST_DAYS = 90  # of a run whose number of devices is chosen here
MOST_DEVICES = 2**17

COMPARABLE = (
    "losses are nats per token of each law's own text and tokenizer: compare them only between "
    "laws of the same text"
)


def plan_budget(
    amount: str,
    *,
    hardware: str,
    seq_len: int,
    law: str = DEFAULT_LAW,
    devices: int | None = None,
    cost: CostConfig | None = None,
    mfu: float | None = None,
    mfu_source: str | None = None,
    place: Callable[[ModelConfig, int], Placement] | None = None,
) -> dict[str, Any]:
    """Turns a plan round: from an amount to a model, its tokens and its loss, by every law.

    Args:
      amount: ``'$100k'``, ``100kUSD``, ``1e22FLOP``: see ``moejax.cost.budget.parse``.
      hardware: a chip's name.
      seq_len: positions of a sequence.
      law: whose model ``plan`` is about.
      devices: how many; None takes the fewest, a power of two, that are done in 90 days and hold
        the model, split over all of them, if any number does; on a CPU, this machine's cores.
      cost: the way to a rate (the book's has a range), to a purchase price and the region, as in a
        config; None takes the packaged book's. Its ``hardware`` and ``mfu`` are not used.
      mfu: utilisation; None takes a default, with a range.
      mfu_source: where ``mfu`` is from.
      place: what a device has of a model's step on so many devices; None cuts experts into as many
        parts as divide them, and everything into the rest.

    Returns:
      The fields that this module's docstring lists.

    Raises:
      ConfigError: an amount, chip, law or option out of range; a budget too small for any model
        or too large for every one.
    """
    budget = parse(amount)
    check(law in LAWS, "--law", law, f"no such law; {nearest(law, LAWS)}")
    check(devices is None or devices > 0, "devices", devices, "must be above zero")
    cost = cost or CostConfig()
    rate = cost.rate(hardware)
    peak, peak_source = chips.peak_flops(hardware, 1)
    used = assumed_mfu(hardware, mfu, mfu_source)
    spread = mfu_spread(used)
    flops, dollars = buy(budget, peak_flops=peak, price=price_spread(rate), mfu=spread)
    _check_size(budget, flops, dollars, seq_len)
    choices = {
        name: budget_models.choose(known, flops.expected, seq_len, budget)
        for name, known in LAWS.items()
    }
    chosen = choices[law]
    place = place or _spread

    def bill(devices: int) -> dict[str, Any]:
        return make_plan(
            chosen.candidate.config, tokens=chosen.tokens, seq_len=seq_len, hardware=hardware,
            devices=devices, price=rate, used=used, peak_flops=peak * devices,
            peak_source=peak_source, placement=place(chosen.candidate.config, devices),
            region=cost.region, purchase=cost.purchase(hardware), pue=cost.pue,
            dollars_per_kwh=cost.dollars_per_kwh,
        )  # fmt: skip

    plan = bill(devices) if devices is not None else _planned(bill, hardware)
    return {
        "budget": dataclasses.asdict(budget),
        "hardware": hardware,
        "mfu": dataclasses.asdict(spread),
        "dollars_per_hour": dataclasses.asdict(price_spread(rate)),
        "flops": dataclasses.asdict(flops),
        "dollars": dataclasses.asdict(dollars),
        "laws": {name: _advice(known, flops, choices[name]) for name, known in LAWS.items()},
        "disagreement": _disagreement(LAWS, flops.expected),
        "note": COMPARABLE,
        "law": law,
        "plan": plan,
    }


def _spread(model: ModelConfig, devices: int) -> Placement:
    expert = math.gcd(devices, model.moe.num_experts) if model.moe else 1
    return Placement(Layout(fsdp=devices // expert, expert=expert))


def chosen_config(amount_plan: dict[str, Any]) -> ModelConfig:
    """The model that ``plan`` of ``plan_budget``'s result is about."""
    seq_len, flops = amount_plan["plan"]["seq_len"], amount_plan["flops"]["expected"]
    budget = Budget(**amount_plan["budget"])
    law = LAWS[amount_plan["law"]]
    return budget_models.choose(law, flops, seq_len, budget).candidate.config


def _check_size(budget: Budget, flops: Spread, dollars: Spread, seq_len: int) -> None:
    first, least = budget_models.smallest(seq_len)
    needed = text.si(least, "FLOP")
    if budget.dollars is not None:
        needed = text.dollars(dollars.expected * least / flops.expected)
    check(
        flops.expected >= least, FLAG, budget.text,
        f"is too small for any model: the smallest here, with "
        f"{text.parameters(first.sizes.active_params)} parameters beside embeddings, takes "
        f"{needed} for {budget_models.LEAST_TOKENS_PER_PARAM} tokens each; give at least that",
    )  # fmt: skip


def _planned(bill: Callable[[int], dict[str, Any]], hardware: str) -> dict[str, Any]:
    """The plan with the fewest devices that end in time and hold the model; on a CPU, with all."""
    if hardware == "cpu":
        return bill(chips.cpu_cores())
    devices = 1
    while (in_time := bill(devices))["wall_days"] > MOST_DAYS and devices < MOST_DEVICES:
        devices *= 2
    plan = in_time
    while plan["memory_fits"] is False and devices < MOST_DEVICES:
        devices *= 2
        plan = bill(devices)
    # What no number of devices holds is short of memory for activations, not of devices.
    return in_time if plan["memory_fits"] is False else plan


def _disagreement(laws: dict[str, Law], flops: float) -> dict[str, list[float]]:
    advised = [law.optimum(flops) for law in laws.values()]
    found = {}
    for name in ("active_params", "total_params", "tokens"):
        values = [getattr(optimum, name) for optimum in advised]
        found[name] = [min(values), max(values)]
    return found


def _advice(law: Law, flops: Spread, choice: Choice) -> dict[str, Any]:
    """One entry of ``laws``."""
    optimum = law.optimum(flops.expected)
    return dataclasses.asdict(law.facts) | {
        "fitted": {name: list(ends) for name, ends in law.facts.fitted.items()},
        "optimum": _optimum(optimum),
        "low": _optimum(law.optimum(flops.low)),
        "high": _optimum(law.optimum(flops.high)),
        "extrapolated": list(law.beyond(optimum)),
        "model": _model(choice),
    }


def _optimum(optimum: Optimum) -> dict[str, Any]:
    values = dataclasses.asdict(optimum)
    design = values.pop("design")
    del design["width"]
    return values | design


def _model(choice: Choice) -> dict[str, Any]:
    candidate = choice.candidate
    config, moe = candidate.config, candidate.config.moe
    return {
        "config": {
            "d_model": config.d_model,
            "num_layers": config.num_layers,
            "num_heads": config.attention.num_heads,
            "head_dim": config.head_dim,
            "d_ff": config.d_ff if moe is None else 0,
            "num_experts": moe.num_experts if moe else 0,
            "top_k": moe.top_k if moe else 0,
            "num_shared_experts": moe.num_shared_experts if moe else 0,
            "d_expert": moe.d_expert if moe else 0,
            "vocab_size": config.vocab_size,
        },
        "params": dataclasses.asdict(candidate.counted.params),
        "granularity": candidate.sizes.granularity,
        "flops_per_token": candidate.counted.flops_per_token.train,
        "tokens": choice.tokens,
        "loss": choice.loss,
    }
