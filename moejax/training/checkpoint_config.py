"""When checkpoints are saved, where, and which are kept."""

import dataclasses

from moejax.config import check, check_not_negative, check_positive


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Options of the config block ``checkpoint``.

    Attributes:
      every_steps: a checkpoint every so many steps; 0: only at the end.
      keep_newest: how many of the newest are kept, at least one.
      keep_best: how many of the lowest validation losses are kept besides.
      at_steps: a checkpoint after each of these steps too, and kept whatever comes later: what
        other runs branch off from.
      local_dir: a folder on a local disk or in memory (``/dev/shm``) for copies that a restart on
        the same machine goes on from; see ``moejax.training.local_copies``.
      local_every: a copy there every so many steps; the newest two are kept.

    Raises:
      ConfigError: a field out of range.
    """

    every_steps: int = 0
    keep_newest: int = 2
    keep_best: int = 1
    at_steps: tuple[int, ...] = ()
    local_dir: str = ""
    local_every: int = 0

    def __post_init__(self):
        check_not_negative("checkpoint", self, "every_steps", "keep_best", "local_every")
        check(
            bool(self.local_dir) == bool(self.local_every), "checkpoint.local_every",
            self.local_every, f"does not go with checkpoint.local_dir = {self.local_dir!r}: set "
            "both, or neither",
        )  # fmt: skip
        check_positive("checkpoint", self, "keep_newest")
        for step in self.at_steps:
            check(step > 0, "checkpoint.at_steps", self.at_steps, "must be steps above zero")

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a checkpoint is to be saved after ``step`` steps of ``total_steps``."""
        regular = self.every_steps > 0 and step % self.every_steps == 0
        return step == total_steps or regular or step in self.at_steps
