"""Ledger files line by line, for the tests of the bill."""

import json
import pathlib


def header(segment="s1", **changes):
    """An ``open`` line: 2 devices at $1.8 an hour, peak 1e11 FLOP/s together, another host."""
    return {
        "segment": segment, "event": "open", "version": 1, "time": "2025-01-01T00:00:00Z",
        "run_id": "r", "stage": "pretrain", "hardware": "cpu", "devices": 2,
        "price": {"dollars_per_hour": 1.8, "source": "a test", "date": "2025"},
        "peak_flops": 1e11, "final": False, "region": "world", "host": "elsewhere", "pid": 1,
        "process_start": 0.0,
    } | changes  # fmt: skip


def charge(train, segment="s1", tokens=10, flops=1e10, **changes):
    """A ``charge`` line of so many seconds of training."""
    return {
        "segment": segment, "event": "charge", "seconds": {"train": train}, "tokens": tokens,
        "model_flops": flops, "steps": 1,
    } | changes  # fmt: skip


def done(train, status="completed", **changes):
    """A ``close`` line."""
    return charge(train, event="close", status=status, **changes)


def plan(**changes):
    """A plan of 1,000 tokens in 36 s: 9e11 FLOP at 25 % of 1e11 FLOP/s, 0.02 device-hours."""
    return {
        "tokens": 1000, "train_flops": 9e11, "mfu": 0.25, "mfu_source": "default",
        "peak_flops": 1e11, "peak_source": "measured", "hardware": "cpu", "devices": 2,
        "device_hours": 0.02, "wall_days": 36 / 86400,
        "price": {"dollars_per_hour": 1.8, "source": "a test", "date": "2025"},
        "dollars": {"rental": 0.036, "owned": None}, "energy_kwh": None, "co2_kg": None,
        "range": {"dollars": {"low": 0.03, "high": 0.04}},
    } | changes  # fmt: skip


def write(folder: pathlib.Path, *lines) -> pathlib.Path:
    """A run directory whose ledger has these lines, dictionaries or bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    data = b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    (folder / "ledger.jsonl").write_bytes(data + b"\n")
    return folder
