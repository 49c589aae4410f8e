"""Choices of mesh axes that waste memory or bandwidth, from what the compiled program sends."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from moejax.moe.exchange import BATCH_AXES, CONTEXT_AXIS
from moejax.parallel.collectives import Collective

# Below these a choice costs too little to speak of.
FEW_BYTES = 64 * 2**20  # of memory on a device
FEW_SENT = 4 * 2**20  # sent in a step
SENT_SHARE = 0.1  # of all bytes of a step: below it GSPMD's own choices for small batches lie


@dataclasses.dataclass(frozen=True)
class Parameter:
    """How one leaf of the parameters lies on the mesh.

    Attributes:
      name: its path.
      shape: of the whole leaf.
      item: bytes of a value.
      axes: mesh axes that cut each of its axes.
    """

    name: str
    shape: tuple[int, ...]
    item: int
    axes: tuple[tuple[str, ...], ...]

    @property
    def cut_over(self) -> set[str]:
        """All mesh axes that cut it."""
        return {name for names in self.axes for name in names}

    def sizes(self, sizes: Mapping[str, int], gathered: Sequence[str] = ()) -> tuple[int, ...]:
        """Its sizes on a device, those axes of the mesh gathered."""
        left = lambda names: math.prod(sizes[n] for n in names if n not in gathered)
        return tuple(n // left(names) for n, names in zip(self.shape, self.axes, strict=True))


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a step works on.

    Attributes:
      mesh: sizes of its axes.
      parameters: all leaves.
      state_bytes: bytes of parameters and optimizer state for a byte of the parameters.
      tokens: of a micro-batch, all devices together.
      local_tokens: those on one device.
      d_model_parts: parts that every width cut over ``fsdp`` can be cut into.
      experts: whether the model has any.
    """

    mesh: Mapping[str, int]
    parameters: tuple[Parameter, ...]
    state_bytes: float
    tokens: int
    local_tokens: int
    d_model_parts: int
    experts: bool


def facts_of(
    state: Any, rows: jax.ShapeDtypeStruct, mesh: Mesh, *, fsdp_cuts: Sequence[int]
) -> Facts:
    """The facts, from the shapes and shardings of a step's arguments.

    Args:
      state: a ``TrainState`` of shapes with shardings.
      rows: token ids, (micro-batches, B, S).
      mesh: the mesh.
      fsdp_cuts: sizes that ``fsdp`` has to divide.
    """
    leaves = jax.tree.leaves_with_path(state.params)
    parameters = tuple(_parameter(path, leaf) for path, leaf in leaves)
    held = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    params = held(state.params)
    assert isinstance(rows.sharding, NamedSharding)
    return Facts(
        mesh=dict(mesh.shape),
        parameters=parameters,
        state_bytes=(params + held(state.opt_state)) / params,
        tokens=math.prod(rows.shape[1:]),
        local_tokens=math.prod(rows.sharding.shard_shape(rows.shape)[1:]),
        d_model_parts=math.gcd(*fsdp_cuts),
        experts=any("/experts/" in parameter.name for parameter in parameters),
    )


def _parameter(path, leaf) -> Parameter:
    spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
    axes = tuple(() if n is None else (n,) if isinstance(n, str) else tuple(n) for n in spec)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return Parameter(name, leaf.shape, leaf.dtype.itemsize, axes)


def axis_warnings(found: Sequence[Collective], facts: Facts) -> list[str]:
    """Each wasteful choice in one line: what it costs, and which setting costs less.

    Args:
      found: the collectives of a training step, from ``collectives_of``.
      facts: what the step works on.
    """
    rules = (_weights_over_expert, _copies, _dense_over_expert, _tokens_gathered, _not_spread)
    return [line for rule in rules for line in rule(found, facts)]


def gathered_parameter(one: Collective, facts: Facts) -> Parameter | None:
    """The parameter that an all-gather puts together over all its axes; None for none.

    By its sizes, whatever their order, of one layer of a stacked leaf or of them all.
    """
    if one.kind != "all-gather":
        return None
    wanted = _sizes(one.shape)
    for leaf in facts.parameters:
        if not set(one.axes) <= leaf.cut_over:
            continue
        # An axis may be gathered after another.
        for gathered in (one.axes, list(leaf.cut_over - {"tensor"}), list(leaf.cut_over)):
            sizes = leaf.sizes(facts.mesh, gathered)
            if wanted in (_sizes(sizes), _sizes(sizes[1:])):
                return leaf
    return None


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def _matters(size: float, found: Sequence[Collective]) -> bool:
    return size >= max(FEW_SENT, SENT_SHARE * sum(one.bytes for one in found))


