"""A process's rows of a batch, by the sharding: what its devices need, and nothing else."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.parallel import MeshConfig, make_mesh, sharding
from moejax.parallel.rows import LocalRows


class Process:
    """A sharding as one of several processes sees it, each with some of the eight devices."""

    def __init__(self, whole, devices):
        self.whole, self.devices = whole, devices

    def addressable_devices_indices_map(self, shape):
        every = self.whole.devices_indices_map(shape)
        return {device: every[device] for device in self.devices}


def of_mesh(mesh, devices, parts, rows, seq_len=4):
    whole = sharding(mesh, None, "batch", "length")
    return LocalRows(Process(whole, devices), parts, rows, seq_len)


MESHES = [
    {"data": 8}, {"fsdp": 8}, {"expert": 4, "data": 2}, {"tensor": 8}, {"data": 2, "tensor": 4},
    {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 4, "tensor": 2},
    {"data": 2, "context": 4}, {"expert": 2, "context": 2, "tensor": 2},
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.sampled_from(MESHES), count=st.sampled_from([1, 2, 4, 8]),
    parts=st.sampled_from([1, 2, 3]), each=st.integers(1, 2),
    order=st.permutations(range(8)), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_device_finds_its_rows_among_those_that_its_process_reads(
    sizes, count, parts, each, order, seed
):
    mesh = make_mesh(MeshConfig(**sizes))
    rows = 8 * each * parts
    batch = np.random.default_rng(seed).integers(0, 99, (rows, 4)).astype(np.int32)
    split = batch.reshape(parts, -1, 4)
    whole = sharding(mesh, None, "batch", "length")
    where = whole.devices_indices_map(split.shape)
    devices = [mesh.devices.flat[i] for i in order]  # a process's devices need not lie together
    for process in range(count):
        own = devices[process * 8 // count : (process + 1) * 8 // count]
        local = of_mesh(mesh, own, parts, rows)
        read = batch[local.numbers]
        needed = np.zeros(rows, bool)
        for device in own:
            np.testing.assert_array_equal(local.part(read, where[device]), split[where[device]])
            part, first = np.arange(parts)[:, None], np.arange(rows // parts)[where[device][1]]
            needed[(part * (rows // parts) + first).reshape(-1)] = True
        assert local.numbers.tolist() == np.flatnonzero(needed).tolist()


def test_a_tensor_axis_over_processes_gives_both_the_same_rows():
    mesh = make_mesh(MeshConfig(tensor=8))
    halves = [of_mesh(mesh, list(mesh.devices.flat)[i : i + 4], 1, 8) for i in (0, 4)]
    assert halves[0].numbers.tolist() == halves[1].numbers.tolist() == list(range(8))


def test_micro_batches_are_those_of_one_process():
    # Two micro-batches of four rows: the second process has the later half of each.
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    second = of_mesh(mesh, list(mesh.devices.flat)[4:], 2, 8)
    assert second.numbers.tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("parts", [1, 2])
def test_one_process_places_the_whole_batch(parts):
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    batch = np.arange(32, dtype=np.int32).reshape(8, 4)
    whole = LocalRows(sharding(mesh, None, "batch", "length"), parts, 8, 4)
    assert whole.numbers.tolist() == list(range(8))
    placed = whole.place(batch[whole.numbers])
    assert isinstance(placed, jax.Array) and placed.shape == (parts, 8 // parts, 4)
    np.testing.assert_array_equal(np.asarray(placed), batch.reshape(parts, -1, 4))
