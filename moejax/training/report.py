"""What a finished run says of itself on the terminal."""

import pathlib
from collections.abc import Mapping
from typing import Any

from moejax.cost import text
from moejax.cost.bill import summarize
from moejax.cost.bill_text import format_ledger


def format_summary(summary: Mapping[str, Any], workdir: str) -> str:
    """The results, the bill, where things are and a sample, as text for people.

    Args:
      summary: what ``summary.json`` holds.
      workdir: the run's folder.
    """
    number = lambda value, digits=4: "unknown" if value is None else f"{value:.{digits}f}"
    base = summary["baselines"]
    folder = pathlib.Path(workdir)
    lines = [
        f"\nrun {summary['status']} after {summary['step']} steps, {summary['tokens']:,} tokens",
        f"  held-out text   {number(summary['val_bits_per_byte'])} bits/byte "
        f"(gzip -9: {base['gzip']:.4f}, unigram: {base['unigram']:.4f})",
        f"  loss            {number(summary['val_loss'])} nats/token held out, "
        f"{number(summary['loss'])} in training",
        f"  speed           {summary['tokens_per_second']:,.0f} tokens/s, MFU "
        f"{text.percent(summary['mfu'])} of {text.si(summary['peak_flops'], 'FLOP/s')} "
        f"({summary['peak_source']})",
        f"  compilation     {summary['compile_seconds']:.1f} s",
        *(f"  warning         {text}" for text in summary["leaks"]),
        "\nthe bill",
        format_ledger(summarize([folder])),
    ]
    for name, what in (
        ("summary.json", "these figures"), ("metrics.jsonl", "loss and router health by step"),
        ("loss.svg", "loss over dollars"), ("ledger.jsonl", "the bill, second by second"),
        ("tensorboard", "tensorboard --logdir"), ("checkpoints", "moejax generate --workdir"),
    ):  # fmt: skip
        if (folder / name).exists():
            lines.append(f"  {folder / name}   {what}")
    for sample in summary["samples"]:
        lines += ["\na sample of what the model writes", sample]
    return "\n".join(lines)
