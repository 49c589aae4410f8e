"""What a compiled program sends between devices: read off its HLO text.

Each collective has its kind, the mesh axes that it runs over, how often it runs in one call of the
program, and its bytes on one device. A loop's body counts as often as the loop is known to run; of
a loop whose length is decided while it runs (further rounds of an exchange) one pass is counted,
and said to be one. Of a conditional every branch counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """Like instructions of a program, together.

    Attributes:
      kind: one of ``KINDS``.
      axes: mesh axes whose devices talk, in the mesh's order.
      shape: of the result on one device; of the first array where several travel together.
      count: how often it runs in one call of the program.
      bytes: of the larger of its operand and its result on one device, all runs together.
      open_loop: it stands in a loop of unknown length, of which one pass is counted.
      where: the operation that it came from, as the program names it.
    """

    kind: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    count: int
    bytes: float
    open_loop: bool = False
    where: str = ""

    @property
    def elements(self) -> int:
        """Values in the result."""
        return math.prod(self.shape)


def collectives_of(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program, those of one kind, place and shape together, largest first.

    Args:
      text: ``compiled.as_text()``.
      sizes: the mesh's axes in order, with their sizes; partition i is its i-th device.
    """
    program = _Program(text)
    found: dict[tuple, list[float]] = {}
    for owner, line in program.collectives:
        times, is_open = program.runs(owner)
        kind, shapes = _kind_and_shapes(line)
        axes, members = _axes_of(line, tuple(sizes.items()))
        if members < 2 or not times:
            continue
        size = sum(_bytes(*shape) for shape in shapes)
        if kind == "reduce-scatter":
            size *= members
        name = _NAME.search(line)
        key = kind, axes, shapes[0][1], is_open, name[1] if name else ""
        total = found.setdefault(key, [0, 0.0])
        total[0] += times
        total[1] += times * size
    every = [
        Collective(kind, axes, shape, int(count), size, is_open, where)
        for (kind, axes, shape, is_open, where), (count, size) in found.items()
    ]
    return sorted(every, key=lambda one: -one.bytes)


def collectives_on(text: str, mesh: Mesh) -> list[Collective]:
    """As ``collectives_of``, on a mesh."""
    return collectives_of(text, dict(mesh.shape))


def summed(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """JSON-ready sums by kind and axes, most bytes first; ``open_loop`` where a pass is counted."""
    totals: dict[tuple, list[float]] = {}
    for one in found:
        total = totals.setdefault((one.kind, one.axes, one.open_loop), [0, 0.0])
        total[0] += one.count
        total[1] += one.bytes
    rows = [
        {"kind": kind, "axes": list(axes), "count": int(count), "bytes": size}
        | ({"open_loop": True} if is_open else {})
        for (kind, axes, is_open), (count, size) in totals.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"?(\d+)')
_KIND = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_NAME = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
# In the order of how often they stand in a program.
_MARKS = ("calls=", "to_apply=", "body=", "branch_computations=", "true_computation=")


class _Program:
    """The computations of a program, who calls them, and the collectives in them."""

    def __init__(self, text: str):
        self.collectives: list[tuple[str, str]] = []
        # By called computation: (caller, times in one run of it, whether that is known).
        self._callers: dict[str, list[tuple[str, int, bool]]] = {}
        self._entry = owner = ""
        for line in text.splitlines():
            if line.endswith("{") and (header := _HEADER.match(line)):
                owner = header[1]
                self._entry = owner if line.startswith("ENTRY") else self._entry
                continue
            if _KIND.search(line):
                self.collectives.append((owner, line))
            if any(mark in line for mark in _MARKS):
                self._note_calls(owner, line)
        self.runs = functools.cache(self._runs)

    def _note_calls(self, owner: str, line: str) -> None:
        trips = _TRIPS.search(line)
        for how, callee in _CALLS.findall(line):
            loop = how in ("body", "condition")
            times = int(trips[1]) if loop and trips else 1
            call = owner, times, trips is not None or not loop
            self._callers.setdefault(callee, []).append(call)
        if branches := _BRANCHES.search(line):
            for callee in branches[1].split(","):
                name = callee.strip().lstrip("%")
                self._callers.setdefault(name, []).append((owner, 1, True))

    def _runs(self, name: str) -> tuple[int, bool]:
        """How often a computation runs, and whether some loop around it is of unknown length."""
        if name == self._entry:
            return 1, False
        total, is_open = 0, False
        for caller, times, known in self._callers.get(name, ()):
            around, open_around = self.runs(caller)
            total += times * around
            is_open |= open_around or not known
        return total, is_open


def _kind_and_shapes(line: str) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    """The kind, and types and shapes of what arrives."""
    match = _KIND.search(line)
    assert match is not None
    result = line[: match.start()].split(" = ", 1)[1]
    shapes = [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", result))
    ]
    if match[2] and match[1] == "collective-permute":
        shapes = shapes[1:2]  # operand, result, and what the device needs to wait
    elif match[2] and match[1] != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]  # operands before results
    return match[1], shapes


def _bytes(kind: str, shape: tuple[int, ...]) -> float:
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return math.prod(shape) * bits / 8


_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"
_GROUPS = re.compile(rf"replica_groups={_IOTA}")
_LISTS = re.compile(r"replica_groups=\{(\{.*?\})\}")
_NAMED = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}")


