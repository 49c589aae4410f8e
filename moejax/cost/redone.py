"""Steps that were trained again: what a resume from an older checkpoint threw away.

A segment begins at the state of a checkpoint: ``from_step`` and ``from_tokens`` in its charge
lines. Whatever earlier segments trained beyond that point, the final model has not seen.
"""

import dataclasses
from collections.abc import Sequence

from moejax.cost.segments import Segment


@dataclasses.dataclass(frozen=True)
class Kept:
    """What of one segment's training is in the run's last state.

    Attributes:
      steps, tokens: kept ones; never more than the segment trained.
      share: kept tokens over tokens trained, 1 where the segment trained none.
    """

    steps: int
    tokens: int
    share: float


def kept(parts: Sequence[Segment]) -> list[Kept] | None:
    """What of each segment the run's last state has seen.

    Returns:
      One entry for each segment; None where a segment that went on with others' work does not say
      from where (ledgers of moejax 0.1.0 before that was recorded).
    """
    begins: list[tuple[int, int] | None] = []
    trained = False
    for part in parts:
        begins.append(_begin(part, first=not trained))
        if begins[-1] is None and _tokens(part):
            return None
        trained = trained or _tokens(part) > 0
    found, limit = [], None
    last = max((i for i, begin in enumerate(begins) if begin is not None), default=-1)
    for i in reversed(range(len(parts))):
        begin, steps, tokens = begins[i], parts[i].charge.get("steps", 0), _tokens(parts[i])
        if begin is None:
            found.append(Kept(0, 0, 1.0))
            continue
        if limit is not None:
            steps = min(max(limit[0] - begin[0], 0), steps)
            tokens = min(max(limit[1] - begin[1], 0), tokens)
        trained_tokens = _tokens(parts[i])
        found.append(Kept(steps, tokens, tokens / trained_tokens if trained_tokens else 1.0))
        # A state that was restored and not trained on replaces nothing, unless it is the last.
        if trained_tokens or i == last:
            limit = begin if limit is None else min(limit, begin)
    return found[::-1]


def tokens_seen(parts: Sequence[Segment]) -> int:
    """Tokens that the run's last state has seen.

    A kill may lose the last second of a ledger, but not the checkpoint of that second: what was
    seen may be a little more than what was billed and kept.
    """
    for part in reversed(parts):
        begin = _begin(part, first=True)
        if begin is not None:
            return begin[1] + _tokens(part)
    return 0


def _tokens(part: Segment) -> int:
    return part.charge.get("tokens", 0)


def _begin(part: Segment, first: bool) -> tuple[int, int] | None:
    """Step and tokens of the state that a segment began with; None where it got to none."""
    if "from_step" in part.charge:
        return part.charge["from_step"], part.charge["from_tokens"]
    return (0, 0) if first and _tokens(part) else None


def summary(parts: Sequence[Segment], entries: Sequence[Kept]) -> dict[str, float]:
    """``steps``, ``tokens``, ``model_flops``, ``seconds``, ``device_hours`` and ``dollars`` redone.

    FLOPs, time and dollars are the tokens' share of their segment's training.
    """
    found = dict.fromkeys(
        ("steps", "tokens", "model_flops", "seconds", "device_hours", "dollars"), 0
    )
    for part, entry in zip(parts, entries, strict=True):
        lost = 1 - entry.share
        found["steps"] += part.charge.get("steps", 0) - entry.steps
        found["tokens"] += _tokens(part) - entry.tokens
        found["model_flops"] += part.charge.get("model_flops", 0.0) * lost
        found["seconds"] += part.seconds["train"] * lost
        found["device_hours"] += part.device_hours["train"] * lost
        found["dollars"] += part.device_hours["train"] * lost * part.rate
    return found
