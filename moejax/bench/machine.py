"""What a measurement was made with: the machine and the versions."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax

import moejax
from moejax.config import ConfigError
from moejax.cost import hardware

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "numpy", "tokamax", "jax-triton", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12",
    "nvidia-cublas", "torch", "transformers",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """The devices that jax sees, and the host. Memory in bytes, None where it is not told."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": stats.get("bytes_limit"),
        "cpu": _processor(),
        "cores": hardware.cpu_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python, of moejax and of the packages that are installed, of those that matter
    to speed; and the code's revision where it is a checkout."""
    found = {"python": platform.python_version(), "moejax": moejax.__version__}
    revision = _revision()
    if revision:
        found["revision"] = revision
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(options: Any, record: Mapping[str, Any]) -> str:
    """What a measurement was: its options, the machine and the versions, as one SHA-256. Two
    records with one fingerprint measured the same thing; where they wrote it does not count."""
    asked = {k: v for k, v in dataclasses.asdict(options).items() if k != "output"}
    parts = [asked, record["machine"], record["versions"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def peak(devices: int) -> tuple[float | None, str]:
    """FLOP/s that so many of this machine's devices reach at most, and where that is from.

    On a CPU all of the host's cores count, as one device, and the peak is measured.

    Returns:
      FLOP/s and its source; None and the reason for a chip that is not in the table.
    """
    device = jax.local_devices()[0]
    try:
        name = hardware.detect(device.platform, device.device_kind)
    except ConfigError as error:
        return None, str(error)
    return hardware.peak_flops(name, hardware.cpu_cores() if name == "cpu" else devices)


def _processor() -> str:
    """The host's processor by name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _revision() -> str | None:
    """The checkout's revision, ``-dirty`` where it was edited; None for an installed copy."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = pathlib.Path(moejax.__file__).parent.parent
    if not (folder / ".git").exists():
        return None
    try:
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None if said.returncode == 0 else None
