"""A mesh for so many devices of a chip on which a model's training fits, and what to change if not.

The rule, in this order: as little of ``tensor`` as fits, since it talks in every product; experts
over as many devices as share the chip's fast link, so that tokens stay on it, then over more; the
smallest ``fsdp`` that fits; copies of the model (``data``) for the rest. Each device has one row at
a time, and a step at most 16M tokens. The loss in chunks costs nothing and comes first where memory
is short; rematerialisation costs FLOPs and comes before ``tensor``.
"""

import dataclasses
import itertools
from typing import Any

from moejax.config import check
from moejax.cost import hardware as chips
from moejax.cost.memory import ADAM_BYTES, Layout, memory_parts, usable_bytes
from moejax.models.model_config import ModelConfig
from moejax.parallel.mesh import cuts

LOSS_CHUNK = 512
# Of a step: the largest batch of Llama-3.1-405B (arXiv 2407.21783, section 3.4).
MOST_TOKENS = 2**24
MOST_DEVICES = 2**20
MUON_BYTES = 4  # one FP32 moment of a matrix


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A layout, and the model with what has to change for it.

    Attributes:
      layout: the mesh.
      model: the model's config, with ``changes``.
      changes: fields of a config and their new values; empty where it fits as it is.
      memory: bytes on one device, with one row of ``seq_len``.
      fits: whether that fits; None where the device's memory is not known.
      devices_needed: the fewest doublings of the devices on which it fits; None where it fits, or
        on none.
    """

    layout: Layout
    model: ModelConfig
    changes: dict[str, Any]
    memory: float
    fits: bool | None
    devices_needed: int | None = None


def suggest(
    model: ModelConfig,
    *,
    hardware: str,
    devices: int,
    seq_len: int,
    optimizer_bytes: float = ADAM_BYTES,
) -> Suggestion:
    """The layout by the rule of this module, or the one that comes closest where nothing fits.

    Args:
      model: the model's config.
      hardware: a chip's name.
      devices: how many.
      seq_len: positions of a row.
      optimizer_bytes: bytes of optimizer state for each parameter.

    Raises:
      ConfigError: no such chip, or devices that are not above zero.
    """
    check(devices > 0, "--devices", devices, "must be above zero")
    limit = usable_bytes(hardware)
    options = {"hardware": hardware, "seq_len": seq_len, "optimizer_bytes": optimizer_bytes}
    if limit is None:
        return _sized(model, Layout(), {}, None, options)
    found = _first_that_fits(model, devices, limit, options)
    if found.fits:
        return found
    more = devices
    while more < MOST_DEVICES:
        more *= 2
        if _first_that_fits(model, more, limit, options).fits:
            return dataclasses.replace(found, devices_needed=more)
    return found


def remedies(
    model: ModelConfig,
    *,
    hardware: str,
    layout: Layout,
    rows: int,
    seq_len: int,
    micro_batches: int,
    optimizer_bytes: float = ADAM_BYTES,
) -> list[dict[str, Any]]:
    """Changes to a config whose training does not fit, each tried by itself.

    Args:
      model: the model's config.
      hardware: a chip's name.
      layout: the config's own mesh.
      rows: of a micro-batch on one device.
      seq_len: positions of a row.
      micro_batches: parts of a step.
      optimizer_bytes: bytes of optimizer state for each parameter.

    Returns:
      ``change`` (flags of ``moejax``), ``devices``, ``memory_bytes_per_device`` and ``fits``: those
      that fit alone, or else all of them and then several together, up to the first that fits.
    """
    limit = usable_bytes(hardware)
    fixed = {"hardware": hardware, "seq_len": seq_len}
    start = {
        "model": model, "layout": layout, "rows": rows, "micro_batches": micro_batches,
        "optimizer_bytes": optimizer_bytes,
    }  # fmt: skip

    def tried(*changes: Change) -> dict[str, Any]:
        memory = _memory(**start | {k: v for c in changes for k, v in c.values.items()}, **fixed)
        return {
            "change": " ".join(c.flags for c in changes),
            "devices": max(c.values.get("layout", layout).devices for c in changes),
            "memory_bytes_per_device": memory,
            "fits": limit is None or memory <= limit,
        }

    groups = _changes(model, layout, rows, micro_batches)
    results = [tried(change) for group in groups for change in group]
    if any(result["fits"] for result in results):
        return [result for result in results if result["fits"]]
    # The strongest of each kind, one after another, and then more devices. Not another optimizer,
    # which would be another training.
    free = [group[-1] for group in groups[:3] if group]
    after = {"rows": rows, "micro_batches": micro_batches}
    after |= {k: v for c in free for k, v in c.values.items() if k in after}
    wider = _changes(model, layout, **after)[3]
    for changes in [free[: i + 1] for i in range(1, len(free))] + [[*free, c] for c in wider]:
        results.append(tried(*changes))
        if results[-1]["fits"]:
            break
    return results


@dataclasses.dataclass(frozen=True)
class Change:
    """Flags of the command line, and the arguments of ``_memory`` that they change."""

    flags: str
    values: dict[str, Any]


def _changes(
    model: ModelConfig, layout: Layout, rows: int, micro_batches: int
) -> list[list[Change]]:
    """Changes by kind, in the order of what they cost a run; the strongest of a kind last."""
    chunk = f"--config.model.loss_chunk={LOSS_CHUNK}"
    chunks = [] if model.loss_chunk else [Change(chunk, {"loss_chunk": LOSS_CHUNK})]
    parts = [
        Change(
            f"--config.train.micro_batches={micro_batches * n}",
            {"rows": rows // n, "micro_batches": micro_batches * n},
        )
        for n in sorted({2, rows})
        if n > 1 and rows % n == 0
    ]
    remats = [Change(f"--config.model.remat={name}", {"remat": name}) for name in _saving(model)]
    wider = [_wider(layout, rows, micro_batches, times) for times in (2, 4, 8, 16)]
    wider = [c for c in wider if _divides(model, "fsdp", c.values["layout"].fsdp)]
    muon = Change("--config.optim.optimizer=muon", {"optimizer_bytes": MUON_BYTES})
    return [chunks, parts, remats, wider, [muon]]


def _wider(layout: Layout, rows: int, micro_batches: int, times: int) -> Change:
    """Parameters cut into more parts: over the copies' devices, or else over more devices.

    More devices share the same batch, or a larger one where it cannot be cut further.
    """
    fsdp = layout.fsdp * times
    if layout.data % times == 0:
        cut = dataclasses.replace(layout, fsdp=fsdp, data=layout.data // times)
        flags = f"--config.mesh.fsdp={fsdp} --config.mesh.data={cut.data}"
        return Change(flags, {"layout": cut})
    values = {"layout": dataclasses.replace(layout, fsdp=fsdp)}
    flags = f"--config.mesh.fsdp={fsdp}"
    if rows % times == 0:
        values["rows"] = rows // times
    elif micro_batches % times == 0:
        values["micro_batches"] = micro_batches // times
        flags += f" --config.train.micro_batches={micro_batches // times}"
    else:
        flags += f" --config.train.batch_size={rows * micro_batches * layout.rows * times}"
    return Change(flags, values)


def _saving(model: ModelConfig) -> tuple[str, ...]:
    """Values of ``remat`` that save more than the model's own."""
    names = ("none", "dots", "full")
    return names[names.index(model.remat) + 1 :]


