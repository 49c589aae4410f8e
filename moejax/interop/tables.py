"""A family's table of tensors, and what it comes to for one model: pieces of our leaves.

Our leaves are stacked over a segment's repeats and over experts, a checkpoint's tensors mostly are
not. A table names each tensor once, with ``{e}`` for the expert's number; layers and experts are
filled in by the model's layout.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from moejax.config import UserError
from moejax.interop.tensors import SAME, Layout, Shape
from moejax.models import ModelConfig

LAYER = "model.layers.{l}."


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a tensor goes.

    Attributes:
      leaf: path of our leaf, inside its layer for a layer's tensor.
      layout: how it lies there.
      at: index into the leaf, after the axes of repeats and experts.
    """

    leaf: str
    layout: Layout = SAME
    at: tuple[int | slice, ...] = ()


GATE, UP = (slice(None), 0), (slice(None), 1)  # of a leaf (D, 2, F)


@dataclasses.dataclass(frozen=True)
class Table:
    """The tensors of a family. Rules whose leaf a model lacks are left out for it.

    Attributes:
      outer: tensors outside the layers.
      layer: tensors of a layer, named after ``model.layers.{l}.``.
      mtp: further tensors of an MTP module k, named after the layer number L + k; leaves inside
        ``mtp_k``. The module's own layer follows ``layer``.
      mtp_copies: tensors of an MTP module that repeat one outside the layers.
      copies: the same outside MTP modules, where a checkpoint has them though it need not.
    """

    outer: Mapping[str, Rule]
    layer: Mapping[str, Rule]
    mtp: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
    mtp_copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def fits(self, names: Mapping[str, Any] | set[str]) -> int:
        """How many of the names this table knows."""
        known = {(LAYER + name).replace("{l}", "#").replace("{e}", "#") for name in self.layer}
        return sum(re.sub(r"(?<=\.)\d+(?=\.)", "#", name) in known for name in names)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint as a part of one of our leaves.

    Attributes:
      name: the tensor.
      leaf: path of the leaf: ``params/...`` or ``router_state/...``.
      index: where in it; integers and whole slices.
      layout: how it lies there.
      shape: the part's shape.
    """

    name: str
    leaf: str
    index: tuple[int | slice, ...]
    layout: Layout
    shape: Shape

    @property
    def stored_shape(self) -> Shape:
        """The tensor's shape."""
        return self.layout.stored_shape(self.shape)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A model's tensors: pieces in the order of the files, and copies (name, whose)."""

    pieces: tuple[Piece, ...]
    copies: Mapping[str, str]


def leaf_shapes(variables: Any) -> dict[str, Shape]:
    """Shape of every leaf of a variables tree by its path, parts joined by ``/``."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): tuple(leaf.shape) for path, leaf in leaves}


def resolve(
    table: Table, config: ModelConfig, shapes: Mapping[str, Shape], family: str
) -> Resolved:
    """The pieces that a model's leaves are made of.

    Args:
      table: the family's.
      config: the model's.
      shapes: of its leaves, from ``leaf_shapes``.
      family: its name, for messages.

    Raises:
      UserError: a leaf that the table does not cover.
    """
    pieces = list(_outer(table, shapes))
    for number, (place, repeat) in enumerate(layers(config)):
        pieces += _layer(table, config, shapes, number, place, repeat)
    outer = {piece.name for piece in pieces}
    copies = {name: whose for name, whose in table.copies.items() if name not in outer}
    for k in range(config.mtp_depth):
        number = config.num_layers + k
        pieces += _layer(table, config, shapes, number, f"mtp_{k}_layer/layer_0", 0)
        prefix = LAYER.format(l=number)
        for name, rule in table.mtp.items():
            pieces += _pieces(prefix + name, rule, f"mtp_{k}/{rule.leaf}", (), 0, shapes)
        for name, whose in table.mtp_copies.items():
            # Where the head is tied there is only the embedding to repeat.
            copies[prefix + name] = whose if whose in outer else table.copies[whose]
    _check_cover(pieces, shapes, family)
    return Resolved(tuple(pieces), copies)


def layers(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Where each layer stands, first to last: ``segment_i/layer_j`` and its repeat's number."""
    for i, (kinds, repeats) in enumerate(config.layout):
        for repeat in range(repeats):
            for j in range(len(kinds)):
                yield f"segment_{i}/layer_{j}", repeat


def _outer(table: Table, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
    for name, rule in table.outer.items():
        yield from _pieces(name, rule, rule.leaf, (), 0, shapes)


def _layer(table, config, shapes, number, place, repeat) -> Iterator[Piece]:
    experts = config.moe.num_experts if config.moe else 0
    for name, rule in table.layer.items():
        full = LAYER.format(l=number) + name
        yield from _pieces(full, rule, f"{place}/{rule.leaf}", (repeat,), experts, shapes)


def _pieces(name, rule, path, index, experts, shapes) -> Iterator[Piece]:
    """The pieces of one rule in one layer: one, one an expert, or none where the leaf is not."""
    for collection in ("params", "router_state"):
        leaf = f"{collection}/{path}"
        if leaf not in shapes:
            continue
        each = [(name.format(e=e), (*index, e)) for e in range(experts)]
        for full, start in each if "{e}" in name else [(name, index)]:
            whole = (*start, *rule.at)
            rest = len(shapes[leaf]) - len(whole)
            whole += (slice(None),) * rest
            shape = tuple(
                size for size, at in zip(shapes[leaf], whole, strict=True) if at == slice(None)
            )
            yield Piece(full, leaf, whole, rule.layout, shape)


def _check_cover(pieces: list[Piece], shapes: Mapping[str, Shape], family: str) -> None:
    filled: dict[str, int] = {}
    for piece in pieces:
        filled[piece.leaf] = filled.get(piece.leaf, 0) + math.prod(piece.shape)
    for leaf, shape in shapes.items():
        if filled.get(leaf, 0) != math.prod(shape):
            raise UserError(
                f"the model has {leaf}, which a checkpoint of family {family!r} has no tensor for; "
                "save it as another family, or train without it"
            )
