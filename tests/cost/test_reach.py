"""Devices that a token reaches, against routings drawn at random."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.cost.reach import expected_parts, groups_of, node_limit
from moejax.models.presets import PRESETS
from moejax.moe import MoEConfig, router_options
from moejax.moe.exchange.traffic import traffic


def moe(experts, top_k, groups=1, kept=1) -> MoEConfig:
    options = {"name": "deepseek_v3", "num_groups": groups, "groups_kept": kept}
    return MoEConfig(experts, top_k, 8, router=router_options(options))


def test_by_hand():
    # 2 of 4 experts on 2 devices: one device in 2 of 6 pairs, both in the other 4.
    assert expected_parts(moe(4, 2), 2) == pytest.approx((2 * 1 + 4 * 2) / 6)
    # Two groups of which one is kept: always one device.
    assert expected_parts(moe(4, 2, 2, 1), 2) == pytest.approx(1)
    assert expected_parts(moe(8, 8), 4) == pytest.approx(4)
    assert expected_parts(moe(8, 3), 1) == pytest.approx(1)


def test_without_groups_it_is_hypergeometric():
    missed = math.comb(256 - 4, 8) / math.comb(256, 8)
    assert expected_parts(moe(256, 8), 64) == pytest.approx(64 * (1 - missed))


def drawn(config: MoEConfig, tokens: int) -> np.ndarray:
    """Choices of so many tokens: groups, then experts in them, every set equally likely."""
    rng, (groups, kept) = np.random.default_rng(0), groups_of(config)
    size = config.num_experts // groups
    rows = []
    for _ in range(tokens):
        group = rng.choice(groups, kept, replace=False)
        reach = (group[:, None] * size + np.arange(size)).ravel()
        rows.append(rng.choice(reach, config.top_k, replace=False))
    return np.stack(rows)


@pytest.mark.parametrize(
    "config, devices",
    [
        (moe(64, 6), 8),
        (moe(64, 6, 8, 3), 8),  # a group is a device
        (moe(64, 6, 8, 3), 32),  # a group is four devices
        (moe(64, 6, 8, 3), 4),  # a device has two groups
        (moe(48, 4, 6, 2), 4),  # a device has one and a half
    ],
)
def test_random_routings_reach_as_many(config, devices):
    """Counted by the exchange's own statistics; 3,000 tokens, so within 3 %."""
    experts = jnp.asarray(drawn(config, 3000), jnp.int32)
    seen = traffic(experts, config.num_experts, devices=devices, devices_per_node=2, parts=1)
    wanted = float(seen["devices_touched"]) / len(experts)
    assert expected_parts(config, devices) == pytest.approx(wanted, rel=0.03)
    nodes = float(seen["nodes_touched"]) / len(experts)
    assert expected_parts(config, devices // 2) == pytest.approx(nodes, rel=0.03)


def test_the_limit_in_words():
    assert node_limit(PRESETS["deepseek_v3"]) == "4 of 8 groups of experts a token"
    assert node_limit(PRESETS["olmoe_1b_7b"]) == ""
    free = dataclasses.replace(PRESETS["deepseek_v3"].moe.router, groups_kept=8)
    open_moe = dataclasses.replace(PRESETS["deepseek_v3"].moe, router=free)
    assert node_limit(dataclasses.replace(PRESETS["deepseek_v3"], moe=open_moe)) == ""
