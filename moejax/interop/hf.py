"""Hugging Face checkpoints in and out: ``load``, ``save``, ``config_from_hf``.

The families stand in ``moejax.interop.families``, one table each.
"""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moejax.config import UserError, check
from moejax.interop.config_map import architecture
from moejax.interop.fields import CONFIG, read_json
from moejax.interop.placing import place
from moejax.interop.safetensors_io import ShardWriter
from moejax.interop.source import (
    Say,
    Source,
    abstract_variables,
    carry_files,
    choose_family,
    open_source,
    parse,
    unboxed,
)  # fmt: skip
from moejax.interop.tables import Piece, Resolved, leaf_shapes, resolve
from moejax.models import ModelConfig
from moejax.output_folder import check_new_folder, whole_folder
from moejax.parallel import check_fits, spec

SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16", "float16")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def config_from_hf(
    source: Mapping[str, Any] | str | os.PathLike[str], say: Say = _say
) -> ModelConfig:
    """Our config from a config.json, without any weights.

    Args:
      source: what the file holds, the file, or the folder with it.
      say: takes a line for each field that is not known.

    Raises:
      UserError: an unknown ``model_type``, or fields that are missing, wrong or contradictory.
    """
    where = CONFIG
    if not isinstance(source, Mapping):
        path = pathlib.Path(source)
        path = path / CONFIG if path.is_dir() else path
        source, where = read_json(path, "give a model's config.json"), str(path)
    config, _, remarks = parse(source, where)
    for line in remarks:
        say(line)
    return config


