"""``moejax plan --budget`` for people, and its model as a config file."""

import json
import os
import pathlib
from typing import Any

from moejax.config import UserError
from moejax.cost import prices, text, utilisation
from moejax.cost.cost_config import CostConfig
from moejax.cost.plan_text import format_plan
from moejax.models.model_config import ModelConfig

# What ``extrapolated`` names, in short.
_SHORT = {
    "active_params": "size",
    "total_params": "size",
    "tokens": "tokens",
    "granularity": "G",
    "num_experts": "experts",
    "flops": "FLOPs",
}


def format_budget_plan(plan: dict[str, Any]) -> str:
    """``plan_budget``'s result as tables."""
    law, spread = plan["laws"][plan["law"]], plan["disagreement"]
    ends = {name: " to ".join(map(_params, values)) for name, values in spread.items()}
    facts = (
        ("law", f"{plan['law']}: {law['title']} ({law['source']})"),
        ("formula", law["equation"]),
        ("counting", law["parameters"]),
        ("mind", law["caveat"]),
    )
    return "\n".join(
        (
            budget_line(plan),
            "",
            "What each law advises, by its own count of parameters and FLOPs:",
            advice_table(plan["laws"]),
            f"They disagree: {ends['active_params']} active parameters, {ends['tokens']} tokens.",
            f"{_sentence(plan['note'])} Beyond: outside the law's experiments.",
            "",
            "The same as models of moejax, with tokens for the whole budget by moejax's count:",
            model_table(plan["laws"]),
            "",
            *(f"{name:<11} {value}" for name, value in facts),
            format_plan(plan["plan"]),
        )
    )


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def budget_line(plan: dict[str, Any]) -> str:
    """What the budget is and buys, in one line."""
    flops, dollars, mfu = plan["flops"], plan["dollars"], plan["mfu"]
    given = plan["budget"]["dollars"] is not None
    bought = _range(flops, lambda value: text.si(value, "FLOP"))
    cost = _range(dollars, text.dollars)
    amount = f"{cost}: {bought}" if given else f"{bought}: {cost} rented"
    return (
        f"{amount}, on {plan['hardware']} at {_range(mfu, text.percent)} MFU, "
        f"{_range(plan['dollars_per_hour'], text.dollars)} a device-hour"
    )


def _range(spread: dict[str, float], show: Any) -> str:
    """``3.1 (2.0 to 4.2)``, or the one figure where there is no range."""
    expected = show(spread["expected"])
    if spread["low"] == spread["high"]:
        return expected
    return f"{expected} ({show(spread['low'])} to {show(spread['high'])})"


def advice_table(laws: dict[str, Any]) -> str:
    """Each law's optimum by its own count; ``laws`` of ``plan_budget``."""
    rows = [("law", "text", "beyond", "active", "total", "experts", "G", "tokens", "/active",
             "loss", "range", "leverage")]  # fmt: skip
    for name, law in laws.items():
        best = law["optimum"]
        ends = [law[end]["loss"] for end in ("high", "low")]
        beyond = dict.fromkeys(_SHORT[field] for field in law["extrapolated"])
        rows.append((
            name, law["corpus"].split(",")[0], ", ".join(beyond) or "-",
            _params(best["active_params"]), _params(best["total_params"]), _experts(best),
            f"{best['granularity']:g}", _params(best["tokens"]),
            f"{best['tokens'] / best['active_params']:.3g}", _loss(best["loss"]),
            "-" if None in ends else f"{ends[0]:.2f} to {ends[1]:.2f}",
            "-" if best["leverage"] is None else f"{best['leverage']:.3g}x",
        ))  # fmt: skip
    return text.columns(rows, left=3)


def model_table(laws: dict[str, Any]) -> str:
    """Each law's model as one of moejax; ``laws`` of ``plan_budget``."""
    rows = [("law", "active", "total", "d_model", "layers", "heads", "experts", "width", "G",
             "tokens", "loss")]  # fmt: skip
    for name, law in laws.items():
        model, config = law["model"], law["model"]["config"]
        rows.append((
            name, _params(model["params"]["active"]["no_embedding"]),
            _params(model["params"]["total"]), f"{config['d_model']}", f"{config['num_layers']}",
            f"{config['num_heads']}", _experts(config), f"{config['d_expert'] or config['d_ff']}",
            f"{model['granularity']:.3g}", _params(model["tokens"]), _loss(model["loss"]),
        ))  # fmt: skip
    return text.columns(rows)


def _params(value: float) -> str:
    return text.parameters(float(f"{value:.3g}"))


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _experts(figures: dict[str, Any]) -> str:
    """``12 of 384 + 1``; ``dense``."""
    if not figures["num_experts"]:
        return "dense"
    shared = f" + {figures['num_shared_experts']}" if figures["num_shared_experts"] else ""
    return f"{figures['top_k']} of {figures['num_experts']}{shared}"


