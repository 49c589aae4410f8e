"""What a run says of its text, before, while and after it trains; and what input cost it."""

import math
from collections.abc import Mapping
from typing import Any

from moejax.data import PairRows, TextDataset, baselines, epochs_read
from moejax.data.duplicates import dropped_line
from moejax.training.validation import bits_per_byte

EPOCHS_WITHOUT_WARNING = 4.0
WAIT_WITHOUT_WARNING = 0.01


def lines_before(dataset: TextDataset, rows: int) -> list[str]:
    """How often a run over ``rows`` rows reads the text, and each source of a mixture.

    More than four times is warned about (Muennighoff et al. 2023, arXiv 2305.16264: up to four
    epochs are about as good as new text). Documents that were dropped as copies are counted.
    """
    times, sources = epochs_read(dataset, rows)
    lines = [f"data        {times:.2f} epochs over {dataset.train_tokens:,} unique tokens"]
    if isinstance(dataset.train, PairRows):
        lines.append(f"  {pairs_line(dataset)}")
    width = max((len(label) for label in sources), default=0)
    for part in dataset.parts:
        lines.append(
            f"  {part.label:<{width}}  {part.share:7.2%} of the tokens: its "
            f"{part.dataset.train_tokens:,} are read {sources[part.label]:.2f} times"
        )
    for prefix, own in [("", dataset), *((f"{p.label}: ", p.dataset) for p in dataset.parts)]:
        if dropped := dropped_line(own.provenance):
            lines.append(f"  {prefix}{dropped}")
    often = {label: own for label, own in sources.items() if own > EPOCHS_WITHOUT_WARNING}
    if often and times <= EPOCHS_WITHOUT_WARNING:
        named = ", ".join(f"{label} {own:.1f} times" for label, own in often.items())
        lines.append(
            f"warning: read more than {EPOCHS_WITHOUT_WARNING:g} times: {named}; lower its weight, "
            "or give it more text"
        )
    if times > EPOCHS_WITHOUT_WARNING:
        lines.append(
            f"warning: more than {EPOCHS_WITHOUT_WARNING:g} epochs repeat the text until it "
            "teaches little; use more text (moejax tokenize) or fewer steps"
        )
    return lines


def pairs_line(dataset: TextDataset) -> str:
    """How many pairs there are, what of them the loss counts, and what was left out."""
    said, rows = dataset.provenance, dataset.train
    counted = "the loss counts completions"
    if said["source"] == "preferences":
        counted = "held-out loss counts the responses that are preferred"
    line = (
        f"{said['train_pairs']:,} pairs, {said['validation_pairs']:,} more held out; {counted}: "
        f"{rows.counted / rows.targets:.1%} of the tokens"
    )
    dropped = said["dropped_long_pairs"]
    return line + (f"; {dropped:,} longer than a row are left out" if dropped else "")


def epoch_values(dataset: TextDataset, rows: int) -> dict[str, float]:
    """Metrics of a step: ``epochs`` so far, and ``epochs/<source>`` of a mixture."""
    times, sources = epochs_read(dataset, rows)
    return {"epochs": times, **{f"epochs/{label}": own for label, own in sources.items()}}


def held_out_values(dataset: TextDataset, losses: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a validation, by source: ``val/<source>/loss`` and ``.../bits_per_byte``."""
    values = {}
    for part in dataset.parts:
        loss = losses.get(part.label, math.nan)
        values[f"val/{part.label}/loss"] = loss
        values[f"val/{part.label}/bits_per_byte"] = bits_per_byte(loss, part.dataset)
    return values


def held_out_line(dataset: TextDataset, losses: Mapping[str, float]) -> str:
    """Bits per byte of each source of a mixture, beside gzip's; empty without one."""
    if not losses:
        return ""
    shown = [
        f"{part.label} {bits_per_byte(losses[part.label], part.dataset):.4f} "
        f"(gzip {baselines(part.dataset)['gzip']:.4f})"
        for part in dataset.parts
    ]
    return f"\n  bits/byte by source: {', '.join(shown)}"


def summary(dataset: TextDataset, rows: int, losses: Mapping[str, float]) -> dict[str, Any]:
    """What ``summary.json`` says of the text: ``epochs``, and ``sources`` of a mixture.

    Args:
      dataset: the text.
      rows: training rows read so far.
      losses: of the last validation, by source.
    """
    times, sources = epochs_read(dataset, rows)
    if not dataset.parts:
        return {"epochs": times}
    of_source = {}
    for part in dataset.parts:
        loss = losses.get(part.label)
        of_source[part.label] = {
            "share": part.share,
            "epochs": sources[part.label],
            "train_tokens": part.dataset.train_tokens,
            "val_loss": loss,
            "val_bits_per_byte": None if loss is None else bits_per_byte(loss, part.dataset),
            "baselines": baselines(part.dataset),
        }
    return {"epochs": times, "sources": of_source}


class InputWait:
    """The share of a run's steps that it waited for input.

    The first step is left out: it waits for the pipeline to start, and may compile.
    """

    def __init__(self):
        self._before: tuple[float, float] | None = None

    def step(self, seconds: Mapping[str, float]) -> None:
        """After each step: the ledger's seconds by phase."""
        if self._before is None:
            self._before = seconds["data_wait"], seconds["train"]

    def share(self, seconds: Mapping[str, float]) -> float | None:
        """Seconds of ``data_wait`` over those of it and ``train``; None before two steps.

        Args:
          seconds: the ledger's seconds by phase, now.
        """
        if self._before is None:
            return None
        wait, train = seconds["data_wait"] - self._before[0], seconds["train"] - self._before[1]
        return wait / (wait + train) if wait + train > 0 else None

    def line(self, seconds: Mapping[str, float]) -> str:
        """For people, with a warning from 1 % and a second on; empty before two steps."""
        share = self.share(seconds)
        if share is None:
            return ""
        line = f"input       waited for in {share:.2%} of the steps' time"
        if share > WAIT_WITHOUT_WARNING and seconds["data_wait"] > 1:
            line += "; warning: above 1 %: raise data.prefetch, or tokenise first (moejax tokenize)"
        return line
