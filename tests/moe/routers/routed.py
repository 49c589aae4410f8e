"""A router inside a layer, run by one compiled program: what the tests of all routers share."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError
from moejax.moe import MoEConfig
from moejax.moe.layer import MoELayer
from moejax.moe.routers import Router, RouterInputs, RouterOptions, Routing

# No width of a router's parameters is the number of experts by accident.
ROWS, LENGTH, WIDTH, EXPERTS, HIDDEN, RANK, VOCAB = 8, 8, 20, 8, 12, 4, 32
VALID = np.arange(LENGTH)[None] < np.array([[8], [5], [8], [0], [8], [7], [8], [1]])
# In the first row, tokens from here on are changed; a second document begins two before.
CHANGED = 5


def _without_emitters():
    """An option of XLA that two thirds of the time hang on; none where it is not known."""
    options = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(jnp.negative).lower(0.0).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


QUICK = _without_emitters()


@dataclasses.dataclass(frozen=True)
class Case:
    """A router with all that its tests look at.

    Attributes:
      name: its name.
      config: of the layer around it.
      first: random parameters, and the router's state as it begins.
      variables: the same after one update of the router's state.
      inputs: what is routed.
      eager: the layer's output and the decision of ``first``, in evaluation, not compiled.
      run: the compiled program; see ``program``.
      out: what it gives for ``variables`` and ``inputs``.
    """

    name: str
    config: MoEConfig
    first: dict
    variables: dict
    inputs: RouterInputs
    eager: tuple
    run: Callable[..., dict]
    out: dict

    @property
    def options(self) -> RouterOptions:
        return self.config.router


def fits(options: RouterOptions, top_k: int) -> bool:
    """Whether a router takes this many experts a token."""
    try:
        options.check(EXPERTS, top_k)
    except ConfigError:
        return False
    return True


def layer_config(options: RouterOptions) -> MoEConfig:
    """A small layer with what the router needs: two experts a token, or one."""
    return MoEConfig(
        num_experts=EXPERTS, top_k=2 if fits(options, 2) else 1, d_expert=HIDDEN,
        dispatch="dense_loop", exchange="none", capacity_factor=float(EXPERTS),
        allow_leak=options.leaks, gate_rank=RANK if options.needs_gate_rank else 0, router=options,
    )  # fmt: skip


def make_inputs(options: RouterOptions) -> RouterInputs:
    """Tokens with ids, documents and padding; the last layer's logits where they are read."""
    rng = np.random.default_rng(0)
    normal = lambda size: jnp.asarray(rng.normal(size=(ROWS, LENGTH, size)), jnp.float32)
    # Values that bfloat16 has too, so that only what is done with them can differ.
    x = normal(WIDTH).astype(jnp.bfloat16).astype(jnp.float32)
    ids = rng.integers(0, VOCAB, (ROWS, LENGTH))
    segments, positions = np.where(VALID, 1, 0), np.tile(np.arange(LENGTH), (ROWS, 1))
    segments[0, CHANGED - 2 :] += 1
    positions[0, CHANGED - 2 :] -= CHANGED - 2
    integers = (jnp.asarray(values, jnp.int32) for values in (ids, positions, segments))
    logits = normal(options.num_choices(EXPERTS)) if options.carries_logits else None
    return RouterInputs(x, jnp.asarray(VALID), *integers, logits, jnp.zeros((), jnp.int32))


def route(config, variables, inputs, key=None, begin=False):
    """The layer's output, its router's decision and, to begin with, the router's state."""
    found, rngs = [], {} if key is None else {"router": key}

    def keep(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, Router) and isinstance(out, Routing):
            found.append(out)
        return out

    with nn.intercept_methods(keep):
        mutable = ["router_state"] if begin else False
        out = MoELayer(config).apply(variables, inputs, rngs=rngs, mutable=mutable)
    return (out[0], found[-1], dict(out[1])) if begin else (out, found[-1])


def shapes(config, inputs):
    """Shapes of a layer's variables, in their sharding boxes."""
    keys = {"params": jax.random.key(0), "router": jax.random.key(1)}
    return dict(jax.eval_shape(MoELayer(config).init, keys, inputs))


def cotangent():
    return jax.random.normal(jax.random.key(3), (ROWS, LENGTH, WIDTH))


@functools.cache
def program(config):
    """Jitted (variables, inputs, key) -> what a layer does in training and in evaluation."""

    def run(variables, inputs, cotangent, key):
        def objective(params, x):
            given = inputs.replace(x=x, train=True)
            out, routing = route(config, {**variables, "params": params}, given, key)
            return jnp.sum(out.y * cotangent) + out.aux_loss, (out, routing)

        gradients, train = jax.grad(objective, (0, 1), has_aux=True)(variables["params"], inputs.x)
        halved = inputs.replace(x=inputs.x.astype(jnp.bfloat16))
        return {
            "train": train,
            "evaluation": route(config, variables, inputs),
            "gradients": gradients,
            "bfloat16": route(config, variables, halved)[1],
        }

    compiled = jax.jit(run, compiler_options=QUICK)

    def call(variables, inputs, key=0):
        return jax.device_get(compiled(variables, inputs, cotangent(), jax.random.key(key)))

    return call


def changed_tokens(case, where, seed=1):
    """What the program gives where tokens, their ids and carried logits are others."""
    rng, inputs = np.random.default_rng(seed), case.inputs
    spread = lambda values: np.where(where[..., None], 3 * rng.normal(size=values.shape), values)
    other = lambda values: jnp.asarray(spread(values), jnp.float32)
    ids = np.where(where, rng.integers(0, VOCAB, where.shape), inputs.tokens)
    logits = inputs.previous_logits
    inputs = inputs.replace(
        x=other(inputs.x), tokens=jnp.asarray(ids, jnp.int32),
        previous_logits=None if logits is None else other(logits),
    )  # fmt: skip
    return case.run(case.variables, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def dispatched(dispatch, gate_rank, variables, inputs, routing):
    """A layer's output for a given decision; compiled once however many routers decide so."""

    def given(call, args, kwargs, context):
        is_router = isinstance(context.module, Router) and context.method_name == "__call__"
        return routing if is_router else call(*args, **kwargs)

    config = MoEConfig(
        num_experts=EXPERTS, top_k=2, d_expert=HIDDEN, dispatch=dispatch, exchange="none",
        capacity_factor=float(EXPERTS), gate_rank=gate_rank,
    )  # fmt: skip
    with nn.intercept_methods(given):
        out = MoELayer(config).apply(variables, inputs)
    return out.y, out.stats["dropped"]
