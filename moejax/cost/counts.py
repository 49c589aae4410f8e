"""Parameters, FLOPs and cache bytes of a model from its config alone: no device, no arrays.

FLOPs follow one convention throughout, the one that reproduces published figures: forward = 2 x the
matrix-product parameters that a token really passes, plus causal attention, in which a query sees
half of the sequence on average; training = 3 x forward. The head counts (when tied, too), the
embedding look-up does not; nor do biases, norms and sinks, which are no matrix products. MTP
modules count where the config has them (``model.mtp_depth``): a source that leaves them out is
compared with depth 0. Not counted: rematerialisation, padding, dropped capacity, optimizer.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from moejax.config import check
from moejax.cost.attention_counts import all_keys, attention_counts, mean_keys
from moejax.models.model_config import ModelConfig, has_window, is_moe

COMPONENTS = (
    "attention_projections",
    "attention_scores",
    "router",
    "routed_experts",
    "shared_experts",
    "dense_ffn",
    "norms",
    "embedding",
    "head",
    "mtp",
)
CACHE_BYTES = 2  # BF16
TRAIN_OVER_FORWARD = 3  # the backward pass costs twice the forward

# Keys that a query sees, from the length of a sequence and the layer's window.
Keys = Callable[[int, int], float]


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of the model, all layers together.

    Attributes:
      params: parameters held.
      active: of these, the ones that a token passes; no integer where a router's expected number
        of experts is none.
      forward: FLOPs per token of a forward pass.
    """

    params: int = 0
    active: float = 0
    forward: float = 0.0

    def times(self, layers: int) -> "Component":
        """The same in so many layers."""
        return Component(layers * self.params, layers * self.active, layers * self.forward)


Parts = dict[str, Component]


@dataclasses.dataclass(frozen=True)
class ActiveParams:
    """Parameters that one token passes, in the three conventions that publications use.

    Attributes:
      no_embedding: the layers and norms, neither embedding nor head.
      with_head: and the head's matrix, since it multiplies. A tied matrix counts here, once.
      with_embeddings: and the embedding's matrix. A tied matrix is there only once, so that this
        equals ``with_head`` when embeddings are tied.
    """

    no_embedding: int
    with_head: int
    with_embeddings: int


@dataclasses.dataclass(frozen=True)
class Params:
    """Parameter counts.

    Attributes:
      total: every parameter once (a tied matrix once), without MTP modules.
      active: those that a token passes, without MTP modules.
      mtp: parameters of multi-token-prediction modules that they do not share with the model.
      by_component: parameters held; the values add up to ``total`` + ``mtp``.
      active_by_component: parameters passed; the values add up to ``active.with_embeddings``.
    """

    total: int
    active: ActiveParams
    mtp: int
    by_component: dict[str, int]
    active_by_component: dict[str, int]


@dataclasses.dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs per token at one sequence length; a multiply-add is two.

    Attributes:
      train: three times ``forward``.
      forward: forward pass as in training, MTP modules included, with causal attention: s/2 keys a
        query, fewer in layers with a window.
      train_full_attention: ``train`` of a source that counts all s keys (6N + 12·L·H·hd·s), or the
        whole window.
      by_component: parts of ``forward``.
    """

    train: float
    forward: float
    train_full_attention: float
    by_component: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a model is and costs; see ``count``.

    Attributes:
      params: parameters.
      flops_per_token: FLOPs of a token.
      kv_cache_bytes_per_token: bytes of cached keys and values of a token, all layers, in BF16.
      seq_len: positions of a sequence that the FLOPs are for.
    """

    params: Params
    flops_per_token: FlopsPerToken
    kv_cache_bytes_per_token: int
    seq_len: int

    def to_dict(self) -> dict[str, Any]:
        """Nested JSON-ready dictionaries with the names of ``moejax plan --format=json``."""
        return dataclasses.asdict(self)


