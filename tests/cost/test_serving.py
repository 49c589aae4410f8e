"""What tokens cost to make against what they sell for: DeepSeek's own day, and by hand."""

import math

import pytest

from moejax.config import ConfigError
from moejax.cost import prices, serving

# DeepSeek-V3/R1 inference system overview (github.com/deepseek-ai/open-infra-index, 2025-02): a
# day of 226.75 nodes of 8 H800 on average, 608B input tokens (342B from the cache), 168B output.
DEVICES = 226.75 * 8
HIT, MISS, OUTPUT = 342e9, 608e9 - 342e9, 168e9


def test_deepseeks_day_costs_what_they_say():
    """$87,072 at the report's $2 an hour."""
    rate = prices.resolve("h800_sxm").dollars_per_hour
    assert DEVICES * rate * 24 == pytest.approx(87_072)


def test_deepseeks_day_would_have_sold_for_what_they_say():
    """$562,027 in theory, all tokens at R1's prices; the tokens are rounded to a billion."""
    revenue = serving.list_price("deepseek_r1").revenue(HIT, MISS, OUTPUT)
    assert revenue == pytest.approx(562_027, rel=5e-4)
    assert revenue / 87_072 - 1 == pytest.approx(5.45, abs=0.01)  # their '545 %'


def test_deepseeks_output_token():
    """All of the cost on the output: $0.52 for a million tokens, where the list price is $2.19."""
    per_device = OUTPUT / (24 * 3600) / DEVICES
    assert per_device == pytest.approx(1072, abs=1)
    cost = serving.dollars_per_million_tokens(per_device, 2.0)
    assert cost == pytest.approx(0.52, abs=0.005)
    assert cost * OUTPUT / 1e6 == pytest.approx(87_072)


def test_deepseeks_day_breaks_even_below_a_sixth_of_its_load():
    price = serving.list_price("deepseek_r1")
    blended = price.blended(608 / 168, 342 / 608)
    assert blended * OUTPUT / 1e6 == pytest.approx(price.revenue(HIT, MISS, OUTPUT))
    found = serving.break_even(DEVICES, 2.0, OUTPUT / (24 * 3600) / DEVICES, blended)
    assert found.dollars_per_day == pytest.approx(87_072)
    assert found.capacity_per_day == pytest.approx(OUTPUT)
    assert found.load == pytest.approx(87_072 / 562_027, rel=1e-3)
    assert found.possible


def test_list_prices_are_not_costs():
    """R1 against o1: 27 times; V3 against GPT-4o: 9 times."""
    r1, o1 = serving.list_price("deepseek_r1"), serving.list_price("o1")
    assert o1.output / r1.output == pytest.approx(27, abs=0.5)
    v3, gpt = serving.list_price("deepseek_v3"), serving.list_price("gpt_4o")
    assert gpt.output / v3.output == pytest.approx(9, abs=0.1)
    assert all(p.source and p.date for p in serving.LIST_PRICES.values())


def test_break_even_by_hand():
    """Two devices at $1.80 make 2 x 500 x 86,400 = 86.4M tokens a day for $86.40: $1 a million."""
    found = serving.break_even(2, 1.8, 500.0, 2.0)
    assert found.dollars_per_day == pytest.approx(86.4)
    assert found.capacity_per_day == pytest.approx(86.4e6)
    assert found.tokens_per_day == pytest.approx(43.2e6)
    assert found.load == pytest.approx(0.5)
    assert serving.dollars_per_million_tokens(500.0, 1.8) == pytest.approx(1.0)
    dear = serving.break_even(2, 1.8, 500.0, 0.9)
    assert dear.load > 1 and not dear.possible


def test_what_repays_a_training_bill():
    """$5.576M at 1.10 - 0.50 = $0.60 profit a million: 9.29T tokens."""
    assert serving.tokens_to_repay(5.576e6, 1.10, 0.50) == pytest.approx(9.293e12, rel=1e-3)
    assert serving.tokens_to_repay(1.0, 0.5, 0.5) == math.inf
    assert serving.tokens_to_repay(0.0, 1.0, 0.5) == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: serving.list_price("deepseek-r1"), "did you mean 'deepseek_r1'"),
        (lambda: serving.dollars_per_million_tokens(0.0, 1.0), "tokens_per_second = 0.0"),
        (lambda: serving.dollars_per_million_tokens(math.nan, 1.0), "tokens_per_second = nan"),
        (lambda: serving.dollars_per_million_tokens(1.0, -1.0), "dollars_per_hour = -1.0"),
        (lambda: serving.break_even(0, 1.0, 1.0, 1.0), "devices = 0"),
        (lambda: serving.break_even(1, 1.0, 1.0, 0.0), "list_dollars_per_million = 0.0"),
        (lambda: serving.tokens_to_repay(-1.0, 1.0, 1.0), "dollars = -1.0"),
        (lambda: serving.list_price("o1").blended(1.0, 1.5), "cache_hit_share = 1.5"),
    ],
)
def test_bad_serving(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
