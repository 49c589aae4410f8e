"""One model's training step, as a program that can be timed pass by pass."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.bench import timing
from moejax.bench.arrays import Normals
from moejax.models import ModelConfig, Transformer
from moejax.moe.diagnostics import stack_layers
from moejax.parallel import MeshConfig, axis_rules, make_mesh
from moejax.training.optimizers import OptimConfig, learning_rate, make_optimizer
from moejax.training.state import TrainState
from moejax.training.step import MTP_WEIGHT, Batch, make_train_step

Tree = Any

# Small and constant, so that the weights stay what they are while the step is timed.
OPTIM = OptimConfig(learning_rate=1e-6, warmup_steps=0, schedule="wsd", decay_fraction=0.0)


def draw_params(config: ModelConfig, seed: int) -> Tree:
    """Parameters: matrices of deviation 0.02, norms of 1. No initializer is compiled."""
    normal = Normals(seed, "float32")

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        return normal(*leaf.shape, fan_in=2500)

    return jax.tree_util.tree_map_with_path(draw, _shapes(config)["params"])


def _shapes(config: ModelConfig) -> Tree:
    init = lambda key: Transformer(config).init(
        key, jnp.zeros((1, 2), jnp.int32), method=Transformer.encode
    )
    return nn.meta.unbox(dict(jax.eval_shape(init, jax.random.key(0))))


class TrainingStep:
    """A model's programs, which are compiled from shapes alone, and its state on one device.

    Attributes:
      config: the model.
      programs: compiled programs by pass.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, seed: int, optim: OptimConfig = OPTIM
    ):
        """Draws a batch of random tokens, one document a row.

        Args:
          config: the model.
          rows: B.
          length: S.
          seed: of the tokens.
          optim: of the training step.
        """
        self.config, self._optim = config, optim
        self.programs: dict[str, timing.Program] = {}
        self._mesh = make_mesh(MeshConfig())
        self._optimizer = make_optimizer(optim, 1000)
        self._shapes = _shapes(config)
        self._state: TrainState | None = None
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, config.vocab_size, (1, rows, length + 1))
        positions = np.broadcast_to(np.arange(length), (1, rows, length))
        self._batch = Batch(
            *(
                jnp.asarray(values, jnp.int32)
                for values in (
                    tokens[..., :-1],
                    tokens[..., 1:],
                    np.ones_like(positions),
                    positions,
                )
            )
        )
        self._load: Any = None

    def _make_state(self, params: Tree) -> TrainState:
        router_state = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes.get("router_state", {})
        )
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, self._optimizer.init(params), router_state)

    def place(self, params: Tree) -> None:
        """Makes the state that the programs run on.

        Args:
          params: from ``draw_params``; any router's, since all have a matrix. Training steps
            overwrite them.
        """
        self._state = self._make_state(params)

    def compile(self, passes: str) -> timing.Program:
        """Compiles ``forward_backward`` (loss and gradients) or ``train_step`` (AdamW as well)."""
        state = jax.eval_shape(self._make_state, self._shapes["params"])
        with jax.set_mesh(self._mesh):
            if passes == "train_step":
                step = make_train_step(
                    self.config, self._optimizer, learning_rate(self._optim, 1000)
                )
                program = timing.compile_program(step, state, self._batch, donate=(0,))
            else:
                run = functools.partial(_forward_backward, self.config)
                program = timing.compile_program(run, state.params, state.router_state, self._batch)
        self.programs[passes] = program
        return program

    def window(self, passes: str) -> timing.Window:
        """A window of steps; training steps move the state on."""
        program = self.programs[passes]

        def train_step():
            self._state, metrics = program.call(self._state, self._batch)
            self._load = metrics.router_stats
            return metrics

        def forward_backward():
            gradients, (loss, self._load) = program.call(
                self._state.params, self._state.router_state, self._batch
            )
            return gradients, loss

        return timing.window_of(train_step if passes == "train_step" else forward_backward)

    def max_over_mean(self) -> float | None:
        """Load of the fullest expert over the mean in the last step, the mean over the layers;
        None for a dense model."""
        stats = stack_layers(jax.device_get(self._load))
        if not stats:
            return None
        load = stats["load"]
        return float((load.max(axis=1) / load.mean(axis=1)).mean())


def _forward_backward(config: ModelConfig, params, router_state, batch: Batch):
    """Gradients of the training loss; the loss and the routers' sums beside them."""
    part = jax.tree.map(lambda values: values[0], batch)

    def objective(params):
        with axis_rules():
            out = Transformer(config).apply(
                {"params": params, "router_state": router_state}, part.tokens, part.targets,
                part.segment_ids, part.positions, train=True, mtp=True,
                method=Transformer.loss, rngs={"router": jax.random.key(0)},
            )  # fmt: skip
        loss = out.nll / out.targets + out.aux_loss
        return loss if out.mtp is None else loss + MTP_WEIGHT * out.mtp.loss, out

    gradients, out = jax.grad(objective, has_aux=True)(params)
    return gradients, (out.nll / out.targets, out.router_stats)
