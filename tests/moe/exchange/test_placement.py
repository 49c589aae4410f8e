"""What the exchange reads off the current mesh."""

import jax
import jax.numpy as jnp
import pytest

from moejax.moe.exchange import exchange, local_sizes
from moejax.moe.exchange.placement import expert_devices, parts_of_batch, rows_in_reach
from moejax.moe.experts import ExpertWeights
from moejax.parallel import MeshConfig, make_mesh


def test_without_a_mesh_all_is_here():
    assert expert_devices() == parts_of_batch(6) == 1
    assert rows_in_reach("all_to_all", 6) == rows_in_reach("none", 6) == 6


@pytest.mark.parametrize(
    ("axes", "experts", "parts", "stay", "travel"),
    [
        ({"expert": 4}, 4, 4, 6, 24),
        ({"data": 2, "expert": 2, "tensor": 2}, 2, 4, 6, 12),
        ({"data": 2, "fsdp": 2}, 1, 4, 6, 6),
        ({"tensor": 4}, 1, 1, 24, 24),
        ({"data": 5}, 1, 1, 24, 24),  # 24 rows cannot be cut into five parts: all are everywhere
    ],
)
def test_24_rows_on_a_mesh(axes, experts, parts, stay, travel):
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        assert expert_devices() == experts
        assert parts_of_batch(24) == parts
        assert rows_in_reach("none", 24) == stay
        assert rows_in_reach("all_to_all", 24) == travel


@pytest.mark.parametrize(
    ("axes", "kind", "sizes"),
    [
        ({}, "none", (32, 8, 2)),
        ({"expert": 4}, "none", (8, 8, 2)),
        # Half of 1.25 · 8 tokens, a choice in each row, from each of four devices.
        ({"expert": 4}, "all_to_all", (4 * 5, 2, 1)),
        ({"data": 2, "fsdp": 2}, "all_to_all", (8, 8, 2)),
        ({"expert": 4, "data": 2}, "all_to_all", (4 * 3, 2, 1)),
        # Eight rows of four tokens cannot be cut into three parts along data.
        ({"data": 3, "expert": 2}, "all_to_all", (32, 4, 2)),
    ],
)
def test_what_a_dispatcher_gets(axes, kind, sizes):
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        assert local_sizes(kind, 8, 4, 8, 2, 1.25) == sizes
        x, expert = jax.ShapeDtypeStruct((8, 4, 16), "float32"), jnp.zeros((32, 2), jnp.int32)
        weights = ExpertWeights(jnp.zeros((8, 16, 2, 4)), jnp.zeros((8, 4, 16)))

        def local(x, expert, gate, weights):
            seen.add((len(x), weights.num_experts, expert.shape[1]))
            return x

        seen = set()
        gate = jax.ShapeDtypeStruct((32, 2), "float32")
        jax.eval_shape(lambda x, gate: exchange(kind, local, x, expert, gate, weights), x, gate)
        assert seen == {sizes}