def count(model_config: ModelConfig, seq_len: int) -> Counts:
    """Counts a model's parameters, FLOPs and cache from its config.

    Args:
      model_config: the model.
      seq_len: positions of a sequence, s; attention's FLOPs grow with it.

    Returns:
      Counts for one model, per token, over all layers.

    Raises:
      ConfigError: a sequence length that is not above zero.
    """
    check(seq_len > 0, "train.seq_len", seq_len, "must be above zero")
    parts = _parts(model_config, seq_len, mean_keys)
    forward, full = (
        sum(part.forward for part in found.values())
        for found in (parts, _parts(model_config, seq_len, all_keys))
    )
    return Counts(
        params=_params(parts),
        flops_per_token=FlopsPerToken(
            train=TRAIN_OVER_FORWARD * forward,
            forward=forward,
            train_full_attention=TRAIN_OVER_FORWARD * full,
            by_component={name: part.forward for name, part in parts.items()},
        ),
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(model_config),
        seq_len=seq_len,
    )


def kv_cache_bytes_per_token(model_config: ModelConfig) -> int:
    """Bytes of cache that one token adds, in BF16.

    For each layer, the key and value of each KV head; with MLA, the latent and the turned key that
    all heads share. Layers with a window are counted like the others, though their bytes can go
    once the window has passed; MTP modules are not counted.
    """
    return attention_counts(model_config).cache_values * CACHE_BYTES * model_config.num_layers


def _params(parts: Parts) -> Params:
    active = {name: round(part.active) for name, part in parts.items()}
    everything = sum(active.values())
    # A tied matrix is filed under "head", where it multiplies, so the embedding's part is then 0.
    with_head = everything - active["embedding"]
    return Params(
        total=sum(part.params for part in parts.values()) - parts["mtp"].params,
        active=ActiveParams(with_head - active["head"], with_head, everything),
        mtp=parts["mtp"].params,
        by_component={name: part.params for name, part in parts.items()},
        active_by_component=active,
    )


def _parts(c: ModelConfig, seq_len: int, keys: Keys) -> Parts:
    """Every component, with the keys that a query sees counted by ``keys``."""
    kinds = collections.Counter()
    for pattern, repeats in c.layout:
        for kind in pattern:
            kinds[kind] += repeats
    parts = {name: Component() for name in COMPONENTS}
    for kind, layers in kinds.items():
        for name, part in _layer(c, kind, seq_len, keys).items():
            parts[name] = _sum([parts[name], part.times(layers)])
    matrix = c.vocab_size * c.d_model
    embedding = 0 if c.tie_embeddings else matrix
    parts["norms"] = _sum([parts["norms"], Component(c.d_model, c.d_model)])
    parts["embedding"] = Component(embedding, embedding)
    parts["head"] = _passed(matrix)
    parts["mtp"] = _mtp_module(c, seq_len, keys).times(c.mtp_depth)
    assert parts.keys() == set(COMPONENTS)
    return parts


def _layer(c: ModelConfig, kind: str, seq_len: int, keys: Keys) -> Parts:
    """One layer: attention with its two norms and those inside it, and the feed-forward."""
    attention = attention_counts(c)
    window = c.attention.window if has_window(kind) else 0
    norms = 2 * c.d_model + attention.norms
    projections = _passed(attention.matrices, vectors=attention.vectors)
    scores = Component(forward=2.0 * keys(seq_len, window) * attention.score_width)
    return {
        "attention_projections": projections,
        "attention_scores": scores,
        "norms": Component(norms, norms),
    } | (_moe(c) if is_moe(kind) else {"dense_ffn": _passed(_swiglu(c.d_model, c.dense_width))})


