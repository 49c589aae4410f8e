"""A mesh for so many devices of a chip on which a model's training fits, and what to change if not.

The rule, in this order: as little of ``tensor`` as fits, since it talks in every product; experts
over as many devices as share the chip's fast link, so that tokens stay on it, then over more; the
smallest ``fsdp`` that fits; copies of the model (``data``) for the rest. Each device has one row at
a time, and a step at most 16M tokens. The loss in chunks costs nothing and comes first where memory
is short; rematerialisation costs FLOPs and comes before ``tensor``. Last comes ``context``, as
little as fits: only where a single row is too much for a device with all of these does its length
have to be cut.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from moejax.config import check
from moejax.cost import counts
from moejax.cost import hardware as chips
from moejax.cost.memory import ADAM_BYTES, Layout, Placement, memory_parts, usable_bytes
from moejax.models.model_config import ModelConfig
from moejax.parallel.mesh import cuts

LOSS_CHUNK = 512
# Of a step: the largest batch of Llama-3.1-405B (arXiv 2407.21783, section 3.4).
MOST_TOKENS = 2**24
MOST_DEVICES = 2**20
# Parts of a row: beyond these what each device gathers of the others' keys outgrows its own tokens.
MOST_CONTEXT = 64
BF16_MOMENTS = 4  # bytes of AdamW's two in bfloat16


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``suggested_layout`` in ``moejax plan --format=json``."""
        return {
            **dataclasses.asdict(self.layout),
            "changes": self.changes,
            "memory_bytes_per_device": self.memory,
            "fits": self.fits,
            "devices_needed": self.devices_needed,
        }


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
    task = _Task(hardware, seq_len, Placement(optimizer_bytes=optimizer_bytes))
    if usable_bytes(hardware) is None:
        return task.sized(model, Layout(), {})
    found = _first_that_fits(model, devices, task)
    if found.fits:
        return found
    more = devices
    while more < MOST_DEVICES:
        more *= 2
        if _first_that_fits(model, more, task).fits:
            return dataclasses.replace(found, devices_needed=more)
    return found


def placed(hardware: str, seq_len: int) -> Callable[[ModelConfig, int], Placement]:
    """What a device has of a model's step on so many devices, by the suggested layout."""

    def place(model: ModelConfig, devices: int) -> Placement:
        found = suggest(model, hardware=hardware, devices=devices, seq_len=seq_len)
        return Placement(found.layout)

    return place


def remedies(
    model: ModelConfig, *, hardware: str, seq_len: int, placement: Placement
) -> list[dict[str, Any]]:
    """Changes to a config whose training does not fit.

    Args:
      model: the model's config.
      hardware: a chip's name.
      seq_len: positions of a row.
      placement: what a device has of a step by the config's own mesh and batch.

    Returns:
      ``change`` (flags of ``moejax``), ``devices``, ``memory_bytes_per_device`` and ``fits``: those
      that fit alone, or else all of them and then several together, up to the first that fits.
    """
    start, task = Change("", model, placement), _Task(hardware, seq_len, placement)
    groups = _changes(start)
    results = [task.tried(change) for group in groups for change in group]
    if any(result["fits"] for result in results):
        return [result for result in results if result["fits"]]
    # The strongest of each kind, one after another, and then more devices; moments in bfloat16 by
    # themselves only, since they change the training.
    together = start
    for kind in range(3):
        group = _changes(together)[kind]
        together = group[-1] if group else together
        results.append(task.tried(together))
        if results[-1]["fits"]:
            return results
    for change in _changes(together)[3]:
        results.append(task.tried(change))
        if results[-1]["fits"]:
            break
    return results


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is to fit: where, in which rows, and with what else beside the layout."""

    hardware: str
    seq_len: int
    placement: Placement

    def memory(self, model: ModelConfig, placement: Placement) -> float:
        parts = memory_parts(
            model, hardware=self.hardware, seq_len=self.seq_len, placement=placement
        )
        return sum(parts.values())

    def sized(self, model: ModelConfig, layout: Layout, changes: dict[str, Any]) -> Suggestion:
        limit = usable_bytes(self.hardware)
        memory = self.memory(model, dataclasses.replace(self.placement, layout=layout))
        fits = None if limit is None else memory <= limit
        return Suggestion(layout, model, changes, memory, fits)

    def tried(self, change: "Change") -> dict[str, Any]:
        limit = usable_bytes(self.hardware)
        memory = self.memory(change.model, change.placement)
        return {
            "change": change.flags,
            "devices": change.placement.layout.devices,
            "memory_bytes_per_device": memory,
            "fits": limit is None or memory <= limit,
        }


@dataclasses.dataclass(frozen=True)
class Change:
    """Flags of the command line, and the model and placement with them."""

    flags: str
    model: ModelConfig
    placement: Placement

    def with_flags(
        self, flags: str, model: dict[str, Any] | None = None, **placement: Any
    ) -> "Change":  # fmt: skip
        """This change and a further one."""
        return Change(
            f"{self.flags} {flags}".strip(),
            dataclasses.replace(self.model, **(model or {})),
            dataclasses.replace(self.placement, **placement),
        )


def _changes(start: Change) -> list[list[Change]]:
    """Further changes by kind, in the order of what they cost a run; the strongest of a kind last.

    Kinds: the loss in chunks, more micro-batches, rematerialisation, more of ``fsdp``, moments.
    """
    model, rows, parts = start.model, start.placement.rows, start.placement.micro_batches
    chunk = start.with_flags(f"--config.model.loss_chunk={LOSS_CHUNK}", {"loss_chunk": LOSS_CHUNK})
    batches = [
        start.with_flags(
            f"--config.train.micro_batches={parts * n}", rows=rows // n, micro_batches=parts * n
        )
        for n in sorted({2, rows})
        if n > 1 and rows % n == 0
    ]
    remats = [
        start.with_flags(f"--config.model.remat={name}", {"remat": name}) for name in _saving(model)
    ]
    wider = [_wider(start, times) for times in (2, 4, 8, 16)]
    wider = [c for c in wider if _divides(model, "fsdp", c.placement.layout.fsdp)]
    moments = start.with_flags(
        "--config.optim.moments_dtype=bfloat16", optimizer_bytes=BF16_MOMENTS
    )
    lighter = [moments] if start.placement.optimizer_bytes > BF16_MOMENTS else []
    return [[] if model.loss_chunk else [chunk], batches, remats, wider, lighter]


def _wider(start: Change, times: int) -> Change:
    """Parameters cut into more parts: over the copies' devices, or else over more devices.

    More devices share the same batch, or a larger one where it cannot be cut further.
    """
    before = start.placement
    layout, rows, parts = before.layout, before.rows, before.micro_batches
    flags = f"--config.mesh.fsdp={layout.fsdp * times}"
    wide = dataclasses.replace(layout, fsdp=layout.fsdp * times)
    if layout.data % times == 0:
        wide = dataclasses.replace(wide, data=layout.data // times)
        return start.with_flags(f"{flags} --config.mesh.data={wide.data}", layout=wide)
    if rows % times == 0:
        return start.with_flags(flags, layout=wide, rows=rows // times)
    if parts % times == 0:
        more = f"{flags} --config.train.micro_batches={parts // times}"
        return start.with_flags(more, layout=wide, micro_batches=parts // times)
    more = f"{flags} --config.train.batch_size={rows * parts * layout.rows * times}"
    return start.with_flags(more, layout=wide)


def _saving(model: ModelConfig) -> tuple[str, ...]:
    """Values of ``remat`` that save more than the model's own."""
    names = ("none", "dots", "full")
    return names[names.index(model.remat) + 1 :]