def _first_that_fits(
    model: ModelConfig, devices: int, limit: float, options: dict[str, Any]
) -> Suggestion:
    smallest = None
    tensors = _tensors(model, devices, options)
    for tensor, changes in itertools.product(tensors, _variants(model)):
        changed = dataclasses.replace(model, **changes)
        for expert in _experts(model, devices // tensor, options["hardware"]):
            rest = devices // tensor // expert
            for fsdp in _divisors(rest):
                if not _divides(model, "fsdp", fsdp):
                    continue
                layout = Layout(rest // fsdp, fsdp, expert, tensor)
                named = {f"model.{name}": value for name, value in changes.items()}
                found = _sized(changed, layout, named, limit, options)
                if found.fits:
                    return found
                if smallest is None or found.memory < smallest.memory:
                    smallest = found
    return smallest


def _sized(model, layout, changes, limit, options) -> Suggestion:
    memory = _memory(model, layout, 1, 1, **options)
    return Suggestion(layout, model, changes, memory, None if limit is None else memory <= limit)


def _memory(
    model, layout, rows, micro_batches, hardware, seq_len, optimizer_bytes, **changes
) -> float:
    parts = memory_parts(
        dataclasses.replace(model, **changes), hardware=hardware, layout=layout,
        tokens=rows * seq_len, seq_len=seq_len, micro_batches=micro_batches,
        optimizer_bytes=optimizer_bytes,
    )  # fmt: skip
    return sum(parts.values())


def _variants(model: ModelConfig) -> list[dict[str, Any]]:
    """Changes to the model's options, from none to the ones that save the most."""
    chunk = {} if model.loss_chunk else {"loss_chunk": LOSS_CHUNK}
    found = [{}, *([chunk] if chunk else [])]
    return found + [chunk | {"remat": name} for name in _saving(model)]


def _tensors(model: ModelConfig, devices: int, options: dict[str, Any]) -> list[int]:
    """Sizes of ``tensor`` within the fast link that leave few enough rows, smallest first."""
    most = _joined(options["hardware"])
    sizes = [n for n in _divisors(devices) if n <= most and _divides(model, "tensor", n)]
    few = [n for n in sizes if devices // n * options["seq_len"] <= MOST_TOKENS]
    return few or sizes[-1:]


def _experts(model: ModelConfig, devices: int, hardware: str) -> list[int]:
    """Sizes of ``expert``: the largest within the fast link, then larger ones, then smaller."""
    if not model.layers("moe"):
        return [1]
    most = _joined(hardware)
    sizes = [n for n in _divisors(devices) if _divides(model, "expert", n)]
    inside = max(n for n in sizes if n <= most)
    larger = [n for n in sizes if n > inside]
    return [inside, *larger, *reversed([n for n in sizes if n < inside])]


def _joined(hardware: str) -> int:
    """Devices that the chip's fast link joins."""
    link = chips.lookup(hardware).scale_up
    return 1 if link is None or link.devices is None else link.devices


def _divides(model: ModelConfig, axis: str, size: int) -> bool:
    return all(value % size == 0 for name, _, value in cuts(model) if name == axis)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
