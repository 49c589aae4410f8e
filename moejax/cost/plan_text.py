"""A plan as text for people."""

import math
import textwrap
from typing import Any

from moejax.cost import text

_WIDTH = 118
_AXES = ("data", "fsdp", "expert", "context", "tensor")
# Kinds of collectives that are spelled out.
_MOST_KINDS = 6


def format_plan(plan: dict[str, Any]) -> str:
    """``make_plan``'s result as a compact table, with what ``plan_layout`` adds."""
    rows = [*_model(plan), *_bill(plan), *_memory(plan), *_exchange(plan)]
    rows += [*_keys(plan), *_lowered(plan)]
    return "\n".join(f"{name:<11} {line}" for name, line in rows)


Rows = list[tuple[str, str]]


def _model(plan: dict[str, Any]) -> Rows:
    params, flops = plan["params"], plan["flops_per_token"]
    active, named = params["active"], flops["conventions"]
    mtp = f", {text.parameters(params['mtp'])} MTP" if params["mtp"] else ""
    train = {name: parts["train"] for name, parts in named.items()}
    without, more = "", plan.get("more_flops_per_token", 0.0)
    beside = f", of them {text.si(more, 'FLOP')} a token in passes beside training" if more else ""
    if params["mtp"]:
        without = f", {text.si(train['causal']['without_mtp'], 'FLOP')} without MTP"
    return [
        ("parameters", f"{text.parameters(params['total'])}{mtp}; active "
         f"{text.parameters(active['no_embedding'])} without embeddings, "
         f"{text.parameters(active['with_head'])} with head, "
         f"{text.parameters(active['with_embeddings'])} with both"),
        ("per token", f"{text.si(flops['train'], 'FLOP')} training at length {plan['seq_len']}"
         f"{without}, {text.si(plan['kv_cache_bytes_per_token'], 'B')} KV cache"),
        ("", f"{text.si(train['full_attention']['with_mtp'], 'FLOP')} by full attention, "
         f"{text.si(train['6N']['with_mtp'], 'FLOP')} by 6N; prefill "
         f"{text.si(flops['prefill'], 'FLOP')}, decode {text.si(flops['decode'], 'FLOP')}"),
        ("training", f"{text.si(plan['tokens'])} tokens, {text.si(plan['train_flops'], 'FLOP')}"
         f"{beside}"),
    ]  # fmt: skip


def _bill(plan: dict[str, Any]) -> Rows:
    price, dollars, spread = plan["price"], plan["dollars"], plan["range"]
    owned = "" if dollars["owned"] is None else f", {text.dollars(dollars['owned'])} owned"
    rows = [
        ("on", f"{plan['devices']} x {plan['hardware']}, {text.si(plan['peak_flops'], 'FLOP/s')} "
         f"({plan['peak_source']})"),
        ("MFU", f"{text.percent(plan['mfu'])} ({plan['mfu_source']})"),
        ("time", f"{text.duration(plan['wall_days'] * 86400)}, "
         f"{text.parameters(plan['device_hours'])} device-hours"),
        ("cost", f"{text.dollars(dollars['rental'])} rented{owned}"),
    ]  # fmt: skip
    if spread["dollars"]["low"] < spread["dollars"]["high"]:
        rows += [("range", part) for part in _range_lines(spread)][:1]
        rows += [("", part) for part in _range_lines(spread)][1:]
    return [
        *rows,
        ("rate", f"${price['dollars_per_hour']:.4g} per device-hour "
         f"({price['kind'].replace('_', ' ')}: {price['source']}, {price['date']})"),
        ("energy", f"{text.energy(plan['energy_kwh'])}, {text.carbon(plan['co2_kg'])} in region "
         f"{plan['region']} ({plan['energy_source']})"),
    ]  # fmt: skip


def _range_lines(spread: dict[str, Any]) -> list[str]:
    mfu, hours, price = spread["mfu"], spread["device_hours"], spread["price"]
    lines = [
        f"{text.dollars(spread['dollars']['low'])} to {text.dollars(spread['dollars']['high'])}, "
        f"{text.parameters(hours['low'])} to {text.parameters(hours['high'])} device-hours"
    ]
    why = []
    if mfu["low"] < mfu["high"]:
        why.append(f"MFU {100 * mfu['low']:.1f} to {text.percent(mfu['high'])} ({mfu['source']})")
    if price["low"] < price["high"]:
        why.append(f"rate ${price['low']:.4g} to ${price['high']:.4g}")
    return [*lines, ", ".join(why)]


def _memory(plan: dict[str, Any]) -> Rows:
    size = text.si(plan["memory_bytes_per_device"], "B")
    usable, fits = plan["memory_usable_bytes"], plan["memory_fits"]
    of = "" if usable is None else f" of {text.si(usable, 'B')} usable"
    verdict = {True: ", fits", False: ", DOES NOT FIT", None: ""}[fits]
    parts = ", ".join(
        f"{text.si(value, 'B')} {name}" for name, value in plan["memory_parts"].items()
    )
    layout = plan["layout"]
    sizes = " x ".join(f"{name} {size}" for name, size in layout.items() if name != "source")
    source = f" ({layout['source']})" if "source" in layout else ""
    rows = [
        ("memory", f"{size} a device{of}{verdict} ({plan['memory_source']})"),
        ("", parts),
        ("layout", f"{sizes}{source}"),
    ]
    suggested = plan.get("suggested_layout")
    own = layout.get("source") == "config"
    if suggested is not None and fits is not None:
        used = math.prod(size for name, size in layout.items() if name != "source")
        if not own or not fits or used != plan["devices"]:
            rows += _suggested(suggested, own)
    for number, remedy in enumerate(plan.get("remedies", [])):
        size = text.si(remedy["memory_bytes_per_device"], "B")
        rows.append(("" if number else "to fit", f"{remedy['change']}  ({size}, "
                     f"{remedy['devices']} devices)"))  # fmt: skip
    return rows


