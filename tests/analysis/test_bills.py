"""Tables and figures of published bills and budgets: numbers agree, figures draw."""

import pytest

from moejax.analysis import bills, budgets, links
from moejax.cost import lenses
from moejax.cost.prices import entry


def test_stages_add_up_to_the_headlines():
    """V3: $5.576M, R1 on top: $294K, as published; moejax within 0.4 %."""
    reported = [reported for _, reported, _, _ in bills.stages()]
    computed = [computed for _, _, computed, _ in bills.stages()]
    assert sum(reported[:3]) == 5.576e6 and sum(reported[3:]) == 294e3
    assert sum(computed) == pytest.approx(sum(reported), rel=0.004)
    assert [kind for *_, kind in bills.stages()] == ["derived"] + ["echoed"] * 5
    table = bills.stages_table()
    assert "$5,576,000" in table and "$294,000" in table and "$5,870,000" in table


def test_lenses_of_v3():
    """About $4.5M and $5.9M owned, $5.576M at the report's $2."""
    rows = {name: dollars for name, dollars, _ in bills.lens_rows()}
    assert rows["rented, assumed, $2.00"] == pytest.approx(5.576e6)
    assert rows["owned, $33,800 a device"] == pytest.approx(4.5e6, rel=0.01)
    assert rows["owned, $44,750 a device"] == pytest.approx(5.9e6, rel=0.01)
    assert list(rows.values()) == sorted(rows.values())
    wanted = lenses.owned("h800_sxm", 2.788e6, purchase=33_800.0).total
    assert rows["owned, $33,800 a device"] == pytest.approx(wanted)


def test_every_end_of_every_rate_is_shown():
    """A rate that its source gives one end for is the other end itself."""
    shown = {name for name, *_ in bills.lens_rows("h100_sxm")}
    for kind, price in entry("h100_sxm").rates.items():
        low, high = (
            price.dollars_per_hour if end is None else end for end in (price.low, price.high)
        )
        words = kind.replace("_", " ")
        assert {f"rented, {words}, ${low:.2f}", f"rented, {words}, ${high:.2f}"} <= shown
    assert "rented, reserved, $7.67" in shown


def test_sensitivity():
    assert bills.v3_dollars() == pytest.approx(5.576e6, rel=0.004)
    assert bills.v3_dollars(rate=4.0) == pytest.approx(2 * bills.v3_dollars())
    assert bills.v3_dollars(failed_share=0.5) == pytest.approx(2 * bills.v3_dollars())
    assert bills.v3_dollars(mfu=0.2) > bills.v3_dollars(mfu=0.4)
    assert all(low < high for _, low, high in bills.sensitivity_rows())


def test_the_limit_and_fp8_shorten_the_exchange():
    far = {(name, chip): far for name, chip, _, far in links.variants()}
    on_h800 = [seconds for (_, chip), seconds in far.items() if chip == "h800_sxm"]
    assert on_h800 == sorted(on_h800) and len(on_h800) == 4
    assert all(far[name, "h100_sxm"] == far[name, "h800_sxm"] for name, _ in far)


def test_a_dense_model_of_the_same_loss_costs_more():
    rows = [row.split() for row in budgets.saving_table((1e3, 1e5)).splitlines()[1:]]
    for row in rows:
        assert float(row[-1]) > 1 and float(row[1]) < float(row[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "plot",
    [bills.plot_stages, bills.plot_lenses, bills.plot_sensitivity, links.plot_variants,
     budgets.plot_advice, budgets.plot_losses, budgets.plot_granularity],
)  # fmt: skip
def test_figures_draw(plot, tmp_path):
    path = tmp_path / "figure.png"
    plot().savefig(path, dpi=30)
    assert path.stat().st_size > 1000
