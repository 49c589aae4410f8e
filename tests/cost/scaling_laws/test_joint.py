"""Ludziejewski et al. 2025 against its own tables."""

import pytest

from moejax.config import ConfigError
from moejax.cost.scaling_laws import LUDZIEJEWSKI
from moejax.cost.scaling_laws.joint import total_params

# Table 4: E, m, mu, n, nu.
TABLE_4 = (
    (1, 30.3640, 0.1817, 53.9838, 0.1965),
    (2, 27.7982, 0.1780, 66.8401, 0.2065),
    (4, 24.8462, 0.1731, 87.7022, 0.2192),
    (8, 21.8330, 0.1676, 119.9126, 0.2338),
    (16, 19.0159, 0.1617, 167.5073, 0.2494),
    (32, 16.5424, 0.1557, 234.6726, 0.2652),
)
# Table 1: budget, experts, active parameters, tokens.
TABLE_1 = (
    (1e20, 1, 1.7e9, 9.7e9), (1e20, 4, 1.2e9, 13.9e9), (1e20, 8, 990e6, 17e9),
    (1e20, 32, 669e6, 24.9e9), (1e21, 1, 5.7e9, 29.3e9), (1e21, 16, 3.3e9, 51.2e9),
    (1e22, 1, 18.8e9, 88.6e9), (1e22, 8, 14.4e9, 115.8e9), (1e22, 32, 12.2e9, 136.9e9),
)  # fmt: skip


@pytest.mark.parametrize("experts, m, mu, n, nu", TABLE_4)
def test_the_law_at_each_number_of_experts(experts, m, mu, n, nu):
    law = LUDZIEJEWSKI.at(experts)
    assert law.a == pytest.approx(m, rel=0.003) and law.alpha == pytest.approx(mu, abs=2e-4)
    assert law.b == pytest.approx(n, rel=0.003) and law.beta == pytest.approx(nu, abs=2e-4)
    assert law.c == 1.3637


@pytest.mark.parametrize("flops, experts, active, tokens", TABLE_1)
def test_the_optima_of_table_1(flops, experts, active, tokens):
    found = LUDZIEJEWSKI.optimum_at(flops, experts)
    assert found.active_params == pytest.approx(active, rel=0.03)
    assert found.tokens == pytest.approx(tokens, rel=0.015)


@pytest.mark.parametrize(
    "active, experts, total",  # appendix E; 1.349B are printed as 1.3B
    [(321e6, 32, 5.0e9), (1.349e9, 4, 3.8e9), (2.7e9, 1, 2.7e9), (118e6, 16, 671e6)],
)
def test_total_parameters(active, experts, total):
    assert total_params(active, experts) == pytest.approx(total, rel=0.03)


def test_more_experts_are_always_better_in_it():
    """Finding 2: so that it advises the 32 it was fitted up to."""
    losses = [LUDZIEJEWSKI.optimum_at(1e21, experts).loss for experts in (1, 2, 4, 8, 16, 32)]
    assert losses == sorted(losses, reverse=True)
    assert LUDZIEJEWSKI.optimum(1e21).design.num_experts == 32


def test_less_than_one_expert():
    with pytest.raises(ConfigError, match="at least 1"):
        LUDZIEJEWSKI.at(0.5)
