"""What holds of every law: the optimum is one, and more budget is never worse."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.cost.scaling_laws import LAWS, LUDZIEJEWSKI
from moejax.cost.scaling_laws.allocation import AllocationLaw
from moejax.cost.scaling_laws.chinchilla import DenseLaw
from moejax.cost.scaling_laws.krajewski import FineGrainedLaw
from moejax.cost.scaling_laws.law import minimize

BUDGETS = st.floats(16, 27).map(lambda exponent: 10**exponent)
NAMES = st.sampled_from(sorted(LAWS))


def loss_at(law, found, active):
    """Loss of another size at the same budget, by the law's own count of FLOPs."""
    if isinstance(law, FineGrainedLaw):
        fine = found.design.granularity
        tokens = found.flops / law.flops_per_token(active, fine)
        return law.loss(law.total_params(active), tokens, fine)
    power = law.law if isinstance(law, DenseLaw) else LUDZIEJEWSKI.at(found.design.num_experts)
    return power.loss(active, found.flops / (6 * active))


@settings(max_examples=60, deadline=None)
@given(NAMES, BUDGETS)
def test_no_other_size_is_better(name, flops):
    law = LAWS[name]
    found = law.optimum(flops)
    if isinstance(law, AllocationLaw):
        assert 6 * found.active_params * found.tokens == pytest.approx(flops, rel=1e-9)
        return
    assert loss_at(law, found, found.active_params) == pytest.approx(found.loss, rel=1e-9)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert loss_at(law, found, factor * found.active_params) > found.loss
    # First-order condition: the slope over log N vanishes beside the terms it balances.
    step = 1e-4
    ends = [loss_at(law, found, found.active_params * math.exp(s)) for s in (-step, step)]
    assert abs(ends[1] - ends[0]) / (2 * step) < 1e-5 * found.loss


@settings(max_examples=60, deadline=None)
@given(NAMES, BUDGETS, st.floats(1.01, 100))
def test_more_budget_is_never_worse(name, flops, factor):
    law = LAWS[name]
    less, more = law.optimum(flops), law.optimum(factor * flops)
    assert more.active_params > less.active_params and more.tokens > 0
    if less.loss is not None:
        assert more.loss < less.loss
    assert set(law.designs_for(flops)) <= set(law.designs_for(factor * flops))


def test_more_tokens_with_more_budget_at_one_granularity():
    """Tokens of the fine-grained law fall where G doubles; at one G they never do."""
    law = LAWS["krajewski_2024"]
    tokens = [law.optimum_at(10**e, 8).tokens for e in range(17, 26)]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("flops", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", sorted(LAWS))
def test_no_optimum_of_nothing(name, flops):
    with pytest.raises(ConfigError, match="above zero"):
        LAWS[name].optimum(flops)


@pytest.mark.parametrize("name", sorted(LAWS))
def test_every_law_says_where_it_is_from(name):
    facts = LAWS[name].facts
    assert "arXiv" in facts.source and facts.parameters and facts.corpus and facts.tokenizer
    assert facts.reading and facts.inverse and facts.fitted
    for field, (low, high) in facts.fitted.items():
        assert low < high, field
    LAWS[name].beyond(LAWS[name].optimum(1e20))  # every field of ``fitted`` exists


def test_the_search_finds_the_bottom_of_a_valley():
    assert minimize(lambda x: (math.log(x) - 2) ** 2, 1e-3, 1e6) == pytest.approx(math.exp(2))
