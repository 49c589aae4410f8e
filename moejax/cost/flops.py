"""FLOPs per token under each convention by name, and those of inference at a context length.

One run has several figures in print, because sources count differently; a ratio of two figures is
worth something only where both count alike. ``causal`` is this project's own (see ``counts``).
"""

import dataclasses
from typing import Any

from moejax.config import check
from moejax.cost import counts
from moejax.cost.attention_counts import all_keys, attention_counts, mean_keys
from moejax.models.model_config import ModelConfig, has_window

CONVENTIONS = {
    "causal": "matrix products, attention over half of the sequence (moejax's own)",
    "full_attention": "matrix products, attention over the whole sequence",
    "6N": "6 x active parameters with both embeddings, no attention scores",
}
MTP = {
    "without_mtp": "the model alone",
    "mtp_layers": "with the layers of its MTP modules, without their projection and head",
    "with_mtp": "with all that its MTP modules multiply",
}


def conventions(c: ModelConfig, seq_len: int) -> dict[str, dict[str, Any]]:
    """FLOPs per token under every name of ``CONVENTIONS``, with and without MTP modules.

    Args:
      c: the model.
      seq_len: positions of a sequence, s.

    Returns:
      By convention: ``forward`` and ``train`` (three times as much), each by the names of ``MTP``.

    Raises:
      ConfigError: a sequence length that is not above zero.
    """
    alone = dataclasses.replace(c, mtp_depth=0)
    model, modules = counts.count(alone, seq_len), counts.count(c, seq_len)
    around = 2.0 * c.mtp_depth * counts.mtp_surroundings(c)
    # A module's layer without its scores, as 6N has it.
    scores = 2.0 * c.mtp_depth * _mtp_keys(c, seq_len) * attention_counts(c).score_width
    products = modules.flops_per_token.by_component["mtp"] - scores
    parameters = 2.0 * model.params.active.with_embeddings
    full = counts.TRAIN_OVER_FORWARD
    pairs = {
        "causal": (model.flops_per_token.forward, modules.flops_per_token.forward),
        "full_attention": (
            model.flops_per_token.train_full_attention / full,
            modules.flops_per_token.train_full_attention / full,
        ),
        "6N": (parameters, parameters + products),
    }
    found = {}
    for name, (without, with_mtp) in pairs.items():
        forward = {
            "without_mtp": without,
            "mtp_layers": with_mtp - around,
            "with_mtp": with_mtp,
        }
        found[name] = {
            "forward": forward,
            "train": {part: full * value for part, value in forward.items()},
        }
    return found


def prefill(c: ModelConfig, context: int) -> float:
    """FLOPs of one token of a prompt of ``context`` tokens, on average.

    A forward pass with causal attention, without MTP modules, and with the head at the prompt's
    last position only, as inference engines run it.

    Raises:
      ConfigError: a context that is not above zero.
    """
    alone = dataclasses.replace(c, mtp_depth=0)
    parts = counts.count(alone, context).flops_per_token.by_component
    return sum(parts.values()) - parts["head"] * (1 - 1 / context)


def decode(c: ModelConfig, context: int) -> float:
    """FLOPs of one generated token that sees ``context`` keys in the cache, its own included.

    Without MTP modules. MLA runs absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): queries
    meet the latents themselves, so that its up-projections multiply as often as in training, and a
    key costs every head kv_lora_rank + rope_head_dim for its score and kv_lora_rank for its share
    of the sum.

    Raises:
      ConfigError: a context that is not above zero.
    """
    check(context > 0, "context", context, "must be above zero")
    alone = dataclasses.replace(c, mtp_depth=0)
    parts = counts.count(alone, context).flops_per_token.by_component
    windows = c.layers("window")
    keys = (c.num_layers - windows) * all_keys(context)
    keys += windows * all_keys(context, c.attention.window)
    scores = 2.0 * keys * attention_counts(c).decode_score_width
    return sum(parts.values()) - parts["attention_scores"] + scores


def per_token(c: ModelConfig, seq_len: int) -> dict[str, Any]:
    """What ``moejax plan --format=json`` adds to ``flops_per_token``.

    Returns:
      ``conventions``, and ``prefill`` and ``decode`` at a context of ``context_length``.
    """
    return {
        "conventions": conventions(c, seq_len),
        "prefill": prefill(c, seq_len),
        "decode": decode(c, seq_len),
        "context_length": seq_len,
    }


def _mtp_keys(c: ModelConfig, seq_len: int) -> float:
    return mean_keys(seq_len, c.attention.window if has_window(c.mtp_kind) else 0)
