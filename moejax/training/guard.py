"""The divergence guard: which losses are bad, which checkpoints good, which batches left out.

A loss or gradient that is not finite is always bad; a loss far above those of the last steps is bad
where ``guard.spike`` says how far. A run then stops, or goes back to its last good checkpoint and
leaves out the batches around the bad one, as PaLM's training did (arXiv 2204.02311, section 5.1).
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from moejax.config import check, check_not_negative, check_positive

ACTIONS = ("stop", "rewind")
FLOOR = 0.01  # nats, and share of the median: a smaller deviation counts as this


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Options of the config block ``guard``.

    Attributes:
      action: what a bad loss does: ``stop`` ends the run; ``rewind`` goes back to the last good
        checkpoint and leaves out the batches around the bad one.
      spike: a loss is bad if it is above the median of the last ``window`` losses by more than this
        many times their median absolute deviation; 0 looks for losses that are not finite only.
        The deviation counts as 1 % of the median, or 0.01 nats, where it is less.
      window: steps that a loss is compared with; until there are so many, none is a spike.
      skip: batches left out at a rewind, the bad one among them and, of two or more, the one before
        it, whose update made the parameters that the bad loss was computed with.
      most_rewinds: of a run; the next bad loss stops it.

    Raises:
      ConfigError: a field out of range.
    """

    action: str = "stop"
    spike: float = 0.0
    window: int = 100
    skip: int = 2
    most_rewinds: int = 3

    def __post_init__(self) -> None:
        check(
            self.action in ACTIONS, "guard.action", self.action,
            f"must be one of {', '.join(ACTIONS)}",
        )  # fmt: skip
        check_not_negative("guard", self, "spike")
        check_positive("guard", self, "skip", "most_rewinds")
        check(
            self.window >= 4, "guard.window", self.window,
            "is too short for a median to mean anything; use at least 4",
        )  # fmt: skip


class BadStep(Exception):
    """A step whose loss the guard takes for bad.

    Attributes:
      step: the step, counted from 1.
      why: in words.
      loss, gradient_norm: what it measured.
      position: of its batch in the input pipeline.
      batch: the batch, on the host.
    """

    def __init__(
        self, step: int, why: str, loss: float, gradient_norm: float, position: int,
        batch: Mapping[str, Any],
    ):  # fmt: skip
        super().__init__(f"step {step}: {why}")
        self.step, self.why, self.loss, self.gradient_norm = step, why, loss, gradient_norm
        self.position, self.batch = position, batch


class Guard:
    """Judges the steps of a run, and keeps count of what it went back from.

    Attributes:
      rewound: one entry for each time: ``step`` (the bad one), ``why``, ``to`` (the step gone back
        to) and ``skipped`` (positions of batches).
      skipped: positions of all the batches that are left out.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.rewound: list[dict[str, Any]] = []
        self._losses: collections.deque[float] = collections.deque(maxlen=config.window)

    @property
    def skipped(self) -> set[int]:
        return {position for entry in self.rewound for position in entry["skipped"]}

    @property
    def may_rewind(self) -> bool:
        """Whether the next bad step is gone back from."""
        return self.config.action == "rewind" and len(self.rewound) < self.config.most_rewinds

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with the loss of the next step, in words; None for a good one.

        Steps are judged in order, each once.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"loss {loss!r}, gradient norm {gradient_norm!r}"
        if not self.config.spike:
            return None
        if len(self._losses) == self.config.window:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(earlier - median) for earlier in self._losses)
            limit = median + self.config.spike * max(spread, FLOOR * max(median, 1.0))
            if loss > limit:
                return (
                    f"loss {loss:.4g} is above {limit:.4g}, the median of {self.config.window} "
                    f"steps ({median:.4g}) and {self.config.spike:g} times their deviation"
                )
        self._losses.append(loss)
        return None

    def is_good(self, step: int, bad_step: int) -> bool:
        """Whether a checkpoint is one to go back to from a bad step.

        Good is a state on which a later step was computed, with a loss that was not bad: the state
        that the bad loss was computed with, of step ``bad_step - 1``, may be what is bad. The first
        state of all is good. A checkpoint is not good if the run went back to it before and did not
        get past the step that was bad then.
        """
        failed = any(e["to"] == step and bad_step <= e["step"] for e in self.rewound)
        return not failed and (step == 0 or step <= bad_step - 2)

    def rewind(self, bad: BadStep, to: int, position: int) -> dict[str, Any]:
        """Notes that the run goes back from a bad step.

        Args:
          bad: the step.
          to: the step gone back to.
          position: of the input pipeline at that step.

        Returns:
          The entry of ``rewound``.
        """
        first = max(bad.position - self.config.skip // 2, position)
        entry = {
            "step": bad.step, "why": bad.why, "to": to,
            "skipped": list(range(first, first + self.config.skip)),
        }  # fmt: skip
        self.rewound.append(entry)
        return entry

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-ready, so that a resumed run judges and skips alike."""
        return {"losses": list(self._losses), "rewound": self.rewound}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from a checkpoint's ``state`` (None: from none). What this process went back
        from since then is kept."""
        state = state or {"losses": [], "rewound": []}
        self._losses = collections.deque(state["losses"], maxlen=self.config.window)
        known = [*state["rewound"]]
        self.rewound = known + [entry for entry in self.rewound if entry not in known]


class Skipping:
    """An iterator over batches that leaves some of them out.

    Args:
      batches: from ``moejax.data.train_iterator``.
      skipped: positions that are left out.
    """

    def __init__(self, batches: Any, skipped: Iterable[int]):
        self._batches, self._skipped = batches, set(skipped)

    def skip(self, positions: Iterable[int]) -> None:
        """Leaves out more batches."""
        self._skipped.update(positions)

    def __next__(self) -> dict[str, Any]:
        while self._batches.position in self._skipped:
            next(self._batches)
        return next(self._batches)

    @property
    def position(self) -> int:
        """Global batches consumed since the start of the run, those left out among them."""
        return self._batches.position

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._batches.close()
