"""A look into a trained model's routers from outside, by Linen's interceptors: no layer knows.

What a router decides is captured as its module's output, and what it would decide without a token's
best experts is had by masking their logits on the way. Programs run on the current mesh.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Bool, Float, Int

from moejax.models import ModelConfig, Transformer
from moejax.models.layers import compute_dtype
from moejax.moe.experts import apply_batched, held_experts
from moejax.moe.layer import MoELayer
from moejax.moe.routers import Router, Routing
from moejax.moe.routers.rows import GatheredRows, TokenRows
from moejax.parallel import axis_rules

# A logit that no score function lets through, and whose square is still a number.
MASKED = -1e9


@struct.dataclass
class Observation:
    """What a model did with a batch.

    Attributes:
      nll: summed negative log-likelihood of the targets.
      targets: how many there are.
      prediction: the likeliest next token.
      router_stats: sums over tokens, by segment and layer.
      layers: by segment and layer, leading axis of repeats: ``sample`` (n, D), the MoE layer's
        input at the sampled tokens, and ``chosen`` (T, E), whether a token runs through an expert;
        without ``chosen`` where rows are mixtures of tokens.
    """

    nll: Float[Array, ""]
    targets: Float[Array, ""]
    prediction: Int[Array, "B S"]
    router_stats: Any
    layers: Any


@functools.partial(jax.jit, static_argnames="config")
def observe(
    config: ModelConfig,
    variables: dict[str, Any],
    batch: dict[str, Int[Array, "B S"]],
    sample: Int[Array, " n"],
    masked: Int[Array, ""] | int = 0,
) -> Observation:
    """Runs a model over a batch as in use (``train=False``) and records its routing.

    MTP modules run too, on the text itself; their layers are among the others.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      batch: ``tokens``, ``targets``, ``segment_ids`` and ``positions``.
      sample: tokens, counted through the batch, whose layer inputs are recorded.
      masked: best experts of each token that its routers may not choose; see ``masking``.
    """
    wanted = lambda module, method: (
        method == "__call__" and (isinstance(module, Router) or module.name == "ffn_norm")
    )
    with axis_rules(), masking(masked):
        (output, _), captured = Transformer(config).apply(
            variables, batch["tokens"], batch["targets"], batch["segment_ids"],
            batch["positions"], method=Transformer.encode_ahead, capture_intermediates=wanted,
            mutable=["intermediates"],
        )  # fmt: skip
    params = variables["params"]
    head = params["embedding"].T if config.tie_embeddings else params["head"]

    def row(_, part):
        hidden, target, weight = part
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        right = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        nll = jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - right))
        return None, (nll, jnp.argmax(logits, axis=-1))

    # Row by row, so that the logits of a whole batch never exist.
    weights = (batch["segment_ids"] > 0).astype(jnp.float32)
    _, (nll, prediction) = jax.lax.scan(row, None, (output.hidden, batch["targets"], weights))
    layers = {}
    for segment, of_segment in captured["intermediates"].items():
        for layer, seen in of_segment.items():
            if "moe" in seen:
                found = _look(seen, config.moe.num_experts, sample)
                layers.setdefault(segment, {})[layer] = found
    return Observation(jnp.sum(nll), jnp.sum(weights), prediction, output.router_stats, layers)


def _look(seen: dict[str, Any], num_experts: int, sample: Int[Array, " n"]) -> dict[str, Array]:
    """What ``Observation.layers`` holds of a layer, from what was captured of it."""
    x = seen["ffn_norm"]["__call__"][0]
    # A router that calls its base class's __call__ is captured twice, itself last.
    routing = seen["moe"]["router"]["__call__"][-1]
    tokens = x.shape[1] * x.shape[2]
    found = {"sample": x.reshape(len(x), tokens, -1)[:, sample]}
    if isinstance(routing.rows, (TokenRows, GatheredRows)):
        chosen = functools.partial(chosen_experts, tokens=tokens, num_experts=num_experts)
        found["chosen"] = jax.vmap(chosen)(routing)
    return found


def chosen_experts(routing: Routing, tokens: int, num_experts: int) -> Bool[Array, "T E"]:
    """Whether each token runs through each expert, where rows are tokens or are picked from them.

    Args:
      routing: a router's decision.
      tokens: T.
      num_experts: E.
    """
    if isinstance(routing.rows, GatheredRows):
        groups = len(routing.rows.token)
        first = jnp.arange(groups)[:, None] * (tokens // groups)
        token = (first + routing.rows.token).reshape(-1)
    else:
        token = jnp.arange(tokens)
    empty = jnp.zeros((tokens, num_experts + 1), bool)
    return empty.at[token[:, None], routing.expert].set(True)[:, :num_experts]


@contextlib.contextmanager
def masking(number: Int[Array, ""] | int) -> Iterator[dict[str, bool]]:
    """While a model runs, its routers may not choose each token's best experts.

    The ``number`` largest logits of each token are masked before the router scores them, so the
    next best take their place and K stays (DeepSeekMoE, arXiv 2401.06066, section 4.5). A masked
    expert that a selection bias still lifts above the others is taken out of the routing; such a
    token runs through fewer than K.

    Args:
      number: how many; 0 changes nothing. It may be traced.

    Yields:
      A mapping whose ``possible`` says, once the model ran, whether that worked for all routers:
      whether they score by ``Router.logits``, and rows are tokens.
    """
    done = {"possible": True}
    masks: list[Bool[Array, "T N"] | None] = []

    def intercept(next_function, args, kwargs, context):
        module, method = context.module, context.method_name
        if not isinstance(module, Router):
            return next_function(*args, **kwargs)
        if method == "logits" and masks:
            logits = next_function(*args, **kwargs)
            masks[-1] = _best(logits, number)
            return jnp.where(masks[-1], MASKED, logits)
        if method != "__call__" or masks:  # masks: a base class's __call__ within a router's
            return next_function(*args, **kwargs)
        masks.append(None)
        try:
            routing = next_function(*args, **kwargs)
        finally:
            mask = masks.pop()
        if mask is None or not isinstance(routing.rows, TokenRows):
            done["possible"] = False
            return routing
        return _without(routing, mask, module.num_experts)

    with nn.intercept_methods(intercept):
        yield done


def _best(logits: Float[Array, "T N"], number: Int[Array, ""] | int) -> Bool[Array, "T N"]:
    """The largest logits of each token; ``moejax.analysis.routing.best_choices``, traced."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True) < number


