"""The layer of the anatomy notebook against a loop, and its pictures."""

import functools

import numpy as np
from matplotlib.figure import Figure
from tiny import relative_error

from moejax.analysis import layer_figures, layer_walk
from moejax.cost.counts import count

walk = functools.cache(layer_walk.walk)


def test_the_output_is_the_sum_over_experts():
    w = walk()
    y = w.shared.astype(np.float64)
    for t, (experts, gates) in enumerate(zip(w.expert, w.gate, strict=True)):
        for e, g in zip(experts, gates, strict=True):
            gate, up = (w.x[t].astype(np.float64) @ w.gate_up[e, :, half] for half in (0, 1))
            y[t] += g * (gate / (1 + np.exp(-gate)) * up) @ w.down[e]
    assert relative_error(w.y, y) < 1e-5


def test_the_bias_balances_and_selects_only():
    w = walk()
    without = layer_walk.load(layer_walk.choose(w.scores, 0 * w.bias))
    assert layer_walk.load(w.expert).max() < without.max()
    chosen = np.take_along_axis(w.scores, w.expert, axis=1)
    np.testing.assert_allclose(w.gate, 2.5 * chosen / chosen.sum(1, keepdims=True), rtol=1e-5)


def test_flops_of_one_layer_by_hand():
    found = count(layer_walk.one_layer(), 4096).flops_per_token.by_component
    assert found["routed_experts"] == 4 * 3 * 2 * 32 * 16
    assert found["shared_experts"] == 3 * 2 * 32 * 16
    assert found["router"] == 2 * 32 * 16


def test_capacity_drops_by_position():
    w = walk()
    bias = 0 * w.bias
    left, taken = layer_walk.kept(w, 1.0, bias), np.zeros(16, int)
    for t, experts in enumerate(layer_walk.choose(w.scores, bias)):
        for k, e in enumerate(experts):
            assert left[t, k] == (e if taken[e] < 4 else 16)
            taken[e] += 1
    assert layer_walk.dropped_share(w, 16.0, bias) == 0


def test_padding_vanishes_with_more_tokens():
    empty = [
        float(line.split()[-1].rstrip("%")) for line in layer_walk.padding_text().splitlines()[1:]
    ]
    assert empty[-1] < 2 < empty[0]


def test_fewer_groups_send_fewer_rows():
    sent = [layer_walk.sent(walk(), groups) for groups in (1, 2, 4)]
    assert sorted(one["rows_sent"] for one in sent) == [one["rows_sent"] for one in sent]
    assert [
        one["devices_touched"] <= 16 * groups for one, groups in zip(sent, (1, 2, 4), strict=True)
    ]


def test_the_pictures():
    w, parts = walk(), np.ones((4, 32))
    drawn = [
        layer_figures.scores(w), layer_figures.selection(w, 4), layer_figures.loads(w),
        layer_figures.sorting(w, 4), layer_figures.blocks(w, 4),
        layer_figures.combine(w, 4, parts), layer_figures.capacity(w), layer_figures.exchange(w),
    ]  # fmt: skip
    assert all(isinstance(figure, Figure) for figure in drawn)
    # Each of the token's four assignments has a red edge in both rows of the picture.
    squares = drawn[3].axes[0].patches
    assert sum(square.get_linewidth() == 2.0 for square in squares) == 8
    assert len(squares) == 2 * 64
