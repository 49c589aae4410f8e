"""Keeps Orbax from showing tracebacks of a failed save: the checkpointer tells of it in a line."""

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any


def quieten() -> None:
    """Drops what Orbax's and tensorstore's threads show of an error that the caller is told of.

    May be called as often as one likes.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_drop_tracebacks)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


def _drop_tracebacks(record: logging.LogRecord) -> bool:
    """A logging filter: no errors logged by Orbax, nor of its tasks that nobody waits for."""
    told_of = record.pathname
    if record.name == "asyncio":
        told_of = record.getMessage()
        if record.exc_info:
            told_of += "".join(traceback.format_exception(*record.exc_info))
    return not (record.levelno >= logging.ERROR and "orbax" in told_of)


class _WithoutClosedLoops:
    """A hook for errors that nobody can catch, without those of tensorstore's writes that end after
    Orbax gave up: the first write that failed closed the event loop that the others report to."""

    def __init__(self, before: Callable[[Any], None]):
        self._before = before

    def __call__(self, error: Any) -> None:
        closed = str(error.exc_value) == "Event loop is closed" and error.object is None
        if not (closed and isinstance(error.exc_value, RuntimeError)):
            self._before(error)