def _suggested(suggested: dict[str, Any], own: bool) -> Rows:
    """The suggestion, beside a config's own layout or as the one that is planned."""
    changes = " ".join(f"{name}={value}" for name, value in suggested["changes"].items())
    more = suggested["devices_needed"]
    rows = []
    if own:
        sizes = " x ".join(f"{n} {suggested[n]}" for n in _AXES)
        size = text.si(suggested["memory_bytes_per_device"], "B")
        rows.append(("suggested", f"{sizes}{' with ' + changes if changes else ''} ({size})"))
    elif changes:
        rows.append(("", f"with {changes}"))
    if more is not None:
        rows.append(("to fit", f"at least {more} devices, by doubling"))
    elif suggested["fits"] is False:
        rows.append(("to fit", "a smaller model or sequences: no number of devices is enough"))
    return rows


def _exchange(plan: dict[str, Any]) -> Rows:
    sent = plan["exchange"]
    if sent is None:
        return []
    micro = lambda seconds: f"{1e6 * seconds:.3g} µs"
    reached = (
        f"a token reaches {sent['devices_reached']:.3g} of {sent['expert_devices']} devices, "
        f"{sent['nodes_reached']:.3g} of {sent['expert_devices'] // sent['devices_per_node']} "
        f"nodes; it sends {exchange_bytes(sent)}"
    )
    time = "its time is not known: nobody says how fast the network is"
    if sent["longest_seconds"] is not None:
        time = (
            f"{micro(sent['longest_seconds'])} a token beside {micro(sent['compute_seconds'])} of "
            f"computation; not hidden {micro(sent['exposed_seconds'])}, "
            f"{text.percent(sent['exposed_share'])} of that (estimate, not in the hours above)"
        )
    first, *more = [
        line for part in (reached, time, f"assumed: {sent['assumption']}") for line in wrapped(part)
    ]
    return [("exchange", first), *(("", line) for line in more)]


def _keys(plan: dict[str, Any]) -> Rows:
    """What attention gathers where rows are cut."""
    keys = plan.get("key_gather")
    if keys is None:
        return []
    line = f"each row on {keys['context']} devices: a token's keys and values send "
    line += text.si(keys["bytes_per_token"], "B")
    if keys["share"] is not None:
        line += f" over {keys['link']['name']}, {text.percent(keys['share'])} of its computation"
    first, *more = wrapped(f"{line} (estimate, not in the hours above)")
    return [("context", first), *(("", part) for part in more)]


def exchange_bytes(sent: dict[str, Any]) -> str:
    """What a token sends over each link, in words."""
    parts = []
    for name, amount in sent["bytes_per_token"].items():
        if amount:
            link = sent["links"][name]
            parts.append(f"{text.si(amount, 'B')} over {link['name'] if link else name}")
    return ", ".join(parts)


def wrapped(line: str, width: int = _WIDTH - 12) -> list[str]:
    """A long line cut between words."""
    return textwrap.wrap(line, width)


def collective_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Sums of collectives (``moejax.parallel.collectives.summed``), most bytes first."""
    lines = []
    for row in rows[:_MOST_KINDS]:
        passes = ", one pass of a loop of unknown length" if row.get("open_loop") else ""
        lines.append(
            f"{row['kind']} over {' x '.join(row['axes'])}: {text.si(row['bytes'], 'B')} a step on "
            f"each device ({row['count']} times{passes})"
        )
    if rest := rows[_MOST_KINDS:]:
        size = sum(row["bytes"] for row in rest)
        lines.append(f"{len(rest)} kinds more: {text.si(size, 'B')} together")
    return lines


def _lowered(plan: dict[str, Any]) -> Rows:
    """What the compiled step says, where it was asked for."""
    found = plan.get("lowered")
    if found is None:
        return []
    size = lambda name: text.si(found[f"{name}_bytes_per_device"], "B")
    sizes = " x ".join(f"{name} {number}" for name, number in found["mesh"].items())
    head = (
        f"for {found['devices']} devices ({sizes}) in {text.duration(found['seconds']['total'])}: "
        f"{size('state')} of state on each, counted {size('counted')}; {size('temp')} of "
        "temporaries by XLA's CPU backend"
    )
    first, *more = wrapped(head)
    rows = [("compiled", first), *(("", line) for line in more)]
    for number, line in enumerate(collective_lines(found["collectives"])):
        rows.append(("" if number else "sends", line))
    for warning in found["warnings"]:
        first, *more = wrapped(warning)
        rows += [("warning", first), *(("", line) for line in more)]
    return rows
