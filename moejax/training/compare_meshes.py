"""Loss curves of one small MoE run over several meshes, and the first token that is routed apart.

Sums over devices are rounded in another order, so that losses of two meshes differ by rounding; but
a score that decides for another expert by a last digit makes a difference of its own, the larger
the faster the weights move. So the choices are recorded, and can be replayed: what is left then is
rounding alone.

Works in several processes as well: every process makes the same batches and the same first state.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Int

from moejax.models import AttentionConfig, ModelConfig
from moejax.moe import MoEConfig
from moejax.moe.routers import RouterInputs, RouterOptions, Routing
from moejax.moe.routers.published import DeepSeekV3Options, DeepSeekV3Router
from moejax.moe.routers.top_k import gates, normalized, score, select
from moejax.parallel import AXES, MeshConfig, make_mesh
from moejax.training.optimizers import OptimConfig, learning_rate, make_optimizer
from moejax.training.programs import batch_rows, lower_step
from moejax.training.run_config import RunConfig, TrainConfig
from moejax.training.schedules import Hyper
from moejax.training.state import TrainState, make_init
from moejax.training.step import Batch

STEPS, ROWS, LENGTH, VOCAB = 20, 8, 16, 64
EXPERTS, TOP_K = 64, 8
SEED = 0
# The largest relative difference of a loss that is rounding: at a learning rate up to 1e-3 whatever
# the routing, above it with the routing replayed.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class RecordedOptions(DeepSeekV3Options):
    """Options of the recording router.

    Attributes:
      steps: of the record.
      tokens: of a batch.
    """

    name: str = "moejax.training.compare_meshes.RecordedRouter"
    steps: int = STEPS
    tokens: int = ROWS * LENGTH


class RecordedRouter(DeepSeekV3Router):
    """DeepSeek-V3's router, which reports its choices (``chosen``) and takes recorded ones.

    Its state holds a record and the step that is next; below zero it chooses by itself. Gates are
    always those of its own scores.
    """

    Options: ClassVar[type[RouterOptions]] = RecordedOptions

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: RecordedOptions = self.options
        logits = self.scored_logits(inputs)
        scores, bias = score(o.score, logits), self.bias(logits.shape[-1])
        state = lambda name, make: self.variable("router_state", name, make).value
        shape = (o.steps, o.tokens, self.top_k)
        record = state("record", lambda: jnp.zeros(shape, jnp.int32))
        next_step = state("next_step", lambda: jnp.full((), -1, jnp.int32))
        expert = select(scores, bias, self.top_k, o.num_groups, o.groups_kept, o.group_score)
        if len(expert) == o.tokens:  # not where parameters are made
            expert = jnp.where(next_step < 0, expert, record[jnp.maximum(next_step, 0)])
        routing = self.decide(
            inputs, logits, normalized(o.score, scores), expert,
            gates(scores, expert, o.normalize_gates, o.routed_scale), {},
        )  # fmt: skip
        return routing.replace(stats={**routing.stats, "chosen": expert})

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        own = {name: state[name] for name in state if name not in ("record", "next_step")}
        step = state["next_step"]
        following = jnp.where(step < 0, step, step + 1)
        kept = {"record": state["record"], "next_step": following}
        return {**super().update(own, stats), **kept}


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run gave.

    Attributes:
      losses: cross-entropy of each step, nats per target.
      chosen: experts of each step, MoE layer and token, in order of their scores.
    """

    losses: Float[np.ndarray, " steps"]
    chosen: Int[np.ndarray, "steps layers T K"]


@dataclasses.dataclass(frozen=True)
class Apart:
    """The first token that two runs send to different experts, and where.

    Attributes:
      step: from 0, as the others.
      layer: of the MoE layers.
      row: of the batch.
      position: in the row.
      experts: of the one run that the other has not.
      others: of the other.
      tokens: tokens of that step and layer that are routed apart.
    """

    step: int
    layer: int
    row: int
    position: int
    experts: tuple[int, ...]
    others: tuple[int, ...]
    tokens: int

    def __str__(self) -> str:
        names = lambda ids: ", ".join(map(str, ids))
        return (
            f"step {self.step}, layer {self.layer}, row {self.row}, position {self.position}: "
            f"expert {names(self.experts)} in place of {names(self.others)} "
            f"({self.tokens} tokens of that layer)"
        )