def load(
    path: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    dtype: str | None = None,
    say: Say = _say,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a checkpoint.

    Tensors are read one by one, straight into what each device holds of our stacked leaves; nothing
    is read before every name and shape is known to be right.

    Args:
      path: a folder with config.json and safetensors, in one file or sharded.
      mesh: where the variables go, by moejax's table of axes; None is the default device.
      dtype: type of the parameters: ``float32``, ``bfloat16`` or ``float16``, and then router state
        is float32; None keeps the checkpoint's types.
      say: takes lines about what was left out or not known.

    Returns:
      The config, and the variables ``params`` and, for routers with state, ``router_state``.

    Raises:
      UserError: a folder, config or tensor that cannot be used; file, tensor and remedy are named.
    """
    source = open_source(path)
    for line in source.remarks:
        say(line)
    return source.config, read_variables(source, mesh, dtype)


def read_variables(source: Source, mesh: Mesh | None, dtype: str | None) -> dict[str, Any]:
    """The variables of an open checkpoint; arguments and errors as for ``load``."""
    check(dtype is None or dtype in DTYPES, "dtype", dtype, f"choose from {', '.join(DTYPES)}")
    resolved, config = source.resolved, source.config
    _check_copies(source, resolved)
    boxed = abstract_variables(config)
    if mesh is not None:
        shape = tuple(mesh.shape.values())
        check_fits(shape, config, mesh.size, mesh.size)
    of_leaf: dict[str, list[Piece]] = {}
    for piece in resolved.pieces:
        of_leaf.setdefault(piece.leaf, []).append(piece)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        pieces = of_leaf[name]
        asked = dtype if dtype is None or name.startswith("params/") else "float32"
        kinds = [source.tensors[piece.name].dtype for piece in pieces]
        # One type that holds all the pieces' numbers, where none is asked for.
        kind = np.dtype(jnp.dtype(asked or functools.reduce(jnp.promote_types, kinds)))
        shape = nn.meta.unbox(leaf).shape
        return place(pieces, source.tensors, shape, kind, _sharding(mesh, leaf))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree_util.tree_map_with_path(fill, boxed, is_leaf=is_box)


def _sharding(mesh: Mesh | None, leaf: Any) -> NamedSharding | None:
    if mesh is None:
        return None
    names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
    return NamedSharding(mesh, spec(*names))


def _check_copies(source: Source, resolved: Resolved) -> None:
    """Tensors that repeat another have to be equal to it; only one of them is kept."""
    for name, whose in resolved.copies.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            continue
        original = source.tensors[whose]
        same = tensor.shape == original.shape and tensor.dtype == original.dtype
        if not (same and np.array_equal(_bytes(tensor.read()), _bytes(original.read()))):
            way = (
                "set num_nextn_predict_layers = 0 in config.json to leave MTP modules out"
                if name.startswith("model.layers.")
                else "set tie_word_embeddings = false there"
            )
            raise UserError(
                f"{tensor.file!r}: tensor {name} differs from {whose}, which it should repeat: the "
                f"model that config.json describes shares the two; restore the file, or {way}"
            )  # fmt: skip


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    variables: Mapping[str, Any],
    *,
    like: str | os.PathLike[str] | None = None,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    more: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    say: Say = _say,
) -> None:
    """Writes a checkpoint that Transformers, and what reads its format, can run.

    It is written beside ``path`` and renamed at the end: there is a whole one or none.

    Args:
      path: a folder that does not exist yet, or an empty one.
      config: the model's.
      variables: ``params`` and, for routers with state, ``router_state``.
      like: the checkpoint that the model came from, or the record kept of it. Its config.json, its
        tensors' types and its tokenizer files are kept; quantised tensors come back in BF16.
      family: a ``model_type``; None takes that of ``like``, or the first that holds the model.
      dtype: type of all parameters instead of ``like``'s or the variables' own; router state stays.
      shard_bytes: size of a file beyond which another one is begun.
      more: further fields of config.json, where there is no ``like``.
      files: further text files to write, name and content, where there is no ``like``.
      say: takes lines about what could not be kept.

    Raises:
      UserError: the target exists or cannot be written, no family holds the model, or the variables
        or ``like`` are another model's. Nothing is left behind then.
    """
    check(dtype is None or dtype in DTYPES, "dtype", dtype, f"choose from {', '.join(DTYPES)}")
    shown = repr(os.fspath(path))
    target = check_new_folder(path, shown)
    source = None if like is None else open_source(like)
    if source is None:
        chosen, values = choose_family(config, family)
        table, values = chosen.tables(values)[0], {**values, **(more or {})}
    else:
        chosen, table, values = source.family, source.table, dict(source.values)
        _check_like(source, config, family)
    leaves = _leaves(config, variables)
    resolved = resolve(table, config, leaf_shapes(leaves), chosen.model_type)
    types = _types(resolved, leaves, source, dtype)
    if source is not None and source.quantized:
        values.pop("quantization_config", None)
        say(f"the source was quantised ({source.quantized}); its weights are written in BF16")
    _name_dtype(values, types, source is None or dtype is not None)
    with whole_folder(target, shown) as folder:
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        if source is not None:
            carry_files(source.folder, folder)
        else:
            for name, content in (files or {}).items():
                (folder / name).write_text(content, encoding="utf-8")
        _write(folder, resolved, leaves, types, shard_bytes)


def _check_like(source: Source, config: ModelConfig, family: str | None) -> None:
    if family not in (None, source.values["model_type"]):
        raise UserError(
            f"family = {family!r}: the model came from a {source.values['model_type']!r} "
            "checkpoint; leave family out, or like"
        )
    ours, theirs = architecture(config), architecture(source.config)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{str(source.folder)!r}: is of another model: {name} is {theirs.get(name)!r} "
                f"there and {ours.get(name)!r} here; leave like out"
            )


def _leaves(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a checkpoint holds, checked against the model's."""
    wanted = unboxed(abstract_variables(config))
    given = unboxed({name: variables.get(name, {}) for name in wanted})
    got, right = leaf_shapes(given), leaf_shapes(wanted)
    for name in sorted(got.keys() | right.keys()):
        if got.get(name) != right.get(name):
            raise UserError(
                f"variables: {name} has shape {got.get(name)} instead of {right.get(name)}, which "
                "the config asks for; give the model's own config"
            )
    return given


def _types(resolved, leaves, source: Source | None, dtype: str | None) -> dict[str, np.dtype]:
    """Type of every tensor to be written, copies included, in the order of the files."""
    own = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.dtype(leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }
    types = {}
    for piece in resolved.pieces:
        kept = own[piece.leaf] if source is None else source.tensors[piece.name].dtype
        asked = dtype is not None and piece.leaf.startswith("params/")
        types[piece.name] = np.dtype(jnp.dtype(dtype)) if asked else kept
    for name, whose in resolved.copies.items():
        # A tied head is written again only where the source had it; MTP modules have their copies.
        had = name in source.tensors if source is not None else name.startswith("model.layers.")
        if had:
            types[name] = types[whose]
    return types


def _name_dtype(values: dict[str, Any], types: Mapping[str, np.dtype], changed: bool) -> None:
    """States the weights' type in config.json, under the name that it is found by there."""
    names = [name for name in ("torch_dtype", "dtype") if name in values] or ["torch_dtype"]
    if changed:
        kinds = list(types.values())
        values.update(dict.fromkeys(names, str(max(set(kinds), key=kinds.count))))


def _write(folder, resolved: Resolved, leaves, types, shard_bytes: int) -> None:
    """Writes all tensors; of what lies on devices, one layer of a leaf is fetched at a time."""
    shapes = {piece.name: piece.stored_shape for piece in resolved.pieces}
    copies: dict[str, list[str]] = {}
    for name, whose in resolved.copies.items():
        if name in types:
            shapes[name] = shapes[whose]
            copies.setdefault(whose, []).append(name)
    of_leaf: dict[str, list[Piece]] = {}
    for piece in resolved.pieces:
        of_leaf.setdefault(piece.leaf, []).append(piece)
    writer = ShardWriter(folder, [(n, types[n], shapes[n]) for n in types], shard_bytes)
    try:
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise UserError(f"variables: {name} lies on several processes; save from one")
            for piece, part in _parts(leaf, of_leaf[name]):
                stored = piece.layout.save(part)
                for each in (piece.name, *copies.get(piece.name, ())):
                    writer.write(each, stored)
        writer.finish()
    finally:
        writer.close()


def _parts(leaf: Any, pieces: list[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its part of a leaf, on the host."""
    devices = leaf.devices() if isinstance(leaf, jax.Array) else set()
    here = len(devices) <= 1 and all(device.platform == "cpu" for device in devices)
    if here or not all(isinstance(piece.index[0], int) for piece in pieces):
        array = np.asarray(leaf)  # on one CPU device a view
        yield from ((piece, array[piece.index]) for piece in pieces)
        return
    layers: dict[int, list[Piece]] = {}
    for piece in pieces:
        layers.setdefault(piece.index[0], []).append(piece)
    for layer, of_layer in layers.items():
        array = np.asarray(_row(leaf, layer))
        yield from ((piece, array[piece.index[1:]]) for piece in of_layer)


@jax.jit
def _row(leaf: jax.Array, index: jax.Array) -> jax.Array:
    """One entry of the leading axis; the index is traced, so that all share a program."""
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


__all__ = ["config_from_hf", "load", "save"]