def _without(routing: Routing, mask: Bool[Array, "T N"], num_experts: int) -> Routing:
    """A routing with the masked assignments taken out."""
    none = jnp.zeros((len(mask), 1), bool)
    hit = jnp.take_along_axis(
        jnp.concatenate([mask[:, :num_experts], none], axis=1), routing.expert, axis=1
    )
    expert = jnp.where(hit, num_experts, routing.expert)
    return routing.replace(expert=expert, gate=jnp.where(hit, 0.0, routing.gate))


def can_mask(config: ModelConfig, variables: Any, batch: Any) -> bool:
    """Whether ``masking`` works on all of a model's routers; nothing is computed."""

    def run(variables, batch):
        with axis_rules(), masking(0) as done:
            Transformer(config).apply(
                variables, batch["tokens"], batch["segment_ids"], batch["positions"],
                method=Transformer.encode,
            )  # fmt: skip
        possible.append(done["possible"])
        return 0

    possible: list[bool] = []
    jax.eval_shape(run, variables, batch)
    return possible[0]


@functools.partial(jax.jit, static_argnames="config")
def router_gradients(
    config: ModelConfig,
    variables: dict[str, Any],
    batch: dict[str, Int[Array, "B S"]],
    weights: Float[Array, "2"],
) -> dict[tuple[str, ...], Float[Array, "repeats ..."]]:
    """Gradients of the routers' parameters on a batch, routed as in use.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      batch: as for ``observe``.
      weights: of the mean cross-entropy, to which that of MTP modules is added in full, and of the
        sum of the auxiliary losses.

    Returns:
      By path, segment and layer first; empty where routers have no parameters.
    """
    flat = traverse_util.flatten_dict(variables["params"])
    routers = {path: leaf for path, leaf in flat.items() if path[2:4] == ("moe", "router")}

    def objective(routers):
        params = traverse_util.unflatten_dict({**flat, **routers})
        out = Transformer(config).apply(
            {**variables, "params": params}, batch["tokens"], batch["targets"],
            batch["segment_ids"], batch["positions"], mtp=True, method=Transformer.loss,
        )  # fmt: skip
        loss = out.nll / jnp.maximum(out.targets, 1)
        loss = loss if out.mtp is None else loss + out.mtp.loss
        return weights[0] * loss + weights[1] * out.aux_loss

    with axis_rules():
        return jax.grad(objective)(routers)


@functools.partial(jax.jit, static_argnames="config")
def expert_outputs(
    config: ModelConfig, layer: dict[str, Any], x: Float[Array, "n D"]
) -> Float[Array, "E n D"]:
    """The output of every expert of one MoE layer on the same tokens, in float32.

    Args:
      config: the model's config.
      layer: parameters of that layer's ``moe``.
      x: inputs of the MoE layer, as ``Observation.layers`` samples them; a router's factor on the
        experts' input is not applied.
    """
    moe, dtype = config.moe, compute_dtype(config.dtype)
    width, low = moe.latent_dim or x.shape[-1], config.precision == "fp8"
    experts = MoELayer.make_experts(moe)
    held = {"params": layer["experts"]}
    weights, _ = experts.apply(held, width, jnp.dtype("float32") if low else dtype)
    weights = held_experts(weights) if low else weights
    rows = x.astype(dtype)
    if moe.latent_dim:
        rows = rows @ layer["latent_in"].astype(dtype)
    outputs = apply_batched(weights, jnp.broadcast_to(rows, (moe.num_experts, *rows.shape)))
    if moe.latent_dim:
        outputs = outputs @ layer["latent_out"].astype(dtype)
    return outputs.astype(jnp.float32)
