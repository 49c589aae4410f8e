"""Published bills as tables: what the notebook shows of the price book."""

from moejax.analysis.bills import lens_rows
from moejax.cost.prices import entry


def test_every_end_of_every_rate_is_shown():
    """A rate that its source gives one end for is the other end itself."""
    shown = {name for name, *_ in lens_rows("h100_sxm")}
    for kind, price in entry("h100_sxm").rates.items():
        low, high = (
            price.dollars_per_hour if end is None else end for end in (price.low, price.high)
        )
        words = kind.replace("_", " ")
        assert {f"rented, {words}, ${low:.2f}", f"rented, {words}, ${high:.2f}"} <= shown
    assert "rented, reserved, $7.67" in shown
