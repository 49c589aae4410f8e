"""Upcycling: a dense model made into an MoE model that computes the same at first.

Each dense feed-forward of width F is cut into G = F / ``moe.d_expert`` shards, and each shard is
copied to equally many routed experts. With G = 1 that is Sparse Upcycling (arXiv 2212.05055), with
more the fine-grained kind of virtual groups (arXiv 2410.07524, section 3).

Experts are laid out copy after copy, so that a **virtual group**, G neighbours, holds every shard
once. The router has one random column a group, the same for its G experts: their scores are equal,
so the top K = m · G takes m whole groups, each shard m times. The products with the down
projections are linear, and these are multiplied by one number, G over the sum of a token's gates,
so that the sum over the chosen is the dense output:

- where gates are renormalised, they sum to ``routed_scale`` for every token whatever the router
  says, and the outputs agree to rounding;
- where they are not, their sum is the same for all tokens only while the router tells nothing: so
  its columns begin as small as float32 can still tell apart, and the outputs agree to about 1e-6.

The paper scales experts' weights for the same reason, and trains routers whose gates do vary: set
``router_std`` for that, and the equality is one of averages.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import ConfigError, check, check_not_negative, check_positive
from moejax.interop.config_map import kinds_of, runs
from moejax.models import ModelConfig
from moejax.models.model_config import Segment, has_window, is_moe
from moejax.moe import MoEConfig
from moejax.moe.routers import find
from moejax.moe.routers.top_k import TopKRouter, gates, score

Tree = Any

# Deviation of a router's weights: Sparse Upcycling's. Of its logits, where gates should not vary.
ROUTER_STD, QUIET_LOGIT_STD = 0.02, 2e-6


@dataclasses.dataclass(frozen=True)
class UpcycleOptions:
    """How a dense model becomes an MoE model.

    Attributes:
      moe: the MoE layers. ``d_expert`` has to divide the dense width F; G = F / d_expert shards, of
        which the first ``num_shared_experts`` become the shared expert, which every token runs
        through, and the others are copied to ``num_experts`` routed ones.
      first_k_dense: layers that stay dense before the first MoE layer.
      every: of the layers after those, every n-th becomes an MoE layer, the n-th first.
      segments: the new model's layers spelled out instead, as ``model.segments`` is.
      router_std: deviation of the router's weights; 0 means 0.02 where gates are renormalised, else
        what makes logits deviate by 2e-6, for the sake of equality at the first step.
      noise: deviation of the noise added to each expert's matrices, over that of the matrix; it
        ends the equality.
    """

    moe: MoEConfig
    first_k_dense: int = 0
    every: int = 1
    segments: tuple[Segment, ...] = ()
    router_std: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_positive("upcycle", self, "every")
        check_not_negative("upcycle", self, "first_k_dense", "router_std", "noise")


def upcycle(
    model_config: ModelConfig, variables: Tree, options: UpcycleOptions, key: Array
) -> tuple[ModelConfig, Tree]:
    """Makes an MoE model of a dense one, with the same outputs if ``noise`` is 0.

    Attention, norms, embedding and head are taken as they are, and so are layers that stay dense;
    MTP modules follow the last layer's kind. The equality holds for a dispatcher that drops
    nothing, and to the rounding of the parameters' type.

    Args:
      model_config: a dense model.
      variables: its ``params``.
      options: what is wanted.
      key: of the routers' columns and the noise.

    Returns:
      The MoE model's config, and its ``params`` and ``router_state``.

    Raises:
      ConfigError: a source with MoE layers, a width that the experts' does not divide, experts or
        top-k that are no multiple of the routed shards, or a router whose gates are not those of
        a plain top-k.
    """
    plan = _Plan.make(model_config, options)
    config = plan.config
    source = _unstacked(variables["params"], model_config.layout)
    params = {name: value for name, value in variables["params"].items() if "segment_" not in name}
    kinds = kinds_of(config.layout)
    layers = [
        plan.layer(layer, jax.random.fold_in(key, i)) if is_moe(kind) else layer
        for i, (layer, kind) in enumerate(zip(source, kinds, strict=True))
    ]
    params |= _stacked(layers, config.layout)
    if is_moe(config.mtp_kind):
        for k in range(config.mtp_depth):
            (layer,) = _unstacked({"segment_0": params[f"mtp_{k}_layer"]}, ((("dense",), 1),))
            layer = plan.layer(layer, jax.random.fold_in(key, len(layers) + k))
            params[f"mtp_{k}_layer"] = _stacked([layer], ((("moe",), 1),))["segment_0"]
    return config, {"params": params, "router_state": plan.router_state(params)}


def upcycled_config(model_config: ModelConfig, options: UpcycleOptions) -> ModelConfig:
    """The config of the model that ``upcycle`` makes; raises as it does."""
    return _Plan.make(model_config, options).config


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is made of each dense layer.

    Attributes:
      config: the new model.
      options: the user's.
      shards: G, shared ones included.
      factor: on the routed experts' down projections.
      router_std: of the router's columns.
    """

    config: ModelConfig
    options: UpcycleOptions
    shards: int
    factor: float
    router_std: float

    @classmethod
    def make(cls, source: ModelConfig, options: UpcycleOptions) -> "_Plan":
        moe, width = options.moe, source.dense_width
        check(
            not source.layers("moe"), "model", "MoE",
            "the model to upcycle already has MoE layers; give a dense one",
        )  # fmt: skip
        check(
            width % moe.d_expert == 0, "moe.d_expert", moe.d_expert,
            f"does not divide the dense layers' width {width}; choose a divisor",
        )  # fmt: skip
        shards = width // moe.d_expert
        _check_experts(moe, shards)
        config = dataclasses.replace(
            source, moe=moe, d_ff=width, first_k_dense=0, segments=_layout(source, options)
        )
        gate_sum, renormalised = _gate_sum(moe)
        quiet = QUIET_LOGIT_STD * source.d_model**-0.5
        std = options.router_std or (ROUTER_STD if renormalised else quiet)
        factor = (shards - moe.num_shared_experts) / gate_sum
        return cls(config, options, shards, factor, std)

    def layer(self, layer: Tree, key: Array) -> Tree:
        """An MoE layer of one dense layer's parameters (without the leading axis of a scan)."""
        rest = {name: value for name, value in layer.items() if name != "ffn"}
        return {**rest, "moe": self._moe(layer["ffn"], key)}

    def _moe(self, ffn: Tree, key: Array) -> Tree:
        moe, shards = self.config.moe, self.shards
        d_model, dtype, shared = ffn["gate_up"].shape[0], ffn["gate_up"].dtype, None
        # By shard: (G, D, 2, f) and (G, f, D).
        gate_up = jnp.moveaxis(ffn["gate_up"].reshape(d_model, 2, shards, -1), 2, 0)
        down = ffn["down"].reshape(shards, -1, d_model)
        if moe.num_shared_experts:
            first = moe.num_shared_experts * moe.d_expert
            # A shared gate begins as sigmoid(0) for every token: the factor 2 undoes it.
            undo = 2.0 if moe.shared_gate else 1.0
            shared = {"gate_up": ffn["gate_up"][..., :first], "down": undo * ffn["down"][:first]}
        routed = shards - moe.num_shared_experts
        copies = moe.num_experts // routed
        gate_up, down = gate_up[-routed:], down[-routed:] * jnp.asarray(self.factor, dtype)
        repeat = lambda leaf: jnp.tile(leaf, (copies,) + (1,) * (leaf.ndim - 1))
        keys = jax.random.split(key, 3)
        experts = {
            "gate_up": self._noisy(repeat(gate_up), keys[0]),
            "down": self._noisy(repeat(down), keys[1]),
        }
        if moe.expert_bias:
            experts["gate_up_bias"] = jnp.zeros((moe.num_experts, 2, moe.d_expert), dtype)
            experts["down_bias"] = jnp.zeros((moe.num_experts, d_model), dtype)
        found = {"experts": experts, "router": self._router(d_model, copies, routed, keys[2])}
        if shared is not None:
            found["shared"] = shared
        if moe.shared_gate:
            found["shared_gate"] = jnp.zeros((d_model, 1), dtype)
        return found

    def _noisy(self, experts: Float[Array, "E ..."], key: Array) -> Float[Array, "E ..."]:
        if not self.options.noise:
            return experts
        axes = tuple(range(1, experts.ndim))
        std = self.options.noise * jnp.std(experts.astype(jnp.float32), axes, keepdims=True)
        noise = std * jax.random.normal(key, experts.shape)
        return (experts.astype(jnp.float32) + noise).astype(experts.dtype)

    def _router(self, d_model: int, copies: int, routed: int, key: Array) -> Tree:
        """One column a virtual group, repeated for its shards."""
        columns = self.router_std * jax.random.normal(key, (d_model, copies))
        router = {"kernel": jnp.repeat(columns, routed, axis=1)}
        if self.config.moe.router.logit_bias:
            router["logit_bias"] = jnp.zeros(self.config.moe.num_experts)
        return router

    def router_state(self, params: Tree) -> Tree:
        """What the routers keep at the beginning, by segment and layer; empty without a bias."""
        moe, state = self.config.moe, {}
        initial = moe.router.rule.initial(moe.num_experts)
        for part, layers in params.items():
            if not initial or not part.startswith(("segment_", "mtp_")):
                continue
            for name, layer in layers.items():
                if "moe" not in layer:
                    continue
                repeats = len(layer["moe"]["router"]["kernel"])
                repeat = lambda leaf, n=repeats: jnp.tile(leaf[None], (n,) + (1,) * leaf.ndim)
                router = jax.tree.map(repeat, initial)
                state.setdefault(part, {})[name] = {"moe": {"router": router}}
        return state