def _weights_over_expert(found: Sequence[Collective], facts: Facts) -> Iterator[str]:
    """An expert axis that replicates: every step gathers the experts' weights over it."""
    size, count = 0.0, 0
    for one in found:
        if "expert" not in one.axes:
            continue
        leaf = gathered_parameter(one, facts)
        if leaf is not None and "/experts/" in leaf.name:
            size, count = size + one.bytes, count + one.count
    if count and _matters(size, found):
        number = facts.mesh["expert"]
        yield (
            f"the experts' weights are gathered over mesh.expert = {number}: {count} times and "
            f"{_size(size)} a step on every device, each of which computes all experts; "
            "moe.exchange='auto' sends tokens to the experts instead, or give the devices to "
            "mesh.fsdp"
        )


def _copies(found: Sequence[Collective], facts: Facts) -> Iterator[str]:
    """Parameters and optimizer state that stand on every device along ``data``."""
    copies, fsdp = facts.mesh["data"], facts.mesh["fsdp"]
    wider = max((n for n in range(1, copies + 1) if copies % n == 0
                 and facts.d_model_parts % (fsdp * n) == 0), default=1)  # fmt: skip
    # Their gradients are added up over that axis, which says that the copies are of one model.
    reduced = any(
        one.kind in ("all-reduce", "reduce-scatter") and "data" in one.axes for one in found
    )
    local = sum(
        math.prod(leaf.sizes(facts.mesh)) * leaf.item
        for leaf in facts.parameters if "fsdp" in leaf.cut_over
    )  # fmt: skip
    saved = facts.state_bytes * local * (1 - 1 / wider)
    if copies > 1 and wider > 1 and reduced and saved >= FEW_BYTES:
        held = _size(facts.state_bytes * local)
        yield (
            f"each of mesh.data = {copies} copies holds {held} of parameters and optimizer state "
            f"on a device; mesh.fsdp={fsdp * wider} and mesh.data={copies // wider} would hold "
            f"{_size(facts.state_bytes * local / wider)}"
        )


def _dense_over_expert(found: Sequence[Collective], facts: Facts) -> Iterator[str]:
    """An expert axis without experts: nothing is cut over it but rows."""
    number = facts.mesh["expert"]
    if number > 1 and not facts.experts:
        yield (
            f"mesh.expert = {number} cuts nothing of a model without experts, and every device "
            "along it holds the same parameters; give the devices to mesh.fsdp"
        )


def _tokens_gathered(found: Sequence[Collective], facts: Facts) -> Iterator[str]:
    """What other devices have of their tokens, brought here: vectors, or scores of all experts."""
    sizes: dict[tuple, float] = collections.defaultdict(float)
    for one in found:
        over = tuple(n for n in one.axes if n in BATCH_AXES)
        if one.kind != "all-gather" or not over or gathered_parameter(one, facts) is not None:
            continue
        parts = math.prod(facts.mesh[n] for n in one.axes if n in (*BATCH_AXES, CONTEXT_AXIS))
        if one.elements >= facts.local_tokens * parts:
            sizes[over, "/".join(one.where.split("/")[-2:])] += one.bytes
    for (over, where), size in sizes.items():
        if _matters(size, found):
            yield (
                f"values of every token are gathered over {' and '.join(over)} ({where}): "
                f"{_size(size)} a step on every device; a router or a dispatch that looks at the "
                "whole batch needs them there, one that decides for each token or row does not"
            )


def _not_spread(found: Sequence[Collective], facts: Facts) -> Iterator[str]:
    """Rows that more than one device computes."""
    parts = math.prod(facts.mesh[n] for n in (*BATCH_AXES, CONTEXT_AXIS))
    times = facts.local_tokens * parts / facts.tokens
    if times > 1:
        yield (
            f"the batch is not spread over data x fsdp x expert x context = {parts}: every token "
            f"is computed {times:g} times; choose rows of a micro-batch (train.batch_size / "
            "train.micro_batches) and train.seq_len that the mesh divides"
        )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
