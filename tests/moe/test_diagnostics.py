"""A router's health, by hand."""

import numpy as np
import pytest

from moejax.moe.diagnostics import (
    dead_experts,
    held_out_health,
    load_entropy,
    load_gini,
    load_variation,
    max_violation,
    router_health,
    stack_bias,
    stack_layers,
)


def test_max_violation():
    # Loads 6, 2, 0, 0 have mean 2: (6 - 2) / 2 = 2. All to one of four, K = 1: 4 - 1 = 3.
    loads = np.array([[6.0, 2, 0, 0], [2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(max_violation(loads), [2, 0, 3, 0])


def test_load_entropy():
    # Half and half over four experts is log 2 / log 4 = 1/2.
    loads = np.array([[4.0, 4, 0, 0], [2, 2, 2, 2], [8, 0, 0, 0]])
    np.testing.assert_allclose(load_entropy(loads), [0.5, 1, 0], atol=1e-12)


def test_load_variation():
    # 6 2 0 0: mean 2, squared deviations 16 0 4 4, mean 6: sqrt(6) / 2. All to one of four: mean 2,
    # 36 4 4 4, mean 12: sqrt(12) / 2 = sqrt(3) = sqrt(E - 1).
    loads = np.array([[6.0, 2, 0, 0], [2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(load_variation(loads), [6**0.5 / 2, 0, 3**0.5, 0])


def test_load_gini():
    # 6 2 0 0: the pairs differ by 4 6 6 2 2 0, both ways round 40, over 2 · 4 · 8: 5/8. All to one
    # of four is 1 - 1/4. The order of the experts does not matter.
    loads = np.array([[6.0, 2, 0, 0], [0, 6, 0, 2], [2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(load_gini(loads), [5 / 8, 5 / 8, 0, 3 / 4, 0], atol=1e-12)


def test_dead_experts_by_layer():
    loads = np.array([[4.0, 4, 4, 4], [8, 8, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(dead_experts(loads), [0, 2, 0])


def measures(*rows):
    """The statistics of one layer of a segment, repeats in front."""
    load = np.array(rows, np.float64)
    tokens = load.sum(axis=1) / 2
    return {
        "load": load, "gate_mass": load * 0.5, "tokens": tokens, "assignments": load.sum(axis=1),
        "entropy": tokens * 1.5, "squared_logsumexp": tokens * 9.0, "top1_margin": tokens * 0.25,
        "unrouted": tokens * 0.125, "loss_balance": tokens * 1.5, "loss_z": tokens * 0.5,
        "dropped": np.full(len(load), 1.0), "devices_touched": tokens * 1.5,
        "nodes_touched": tokens * 1.25, "rows": tokens * 2.0,
        "rows_sent": tokens * 0.5, "bytes_sent": tokens * 64.0,
        "rows_sent_out": tokens * 0.125, "bytes_sent_out": tokens * 16.0,
        "exchange_overflow": np.full(len(load), 3.0), "exchange_dropped": np.full(len(load), 1.5),
    }  # fmt: skip


def test_layers_are_stacked_in_the_models_order():
    # segment_1 repeats (layer_0, layer_2) twice; the tenth segment comes after the second.
    stats = {
        "segment_10": {"layer_0": {"load": np.array([[5.0]])}},
        "segment_1": {
            "layer_2": {"load": np.array([[2.0], [4.0]])},
            "layer_0": {"load": np.array([[1.0], [3.0]])},
        },
    }
    np.testing.assert_array_equal(stack_layers(stats)["load"][:, 0], [1, 2, 3, 4, 5])


def test_health_of_two_layers():
    # Layer 0 is balanced: 4 4 4 4. Layer 1: 8 8 0 0, mean 4, MaxVio 1, two experts dead.
    health = router_health({"segment_0": {"layer_0": measures([4, 4, 4, 4], [8, 8, 0, 0])}})
    assert health["max_violation_by_layer"] == [0, 1]
    assert health["max_violation"] == 0.5 and health["max_violation_worst"] == 1
    assert health["load_entropy"] == pytest.approx((1 + 0.5) / 2)
    assert health["dead_experts"] == 2
    assert health["dropped_share"] == pytest.approx(2 / 32)
    assert health["gate_entropy"] == pytest.approx(1.5)
    assert health["squared_logsumexp"] == pytest.approx(9.0)
    assert health["top1_margin"] == pytest.approx(0.25)
    assert health["devices_per_token"] == 1.5 and health["nodes_per_token"] == 1.25
    assert health["bytes_sent_per_token"] == 64 and health["bytes_sent_out_per_token"] == 16
    # Two layers of 8 tokens make 2 · 8 · 2 = 32 rows, of which 6 overflowed and 3 were left out.
    assert health["exchange_overflow_share"] == 6 / 32
    assert health["exchange_dropped_share"] == 3 / 32
    # Coefficients of variation 0 and 1 (deviations 4 of a mean of 4), Gini 0 and 1/2.
    assert health["load_variation"] == 0.5 and health["load_gini"] == 0.25
    # 8 tokens a layer with 16 assignments; an eighth of them without an expert.
    assert health["experts_per_token"] == 2 and health["unrouted_share"] == 0.125
    assert health["loss_balance"] == 1.5 and health["loss_z"] == 0.5
    assert not any(name.startswith("bias") for name in health)
    assert health["load_by_layer"] == [[0.25] * 4, [0.5, 0.5, 0, 0]]
    assert health["gate_mass_by_layer"] == health["load_by_layer"]
    assert health["load_entropy_by_layer"] == [1, 0.5]
    assert health["load_variation_by_layer"] == [0, 1]
    assert health["dead_experts_by_layer"] == [0, 2]
    assert health["gate_entropy_by_layer"] == [1.5, 1.5]
    # One of 16 assignments dropped in each.
    assert health["dropped_share_by_layer"] == [0.0625, 0.0625]


def test_max_violation_of_batches_and_of_all_of_them():
    # Two batches, uneven in opposite ways: each has MaxVio 1, together they are balanced. In the
    # second layer both lean the same way: 12 4 of mean 8 is 1/2 in each and in both.
    parts = [measures([8, 0], [12, 4]), measures([0, 8], [12, 4])]
    sums = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    health = held_out_health({"segment_0": {"layer_0": sums}}, [part["load"] for part in parts])
    assert health["max_violation_global_by_layer"] == [0, 0.5]
    assert health["max_violation_batch_by_layer"] == [1, 0.5]
    assert health["max_violation_global"] == 0.25 and health["max_violation_batch"] == 0.75
    assert health["load_by_layer"] == [[0.5, 0.5], [0.75, 0.25]]
    assert health["gate_entropy_by_layer"] == [1.5, 1.5] and health["gate_entropy"] == 1.5
    # Four of the 8 · 2 + 16 · 2 assignments.
    assert health["dropped_share"] == pytest.approx(4 / 48)
    assert health["dead_experts_by_layer"] == [0, 0]
    assert held_out_health({}, []) == {}


def test_an_expert_is_dead_below_a_64th_of_its_fair_share():
    # 128 assignments over 2 experts, fair share 64: one is not below one 64th of it, zero is.
    alive = {"segment_0": {"layer_0": measures([127, 1])}}
    dead = {"segment_0": {"layer_0": measures([128, 0])}}
    assert router_health(alive)["dead_experts"] == 0
    assert router_health(dead)["dead_experts"] == 1


def test_gate_mass_stands_beside_the_load():
    # Equal loads, but the first expert's gates are three times the second's.
    layer = measures([4, 4])
    layer["gate_mass"] = np.array([[3.0, 1]])
    health = router_health({"segment_0": {"layer_0": layer}})
    assert health["load_by_layer"] == [[0.5, 0.5]]
    assert health["gate_mass_by_layer"] == [[0.75, 0.25]]


def state(*biases):
    return {"moe": {"router": {"bias": np.array(biases)}}}


def test_the_bias_is_told_where_the_state_is_given():
    # Layers 1 and 2 of the model in order: spreads 2 and 0, means 1 and 3.
    stats = {"segment_0": {"layer_0": measures([4, 4], [4, 4])}}
    biases = {"segment_0": {"layer_0": state([3.0, -1], [3, 3])}}
    health = router_health(stats, biases)
    assert health["bias_mean"] == 2 and health["bias_spread"] == 1
    assert health["bias_by_layer"] == [[3, -1], [3, 3]]
    assert health["bias_min_by_layer"] == [-1, 3] and health["bias_max_by_layer"] == [3, 3]
    assert health["bias_spread_by_layer"] == [2, 0]
    np.testing.assert_array_equal(stack_bias(biases), [[3, -1], [3, 3]])
    # A router without one, or with other state.
    other = {"segment_0": {"layer_0": {"moe": {"router": {"threshold": np.zeros((2, 2))}}}}}
    assert stack_bias({}) is None and stack_bias(other) is None
    assert "bias_mean" not in router_health(stats, {})


def test_a_small_bias_keeps_its_digits():
    stats = {"segment_0": {"layer_0": measures([4, 4])}}
    small = np.float32([[1.23456e-5, 0]])
    health = router_health(stats, {"segment_0": {"layer_0": state(*small)}})
    assert health["bias_by_layer"] == [[1.235e-5, 0]]


def test_a_dense_model_has_no_router_health():
    assert router_health({}) == {}
    assert stack_layers({}) == {}