def run_config(
    rate: float, mesh: MeshConfig, *, steps: int = STEPS, dispatch: str = "blocks"
) -> RunConfig:
    """The run that is compared: two MoE layers of 64 experts, 8 a token, in float32.

    Sizes are such that eight devices can have any axis of the mesh to themselves.
    """
    moe = MoEConfig(
        num_experts=EXPERTS, top_k=TOP_K, d_expert=8, num_shared_experts=1, dispatch=dispatch,
        router=RecordedOptions(steps=steps),
    )  # fmt: skip
    model = ModelConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, first_k_dense=0, moe=moe, dtype="float32",
        attention=AttentionConfig(num_heads=8), tie_embeddings=False,
    )  # fmt: skip
    optim = OptimConfig(learning_rate=rate, warmup_steps=0, final_fraction=1.0)
    train = TrainConfig(steps=steps, batch_size=ROWS, seq_len=LENGTH)
    return RunConfig(model, train, optim=optim, mesh=mesh, seed=SEED)


@functools.cache
def batches(steps: int) -> tuple[Batch, ...]:
    """The global batches: text of a made-up language, two documents a row and some padding."""
    rng = np.random.default_rng(SEED)
    follows = rng.integers(0, VOCAB, (VOCAB, 3))  # three words may follow each
    found = []
    for _ in range(steps):
        tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
        tokens[:, 0] = rng.integers(0, VOCAB, ROWS)
        for i in range(LENGTH):
            tokens[:, i + 1] = follows[tokens[:, i], rng.integers(0, 3, ROWS)]
        second = rng.integers(2, LENGTH - 2, ROWS)[:, None]
        place = np.arange(LENGTH)[None, :]
        segments = np.where(place < second, 1, 2)
        segments[place >= LENGTH - rng.integers(0, 3, ROWS)[:, None]] = 0
        positions = np.where(place < second, place, place - second)
        parts = tokens[:, :-1], tokens[:, 1:], segments, positions
        found.append(Batch(*(np.asarray(part, np.int32)[None] for part in parts)))
    return tuple(found)


@functools.cache
def first_state(steps: int, dispatch: str) -> TrainState:
    """The state that all runs begin with, on the host: made on one device of this process."""
    mesh = Mesh(
        np.asarray(jax.local_devices()[:1]).reshape((1,) * len(AXES)), AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )  # fmt: skip
    config = run_config(1e-3, MeshConfig(), steps=steps, dispatch=dispatch)
    optimizer = make_optimizer(config.optim, config.train.steps)
    with jax.set_mesh(mesh):
        init, _ = make_init(config.model, optimizer, mesh)
        return jax.device_get(init(jax.random.key(SEED)))


def placed(tree: Any, like: Any) -> Any:
    """Host values on a mesh; every process has them all and gives its devices their parts."""
    place = lambda value, leaf: jax.make_array_from_callback(
        np.shape(value), leaf.sharding, lambda at: np.asarray(value)[at]
    )
    return jax.tree.map(place, tree, like)


class Runner:
    """A mesh's compiled step, for as many runs as one likes: rate and record are its arguments."""

    def __init__(self, mesh: MeshConfig, *, steps: int = STEPS, dispatch: str = "blocks"):
        self._steps, self._first = steps, first_state(steps, dispatch)
        self._own: dict[float, Curve] = {}
        config = run_config(1e-3, mesh, steps=steps, dispatch=dispatch)
        self.mesh = make_mesh(mesh)
        optimizer = make_optimizer(config.optim, steps)
        with jax.set_mesh(self.mesh):
            _, self._abstract = make_init(config.model, optimizer, self.mesh)
            self._rows = batch_rows(config, self.mesh)
            hyper = Hyper(np.uint32(SEED), self._rate(1e-3), config.train.mtp_schedule)
            self._hyper = hyper
            self._step = lower_step(config, self._abstract, self.mesh, hyper).compile()

    def _rate(self, rate: float):
        return learning_rate(run_config(rate, MeshConfig()).optim, self._steps)

    def run(self, rate: float, replay: Int[np.ndarray, "steps layers T K"] | None = None) -> Curve:
        """Trains from the first state.

        Args:
          rate: the learning rate, of every step.
          replay: choices to make in place of its own.
        """
        if replay is None and rate in self._own:
            return self._own[rate]
        state = self._first
        if replay is not None:
            state = state.replace(router_state=_with_record(state.router_state, replay))
        state = placed(state, self._abstract)
        hyper = self._hyper.replace(learning_rate=self._rate(rate))
        losses, chosen = [], []
        with jax.set_mesh(self.mesh):
            for batch in batches(self._steps):
                placed_batch = jax.tree.map(lambda values: placed(values, self._rows), batch)
                state, metrics = self._step(state, placed_batch, hyper)
                layers = jax.tree.leaves(
                    {name: {layer: stats["chosen"] for layer, stats in segment.items()}
                     for name, segment in metrics.router_stats.items()}
                )  # fmt: skip
                chosen.append(np.concatenate(jax.device_get(layers)))
                losses.append(float(metrics.loss))
        curve = Curve(np.asarray(losses), np.asarray(chosen))
        if replay is None:
            self._own[rate] = curve
        return curve


