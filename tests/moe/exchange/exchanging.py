"""One exchange, its values and every gradient, compiled once a mesh; routing is data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.moe.dispatch import dense_loop, dispatch
from moejax.moe.dispatch.grouped import grouped
from moejax.moe.exchange import BATCH_AXES, exchange
from moejax.moe.exchange.placement import rows_in_reach
from moejax.moe.experts import ExpertWeights
from moejax.parallel import MeshConfig, make_mesh, spec

BATCH, LENGTH, EXPERTS, TOP_K, WIDTH, HIDDEN = 8, 8, 8, 2, 16, 8
TOKENS = BATCH * LENGTH

MESHES = {
    "expert 2": MeshConfig(expert=2),
    "fsdp 2 x expert 2": MeshConfig(fsdp=2, expert=2),
    "expert 4": MeshConfig(expert=4),
    "data 2 x expert 2 x tensor 2": MeshConfig(data=2, expert=2, tensor=2),
    "fsdp 2 x expert 4": MeshConfig(fsdp=2, expert=4),
    "expert 8": MeshConfig(expert=8),
}


@functools.cache
def inputs(form="plain"):
    """x (B, S, D), gate (T, K), distinct experts' weights and a cotangent of the outputs.

    Args:
      form: ``plain``, or ``gpt-oss``: with biases and its activation.
    """
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weights = ExpertWeights(
        normal(EXPERTS, WIDTH, 2, HIDDEN) * WIDTH**-0.5, normal(EXPERTS, HIDDEN, WIDTH)
    )
    x, cotangent = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH)
    gate = rng.uniform(0.1, 1, (TOKENS, TOP_K)).astype(np.float32)
    if form == "gpt-oss":
        weights = weights.replace(
            gate_up_bias=5 * normal(EXPERTS, 2, HIDDEN), down_bias=normal(EXPERTS, WIDTH),
            activation="clamped_swiglu",
        )  # fmt: skip
    return x, gate, weights, cotangent


def draw(rng, chance, padding=0.1):
    """Two different experts a token, drawn with the chances given; some tokens are padding."""
    chance = np.asarray(chance, np.float64) / np.sum(chance)
    rows = [rng.choice(EXPERTS, TOP_K, replace=False, p=chance) for _ in range(TOKENS)]
    expert = np.stack(rows).astype(np.int32)
    expert[rng.random(TOKENS) < padding] = EXPERTS
    return expert


ROUTINGS = {
    "balanced": draw(np.random.default_rng(1), [1] * 8, padding=0),
    "skewed": draw(np.random.default_rng(2), [20, 1, 8, 1, 1, 1, 1, 1]),
    "all to one device": np.tile(np.array([[1, 0]], np.int32), (TOKENS, 1)),
    "all to the last device": np.tile(np.array([[6, 7]], np.int32), (TOKENS, 1)),
    "nothing but padding": np.full((TOKENS, TOP_K), EXPERTS, np.int32),
}


def place(mesh, x, gate, weights, cotangent):
    """The inputs laid out as a model's are: rows cut, weights cut over expert, fsdp and tensor."""
    put = lambda value, at: jax.device_put(value, NamedSharding(mesh, at))
    layout = weights.replace(
        gate_up=spec("expert", "embed", None, "mlp"), down=spec("expert", "mlp", "embed")
    )
    if weights.down_bias is not None:
        layout = layout.replace(
            gate_up_bias=spec("expert", None, "mlp"), down_bias=spec("expert", "embed")
        )
    return (
        put(x, P(BATCH_AXES)), put(gate, P(BATCH_AXES)), jax.tree.map(put, weights, layout),
        put(cotangent, P(BATCH_AXES)),
    )  # fmt: skip


@functools.cache
def compiled(mesh, kind="all_to_all", dispatcher="blocks", factor=1.0, exact=True, slots=0):
    """Jitted (x, expert, gate, weights, cotangent) -> ((outputs, rows beyond), gradients)."""

    def run(x, expert, gate, weights, cotangent):
        def objective(x, gate, weights):
            local = functools.partial(
                dispatch, dispatcher, slots=slots * rows_in_reach(kind, BATCH)
            )
            if dispatcher == "grouped":
                local = functools.partial(grouped, interpret=True)
            y, beyond = exchange(
                kind, local, x, expert, gate, weights, factor=factor, exact=exact
            )  # fmt: skip
            return jnp.sum(y * cotangent), (y, beyond)

        gradients, out = jax.grad(objective, (0, 1, 2), has_aux=True)(x, gate, weights)
        return out, gradients

    return jax.jit(run)


def run(mesh, expert, form="plain", **options):
    """Outputs, rows beyond the first round, and gradients of x, gate and weights, on the host."""
    devices = make_mesh(MESHES[mesh])
    x, gate, weights, cotangent = place(devices, *inputs(form))
    with jax.set_mesh(devices):
        (y, beyond), gradients = compiled(mesh, **options)(
            x, jnp.asarray(expert), gate, weights, cotangent
        )
    return jax.device_get((y, gradients)), float(beyond)


@functools.cache
def _reference():
    def objective(x, gate, weights, expert, cotangent):
        y = dense_loop(x.reshape(TOKENS, WIDTH), expert, gate, weights).reshape(x.shape)
        return jnp.sum(y * cotangent), y

    return jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))


def reference(expert, form="plain"):
    """Outputs and gradients of the loop over all experts on one device."""
    x, gate, weights, cotangent = inputs(form)
    gradients, y = _reference()(x, gate, weights, jnp.asarray(expert), cotangent)
    return jax.device_get((y, gradients))


def check(mesh, expert, tolerance=1e-5, form="plain", **options):
    """Compares with the reference tensor by tensor; returns the rows beyond the first round."""
    got, beyond = run(mesh, expert, form, **options)
    tiny.assert_trees_close(got, reference(expert, form), tolerance)
    return beyond