def write_config(plan: dict[str, Any], model: ModelConfig, path: str | os.PathLike) -> None:
    """Writes the chosen model as a ``get_config()`` file that ``moejax plan`` and ``train`` take.

    Batch and learning rate are DeepSeek LLM's for a dense model (arXiv 2401.02954, equation 1) and
    Ling's for a mixture (arXiv 2507.17702, equation 3), as powers of the training FLOPs.

    Raises:
      UserError: the file exists or cannot be written.
    """
    file = pathlib.Path(path)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(config_source(plan, model))
    except FileExistsError:
        raise UserError(f"--output = {str(path)!r}: exists already; name a new file") from None
    except OSError as error:
        raise UserError(f"--output = {str(path)!r}: cannot be written ({error})") from error


def config_source(plan: dict[str, Any], model: ModelConfig) -> str:
    """The text of ``write_config``'s file."""
    bill, law = plan["plan"], plan["laws"][plan["law"]]
    flops, seq_len, given = plan["flops"]["expected"], bill["seq_len"], plan["budget"]
    if model.moe is None:
        batch_tokens, learning_rate = 0.2920 * flops**0.3271, 0.3118 * flops**-0.1250
    else:
        batch_tokens, learning_rate = 0.0694 * flops**0.3644, 1.1576 * flops**-0.1529
    # A hundred steps at least, so that rounding them leaves the budget within 1 %.
    rows = max(1, min(round(batch_tokens / seq_len), round(bill["tokens"] / seq_len / 100)))
    blocks: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": model.vocab_size,
            "d_model": model.d_model,
            "num_layers": model.num_layers,
            "d_ff": model.d_ff,
            "attention": {
                "num_heads": model.attention.num_heads,
                "head_dim": model.attention.head_dim,
            },
            "tie_embeddings": model.tie_embeddings,
            "remat": model.remat,
            "loss_chunk": model.loss_chunk,
        },
        "train": {
            "steps": max(1, round(bill["tokens"] / (rows * seq_len))),
            "batch_size": rows,
            "seq_len": seq_len,
        },
        "optim": {"learning_rate": float(f"{learning_rate:.3g}")},
        "budget": {f"max_{name}": given[name] for name in ("dollars", "flops") if given[name]},
        "cost": _cost_block(bill),
    }
    if bill["mfu"] != utilisation.assumed(bill["hardware"], model, bill["seq_len"]).mfu:
        blocks["cost"]["mfu"] = bill["mfu"]
    if model.moe is not None:
        blocks["moe"] = {
            "num_experts": model.moe.num_experts,
            "top_k": model.moe.top_k,
            "d_expert": model.moe.d_expert,
            "num_shared_experts": model.moe.num_shared_experts,
        }
        blocks["router"] = {"name": model.moe.router.name}
    return (
        f'"""What {plan["budget"]["text"]} buys on {plan["hardware"]}, by {law["title"]}.\n\n'
        f"{law['source']}.\n"
        "Batch and learning rate: powers of the training FLOPs, by arXiv "
        f"{'2507.17702, equation 3' if model.moe else '2401.02954, equation 1'}.\n"
        'The data are still to be set: block "data", and model.vocab_size to its tokenizer\'s.\n'
        '"""\n\n'
        "import ml_collections\n\n\n"
        "def get_config() -> ml_collections.ConfigDict:\n"
        '    """The run\'s config."""\n'
        "    return ml_collections.ConfigDict(\n"
        f"        {_source(blocks, 8)}\n"
        "    )\n"
    )


def _cost_block(bill: dict[str, Any]) -> dict[str, Any]:
    """What leads to the plan's rate: a book's is left to it, with its date and source."""
    price, chip = bill["price"], bill["hardware"]
    block = {"hardware": chip}
    if bill["region"] != CostConfig().region:
        block["region"] = bill["region"]
    if price["book"] is None:
        return block | {"price": price["dollars_per_hour"]}
    bought = bill["purchase"] or {}
    books = [book for book in (price["book"], bought.get("book")) if book not in (None, "moejax")]
    if books:
        block["price_book"] = os.path.abspath(books[0])
    if price["kind"] != prices.entry(chip, *books[:1]).default:
        block["price_kind"] = price["kind"]
    return block


def _source(value: Any, indent: int) -> str:
    """Nested dictionaries as Python source, a line a field."""
    if isinstance(value, str):
        return json.dumps(value)
    if not isinstance(value, dict):
        return repr(value)
    inner = " " * (indent + 4)
    fields = "".join(
        f"{inner}{json.dumps(name)}: {_source(field, indent + 4)},\n"
        for name, field in value.items()
    )
    return f"{{\n{fields}{' ' * indent}}}"
