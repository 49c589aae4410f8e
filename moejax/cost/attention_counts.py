"""What one layer's attention holds, multiplies and caches, for ``moejax.cost.counts``."""

import dataclasses

from moejax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class AttentionCounts:
    """Attention of one layer.

    Attributes:
      matrices: parameters of the projections, each multiplied by every token.
      vectors: biases and sinks, which multiply nothing.
      norms: scales of the norms of queries and keys, or of MLA's latents.
      score_width: FLOPs of a query for each key that it sees, halved: H · (d_qk + d_v), for its
        score and its share of the weighted sum of values.
      decode_score_width: the same while decoding, where MLA's queries meet the latents themselves:
        H · (2 · kv_lora_rank + rope_head_dim).
      cache_values: numbers that a token leaves in the cache.
      outputs: numbers that the projections but the last, and the weighted sum of values, give for a
        token: what a backward pass needs again.
    """

    matrices: int
    vectors: int
    norms: int
    score_width: int
    decode_score_width: int
    cache_values: int
    outputs: int


def attention_counts(c: ModelConfig) -> AttentionCounts:
    """Counts one layer's attention from the model's config."""
    return _mla(c) if c.attention.kind == "mla" else _gqa(c)


def _gqa(c: ModelConfig) -> AttentionCounts:
    a, width = c.attention, c.head_dim
    queries, keys = a.num_heads * width, a.kv_heads * width
    vectors = a.num_heads if a.sinks else 0
    if a.bias != "none":
        vectors += queries + 2 * keys
    if a.bias == "all":
        vectors += c.d_model
    norms = {"none": 0, "head": 2 * width, "all": queries + keys}[a.qk_norm]
    return AttentionCounts(
        matrices=c.d_model * (2 * queries + 2 * keys),
        vectors=vectors,
        norms=norms,
        score_width=a.num_heads * 2 * width,
        decode_score_width=a.num_heads * 2 * width,
        cache_values=2 * keys,
        outputs=2 * queries + 2 * keys,
    )


def _mla(c: ModelConfig) -> AttentionCounts:
    """DeepSeek-V2 (arXiv 2405.04434), section 2.1 and table 1: d_qk = nope + rope, d_v its own.

    As in training: the latent is projected up to every head's key and value. Decoding absorbs these
    matrices into the queries and the output, which multiplies as much for each token.
    """
    a = c.attention
    heads, rank, query_width = a.num_heads, a.kv_lora_rank, a.num_heads * c.head_dim
    if a.q_lora_rank:
        query = a.q_lora_rank * (c.d_model + query_width)
    else:
        query = c.d_model * query_width
    latent = c.d_model * (rank + a.rope_head_dim)
    up = rank * heads * (a.nope_head_dim + a.v_head_dim)
    out = heads * a.v_head_dim * c.d_model
    vectors = 0
    if a.bias == "all":
        vectors = a.q_lora_rank + rank + a.rope_head_dim + c.d_model
    return AttentionCounts(
        matrices=query + latent + up + out,
        vectors=vectors,
        norms=a.q_lora_rank + rank,
        score_width=heads * (c.head_dim + a.v_head_dim),
        decode_score_width=heads * (2 * rank + a.rope_head_dim),
        cache_values=rank + a.rope_head_dim,
        outputs=a.q_lora_rank
        + query_width
        + rank
        + a.rope_head_dim
        + heads * (a.nope_head_dim + 2 * a.v_head_dim),
    )


def mean_keys(seq_len: int, window: int = 0) -> float:
    """Keys that a query sees on average over a sequence of s positions, by the convention.

    Query i of s sees min(i, w) keys under a window w: w - w (w - 1) / 2s on average, which is
    (s + 1) / 2 without a window (w = s). Published FLOP counts take s / 2, dropping the diagonal's
    half, so w / 2s is dropped here too: w - w² / 2s, which is s / 2 at w = s.

    Args:
      seq_len: s.
      window: positions that a query sees at most, its own included; 0 means all before it.
    """
    width = min(window or seq_len, seq_len)
    return width - width * width / (2 * seq_len)


def all_keys(seq_len: int, window: int = 0) -> float:
    """As ``mean_keys``, for sources that count every query as if it saw all that any query sees."""
    return float(min(window or seq_len, seq_len))