def _moe(c: ModelConfig) -> Parts:
    """Router, routed and shared experts of an MoE layer."""
    moe = c.moe
    router = moe.router.counts(c.d_model, moe.num_experts, moe.top_k)
    flops = router.flops_per_token
    if moe.router.needs_gate_rank:  # scored by every expert's first low-rank activation
        flops += 2.0 * moe.num_experts * (moe.latent_dim or c.d_model) * moe.gate_rank
    expert = expert_params(c)
    # The matrices between the model's width and the experts' own, which every token passes.
    latent = 2 * c.d_model * moe.latent_dim
    shared = _swiglu(c.d_model, moe.num_shared_experts * moe.d_expert)
    shared += c.d_model if moe.shared_gate else 0
    return {
        "router": Component(router.params, router.params, flops),
        "routed_experts": Component(
            moe.num_experts * expert.held + latent,
            router.expected_experts * (expert.multiplied + expert.bias) + latent,
            2.0 * (router.expected_experts * expert.multiplied + latent),
        ),
        "shared_experts": _passed(shared),
    }


def _mtp_module(c: ModelConfig, seq_len: int, keys: Keys) -> Component:
    """One multi-token-prediction module (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Parameters are those that it does not share: a layer of the last layer's kind, the projection
    of the normalised embedding and hidden state, three norms. Its FLOPs include its own pass
    through the shared head, as if it saw as many positions as the model. A token of the model
    itself does not pass it, so no parameter of it is active.
    """
    layer = _sum(_layer(c, c.mtp_kind, seq_len, keys).values())
    return Component(
        layer.params + mtp_surroundings(c, head=False) + 3 * c.d_model,
        0,
        layer.forward + 2.0 * mtp_surroundings(c),
    )


def mtp_surroundings(c: ModelConfig, head: bool = True) -> int:
    """Parameters that one MTP module multiplies around its layer.

    Args:
      c: the model.
      head: whether to count the shared head, beside the module's own projection.
    """
    return 2 * c.d_model * c.d_model + head * c.vocab_size * c.d_model


class ExpertParams(NamedTuple):
    """Parameters of a routed expert: held, of the matrices that a token multiplies, of its biases.

    The first is not the sum of the others where the gate projection is kept as two factors
    (``moe.gate_rank``), which are multiplied out once a step.
    """

    held: int
    multiplied: int
    bias: int


def expert_params(c: ModelConfig) -> ExpertParams:
    """Parameters of one routed expert of a model with MoE layers."""
    moe = c.moe
    width = moe.latent_dim or c.d_model
    multiplied = _swiglu(width, moe.d_expert)
    bias = 2 * moe.d_expert + width if moe.expert_bias else 0
    gate = width * moe.d_expert
    factors = moe.gate_rank * (width + moe.d_expert) if moe.gate_rank else gate
    return ExpertParams(multiplied - gate + factors + bias, multiplied, bias)


def routed_layers(c: ModelConfig) -> int:
    """MoE layers that a token passes in training, those of MTP modules included."""
    return c.layers("moe") + c.mtp_depth * is_moe(c.mtp_kind)


def routed_params(c: ModelConfig) -> int:
    """Parameters of all routed experts, those of MTP modules included."""
    if c.moe is None:
        return 0
    return routed_layers(c) * c.moe.num_experts * expert_params(c).held


def assignment_flops(c: ModelConfig) -> float:
    """Training FLOPs of one token in one routed expert: what a run is billed where they vary."""
    return 0.0 if c.moe is None else TRAIN_OVER_FORWARD * 2.0 * expert_params(c).multiplied


def _swiglu(d_model: int, width: int) -> int:
    """Parameters of a SwiGLU: gate, up and down projections."""
    return 3 * d_model * width


def _passed(matrices: int, vectors: int = 0) -> Component:
    """Matrices that every token multiplies, and vectors that it only adds."""
    return Component(matrices + vectors, matrices + vectors, 2.0 * matrices)


def _sum(parts: Iterable[Component]) -> Component:
    parts = list(parts)
    return Component(
        sum(part.params for part in parts),
        sum(part.active for part in parts),
        sum(part.forward for part in parts),
    )
