"""Parameters, FLOPs and cache bytes of a model from its config alone: no device, no arrays.

FLOPs follow one convention throughout, the one that reproduces published figures: forward = 2 x the
matrix-product parameters that a token really passes, plus causal attention, in which a query sees
half of the sequence on average; training = 3 x forward. The head counts (when tied, too), the
embedding look-up does not. Not counted: rematerialisation, padding, dropped capacity, optimizer.
"""

import dataclasses
from typing import Any

from moejax.config import check
from moejax.models.model_config import ModelConfig

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


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of the model, all layers together.

    Attributes:
      params: parameters held.
      active: of these, the ones that a token passes (rounded where a router's expected number of
        experts is no integer).
      forward: FLOPs per token of a forward pass, causal attention halved.
    """

    params: int = 0
    active: int = 0
    forward: float = 0.0


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
      active: those that a token passes.
      mtp: parameters of multi-token-prediction modules.
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
      forward: forward pass with causal attention, s/2 keys a query.
      train_full_attention: ``train`` of a source that counts all s keys (6N + 12·L·H·hd·s).
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
    parts = {name: Component() for name in COMPONENTS}
    parts |= _attention(model_config, seq_len) | _feed_forward(model_config)
    parts |= _around_the_layers(model_config)
    assert parts.keys() == set(COMPONENTS)
    forward = sum(part.forward for part in parts.values())
    full = forward + parts["attention_scores"].forward
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
    """Bytes of cache that one token adds: a BF16 key and value for each KV head and layer."""
    attention = model_config.attention
    return 2 * attention.kv_heads * model_config.head_dim * CACHE_BYTES * model_config.num_layers


def _params(parts: dict[str, Component]) -> Params:
    active = {name: part.active for name, part in parts.items()}
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


def _attention(c: ModelConfig, seq_len: int) -> dict[str, Component]:
    """Projections (q, k, v, o; no biases), and scores with their weighted sum of values."""
    heads, kv_heads, width = c.attention.num_heads, c.attention.kv_heads, c.head_dim
    projections = c.num_layers * c.d_model * width * (2 * heads + 2 * kv_heads)
    # 2 FLOPs x s/2 keys x H heads x (hd of the scores + hd of the values)
    scores = float(c.num_layers * seq_len * heads * (width + width))
    return {
        "attention_projections": _passed(projections),
        "attention_scores": Component(forward=scores),
    }


def _feed_forward(c: ModelConfig) -> dict[str, Component]:
    """SwiGLU of dense layers; router, routed and shared experts of MoE layers."""
    dense = c.layers("dense") * swiglu_params(c.d_model, c.dense_width)
    moe, layers = c.moe, c.layers("moe")
    if moe is None or not layers:
        return {"dense_ffn": _passed(dense)}
    router = moe.router.counts(c.d_model, moe.num_experts, moe.top_k)
    flops = router.flops_per_token
    if moe.router.needs_gate_rank:  # scored by every expert's first low-rank activation
        flops += 2.0 * moe.num_experts * (moe.latent_dim or c.d_model) * moe.gate_rank
    held, passed = expert_params(c)
    routed = layers * router.expected_experts * passed
    # The matrices between the model's width and the experts' own, which every token passes.
    latent = layers * 2 * c.d_model * moe.latent_dim
    shared = swiglu_params(c.d_model, moe.num_shared_experts * moe.d_expert)
    shared += c.d_model if moe.shared_gate else 0
    return {
        "dense_ffn": _passed(dense),
        "router": Component(
            layers * router.params, layers * router.params, layers * flops
        ),
        "routed_experts": Component(
            layers * moe.num_experts * held + latent,
            round(routed) + latent,
            2.0 * (routed + latent),
        ),
        "shared_experts": _passed(layers * shared),
    }  # fmt: skip


def expert_params(c: ModelConfig) -> tuple[int, int]:
    """Parameters that a routed expert holds, and those of the matrices that a token multiplies.

    They differ where the gate projection is kept as two factors (``moe.gate_rank``), which are
    multiplied out once a step.
    """
    moe = c.moe
    width = moe.latent_dim or c.d_model
    passed = swiglu_params(width, moe.d_expert)
    if not moe.gate_rank:
        return passed, passed
    gate = moe.gate_rank * (width + moe.d_expert)
    return passed - width * moe.d_expert + gate, passed


def assignment_flops(c: ModelConfig) -> float:
    """Training FLOPs of one token in one routed expert: what a run is billed where they vary."""
    return 0.0 if c.moe is None else TRAIN_OVER_FORWARD * 2.0 * expert_params(c)[1]


def _around_the_layers(c: ModelConfig) -> dict[str, Component]:
    """Norms (two a layer and a final one), embedding and head."""
    norms = (2 * c.num_layers + 1) * c.d_model
    matrix = c.vocab_size * c.d_model
    embedding = 0 if c.tie_embeddings else matrix
    return {
        "norms": Component(norms, norms),
        "embedding": Component(embedding, embedding),
        "head": _passed(matrix),
    }


def swiglu_params(d_model: int, width: int) -> int:
    """Parameters of a SwiGLU: gate, up and down projections."""
    return 3 * d_model * width


def _passed(params: int) -> Component:
    """Matrices that every token passes."""
    return Component(params, params, 2.0 * params)
