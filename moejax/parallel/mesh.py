"""The device mesh, and the table that maps logical axes to mesh axes."""

import dataclasses
import math
from contextlib import AbstractContextManager

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.config import ConfigError, check, check_positive
from moejax.models.model_config import ModelConfig
from moejax.moe.exchange import BATCH_AXES, CONTEXT_AXIS
from moejax.parallel.host_threads import enough_threads

AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis of a parameter or an activation -> mesh axes. Every name that a model uses is here.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations.
    "batch": BATCH_AXES,  # rows: copies, parameters' parts and experts' parts all take their own
    "length": CONTEXT_AXIS,  # positions of a row: the first device has the first ones
    "embed_act": None,  # the residual stream's width, whole on every device
    # Parameters.
    "layers": None,  # the axis that a segment's scan runs over
    "vocab": "tensor",  # embedding and head: logits stay cut until their sum
    "embed": "fsdp",  # the model's width in every matrix: gathered for a product, then let go
    "heads": "tensor",  # query heads
    "kv_heads": "tensor",  # key/value heads, each beside its query heads
    "head_dim": None,  # one head's channels
    "latent": "fsdp",  # MLA's latents, where no other axis of the matrix is the model's width
    "mlp": "tensor",  # hidden width of dense layers, and of each expert
    "expert": "expert",  # experts: tokens travel to them (moe.exchange)
    "router_expert": None,  # the router's scores, needed whole for a choice
    "norm": None,  # scales, as wide as what they multiply
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (block ``mesh``).

    Attributes:
      data: copies of the model, each with its own rows of the batch; 0 takes all devices left.
      fsdp: parts that parameters and optimizer state are cut into; rows are spread over it too.
      expert: parts that the experts are cut into; rows are spread over it too.
      context: parts that every row's length is cut into; see ``moejax.models.context``.
      tensor: parts that heads, hidden widths and the vocabulary are cut into.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check(self.data >= 0, "mesh.data", self.data, "must not be below zero")
        check_positive("mesh", self, "fsdp", "expert", "context", "tensor")

    def shape(self, devices: int) -> tuple[int, ...]:
        """Sizes in the order of ``AXES``, with ``data`` filled in.

        Raises:
          ConfigError: the mesh needs more devices than there are, or does not divide them.
        """
        rest = self.fsdp * self.expert * self.context * self.tensor
        data = self.data or max(1, devices // rest)
        needed = data * rest
        check(
            needed <= devices, "mesh", dataclasses.asdict(self),
            f"needs {needed} devices, but there are {devices}; make an axis smaller",
        )  # fmt: skip
        return (data, self.fsdp, self.expert, self.context, self.tensor)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over the first devices that it needs; enter it with ``jax.set_mesh``."""
    enough_threads()
    shape = config.shape(jax.device_count())
    devices = np.asarray(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_fits(
    shape: tuple[int, ...], model: ModelConfig, batch_size: int, seq_len: int
) -> None:  # fmt: skip
    """Raises ConfigError where a mesh axis does not divide what it is to cut.

    Args:
      shape: sizes in the order of ``AXES``.
      model: the model's config.
      batch_size: rows of one micro-batch.
      seq_len: positions of a row.
    """
    size = dict(zip(AXES, shape, strict=True))
    rows = math.prod(size[axis] for axis in BATCH_AXES)
    check(
        batch_size % rows == 0, "train.batch_size", batch_size,
        f"has to be cut into {rows} parts (mesh data x fsdp x expert) for each micro-batch; "
        "choose a multiple",
    )  # fmt: skip
    cut = [("context", "train.seq_len", seq_len), *cuts(model)]
    for axis, field, value in cut:
        if value % size[axis]:
            remedy = f"does not divide {field} = {value}; choose a divisor, or change {field}"
            raise ConfigError(f"mesh.{axis}", size[axis], remedy)


def cuts(model: ModelConfig) -> list[tuple[str, str, int]]:
    """What mesh axes cut of a model: axis, the config's field, its size, which it has to divide."""
    found = [
        ("tensor", "model.vocab_size", model.vocab_size),
        ("tensor", "model.attention.num_heads", model.attention.num_heads),
        ("tensor", "model.attention.num_kv_heads", model.attention.kv_heads),
        ("fsdp", "model.d_model", model.d_model),
    ]
    if model.attention.kind == "mla":
        found.append(("fsdp", "model.attention.q_lora_rank", model.attention.q_lora_rank))
        found.append(("fsdp", "model.attention.kv_lora_rank", model.attention.kv_lora_rank))
    if model.layers("dense"):
        found.append(("tensor", "model.d_ff", model.dense_width))
    if model.layers("moe"):
        found.append(("expert", "moe.num_experts", model.moe.num_experts))
        found.append(("tensor", "moe.d_expert", model.moe.d_expert))
        found.append(("fsdp", "moe.latent_dim", model.moe.latent_dim))
    return found


def axis_rules() -> AbstractContextManager[None]:
    """The context in which a model is traced, so that its activations are constrained by the table.

    Flax leaves them unconstrained without a word where the rules are not set, and jit's cache does
    not know the rules: every function that is jitted enters this by itself.
    """
    return nn.logical_axis_rules(tuple(RULES.items()))


def spec(*names: str | None) -> PartitionSpec:
    """The partition of an array whose axes have these logical names.

    Raises:
      KeyError: a name that is not in the table; Flax would leave it unconstrained without a word.
    """
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """As ``spec``, on a mesh."""
    return NamedSharding(mesh, spec(*names))
