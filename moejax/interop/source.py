"""A checkpoint's folder: its config, its family, its tensors, and the files that travel along."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError, UserError
from moejax.interop import families
from moejax.interop.config_map import architecture
from moejax.interop.families import Family
from moejax.interop.fields import CONFIG, Fields, read_json
from moejax.interop.quantized import Tensor, numbers
from moejax.interop.safetensors_io import DTYPES, INDEX, NAMES, SINGLE, open_checkpoint
from moejax.interop.tables import LAYER, Resolved, Table, leaf_shapes, resolve
from moejax.models import ModelConfig, Transformer

Say = Callable[[str], None]

RECORD = "tensors.json"
# What a model is used with beside its weights. Code of a model without a class in Transformers is
# carried as text; moejax never runs it.
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "vocab*", "merges.txt", "chat_template*", "*tiktoken*", "*.py", "LICENSE*",
)  # fmt: skip
# Buffers that old checkpoints hold and that the config says.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
AGAIN = "restore the file, or correct config.json"
# A tensor that tells an MTP module from a layer of the main model.
MTP_PROJECTION = "eh_proj.weight"


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, or what ``write_record`` kept of one.

    Attributes:
      folder: where it is.
      values: its config.json.
      family: its family.
      config: our config; without MTP modules where the checkpoint has no tensors of them.
      table: the table that its names follow.
      tensors: its tensors, quantisation resolved; those of a record cannot be read.
      quantized: how it was quantised, or "".
      remarks: lines that the user should see.
    """

    folder: pathlib.Path
    values: Mapping[str, Any]
    family: Family
    config: ModelConfig
    table: Table
    tensors: Mapping[str, Tensor]
    quantized: str
    remarks: tuple[str, ...]

    @functools.cached_property
    def resolved(self) -> Resolved:
        """The pieces of our leaves, every tensor checked.

        Raises:
          UserError: a tensor is missing, unexpected, of another shape, or of a type that no weight
            has.
        """
        shapes = leaf_shapes(unboxed(abstract_variables(self.config)))
        found = resolve(self.table, self.config, shapes, self.family.model_type)
        self._check(found)
        return found

    def _check(self, found: Resolved) -> None:
        index = self.folder / INDEX
        where = str(index if index.is_file() else self.folder / SINGLE)
        missing = [piece.name for piece in found.pieces if piece.name not in self.tensors]
        if missing:
            raise UserError(
                f"{where!r}: tensor {missing[0]} is missing{_more(missing)}, which config.json "
                f"asks for; {AGAIN}"
            )
        for piece in found.pieces:
            tensor = self.tensors[piece.name]
            if tensor.shape != piece.stored_shape:
                raise UserError(
                    f"{tensor.file!r}: tensor {piece.name} has shape {list(tensor.shape)} instead "
                    f"of {list(piece.stored_shape)}, which config.json asks for; {AGAIN}"
                )
            if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
                raise UserError(
                    f"{tensor.file!r}: tensor {piece.name} has type {NAMES[tensor.dtype]}, which "
                    "is none for weights; get the model's BF16 weights"
                )
        known = {piece.name for piece in found.pieces} | set(found.copies)
        unexpected = [n for n in self.tensors if n not in known and not IGNORED.search(n)]
        if unexpected:
            raise UserError(
                f"{self.tensors[unexpected[0]].file!r}: tensor {unexpected[0]} is unexpected"
                f"{_more(unexpected)}: the model that config.json describes has none; {AGAIN}"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def open_source(path: str | pathlib.Path) -> Source:
    """A checkpoint's folder.

    Raises:
      UserError: no folder, no or a contradictory config.json, an unknown family, or files that are
        missing or damaged.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{str(folder)!r}: {what}; give a model's folder, with {CONFIG} in it")
    file = folder / CONFIG
    values = read_json(file, "give a model's folder")
    config, family, remarks = parse(values, str(file))
    if (folder / RECORD).is_file():
        tensors, quantized = _read_record(folder / RECORD)
    else:
        stored = open_checkpoint(folder)
        quantization = values.get("quantization_config")
        tensors = numbers(stored, quantization, repr(str(file)))
        quantized = (quantization or {}).get("quant_method", "")
    if config.mtp_depth and not _has_mtp(config, tensors):
        remarks = (*remarks, f"{str(file)!r}: the checkpoint has no tensors of its "
                   f"{config.mtp_depth} MTP modules; they are left out")  # fmt: skip
        config = dataclasses.replace(config, mtp_depth=0)
    surplus = _surplus_mtp(config, tensors)
    if surplus:
        remarks = (*remarks, f"{str(file)!r}: num_nextn_predict_layers leaves {len(surplus)} MTP "
                   f"module(s) of the checkpoint out: {', '.join(surplus)}")  # fmt: skip
        tensors = {name: t for name, t in tensors.items() if not name.startswith(surplus)}
    ignored = sum(bool(IGNORED.search(name)) for name in tensors)
    if ignored:
        remarks = (*remarks, f"{str(folder)!r}: {ignored} tensors rotary_emb.inv_freq are ignored; "
                   "config.json says them")  # fmt: skip
    table = max(family.tables(values), key=lambda table: table.fits(tensors))
    return Source(folder, values, family, config, table, tensors, quantized, tuple(remarks))


def _has_mtp(config: ModelConfig, tensors: Mapping[str, Tensor]) -> bool:
    prefix = LAYER.format(l=config.num_layers)
    return any(name.startswith(prefix) for name in tensors)


def _surplus_mtp(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Prefixes of MTP modules that the files hold beyond those that config.json counts.

    Leaving them out is usual: the main model does not need them.
    """
    found, number = [], config.num_layers + config.mtp_depth
    while LAYER.format(l=number) + MTP_PROJECTION in tensors:
        found.append(LAYER.format(l=number))
        number += 1
    return tuple(found)


def parse(values: Mapping[str, Any], where: str) -> tuple[ModelConfig, Family, tuple[str, ...]]:
    """Our config, the family, and a line for each field that nobody knows.

    Args:
      values: what config.json holds.
      where: the file, for messages.

    Raises:
      UserError: an unknown family, or fields that are missing, wrong or contradict one another.
    """
    fields = Fields(values, repr(where))
    family = families.find(fields)
    try:
        config = family.read(fields)
    except ConfigError as error:
        raise UserError(f"{where!r}: {error}") from None
    unknown = fields.unknown()
    remarks = [f"warning: {where!r}: field {name} = {values[name]!r} is not known and was not used"
               for name in unknown]  # fmt: skip
    return config, family, tuple(remarks)


def choose_family(config: ModelConfig, name: str | None) -> tuple[Family, dict[str, Any]]:
    """The family that a model can be saved as, and its fields.

    A family holds a model if its fields, read again, say the same architecture.

    Args:
      config: the model's.
      name: the family wanted; None takes the first that holds it.

    Raises:
      UserError: none does, or not the one wanted; the first field that is lost is named.
    """
    if name is not None and name not in families.BY_TYPE:
        known = ", ".join(sorted(families.BY_TYPE))
        raise UserError(f"family = {name!r}: moejax writes no such model; known: {known}")
    wanted, nearest = architecture(config), None
    for family in families.FAMILIES if name is None else [families.BY_TYPE[name]]:
        lost = _lost(family, config, wanted)
        if isinstance(lost, dict):
            return family, lost
        if nearest is None or len(lost) < len(nearest[1]):
            nearest = family.model_type, lost
    field, lost = nearest
    raise UserError(
        f"no Hugging Face family holds this model: the nearest, {field!r}, has no "
        f"{'; '.join(lost[:3])}; train one of its form to export it"
    )


def _lost(family: Family, config: ModelConfig, wanted: dict[str, Any]) -> dict | list[str]:
    """The family's fields, or what of the architecture they would lose."""
    try:
        values = {"architectures": [family.architecture], "model_type": family.model_type,
                  **family.write(config)}  # fmt: skip
        again, _, _ = parse(values, family.model_type)
    except (AttributeError, UserError):  # a dense model has no experts to write
        return ["layers of this kind"] * 99
    got = architecture(again)
    lost = [
        f"{name} = {wanted.get(name)!r}" for name in sorted(wanted.keys() | got.keys())
        if wanted.get(name) != got.get(name)
    ]  # fmt: skip
    return lost or values


def abstract_variables(config: ModelConfig) -> Any:
    """Shapes of a model's ``params`` and ``router_state``, in their sharding boxes."""
    mesh = jax.sharding.get_abstract_mesh()
    return _abstract(config, 1 if mesh.empty else mesh.size)


@functools.lru_cache(4)
def _abstract(config: ModelConfig, rows: int) -> Any:
    init = lambda key: Transformer(config).init(
        key, jnp.zeros((rows, 2), jnp.int32), method=Transformer.encode
    )
    found = dict(jax.eval_shape(init, jax.random.key(0)))
    return {name: found[name] for name in ("params", "router_state") if name in found}


def unboxed(variables: Any) -> Any:
    """The same without the boxes."""
    return nn.meta.unbox(variables)


def carry_files(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies the files that travel along: tokenizer, generation config, licence, remote code."""
    names = sorted({path.name for pattern in CARRIED for path in source.glob(pattern)
                    if path.is_file()})  # fmt: skip
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def write_record(source: Source, folder: pathlib.Path) -> None:
    """Keeps what a later export needs: config.json, names, types and shapes, and the files."""
    (folder / CONFIG).write_text(json.dumps(source.values, indent=2) + "\n", encoding="utf-8")
    tensors = {name: [NAMES[t.dtype], list(t.shape)] for name, t in source.tensors.items()}
    record = {"quantized": source.quantized, "tensors": tensors}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    carry_files(source.folder, folder)


def _read_record(file: pathlib.Path) -> tuple[dict[str, Tensor], str]:
    record = read_json(file, "import the checkpoint again")

    def unread() -> np.ndarray:
        raise UserError(f"{str(file)!r}: a record holds no weights; give the checkpoint's folder")

    try:
        tensors = {
            name: Tensor(DTYPES[dtype], tuple(shape), str(file), unread)
            for name, (dtype, shape) in record["tensors"].items()
        }
        return tensors, record["quantized"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{str(file)!r}: is damaged; import the checkpoint again") from None
