"""Optimizers and learning-rate schedules (block ``optim``)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from moejax.config import check, check_not_negative, check_positive
from moejax.training.schedules import LearningRate

Params = Any


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Options of the optimizer and of its learning rate.

    Attributes:
      optimizer: ``adamw``, or ``muon`` for the matrices with AdamW for the rest.
      learning_rate: peak learning rate.
      schedule: ``cosine`` after the warm-up, or ``wsd``: constant, then a linear decay.
      warmup_steps: steps of linear warm-up from 0.
      decay_fraction: share of all steps that the decay of ``wsd`` takes.
      final_fraction: last learning rate over the peak.
      weight_decay: decoupled decay of everything but norms, biases and sinks.
      clip_norm: largest global norm of the gradients; 0 does not clip.
      beta1: AdamW's first decay rate.
      beta2: AdamW's second decay rate.
      momentum: Muon's momentum (Nesterov).
      moments_dtype: type that AdamW keeps its moments in between steps; a step itself computes in
        float32. DeepSeek-V3 keeps both in bfloat16 (arXiv 2412.19437, section 3.3.3). A second
        moment with a ``beta2`` of 0.998 or more hardly moves there: a step changes it by less than
        bfloat16 tells apart.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    moments_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_positive("optim", self, "learning_rate")
        names = ["warmup_steps", "decay_fraction", "final_fraction", "weight_decay", "clip_norm"]
        check_not_negative("optim", self, *names)
        for name in ("beta1", "beta2", "momentum", "decay_fraction", "final_fraction"):
            value = getattr(self, name)
            top = 1.0 if name.endswith("fraction") else 1.0 - 1e-9
            remedy = "must be from 0 to 1" if top == 1.0 else "must be from 0 to below 1"
            check(0 <= value <= top, f"optim.{name}", value, remedy)


def learning_rate(config: OptimConfig, steps: int) -> LearningRate:
    """The learning rate as a function of the step, over a run of ``steps`` steps.

    ``cosine`` is DeepSeek-V3's first and last part; ``wsd``, warm-up–stable–decay, is MiniCPM's
    (arXiv 2404.06395, section 4), with a linear decay.
    """
    warmup = start = min(config.warmup_steps, steps)
    shape = "cosine"
    if config.schedule == "wsd":
        shape = "linear"
        start = decay_start(config, steps)
    return LearningRate.of(
        shape, peak=config.learning_rate, final_fraction=config.final_fraction, warmup=warmup,
        start=start, length=max(1, steps - start),
    )  # fmt: skip


def decay_start(config: OptimConfig, steps: int) -> int:
    """Steps before the decay of schedule ``wsd`` begins, in a run of ``steps`` steps.

    Up to there, runs of any length are the same.
    """
    return max(min(config.warmup_steps, steps), steps - round(config.decay_fraction * steps))


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of ``steps`` steps; see ``optimizer_under``."""
    return optimizer_under(config, learning_rate(config, steps))


def optimizer_under(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then AdamW or Muon under a schedule, whatever the config's own is.

    Muon (Jordan 2024) orthogonalises each layer's and each expert's matrix by itself, gate and up
    projections apart. Its updates are scaled to AdamW's usual size (Moonlight, arXiv 2502.16982,
    eq. 4), so that one learning rate serves both.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask
    )
    if config.moments_dtype != "float32":
        adamw = _kept_as(adamw, jnp.dtype(config.moments_dtype))
    if config.optimizer == "adamw":
        return optax.chain(clip, adamw)
    muon = optax.contrib.muon(
        rate,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=0.2,
    )
    # optax's muon has an AdamW of its own for the other leaves, but no mask for its weight decay.
    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, muon_labels))


def state_bytes(config: OptimConfig) -> int:
    """Bytes of optimizer state for each parameter, as if AdamW took them all."""
    return 2 * jnp.dtype(config.moments_dtype).itemsize


def _kept_as(
    optimizer: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """An optimizer whose state's float arrays are kept in another type between updates."""

    def cast(state, dtype):
        floats = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if floats(leaf) else leaf, state)

    def update(gradients, state, params=None):
        updates, state = optimizer.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def decay_mask(params: Params) -> Params:
    """True for the leaves that weight decay applies to: all but norms, biases and sinks."""
    kept = lambda name: name in ("scale", "sinks") or name.endswith("bias")
    return jax.tree_util.tree_map_with_path(lambda path, _: not kept(path[-1].key), params)


# Input and output axes of the matrices that Muon takes, counted from the end, by the last two
# names of a parameter's path. All other axes are batches: layers, experts, gate beside up.
# Embedding, head, norms, biases, sinks and routers stay with AdamW.
_MATRICES = {
    ("query", "kernel"): ((-3,), (-2, -1)),
    ("key", "kernel"): ((-3,), (-2, -1)),
    ("value", "kernel"): ((-3,), (-2, -1)),
    ("query_down", "kernel"): ((-2,), (-1,)),
    ("query_up", "kernel"): ((-3,), (-2, -1)),
    ("kv_down", "kernel"): ((-2,), (-1,)),
    ("kv_up", "kernel"): ((-3,), (-2, -1)),
    ("out", "kernel"): ((-3, -2), (-1,)),
    ("experts", "gate_up"): ((-3,), (-1,)),
    ("shared", "gate_up"): ((-3,), (-1,)),
    ("ffn", "gate_up"): ((-3,), (-1,)),
    ("experts", "gate_in"): ((-2,), (-1,)),
    ("experts", "gate_out"): ((-2,), (-1,)),
    ("experts", "up"): ((-2,), (-1,)),
    ("experts", "down"): ((-2,), (-1,)),
    ("moe", "latent_in"): ((-2,), (-1,)),
    ("moe", "latent_out"): ((-2,), (-1,)),
    ("shared", "down"): ((-2,), (-1,)),
    ("ffn", "down"): ((-2,), (-1,)),
    ("projection", "kernel"): ((-2,), (-1,)),
}


def muon_labels(params: Params) -> Params:
    """``muon`` for the leaves that Muon takes, ``adamw`` for the others."""
    label = lambda path, _: "muon" if _names(path) in _MATRICES else "adamw"
    return jax.tree_util.tree_map_with_path(label, params)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(part.key for part in path[-2:])


def muon_dimensions(params: Params) -> Params:
    """Which axes of each leaf Muon orthogonalises; None for the leaves that AdamW takes."""

    def dimensions(path, leaf):
        names = _names(path)
        if names not in _MATRICES:
            return None
        inputs, outputs = (tuple(leaf.ndim + i for i in axes) for axes in _MATRICES[names])
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    return jax.tree_util.tree_map_with_path(dimensions, params)
