"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

import signal
from types import FrameType


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is noted, and a second one raises.

    Attributes:
      name: the signal that came, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, object] = {}

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

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
