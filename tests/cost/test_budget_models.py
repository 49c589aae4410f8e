"""Models by plain rules, and the choice among them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.cost import budget_models as bm
from moejax.cost import counts
from moejax.cost.budget import parse
from moejax.cost.scaling_laws import KRAJEWSKI, LAWS, LING
from moejax.cost.scaling_laws.law import Design

SEQ_LEN = 4096
BUDGET = parse("$1")
DESIGNS = tuple(dict.fromkeys(itertools.chain(*(law.designs for law in LAWS.values()))))


@pytest.mark.parametrize("d_model", [128, 960, 1024, 2048, 7168, 65536])
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_the_rules(design, d_model):
    config = bm.build(design, d_model)
    if config is None:
        used = design.top_k + design.num_shared_experts
        assert design.width * d_model / used < 0.75 * 64
        return
    heads = config.attention.num_heads
    assert heads * config.head_dim == d_model
    assert config.head_dim == (128 if d_model >= 1024 else 64)
    assert config.num_layers == max(4, round(d_model / 80))
    if config.moe is None:
        assert config.d_ff % 128 == 0
        assert config.d_ff == pytest.approx(design.width * d_model, abs=64.01, rel=1e-9)
    else:
        assert config.moe.d_expert % 64 == 0
        assert config.moe.num_experts == design.num_experts
        assert config.moe.num_shared_experts == design.num_shared_experts


def test_sizes_by_hand():
    """d_model 4096, 51 layers, 32 of 2048 experts of width 320 (4096 x 8/3 / 32 = 341)."""
    design = next(d for d in KRAJEWSKI.designs if d.granularity == 32)
    config = bm.build(design, 4096)
    sizes = bm.sizes_of(config, design, counts.count(config, SEQ_LEN))
    attention, expert, norms = 4 * 4096**2, 3 * 4096 * 320, 2 * 4096
    assert config.num_layers == 51 and config.moe.d_expert == 320
    assert sizes.active_params == 51 * (attention + 32 * expert + norms) + 4096
    assert sizes.total_params == 51 * (attention + 2048 * expert + norms) + 4096
    assert sizes.embedding_params == 2 * 50304 * 4096
    assert sizes.granularity == pytest.approx(4 * 4096 / (320 * 3 / 2))  # an MLP's equal width


def test_lings_granularity_after_rounding():
    """G = 2 d_model / d_expert, whatever the rounding."""
    config = bm.build(LING.design, 4096)
    sizes = bm.sizes_of(config, LING.design, counts.count(config, SEQ_LEN))
    assert config.moe.d_expert == 704
    assert sizes.granularity == pytest.approx(2 * 4096 / 704)


@pytest.mark.parametrize("name", sorted(LAWS))
@pytest.mark.parametrize("flops", [1e20, 1e22, 1e24])
def test_the_choice_is_near_the_advice(name, flops):
    """The head, the router and attention cost it something: up to a factor of 2 in size."""
    law = LAWS[name]
    found, advised = bm.choose(law, flops, SEQ_LEN, BUDGET), law.optimum(flops)
    per_token = found.candidate.counted.flops_per_token.train
    assert found.tokens * per_token == pytest.approx(flops, rel=1e-9)
    assert 0.4 < found.candidate.sizes.active_params / advised.active_params < 2.1
    assert 0.4 < found.tokens / advised.tokens < 2.1
    if advised.loss is not None:
        assert found.loss == pytest.approx(advised.loss, rel=0.025)


@pytest.mark.parametrize("name", sorted(LAWS))
def test_no_other_candidate_is_better(name):
    law = LAWS[name]
    best = bm.choose(law, 1e21, SEQ_LEN, BUDGET)
    fit = law.misfit(best.candidate.trained(1e21), best.candidate.design, 1e21)
    for other in bm.candidates(law.designs_for(1e21), SEQ_LEN):
        assert fit <= law.misfit(other.trained(1e21), other.design, 1e21)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name in sorted(LAWS) if LAWS[name].optimum(1e20).loss]),
    st.floats(15.5, 25), st.floats(0.001, 2),
)  # fmt: skip
def test_more_budget_never_predicts_a_worse_loss(name, exponent, more):
    less, larger = (
        bm.choose(LAWS[name], 10**power, SEQ_LEN, BUDGET) for power in (exponent, exponent + more)
    )
    assert larger.loss < less.loss


def test_beyond_the_widest_model():
    with pytest.raises(ConfigError, match="widest"):
        bm.choose(LAWS["deepseek_llm_2024"], 1e30, SEQ_LEN, parse("1e30FLOP"))


def test_one_expert_a_token_has_a_gate_that_learns():
    assert bm.build(Design(3.0, 8, 1), 1024).moe.router.name == "switch"