def _with_record(router_state: Any, chosen: Int[np.ndarray, "steps layers T K"]) -> Any:
    """The routers' state with a record to replay, its layers in the order that they were told."""
    layer = 0

    def fill(path, value):
        nonlocal layer
        name = path[-1].key
        if name == "next_step":
            return np.zeros_like(value)
        if name != "record":
            return value
        record = chosen[:, layer : layer + len(value)].swapaxes(0, 1)
        layer += len(value)
        return np.ascontiguousarray(record)

    return jax.tree_util.tree_map_with_path(fill, router_state)


def worst(curve: Curve, reference: Curve) -> float:
    """The largest relative difference of a step's loss."""
    return float(np.max(np.abs(curve.losses - reference.losses) / np.abs(reference.losses)))


def first_apart(curve: Curve, reference: Curve) -> Apart | None:
    """The first token that is routed apart, in order of step and layer; None for none."""
    ours, theirs = np.sort(curve.chosen, axis=-1), np.sort(reference.chosen, axis=-1)
    differ = np.any(ours != theirs, axis=-1)
    # Padding is not routed, whatever is chosen for it.
    told = [batch.segment_ids.reshape(1, -1) > 0 for batch in batches(len(differ))]
    differ &= np.stack(told)
    if not differ.any():
        return None
    step, layer, token = np.unravel_index(np.argmax(differ), differ.shape)
    own, other = ours[step, layer, token], theirs[step, layer, token]
    only = lambda a, b: tuple(int(e) for e in np.setdiff1d(a, b))
    row, position = divmod(int(token), LENGTH)
    count = int(differ[step, layer].sum())
    return Apart(int(step), int(layer), row, position, only(own, other), only(other, own), count)


def describe(mesh: MeshConfig) -> str:
    """The axes of a mesh that cut anything: ``expert 4 x data 2``."""
    sizes = dataclasses.asdict(mesh)
    parts = [f"{name} {size}" for name, size in sizes.items() if size != 1]
    return " x ".join(parts) or "one device"


# Every axis alone on 2, 4 and 8 devices, and mixed ones.
ALONE = tuple(MeshConfig(**{axis: size}) for size in (2, 4, 8) for axis in AXES)
MIXED = (
    MeshConfig(data=2, expert=4),
    MeshConfig(fsdp=2, expert=2, context=2),
    MeshConfig(data=2, context=2, tensor=2),
    MeshConfig(fsdp=2, tensor=4),
)


def compare(
    meshes: Sequence[MeshConfig], reference: Runner, *, low: float = 1e-3, high: float = 3e-3
) -> list[dict[str, Any]]:
    """Each mesh against one device.

    Args:
      meshes: to compare.
      reference: of the mesh to compare with.
      low: a learning rate at which every router chooses for itself.
      high: one at which they take the reference's choices, and once choose for themselves.

    Returns:
      For each mesh ``mesh``, ``devices``, ``learned`` and ``apart`` at ``low``, ``replayed`` at
      ``high`` and beside it ``learned_high`` and ``apart_high``: largest relative differences of a
      loss, and the first token that is routed apart, in words (None for none); ``agrees``, whether
      ``learned`` and ``replayed`` are within ``TOLERANCE``.
    """
    slow, fast = reference.run(low), reference.run(high)
    rows = []
    for mesh in meshes:
        runner = Runner(mesh)
        curves = runner.run(low), runner.run(high, fast.chosen), runner.run(high)
        learned, replayed = worst(curves[0], slow), worst(curves[1], fast)
        apart = [first_apart(curves[0], slow), first_apart(curves[2], fast)]
        rows.append({
            "mesh": describe(mesh),
            "devices": math.prod(dataclasses.astuple(mesh)),
            "learned": learned,
            "apart": apart[0] and str(apart[0]),
            "replayed": replayed,
            "learned_high": worst(curves[2], fast),
            "apart_high": apart[1] and str(apart[1]),
            "agrees": max(learned, replayed) <= TOLERANCE,
        })  # fmt: skip
    return rows