def _axes_of(line: str, sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the members of a group differ, and how many members it has."""
    if pairs := _PAIRS.search(line):
        ends = np.array([[int(n) for n in re.findall(r"\d+", p)] for p in pairs[1].split("},")])
        ends = ends[ends[:, 0] != ends[:, 1]]
        return _differing(ends, sizes), 2 if len(ends) else 1
    text = line[line.find("replica_groups=") :] if "replica_groups=" in line else ""
    if named := _NAMED.match(text):
        return _of_groups(named[0], sizes)
    if iota := _GROUPS.match(text):
        return _of_groups(iota[0], sizes)
    if lists := _LISTS.match(text):
        return _of_groups(lists[0], sizes)
    # None, or empty: everybody.
    names = tuple(name for name, size in sizes if size > 1)
    return names, math.prod(size for _, size in sizes)


@functools.lru_cache(4096)
def _of_groups(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    if named := _NAMED.match(text):
        groups = _named_groups(*named.groups())
    elif iota := _GROUPS.match(text):
        groups = _iota(*iota.groups())
    else:
        rows = _LISTS.match(text)[1].split("},")
        groups = np.array([[int(n) for n in re.findall(r"\d+", row)] for row in rows[:64]])
    return _differing(groups, sizes), groups.shape[1]


def _iota(shape: str, source: str | None, turn: str | None) -> np.ndarray:
    """The devices that ``[4,2]<=[2,4]T(1,0)`` lists."""
    numbers = lambda text: [int(n) for n in text.split(",")]
    dims = numbers(source or shape)
    ids = np.arange(math.prod(dims)).reshape(dims)
    if turn:
        ids = ids.transpose(numbers(turn))
    return ids.reshape(numbers(shape))


def _named_groups(
    axes: str, shape: str | None, source: str | None, turn: str | None, chosen: str
) -> np.ndarray:
    """The groups of ``mesh['a'=2,'b'=4] {'a'}``: a mesh of the program's own, and axes of it.

    An axis may be a part of one: ``'a':(2)4`` are the 4 parts that come after a factor of 2.
    """
    own = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)]
    picked = {
        name: (before, size)
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    dims, inside = [], []
    for name, size in own:
        before, part = picked.get(name, ("", ""))
        factors = [int(before), int(part)] if part else [1, size if name in picked else 1]
        factors.append(size // math.prod(factors))
        inside.append(len(dims) + 1)
        dims += factors
    count = math.prod(dims)
    ids = np.arange(count) if shape is None else _iota(shape, source, turn).reshape(-1)
    ids = ids.reshape(dims)
    outside = [i for i in range(len(dims)) if i not in inside]
    members = math.prod(dims[i] for i in inside)
    return ids.transpose(outside + inside).reshape(-1, members)


def _differing(groups: np.ndarray, sizes: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Mesh axes along which the devices of any group differ."""
    names, dims = [name for name, _ in sizes], [size for _, size in sizes]
    places = np.stack(np.unravel_index(groups, dims))
    differ = np.any(places != places[:, :, :1], axis=(1, 2))
    return tuple(name for name, one in zip(names, differ, strict=True) if one)
