"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StoppedAtOnce(KeyboardInterrupt):
    """A first signal where there is nothing to save."""


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is noted, and a second one raises.

    Attributes:
      name: the signal that came, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, object] = {}
        self._at_once = False

    def __enter__(self) -> "StopRequest":
        try:
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        except ValueError:  # only the main thread may set handlers; elsewhere nobody is asked
            self._before.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A part with nothing to save: the first signal raises StoppedAtOnce there, too."""
        self._at_once = True
        try:
            if self.name is not None:  # it came before
                raise StoppedAtOnce
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._at_once:
            raise StoppedAtOnce