def _check_experts(moe: MoEConfig, shards: int) -> None:
    """Refuses layers that cannot begin as the dense one."""
    kind = find(moe.router.name)
    plain = issubclass(kind, TopKRouter) and kind.__call__ is TopKRouter.__call__
    plain = plain and moe.router.num_choices(moe.num_experts) == moe.num_experts
    check(
        plain, "router.name", moe.router.name,
        "has gates that no factor makes sum to 1; use mixtral, deepseek_v3, softmax_topk or "
        "another of plain top-k",
    )  # fmt: skip
    for name, value, default in (
        ("latent_dim", moe.latent_dim, 0), ("gate_rank", moe.gate_rank, 0),
        ("activation", moe.activation, "swiglu"),
    ):  # fmt: skip
        check(
            value == default, f"moe.{name}", value,
            f"gives experts another form than the dense layers'; set it to {default!r}",
        )  # fmt: skip
    routed = shards - moe.num_shared_experts
    check(
        routed > 0, "moe.num_shared_experts", moe.num_shared_experts,
        f"leaves no routed shard of the {shards} that moe.d_expert = {moe.d_expert} makes; choose "
        "fewer shared experts, or narrower ones",
    )  # fmt: skip
    for name in ("num_experts", "top_k"):
        value = getattr(moe, name)
        check(
            value % routed == 0, f"moe.{name}", value,
            f"is no multiple of the {routed} routed shards that a dense layer is cut into; choose "
            "a multiple, or another moe.d_expert",
        )  # fmt: skip
    o = moe.router
    check(
        o.groups_kept == o.num_groups or (moe.num_experts // o.num_groups) % routed == 0,
        "router.num_groups", o.num_groups,
        f"cuts virtual groups of {routed} experts apart; choose groups that hold whole ones",
    )  # fmt: skip


def _gate_sum(moe: MoEConfig) -> tuple[float, bool]:
    """The sum of a token's gates while logits are equal, and whether it is so for any logits."""
    o = moe.router
    scores = score(o.score, jnp.zeros((1, moe.num_experts)))
    chosen = gates(scores, jnp.arange(moe.top_k)[None], o.normalize_gates, o.routed_scale)
    return float(jnp.sum(chosen)), o.normalize_gates


def _layout(source: ModelConfig, options: UpcycleOptions) -> tuple[Segment, ...]:
    """The new model's segments: given, or from the source's layers."""
    before = kinds_of(source.layout)
    if options.segments:
        after = kinds_of(options.segments)
        same = [has_window(kind) for kind in before] == [has_window(kind) for kind in after]
        check(
            same, "model.segments", options.segments,
            f"are not the dense model's {len(before)} layers, windows included; make them agree",
        )  # fmt: skip
        segments = options.segments
    else:
        first, every = options.first_k_dense, options.every
        chosen = lambda i: i >= first and (i - first) % every == every - 1
        after = [k.replace("dense", "moe") if chosen(i) else k for i, k in enumerate(before)]
        segments = runs(after)
    if not any(map(is_moe, after)):
        raise ConfigError(
            "upcycle.every", options.every,
            f"with first_k_dense = {options.first_k_dense} leaves no MoE layer among "
            f"{len(before)}; choose less",
        )  # fmt: skip
    return segments


def _unstacked(params: Tree, layout: tuple[Segment, ...]) -> list[Tree]:
    """Parameters layer by layer, without the scans' leading axis."""
    layers = []
    for i, (kinds, repeats) in enumerate(layout):
        for n in range(repeats):
            take = functools.partial(jax.tree.map, lambda leaf, n=n: leaf[n])
            layers += [take(params[f"segment_{i}"][f"layer_{j}"]) for j in range(len(kinds))]
    return layers


def _stacked(layers: list[Tree], layout: tuple[Segment, ...]) -> Tree:
    """The other way round: ``segment_i/layer_j``, repeats in front."""
    params, at = {}, 0
    for i, (kinds, repeats) in enumerate(layout):
        part, size = {}, len(kinds)
        for j in range(size):
            own = [layers[at + n * size + j] for n in range(repeats)]
            part[f"layer_{j}"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
        params[f"segment_{i}"] = part
        at += size * repeats
    return params
