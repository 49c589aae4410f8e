"""What routers do with text, as pure NumPy: every measure with its formula and its source.

``chosen`` says of each token which experts it runs through: ``chosen[..., t, i]`` is True where
token t goes to expert i. The measures that summed statistics give in every logged step are in
``moejax.moe.diagnostics``; those of the load are here as well, under the same names.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.moe.diagnostics import (
    dead_experts,
    load_entropy,
    load_gini,
    load_variation,
    max_violation,
)

__all__ = [
    "BiasMeasures", "TokenShares", "best_choices", "bias_measures", "coactivation", "dead_experts",
    "domain_specialisation", "dropped_share", "expert_load", "flip_rate", "gradient_norm",
    "load_entropy", "load_gini", "load_variation", "masked_loss", "max_violation",
    "max_violation_batch", "max_violation_global", "most_specific", "output_redundancy",
    "saturation", "shares", "token_shares", "vocabulary_specialisation",
]  # fmt: skip

Chosen = Bool[np.ndarray, "*layers T E"]


def expert_load(chosen: Chosen) -> Float[np.ndarray, "*layers E"]:
    """c_i, the number of tokens that expert i computes."""
    return chosen.sum(axis=-2, dtype=np.float64)


def shares(values: Float[np.ndarray, "*layers E"]) -> Float[np.ndarray, "*layers E"]:
    """Each expert's share of its layer's sum: of the load, or of the gate mass beside it.

    The gate mass is the sum of the gates of an expert's tokens. An expert with much load and little
    gate mass is one that balancing forces on tokens. Zeros where the sum is zero.
    """
    return values / np.maximum(values.sum(axis=-1, keepdims=True), 1e-9)


def max_violation_batch(
    loads: Float[np.ndarray, "batches *layers E"],
) -> Float[np.ndarray, "*layers"]:
    """MaxVio_batch: the mean over batches of (max c - mean c) / mean c of each.

    Source: loss-free balancing (arXiv 2408.15664, eq. 4). It grows with smaller batches.
    """
    return max_violation(loads).mean(axis=0)


def max_violation_global(
    loads: Float[np.ndarray, "batches *layers E"],
) -> Float[np.ndarray, "*layers"]:
    """MaxVio_global: (max c - mean c) / mean c of the load of all batches together.

    Source: loss-free balancing (arXiv 2408.15664, eq. 4), there over the whole validation set.
    """
    return max_violation(loads.sum(axis=0))


def dropped_share(
    dropped: Float[np.ndarray, "*layers"], assignments: Float[np.ndarray, "*layers"]
) -> Float[np.ndarray, "*layers"]:
    """Assignments that found no slot, over all of them (K T where every token has K experts)."""
    return dropped / np.maximum(assignments, 1)


def saturation(chosen: Chosen, final: Chosen) -> Float[np.ndarray, "*layers"]:
    """Mean over tokens of |A_t and F_t| / |F_t|: how much of the final routing is there already.

    A_t are token t's experts now and F_t those of the final model, K of them; by chance it is K / E
    under balance. Tokens without an expert in the final model are left out.

    Source: OLMoE (arXiv 2409.02060, section 5.1): 60 % after 1 % of the training.
    """
    wanted = final.sum(axis=-1)
    common = (chosen & final).sum(axis=-1) / np.maximum(wanted, 1)
    return common.sum(axis=-1) / np.maximum((wanted > 0).sum(axis=-1), 1)


def flip_rate(before: Chosen, after: Chosen) -> Float[np.ndarray, "*layers"]:
    """Share of the tokens whose set of experts is not the same at two checkpoints."""
    return (before != after).any(axis=-1).mean(axis=-1)


def coactivation(chosen: Chosen) -> Float[np.ndarray, "*layers E E"]:
    """N_ij / N_i over all pairs: of the tokens of expert i, the share that expert j computes too.

    The diagonal is 1; a row sums to the experts per token of that expert's tokens. If experts were
    independent, all other entries would be near (K - 1) / (E - 1). Zeros for unused experts.

    Source: OLMoE (arXiv 2409.02060, section 5.2), which shows its most frequent pairs only.
    """
    counted = chosen.astype(np.float32)
    together = np.swapaxes(counted, -1, -2) @ counted
    alone = np.diagonal(together, axis1=-2, axis2=-1)
    return together / np.maximum(alone, 1)[..., None]


def domain_specialisation(
    chosen: Chosen, domain: Int[np.ndarray, " T"], num_domains: int
) -> Float[np.ndarray, "*layers E domains"]:
    """N_iD / N_D: of the tokens of domain D, the share that expert i computes.

    Over the experts of a layer it sums to the experts per token; without specialisation it is K / E
    everywhere, if the load is balanced. Zeros for a domain without tokens.

    Source: OLMoE (arXiv 2409.02060, section 5.3).
    """
    member = (domain[:, None] == np.arange(num_domains)).astype(np.float32)
    together = np.swapaxes(chosen, -1, -2).astype(np.float32) @ member
    return together / np.maximum(member.sum(axis=0), 1)


class TokenShares(NamedTuple):
    """P(expert | token) of the token ids that occur, in the order of ids.

    Attributes:
      ids: the token ids.
      counts: how often each occurs.
      share: of its occurrences, those that each expert computes.
    """

    ids: Int[np.ndarray, " U"]
    counts: Int[np.ndarray, " U"]
    share: Float[np.ndarray, "*layers U E"]


def token_shares(chosen: Chosen, ids: Int[np.ndarray, " T"]) -> TokenShares:
    """N_xi / N_x: of the occurrences of token id x, the share that expert i computes.

    Source: OLMoE (arXiv 2409.02060, section 5.4), for ids of the input, of the target and of what
    the model predicts.
    """
    order = np.argsort(ids, kind="stable")
    found, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    layers = chosen.reshape(-1, *chosen.shape[-2:])
    sums = [np.add.reduceat(layer[order], starts, axis=0, dtype=np.float32) for layer in layers]
    together = np.stack(sums).reshape(*chosen.shape[:-2], len(found), chosen.shape[-1])
    return TokenShares(found, counts, together / counts[:, None])


def vocabulary_specialisation(
    shares_: TokenShares, top_k: float, min_count: int = 8
) -> Float[np.ndarray, "*layers"]:
    """How far the token id alone settles the experts: 1 where the same id always gets the same.

    The K largest P(expert | token) of an id, summed and divided by K; the mean over occurrences of
    ids that occur ``min_count`` times at least, since rare ones look settled by chance. Where the
    experts do not depend on the id it is the share of the load that the K fullest experts take,
    K / E at balance.

    Args:
      shares_: from ``token_shares``.
      top_k: experts per token; a mean where that varies, then rounded.
      min_count: occurrences that an id needs.

    Returns:
      The share by layer; nan where no id occurs often enough.
    """
    often = shares_.counts >= min_count
    if not often.any():
        return np.full(shares_.share.shape[:-2], np.nan)
    whole = max(round(top_k), 1)
    best = np.sort(shares_.share[..., often, :], axis=-1)[..., -whole:].sum(axis=-1)
    return (best * shares_.counts[often]).sum(axis=-1) / (shares_.counts[often].sum() * whole)


def most_specific(
    shares_: TokenShares, number: int, min_count: int = 8
) -> list[list[tuple[int, float, int]]]:
    """Of each expert of one layer, the ids that go to it most surely.

    Args:
      shares_: from ``token_shares`` of one layer.
      number: ids of an expert at most; those that never go to it are left out.
      min_count: occurrences that an id needs.

    Returns:
      Expert by expert (id, P(expert | token), occurrences), most specific first; of equals the more
      frequent one first.
    """
    often = np.flatnonzero(shares_.counts >= min_count)
    result = []
    for share in shares_.share[often].T:
        order = np.lexsort((-shares_.counts[often], -share))[:number]
        result.append([
            (int(shares_.ids[often[i]]), float(share[i]), int(shares_.counts[often[i]]))
            for i in order if share[i] > 0
        ])  # fmt: skip
    return result


def output_redundancy(outputs: Float[np.ndarray, "E T D"]) -> float:
    """Mean cosine of two experts' outputs on the same token, over all pairs and tokens.

    1 where all experts compute the same, about 0 where they are unrelated.

    Source: the similarity of outputs of Lo et al. (arXiv 2406.18219). A single expert gives nan.
    """
    experts = len(outputs)
    unit = outputs / np.maximum(np.linalg.norm(outputs, axis=-1, keepdims=True), 1e-20)
    # |sum of unit vectors|² is the sum over all ordered pairs, each vector with itself among them.
    pairs = (unit.sum(axis=0) ** 2).sum(axis=-1) - (unit**2).sum(axis=(0, 2))
    return float(pairs.mean() / (experts * (experts - 1))) if experts > 1 else float("nan")


def best_choices(logits: Float[np.ndarray, "T N"], number: int) -> Bool[np.ndarray, "T N"]:
    """The ``number`` largest logits of each token, ties to the lower index.

    Masked before the choice, they measure how replaceable a token's best experts are: the next best
    take their place, so that K stays (``masked_loss``).

    Source: DeepSeekMoE (arXiv 2401.06066, section 4.5): the more specialised the experts are, the
    faster the loss rises with ``number``.
    """
    order = np.argsort(-logits, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1, kind="stable")
    return rank < number


def masked_loss(nll: Iterable[float], targets: Iterable[float]) -> float:
    """Loss of batches, their sums of negative log-likelihoods over their targets, in nats.

    Cross-entropy alone, without auxiliary terms; with each token's best r experts masked it is one
    point of the curve over r.
    """
    return float(sum(nll) / max(sum(targets), 1))


class BiasMeasures(NamedTuple):
    """A selection bias: its mean, standard deviation, least and largest value over the experts."""

    mean: Float[np.ndarray, "*layers"]
    spread: Float[np.ndarray, "*layers"]
    least: Float[np.ndarray, "*layers"]
    largest: Float[np.ndarray, "*layers"]


def bias_measures(bias: Float[np.ndarray, "*layers N"]) -> BiasMeasures:
    """Mean and spread of a selection bias (arXiv 2408.15664; DeepSeek-V3, 2412.19437, 2.1.2).

    Only differences between experts select: the spread matters, the mean drifts without meaning.
    """
    return BiasMeasures(bias.mean(-1), bias.std(-1), bias.min(-1), bias.max(-1))


def gradient_norm(
    gradients: Iterable[Float[np.ndarray, "L ..."]],
) -> Float[np.ndarray, " L"]:
    """Norm over all of a router's parameters, sqrt(sum of squares), layer by layer.

    Near zero where a router learns nothing from the loss, as with K = 1 and normalised gates.

    Args:
      gradients: of each parameter, layers in front.
    """
    squares = [np.square(g, dtype=np.float64).reshape(len(g), -1).sum(-1) for g in gradients]
    return np.sqrt(sum(squares))
