"""Headline and all-in by what other projects measured."""

import pytest

from moejax.config import ConfigError
from moejax.cost.development import MEASURED, all_in


def test_all_in_by_hand():
    assert all_in(2e6, 1.5) == 3e6
    assert all_in(2e6, 1.0, failed_share=0.2) == pytest.approx(2.5e6)
    assert all_in(2e6, 1.5, 0.5) == 6e6


def test_what_was_measured():
    """arXiv 2503.05804: 50 % of that of training; arXiv 2605.01158: 82.2 % of all compute."""
    olmo, olmo3 = MEASURED
    assert olmo.multiplier == 1.5
    assert 1 - 1 / olmo3.multiplier == pytest.approx(0.822)
    assert all(known.source.startswith("arXiv") for known in MEASURED)


@pytest.mark.parametrize("multiplier, share", [(0.9, 0.0), (1.5, 1.0), (1.5, -0.1), (1.5, 2.0)])
def test_out_of_range(multiplier, share):
    with pytest.raises(ConfigError):
        all_in(1.0, multiplier, share)
