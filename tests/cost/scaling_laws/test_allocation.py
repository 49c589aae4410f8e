"""The laws that only split a budget against their papers' statements."""

import pytest

from moejax.config import ConfigError
from moejax.cost.budget_models import candidates
from moejax.cost.scaling_laws import DEEPSEEK, LING, LING_DENSE
from moejax.cost.scaling_laws.law import MLP_WIDTH, Design


@pytest.mark.parametrize(
    "law, scale, exponent",  # of the tokens: printed beside those of M
    [(DEEPSEEK, 5.8316, 0.4757), (LING, 5.2232, 0.4905), (LING_DENSE, 15.2582, 0.4578)],
)
def test_tokens_are_the_rest(law, scale, exponent):
    """D = C / M is the printed power law, to the digits printed."""
    for flops in (1e18, 1e20, 1e22):
        assert law.optimum(flops).tokens == pytest.approx(scale * flops**exponent, rel=2e-3)


def test_what_m_counts():
    """DeepSeek LLM, table 3: M of 24 layers of 2048 at s = 4096 is 9.66 G, where 6 N is 7.25 G.

    Its 72 n d² is 6 FLOPs for each of 12 d² parameters, its 12 n d s attention to all keys: the
    head is left out. Here a layer has the same 12 d² up to the rounding of its SwiGLU.
    """
    design = Design(MLP_WIDTH)
    (found,) = (c for c in candidates((design,), 4096) if c.config.d_model == 2048)
    layers = found.config.num_layers
    assert found.sizes.flops_per_token == pytest.approx(9.66e9 / 24 * layers, rel=0.01)


def test_leverage_of_lings_design():
    """Section 4.2.2: over 7 at 1e22 FLOP, A = 3.1 %, G = 12; section 4.1: the best G near 12."""
    assert 7 < LING.efficiency(0.031, 12, 1e22) < 7.5
    best = max(range(1, 65), key=lambda fine: LING.efficiency(0.031, fine, 1e22))
    assert 8 <= best <= 14
    assert LING.efficiency(1.0, 12, 1e22) == pytest.approx(1.0, abs=0.02)  # equation 10: dense


def test_leverage_grows_with_sparsity_and_budget():
    by_ratio = [LING.efficiency(ratio, 12, 1e20) for ratio in (1.0, 0.5, 0.1, 0.03, 0.01)]
    assert by_ratio == sorted(by_ratio)
    by_budget = [LING.efficiency(0.03, 12, flops) for flops in (1e18, 1e20, 1e22)]
    assert by_budget == sorted(by_budget)


def test_lings_total_parameters():
    """Ling-mini-beta (table 3): 17.5B total over 0.85B active; embeddings are in both there."""
    optimum = LING.optimum(1e22)
    assert optimum.total_params / optimum.active_params == pytest.approx(17.5 / 0.85, rel=0.1)


@pytest.mark.parametrize("activation, fine", [(0.0, 12), (1.1, 12), (0.03, 0)])
def test_no_leverage_of_what_cannot_be(activation, fine):
    with pytest.raises(ConfigError):
        LING.efficiency(activation, fine, 1e22)
