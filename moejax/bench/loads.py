"""Which experts the tokens choose, drawn in NumPy from a seed: balanced, skewed, worst.

Every token's K experts are distinct. The number of assignments of each expert is exact, and only
who goes where is random.
"""

import numpy as np
from jaxtyping import Float, Int

LOADS = ("balanced", "skewed", "worst")

# Load of the fullest expert over the mean, in the skewed load.
SKEW = 4.0

# Rounds of random swaps; each touches every token once.
_SHUFFLES = 40


def draw_routing(
    load: str, tokens: int, num_experts: int, top_k: int, seed: int = 0
) -> tuple[Int[np.ndarray, "T K"], Float[np.ndarray, "T K"]]:
    """Chosen experts and their gates.

    ``balanced`` gives every expert the same number of assignments (give or take one where E does
    not divide T · K). In ``skewed`` the fullest expert has 4 times the mean, or all T tokens where
    that is less, and the others fall off geometrically from it. In ``worst`` expert 0 is chosen by
    all T tokens, and the other K - 1 choices are balanced over the other experts.

    Args:
      load: one of ``LOADS``.
      tokens: T.
      num_experts: E.
      top_k: K, at most E.
      seed: two calls with the same arguments give the same arrays.

    Returns:
      expert: int32 indices, distinct in a row, in no order.
      gate: float32 weights of a row, positive, which sum to 1.
    """
    rng = np.random.default_rng([LOADS.index(load), tokens, num_experts, top_k, seed])
    counts = expert_counts(load, tokens, num_experts, top_k)
    if load != "balanced":
        # The others stand in any order: neighbours in it are no more alike than strangers.
        counts[1:] = rng.permutation(counts[1:])
    expert = _shuffled(_assign(counts, tokens, top_k, rng), rng)
    gate = rng.uniform(0.5, 1.5, expert.shape).astype(np.float32)
    return expert.astype(np.int32), gate / gate.sum(axis=1, keepdims=True)


def expert_counts(load: str, tokens: int, num_experts: int, top_k: int) -> Int[np.ndarray, " E"]:
    """Assignments of each expert, expert 0 the fullest; they sum to T · K."""
    total = tokens * top_k
    if load == "balanced":
        return _even(total, num_experts)
    if load == "worst":
        return np.append(tokens, _even(total - tokens, num_experts - 1))
    fullest = min(tokens, max(1, round(SKEW * total / num_experts)))
    share = _geometric(fullest / total, num_experts)
    counts = np.floor(share * total).astype(np.int64)
    counts[0] = fullest
    # What rounding down has left over, to the largest remainders among the others.
    rest = total - counts.sum()
    remainder = share * total - counts
    remainder[0] = -1.0
    counts[np.argsort(-remainder, kind="stable")[:rest]] += 1
    return counts


def _even(total: int, parts: int) -> Int[np.ndarray, " parts"]:
    """``total`` cut into parts that differ by one at most, the first none of the smaller ones."""
    return np.diff(-(np.arange(parts + 1) * -total // max(parts, 1)))


def _geometric(first: float, parts: int) -> Float[np.ndarray, " parts"]:
    """Shares that fall by a constant factor, sum to 1 and begin with ``first`` (at least 1 / E)."""
    low, high = 0.0, 1.0
    for _ in range(100):
        factor = (low + high) / 2
        if (factor ** np.arange(parts)).sum() * first > 1:
            high = factor
        else:
            low = factor
    share = low ** np.arange(parts)
    return share / share.sum()


def _assign(counts, tokens: int, top_k: int, rng) -> Int[np.ndarray, "T K"]:
    """Deals the experts out to the tokens in turn: an expert of at most T assignments meets no
    token twice, and every token gets K."""
    turns = np.repeat(np.arange(len(counts)), counts).reshape(top_k, tokens)
    return turns.T[rng.permutation(tokens)]


def _shuffled(expert: Int[np.ndarray, "T K"], rng) -> Int[np.ndarray, "T K"]:
    """Swaps assignments between random pairs of tokens, wherever both stay distinct; every
    expert's count stays. Then each token's choices in a random order."""
    expert = expert.copy()
    half, top_k = len(expert) // 2, expert.shape[1]
    for _ in range(_SHUFFLES):
        order = rng.permutation(len(expert))
        a, b = order[:half], order[half : 2 * half]
        i, j = rng.integers(0, top_k, (2, half))
        from_a, from_b = expert[a, i], expert[b, j]
        free = ~(expert[a] == from_b[:, None]).any(1) & ~(expert[b] == from_a[:, None]).any(1)
        expert[a[free], i[free]], expert[b[free], j[free]] = from_b[free], from_a[free]
    return rng.permuted(expert, axis=1)


def max_over_mean(counts: Float[np.ndarray, " E"]) -> float:
    """Load of the fullest expert over the mean: 1 at balance, E / K at most."""
    return float(counts.max() / max(counts.mean(), 1e-9))
