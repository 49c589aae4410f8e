"""A profiler trace of a few calls, checked to be really there."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

CALLS = 3


class TraceMissing(Exception):
    """The profiler ran and left no trace."""


def write_trace(folder: pathlib.Path, calls: Mapping[str, Callable[[], Any]]) -> pathlib.Path:
    """Traces three calls of each program, which stands under its name in the trace.

    TensorBoard (its profile plug-in) and xprof read it.

    Args:
      folder: where the trace goes; it is made.
      calls: compiled programs by name.

    Returns:
      The trace's file.

    Raises:
      TraceMissing: there is no trace, or an empty one, after all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    profile = jax.profiler.ProfileOptions()
    profile.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=profile):
        for name, call in calls.items():
            for _ in range(CALLS):
                with jax.profiler.TraceAnnotation(name):
                    jax.block_until_ready(call())
    traces = [file for file in folder.rglob("*.xplane.pb") if file.stat().st_size]
    if not traces:
        raise TraceMissing(f"the profiler left no trace in {str(folder)!r}")
    return traces[0]
