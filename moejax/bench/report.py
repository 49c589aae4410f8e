"""What a benchmark gathers: rows, and what is to be said beside them."""

import dataclasses
import sys
from typing import Any

from moejax.bench.timing import Program, Times


@dataclasses.dataclass
class Report:
    """One run of ``moejax bench``.

    Attributes:
      results: one row a measurement; see ``row``.
      auto: what ``auto`` picks, by shape: ``dispatch`` and ``reason``.
      notes: what a reader has to know: what was left out, how something was defined.
      failures: measurements that were tried and failed, each with its ``error``; they make the
        exit status 1.
      profile: the parts of a layer, one row each; None without ``--profile``.
      extra: further keys of the JSON object.
    """

    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    auto: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    profile: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def note(self, line: str) -> None:
        """Adds a note, once."""
        if line not in self.notes:
            self.notes.append(line)

    def fail(self, error: BaseException, **what: Any) -> None:
        """Records a measurement that failed, and says so at once."""
        line = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        self.failures.append({**what, "error": line})
        progress(f"failed: {' '.join(str(value) for value in what.values())}: {line}")


def progress(line: str) -> None:
    """A line for whoever is waiting, on standard error."""
    print(line, file=sys.stderr, flush=True)


def row(
    *,
    suite: str,
    shape: dict[str, Any],
    load: str | None,
    dispatch: str | None,
    passes: str,
    dtype: str,
    times: Times,
    flops: float,
    dense: Times | None = None,
    program: Program | None = None,
    in_turns: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """One row of ``results``.

    Args:
      suite: the suite that measured it.
      shape: axes and their sizes, and the shape's ``name``.
      load: how the tokens fall on the experts.
      dispatch: the dispatcher; ``dense`` for the dense layer.
      passes: ``forward``, ``forward_backward`` or ``train_step``; under ``pass`` in the row.
      dtype: compute type.
      times: its times.
      flops: useful FLOPs of a call.
      dense: the dense layer's times. ``ratio_to_dense`` is the ratio of the two medians,
        ``ratio_to_dense_by_round`` the median of the ratios within a round.
      program: what was run.
      in_turns: whether this and the dense layer were measured in turns, round by round.
      more: further keys.
    """
    ratio = times.median / dense.median if dense else None
    by_round = times.ratio_by_round(dense) if dense and in_turns else None
    return {
        "suite": suite,
        "shape": shape,
        "load": load,
        "dispatch": dispatch,
        "pass": passes,
        "dtype": dtype,
        "ms": times.to_dict(),
        "rounds": len(times.rounds),
        "flops_per_s": flops / (times.median / 1e3),
        "ratio_to_dense": ratio,
        "ratio_to_dense_by_round": by_round,
        "in_turns": in_turns,
        "temp_bytes": program.temp_bytes if program else None,
        "output_bytes": program.output_bytes if program else None,
        "compile_seconds": program.compile_seconds if program else None,
        **more,
    }
