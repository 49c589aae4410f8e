"""How many devices, or nodes, hold a token's experts: the expectation under uniform routing.

Experts stand in order, equally many on each part. Where routers keep the best groups only
(DeepSeek-V2 and V3), a token's experts are drawn from the groups that it kept.
"""

import collections
import functools
import math
from collections.abc import Iterator

from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig


def expected_parts(moe: MoEConfig, parts: int) -> float:
    """Parts that hold at least one of a token's K experts, on average.

    Args:
      moe: the layer; its router's ``num_groups`` and ``groups_kept``, where it has them.
      parts: how many the E experts are spread over, neighbours together; divides E.

    Source: group-limited selection as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), each set of
    ``groups_kept`` groups and each K experts in them equally likely.
    """
    return _expected_parts(moe.num_experts, moe.top_k, *groups_of(moe), parts)


@functools.lru_cache(maxsize=1024)  # a search of layouts asks for the same of every layer
def _expected_parts(num_experts: int, top_k: int, groups: int, kept: int, parts: int) -> float:
    size, local = num_experts // groups, num_experts // parts
    in_reach = kept * size
    total = 0.0
    for part in range(parts):
        first, last = part * local, (part + 1) * local
        # Experts that the part has of each group that it touches.
        shares = [
            min(last, (group + 1) * size) - max(first, group * size)
            for group in range(first // size, (last - 1) // size + 1)
        ]
        for experts, chance in _kept_shares(shares, groups, kept):
            total += chance * (1 - _missed(in_reach, experts, top_k))
    return total


def groups_of(moe: MoEConfig) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may choose from; (1, 1) without groups."""
    kept = getattr(moe.router, "groups_kept", None)
    return (1, 1) if kept is None else (moe.router.num_groups, kept)


def node_limit(c: ModelConfig) -> str:
    """The routers' limit in words; empty where there is none."""
    groups, kept = groups_of(c.moe)
    return f"{kept} of {groups} groups of experts a token" if kept < groups else ""


def _kept_shares(shares: list[int], groups: int, kept: int) -> Iterator[tuple[int, float]]:
    """A part's experts in reach, and the chance of it, for each choice of the groups it touches."""
    sets = collections.Counter({(0, 0): 1})
    for share in shares:
        sets.update({(n + 1, experts + share): ways for (n, experts), ways in sets.items()})
    # Each set of n touched groups goes with any kept - n of the others.
    others = groups - len(shares)
    for (n, experts), ways in sets.items():
        if 0 <= kept - n <= others:
            yield experts, ways * math.comb(others, kept - n) / math.comb(groups, kept)


def _missed(in_reach: int, experts: int, top_k: int) -> float:
    """Chance that none of K different experts of those in reach is among some of them."""
    return math.comb(in_reach - experts, top_k) / math.comb(in_reach, top_k)
