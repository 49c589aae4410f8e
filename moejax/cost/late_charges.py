"""Charges for processes of a run that were killed before their own ledgers opened."""

import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.cost import starting
from moejax.cost.segments import alive, segments

PROCESS = ("host", "boot_id", "pid", "process_ticks")


def lines(path: pathlib.Path, header: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines to append to a ledger: a segment for each such process, start-up alone.

    What a process left behind is deleted once its lines are taken, which have been written then.

    Args:
      path: the ledger.
      header: the ``open`` line of the process that opens it now, whose rate is charged.
    """
    known = {_process(part.header) for part in segments(path)}
    for file, record in starting.left_behind(path.parent):
        if alive(record):
            continue
        if _process(record) not in known:
            own = {name: record.get(name) for name in (*PROCESS, "process_start")}
            name = uuid.uuid4().hex[:12]
            yield {**header, **own, "segment": name, "energy": None}
            yield {
                "segment": name, "event": "charge", "seconds": {"startup": record["seconds"]},
                "tokens": 0, "model_flops": 0.0, "steps": 0,
            }  # fmt: skip
        file.unlink(missing_ok=True)


def _process(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in PROCESS)
