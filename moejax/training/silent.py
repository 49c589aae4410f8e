"""What the processes besides process 0 have in place of a progress bar and a metric writer."""

from collections.abc import Callable


class Silent:
    """Takes every call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None
