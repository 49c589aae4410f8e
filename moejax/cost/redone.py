"""Steps that were trained again: what a run threw away by going back to an older checkpoint.

A segment begins at the state of a checkpoint: ``from_step`` and ``from_tokens`` in its charge
lines. Whatever earlier segments trained beyond that point, the final model has not seen. A segment
that went back itself lists what it had trained up to then in ``pieces``: the step and the tokens
that a piece began from, and how many it trained.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

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


class _Piece(NamedTuple):
    """Training in one go: from which state, None where that is not known, and how much."""

    begin: tuple[int, int] | None
    steps: int
    tokens: int


def kept(parts: Sequence[Segment]) -> list[Kept] | None:
    """What of each segment the run's last state has seen.

    Returns:
      One entry for each segment; None where a segment that went on with others' work does not say
      from where (ledgers of moejax 0.1.0 before that was recorded).
    """
    pieces: list[list[_Piece]] = []
    trained = False
    for part in parts:
        pieces.append(_pieces(part, first=not trained))
        if pieces[-1][-1].begin is None and _tokens(part):
            return None
        trained = trained or _tokens(part) > 0
    flat = [(i, piece) for i, own in enumerate(pieces) for piece in own]
    steps, tokens = [0] * len(parts), [0] * len(parts)
    limit = None
    last = max((j for j, (_, piece) in enumerate(flat) if piece.begin is not None), default=-1)
    for j in reversed(range(len(flat))):
        i, (begin, done, seen) = flat[j]
        if begin is None:
            continue
        if limit is not None:
            done = min(max(limit[0] - begin[0], 0), done)
            seen = min(max(limit[1] - begin[1], 0), seen)
        steps[i] += done
        tokens[i] += seen
        # A state that was restored and not trained on replaces nothing, unless it is the last.
        if flat[j][1].tokens or j == last:
            limit = begin if limit is None else min(limit, begin)
    return [
        Kept(steps[i], tokens[i], tokens[i] / _tokens(part) if _tokens(part) else 1.0)
        for i, part in enumerate(parts)
    ]


def tokens_seen(parts: Sequence[Segment]) -> int:
    """Tokens that the run's last state has seen.

    A kill may lose the last second of a ledger, but not the checkpoint of that second: what was
    seen may be a little more than what was billed and kept.
    """
    for part in reversed(parts):
        last = _pieces(part, first=True)[-1]
        if last.begin is not None:
            return last.begin[1] + last.tokens
    return 0


def _tokens(part: Segment) -> int:
    return part.charge.get("tokens", 0)


def _pieces(part: Segment, first: bool) -> list[_Piece]:
    """What a segment trained in one go each, oldest first; the last one's beginning is None where
    it got to no state."""
    charge = part.charge
    found = [_Piece((step, seen), steps, tokens) for step, seen, steps, tokens
             in charge.get("pieces", [])]  # fmt: skip
    begin = (0, 0) if first and _tokens(part) else None
    if "from_step" in charge:
        begin = charge["from_step"], charge["from_tokens"]
    steps = charge.get("steps", 0) - sum(piece.steps for piece in found)
    tokens = _tokens(part) - sum(piece.tokens for piece in found)
    return [*found, _Piece(begin, steps, tokens)]


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
