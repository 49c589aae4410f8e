"""The utilisation that a plan assumes: measured in a run of one's own, published, or a default."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from moejax.config import ConfigError, check
from moejax.cost import counts
from moejax.cost.segments import FILE_NAME, ledger_errors, segments
from moejax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """Model FLOPs over the dense BF16 peak (FP32 on a CPU), and what it may be instead.

    Attributes:
      mfu: the utilisation, above 0 to 1.
      source: ``--mfu``, ``config``, ``measured: DIR``, ``published: …`` or ``default``.
      low, high: the range to reckon with, in which ``mfu`` lies.
      range_source: where the range is from.
    """

    mfu: float
    source: str
    low: float
    high: float
    range_source: str

    def __post_init__(self) -> None:
        for value in (self.mfu, self.low, self.high):
            check(0 < value <= 1, "cost.mfu", value, "must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Published:
    """A utilisation in print, or one that follows from a published bill.

    Attributes:
      hardware: a chip's name.
      moe: whether the model has experts.
      mfu: as published, by its source's own count of FLOPs: at most some per cent from moejax's.
      run: which model, on how many devices.
      source: paper and place.
      derived: by moejax, from published hours and tokens; else the source says it.
      without_mtp: the FLOPs of MTP modules, which ran, are not in it.
    """

    hardware: str
    moe: bool
    mfu: float
    run: str
    source: str
    derived: bool = False
    without_mtp: bool = False

    def __str__(self) -> str:
        return f"{self.run}, {self.source}{', derived' if self.derived else ''}"


# The first of a chip and class is what a plan assumes; all of them are its range.
PUBLISHED = (
    Published("h800_sxm", True, 0.3894, "DeepSeek-V3 on 2,048", "ISCA 2025, table 4",
              without_mtp=True),
    Published("h800_sxm", True, 0.252, "DeepSeek-V2, 172.8K hours a trillion tokens",
              "arXiv 2405.04434, section 3.2.3", derived=True),
    Published("h100_sxm", True, 0.390, "Qwen2-57B-A14B", "arXiv 2504.14960, abstract"),
    Published("h100_sxm", True, 0.493, "Mixtral-8x22B", "arXiv 2504.14960, abstract"),
    Published("h100_sxm", True, 0.185, "OLMoE on 256 for 10 days", "arXiv 2409.02060",
              derived=True),
    Published("h100_sxm", False, 0.41, "Llama-3.1-405B on 16,384", "arXiv 2407.21783, table 4"),
    Published("h100_sxm", False, 0.43, "Llama-3.1-405B on 8,192", "arXiv 2407.21783, table 4"),
    Published("h100_sxm", False, 0.346, "Llama-3.1-405B, all hours of its model card", "model card",
              derived=True),
    Published("a100_80gb_sxm", False, 0.443, "Llama-2-70B, 1.72M hours",
              "arXiv 2307.09288, table 2", derived=True),
    Published("a100_80gb_sxm", False, 0.302, "Megatron-Turing NLG 530B on 2,240",
              "arXiv 2204.02311, table 3"),
    Published("tpu_v4", False, 0.462, "PaLM 540B on 6,144", "arXiv 2204.02311, table 3"),
)  # fmt: skip

DEFAULT = 0.35
# The quickstart on two shared cores.
CPU_DEFAULT, CPU_LOW, CPU_HIGH = 0.15, 0.12, 0.22


def check_mfu(mfu: float) -> None:
    """Raises ConfigError unless a utilisation is possible; a millionth is none that a run has."""
    check(0 < mfu <= 1, "cost.mfu", mfu, "must be above 0 and at most 1")
    check(mfu >= 1e-6, "cost.mfu", mfu, "must be a millionth at least")


def given(mfu: float, source: str) -> Utilisation:
    """A utilisation that somebody names: a point, without a range.

    Raises:
      ConfigError: not above 0 and at most 1.
    """
    check_mfu(mfu)
    return Utilisation(mfu, source, mfu, mfu, source)


def assumed(hardware: str, model: ModelConfig | None = None, seq_len: int = 4096) -> Utilisation:
    """What to assume where nothing is measured or given.

    The first published figure of this chip and class of model, with the range of all of them, or a
    default within the range of the class on any chip. That is the range of a chip with a single
    figure, too: one run says nothing of how far others lie apart.

    Args:
      hardware: a chip's name.
      model: the model; None for one with experts and without MTP modules.
      seq_len: positions of a sequence, for the share of MTP modules' FLOPs.
    """
    if hardware == "cpu":
        return Utilisation(CPU_DEFAULT, "default", CPU_LOW, CPU_HIGH, "the quickstart on two cores")
    moe = model is None or model.layers("moe") > 0
    same_class = [p for p in PUBLISHED if p.moe == moe]
    same_chip = [p for p in same_class if p.hardware == hardware]
    several = len(same_chip) > 1
    values = [_with_mtp(p, model, seq_len) for p in (same_chip if several else same_class)]
    kind = "with experts" if moe else "dense"
    others = "several chips" if same_chip else "other chips"
    where = f"published for models {kind} on {hardware if several else others}"
    mfu, source = DEFAULT, "default"
    if same_chip:
        mfu, source = _with_mtp(same_chip[0], model, seq_len), f"published: {same_chip[0]}"
    return Utilisation(mfu, source, min(mfu, *values), max(mfu, *values), where)


def _with_mtp(published: Published, model: ModelConfig | None, seq_len: int) -> float:
    """Of a model with MTP modules, the same speed by FLOPs that count them."""
    if model is None or not published.without_mtp or not model.mtp_depth:
        return published.mfu
    alone = dataclasses.replace(model, mtp_depth=0)
    train = lambda c: counts.count(c, seq_len).flops_per_token.train
    return published.mfu * train(model) / train(alone)


def measured(directories: Sequence[str | pathlib.Path], hardware: str) -> Utilisation:
    """What runs of one's own reached: the mean, between the lowest and the highest.

    Of a single run the range is that of its logged steps, the tenth lowest and highest left out.

    Args:
      directories: run directories, with ``summary.json`` and ``ledger.jsonl``.
      hardware: the chip to plan for; the runs must have had it.

    Raises:
      ConfigError: no summary, no utilisation in it, or another chip.
    """
    values = [_summary_mfu(pathlib.Path(d), hardware) for d in directories]
    mean = sum(values) / len(values)
    source = f"measured: {', '.join(str(d) for d in directories)}"
    if len(values) > 1:
        low, high = min(mean, *values), max(mean, *values)  # a mean of equals is rounded
        return Utilisation(mean, source, low, high, f"{len(values)} runs")
    steps = sorted(_step_mfus(pathlib.Path(directories[0])))
    tenth = len(steps) // 10
    steps = steps[tenth : len(steps) - tenth] or values
    return Utilisation(mean, source, min(mean, *steps), max(mean, *steps), "its logged steps")


def _summary_mfu(folder: pathlib.Path, hardware: str) -> float:
    path = folder / "summary.json"
    check(path.is_file(), "--measured", str(folder), "has no summary.json; name a finished run")
    mfu = _json(path).get("mfu")
    check(
        isinstance(mfu, float) and 0 < mfu <= 1, "--measured", str(folder),
        f"has no utilisation in its summary.json (mfu: {mfu!r}); name a run that trained",
    )  # fmt: skip
    ledger = folder / FILE_NAME
    with ledger_errors(ledger):
        chips = {segment.header["hardware"] for segment in segments(ledger)}
    check(
        chips == {hardware}, "--measured", str(folder),
        f"ran on {' and '.join(sorted(chips)) or 'no known chip'}, not on {hardware}; plan for the "
        "same chip",
    )  # fmt: skip
    return mfu


def _step_mfus(folder: pathlib.Path) -> list[float]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            value = json.loads(line).get("mfu")
        except (ValueError, AttributeError):  # a torn line
            continue
        if isinstance(value, float) and 0 < value <= 1:
            found.append(value)
    return found


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError("--measured", str(path), "is not JSON; name a finished run") from error
    return found if isinstance(found, dict) else {}
