"""The same tokens through several routers: who goes where, and how evenly."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from moejax.analysis.figures import panel
from moejax.analysis.probe import chosen_experts
from moejax.analysis.routing import expert_load
from moejax.cost import text
from moejax.moe import router_options
from moejax.moe.diagnostics import dead_experts, max_violation
from moejax.moe.routers import RouterInputs, Routing, find

TOKENS, D_MODEL, EXPERTS, TOP_K = 48, 32, 16, 2


@functools.cache
def inputs() -> RouterInputs:
    """One sequence of token vectors that share a direction, with ids drawn from 20."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, TOKENS, D_MODEL)) + 0.6 * rng.standard_normal(D_MODEL)
    ids = rng.integers(0, 20, (1, TOKENS))
    return RouterInputs(
        jnp.asarray(x, jnp.float32), jnp.ones((1, TOKENS), bool), jnp.asarray(ids),
        jnp.arange(TOKENS)[None], jnp.ones((1, TOKENS), int), train=True,
    )  # fmt: skip


@functools.cache
def decide(name: str) -> Routing:
    """An untrained router's decision in training, its state as it begins.

    Args:
      name: of a router that sees no experts.
    """
    router = find(name)(router_options({"name": name}), EXPERTS, TOP_K)
    init, draw = jax.random.split(jax.random.key(0))

    def run(inputs):
        rngs = {"params": init, "router": draw}
        return router.init_with_output(rngs, inputs)[0]

    return jax.device_get(nn.meta.unbox(jax.jit(run)(inputs())))


def gates(name: str) -> Float[np.ndarray, "T E"]:
    """Gate of each token and expert, 0 where the token does not go."""
    routing = decide(name)
    chosen = np.asarray(chosen_experts(routing, TOKENS, EXPERTS))
    if len(routing.expert) != TOKENS:
        return chosen.astype(np.float32)  # rows are picked from the tokens; who, not how much
    full = np.zeros((TOKENS, EXPERTS + 1), np.float32)
    np.put_along_axis(full, routing.expert, routing.gate, axis=1)
    return full[:, :EXPERTS]


def table(names: Sequence[str]) -> str:
    """For each router: experts a token, fewest and most; MaxVio; dead experts; causality."""
    rows = [["router", "experts a token", "MaxVio", "dead", "causal"]]
    for name in names:
        chosen = np.asarray(chosen_experts(decide(name), TOKENS, EXPERTS))
        each, load = chosen.sum(axis=1), expert_load(chosen)
        rows.append([
            name, f"{each.min()} to {each.max()}", f"{max_violation(load):.2f}",
            str(dead_experts(load)), "no" if find(name).Options.leaks else "yes",
        ])  # fmt: skip
    return text.columns(rows)


def plot(names: Sequence[str]) -> Figure:
    """A panel a router: tokens down, experts across, dark where the gate is large."""
    figure, panels = panel(1.75 * len(names), 3.6, columns=len(names))
    for axes, name in zip(panels, names, strict=True):
        values = gates(name)
        axes.imshow(values / max(values.max(), 1e-9), aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        axes.set(xticks=[], yticks=[], xlabel="experts")
        axes.set_title(name, fontsize=9)
    panels[0].set_ylabel("tokens")
    return figure
