"""Traffic by hand: devices and machines that tokens reach, rows sent."""

import jax
import jax.numpy as jnp
import pytest

from moejax.moe import MoEConfig
from moejax.moe.exchange.traffic import layer_traffic, traffic
from moejax.parallel import MeshConfig, make_mesh

# Eight experts on four devices: 0 1 | 2 3 | 4 5 | 6 7, two devices a machine: 0 to 3 | 4 to 7.
# Eight tokens on eight parts (data 2 x expert 4), so token t stands on device t % 4.
EXPERT = [
    [0, 1],  # on 0, to device 0: nothing leaves
    [0, 1],  # on 1, to device 0: two rows, since a row carries one choice (see test_rows)
    [2, 4],  # on 2, to devices 1 and 2: one row leaves; two machines
    [0, 7],  # on 3, to devices 0 and 3: one row leaves; two machines
    [5, 3],  # on 0, to devices 2 and 1: two rows; two machines
    [6, 7],  # on 1, to device 3: two rows
    [8, 8],  # on 2: padding
    [1, 8],  # on 3, to device 0, its second choice dropped: one row
]


def measure(**changes):
    sizes = {"devices": 4, "devices_per_node": 2, "parts": 8, **changes}
    sums = traffic(jnp.asarray(EXPERT, jnp.int32), 8, **sizes)
    return {name: float(value) for name, value in sums.items()}


def test_by_hand():
    assert measure() == {
        "devices_touched": 1 + 1 + 2 + 2 + 2 + 1 + 0 + 1,
        "nodes_touched": 1 + 1 + 2 + 2 + 2 + 1 + 0 + 1,
        "rows": 2 + 2 + 2 + 2 + 2 + 2 + 0 + 1,
        "rows_sent": 0 + 2 + 1 + 1 + 2 + 2 + 0 + 1,
        # Devices 0 and 1 are a machine, 2 and 3 the other. What leaves one: token 2 to device 1,
        # 3 to 0, 4 to 2, 5 twice to 3, 7 to 0.
        "rows_sent_out": 0 + 0 + 1 + 1 + 1 + 2 + 0 + 1,
    }


@pytest.mark.parametrize(("per_node", "nodes"), [(1, 10), (2, 10), (3, 8), (4, 7), (8, 7)])
def test_machines(per_node, nodes):
    # Of three devices: 0 1 2 | 3, so that [2, 4] and [5, 3] stay on one; [0, 7] does not.
    found = measure(devices_per_node=per_node)
    assert found["nodes_touched"] == nodes
    if per_node == 1:
        assert found["rows_sent_out"] == found["rows_sent"]
    if per_node >= 4:
        assert found["rows_sent_out"] == 0


def test_four_parts_hold_two_tokens_each():
    # Tokens 0 1 | 2 3 | 4 5 | 6 7 on devices 0 to 3: rows 0 0 1 2 1 2 0 1.
    assert measure(parts=4)["rows_sent"] == 7


def test_one_device_and_tokens_that_do_not_travel():
    assert measure(devices=1, parts=1) == {
        "devices_touched": 7, "nodes_touched": 7, "rows": 7, "rows_sent": 0, "rows_sent_out": 0,
    }  # fmt: skip
    assert measure(parts=1)["rows_sent"] == 0
    assert measure(parts=1)["devices_touched"] == 10


@pytest.mark.parametrize(("overflow", "dropped"), [("exact", 0), ("drop", 3)])
def test_a_layers_own(overflow, dropped):
    config = MoEConfig(8, 2, 4, devices_per_node=2, exchange_overflow=overflow)
    x, expert = jnp.zeros((8, 1, 16), jnp.bfloat16), jnp.asarray(EXPERT, jnp.int32)
    layer = lambda kind: {
        name: float(value)
        for name, value in layer_traffic(config, kind, x, expert, jnp.float32(3)).items()
    }
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        # 9 rows of 16 numbers of 2 bytes, there and back.
        assert layer("all_to_all") == {
            **measure(), "bytes_sent": 9 * 16 * 2 * 2, "bytes_sent_out": 6 * 16 * 2 * 2,
            "exchange_overflow": 3, "exchange_dropped": dropped,
        }  # fmt: skip
        assert layer("none")["rows_sent"] == layer("none")["bytes_sent"] == 0
    assert layer("none")["devices_touched"] == 7