def _first_that_fits(model: ModelConfig, devices: int, task: _Task) -> Suggestion:
    smallest = None
    for context in _contexts(model, devices, task):
        found = _first_with(model, devices, context, task)
        if found.fits:
            return found
        if smallest is None or found.memory < smallest.memory:
            smallest = found
    assert smallest is not None  # rows that are not cut are always a layout
    return smallest


def _first_with(model: ModelConfig, devices: int, context: int, task: _Task) -> Suggestion:
    """As ``_first_that_fits``, with rows cut into so many parts."""
    smallest = None
    tensors = _tensors(model, devices // context, task)
    for tensor, changes in itertools.product(tensors, _variants(model)):
        changed = dataclasses.replace(model, **changes)
        named = {f"model.{name}": value for name, value in changes.items()}
        for expert in _experts(model, devices // context // tensor, task.hardware):
            rest = devices // context // tensor // expert
            for fsdp in _divisors(rest):
                if not _divides(model, "fsdp", fsdp):
                    continue
                layout = Layout(rest // fsdp, fsdp, expert, context, tensor)
                found = task.sized(changed, layout, named)
                if found.fits:
                    return found
                if smallest is None or found.memory < smallest.memory:
                    smallest = found
    assert smallest is not None  # one device each is always a layout
    return smallest


def _contexts(model: ModelConfig, devices: int, task: _Task) -> list[int]:
    """Parts that rows can be cut into, fewest first, and always one.

    Devices along ``context`` hold the same parameters: more of them than leave room for these,
    everything else cut, are of no use.
    """
    params, limit = counts.count(model, 1).params, usable_bytes(task.hardware)
    each = 8 + task.placement.optimizer_bytes  # parameters and gradients, float32
    state = (params.total + params.mtp) * each
    sizes = [n for n in _divisors(devices) if n <= MOST_CONTEXT and task.seq_len % n == 0]
    return [n for n in sizes if n == 1 or state * n / devices <= limit]


def _variants(model: ModelConfig) -> list[dict[str, Any]]:
    """Changes to the model's options, from none to the ones that save the most."""
    chunk = {} if model.loss_chunk else {"loss_chunk": LOSS_CHUNK}
    found = [{}, *([chunk] if chunk else [])]
    return found + [chunk | {"remat": name} for name in _saving(model)]


def _tensors(model: ModelConfig, devices: int, task: _Task) -> list[int]:
    """Sizes of ``tensor`` within the fast link that leave few enough rows, smallest first."""
    most = _joined(task.hardware)
    sizes = [n for n in _divisors(devices) if n <= most and _divides(model, "tensor", n)]
    few = [n for n in sizes if devices // n * task.seq_len <= MOST_TOKENS]
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
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
