"""Agreement between the processes of a job: what one knows is told to all, and decided alike.

With one process nothing is sent, and every function is its argument's own result. With several,
all have to call the same functions in the same order.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from moejax.config import UserError

T = TypeVar("T")


class PeerError(UserError):
    """What another process found and says; this one ends with it, silently."""


def count() -> int:
    """Processes of the job; does not wake jax's devices where there is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """This process's number."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def exchange(told: Any) -> list[Any]:
    """What every process tells, JSON-ready, in the order of their numbers."""
    if count() == 1:
        return [told]
    data = np.frombuffer(json.dumps(told).encode(), np.uint8)
    _wait_for_devices()
    sizes = multihost_utils.process_allgather(np.int32(len(data))).ravel()
    # Few different shapes, so that few programs are compiled.
    width = 1 << max(10, int(sizes.max() - 1).bit_length())
    padded = np.zeros(width, np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(np.asarray(rows), sizes, strict=True)
    ]


def agreed(work: Callable[[], T], tell: Callable[[T], Any] = lambda result: None) -> T:
    """The result of work that every process does, if it went well on all of them.

    Args:
      work: what to do; may raise UserError.
      tell: what of the result has to be the same everywhere, JSON-ready: a dictionary from what it
        is called to what it is.

    Raises:
      UserError: it went wrong somewhere, or came out differently: on process 0, with the number of
        the process if that is another one.
      PeerError: the same, on the other processes.
    """
    if count() == 1:
        return work()
    result, error, told = None, None, None
    try:
        result = work()
        told = tell(result)
    except UserError as found:
        error = str(found)
    everyone = exchange([error, told])
    for number, (theirs, _) in enumerate(everyone):
        if theirs is not None:
            _raise(theirs if number == 0 else f"process {number}: {theirs}")
    for number, (_, theirs) in enumerate(everyone):
        if theirs != everyone[0][1]:
            _raise(_difference(number, everyone[0][1], theirs))
    return result  # type: ignore[return-value]


def decide(work: Callable[[], T], error: type[Exception] = UserError) -> T:
    """What process 0 found, JSON-ready, on every process; and its error, of this class, too."""
    if count() == 1:
        return work()
    found, failed = None, None
    if index() == 0:
        try:
            found = work()
        except error as problem:
            failed = str(problem)
    found, failed = exchange([found, failed])[0]
    if failed is not None:
        raise error(failed)
    return found


def _raise(text: str) -> None:
    raise (UserError if index() == 0 else PeerError)(text)


def _difference(number: int, first: dict[str, Any], other: dict[str, Any]) -> str:
    """The first thing that two processes do not have in common, in a line."""
    name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
    ours, theirs = (json.dumps(told.get(name)) for told in (first, other))
    return (
        f"process {number} has another {name} than process 0: {theirs[:200]} and {ours[:200]}; "
        "start all processes with the same code, config, corpus and --workdir"
    )


class StopVote:
    """Whether to stop, decided by all processes after the same step.

    A signal may reach one process only, and budgets are read on process 0's clock. Votes are about
    ``SECONDS`` apart, by the slowest process's steps: each waits for the step in flight, and gloo
    takes some milliseconds.
    """

    SECONDS = 0.5
    BUDGET = 1000  # above every signal's number

    def __init__(self) -> None:
        self._calls = self._voted_at = self._vote_at = 0
        self._since = time.monotonic()
        self._why: tuple[str, str] | None = None
        if count() > 1:
            first = {device.process_index: device for device in reversed(jax.devices())}
            self._mesh = Mesh(np.array([first[i] for i in range(count())]), ("processes",))
            self._rows = NamedSharding(self._mesh, PartitionSpec("processes"))
            whole = NamedSharding(self._mesh, PartitionSpec())
            self._most = jax.jit(lambda votes: votes.max(axis=0), out_shardings=whole)

    def ask(self, own: tuple[str, str] | None) -> tuple[str, str] | None:
        """What all processes decide; every process has to ask once before each step.

        Args:
          own: status and reason, where this process would stop.

        Returns:
          Status and reason, the same status everywhere; None to go on.
        """
        if count() == 1:
            return own
        if own is not None:
            self._why = own
        self._calls += 1
        if self._calls < self._vote_at:
            return None
        code, micros = self._vote()
        if code:
            return self._decision(code)
        # As many steps as the slowest process does in the time between votes.
        self._vote_at = self._calls + min(max(int(self.SECONDS * 1e6 / max(micros, 1)), 1), 10_000)
        return None

    def _vote(self) -> tuple[int, int]:
        """The largest code of all processes, and microseconds of a step of the slowest."""
        now, passed = time.monotonic(), self._calls - self._voted_at
        micros = min((now - self._since) / passed, 1000.0) * 1e6
        self._since, self._voted_at = now, self._calls
        own = np.array([[self._code(), micros]]).astype(np.int32)
        _wait_for_devices()
        shape: tuple[int, int] = (count(), 2)
        votes: Int[Array, "P 2"] = jax.make_array_from_process_local_data(self._rows, own, shape)
        with jax.set_mesh(self._mesh):
            most = np.asarray(self._most(votes).addressable_data(0))
        return int(most[0]), int(most[1])

    def _code(self) -> int:
        if self._why is None:
            return 0
        status, reason = self._why
        if status == "budget":
            return self.BUDGET if index() == 0 else 0
        return int(getattr(signal, reason, signal.SIGTERM))

    def _decision(self, code: int) -> tuple[str, str]:
        status = "budget" if code == self.BUDGET else "interrupted"
        if self._why is not None and self._why[0] == status:
            return self._why
        name = "" if status == "budget" else signal.Signals(code).name
        return status, f"{name} at another process" if name else "the budget is spent"


def _wait_for_devices() -> None:
    """Waits until no program is in flight here.

    XLA:CPU runs programs with one device a process as they come, a step's collectives beside those
    of a vote. Where they are of the same devices, gloo has one connection for both, and processes
    that take them in different orders read one another's data.
    """
    for array in jax.live_arrays():
        # Orbax holds shards of states that have been donated since: there is nothing to wait for.
        # What failed in flight is told where its values are read.
        with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError, ValueError):
            array.block_until_ready()
