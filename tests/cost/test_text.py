"""Quantities as text."""

import pytest

from moejax.cost import text


@pytest.mark.parametrize(
    "found, wanted",
    [
        (text.si(3.707e24, "FLOP"), "3.71 YFLOP"),
        (text.si(999.9e9, "FLOP"), "1 TFLOP"),
        (text.si(12, "B"), "12 B"),
        (text.si(None), "unknown"),
        (text.parameters(16.376e9), "16.38B"),
        (text.parameters(3_141_592), "3.142M"),
        (text.parameters(12), "12"),
        (text.dollars(5_328_000), "$5,328,000"),
        (text.dollars(12.3456), "$12.35"),
        (text.dollars(0.00123), "$0.0012"),
        (text.dollars(1.2e-6), "$1.2e-06"),
        (text.dollars(0.0), "$0.00"),
        (text.dollars(None), "unknown"),
        (text.duration(42), "42.0 s"),
        (text.duration(200), "3 min 20 s"),
        (text.duration(5.4 * 3600), "5.4 h"),
        (text.duration(54.2 * 86400), "54.2 days"),
        (text.duration(None), "unknown"),
        (text.energy(3.18e6), "3.18 GWh"),
        (text.energy(5e-6), "5 mWh"),
        (text.energy(0.0), "0 Wh"),
        (text.energy(None), "energy unknown"),
        (text.carbon(0.0048), "4.8 g CO2"),
        (text.carbon(12.0), "12 kg CO2"),
        (text.carbon(8.93e6), "8,930 t CO2"),
        (text.carbon(None), "CO2 unknown"),
        (text.percent(0.3894), "38.9 %"),
        (text.percent(None), "-"),
    ],
)
def test_quantities(found, wanted):
    assert found == wanted


def test_columns_align():
    assert text.columns([("run", "x"), ("a", "10")], left=1) == "run   x\na    10"
