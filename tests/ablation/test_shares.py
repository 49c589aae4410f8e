"""Parts of a machine for cells that run at once."""

import os

import pytest

from moejax.ablation import shares
from moejax.ablation.shares import Share
from moejax.config import ConfigError


def test_gpus_are_those_that_jax_would_see(tmp_path, monkeypatch):
    for name in ("nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv(shares.GPU_VARIABLE, raising=False)
    assert shares.gpus(tmp_path) == ["2", "10"]
    monkeypatch.setenv(shares.GPU_VARIABLE, "3,GPU-ab")
    assert shares.gpus(tmp_path) == ["3", "GPU-ab"]
    monkeypatch.setenv(shares.GPU_VARIABLE, "")
    assert shares.gpus(tmp_path) == []
    monkeypatch.setenv(shares.GPU_VARIABLE, "3")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert shares.gpus(tmp_path) == []


def test_a_gpu_each_and_no_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(shares, "gpus", lambda: ["0", "1", "2"])
    found = shares.shares(2)
    assert [share.environment() for share in found] == [
        {shares.GPU_VARIABLE: "0"}, {shares.GPU_VARIABLE: "1"},
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"--processes = 4: there are 3 GPUs"):
        shares.shares(4)


@pytest.mark.parametrize(("processes", "each"), [(1, 5), (2, 2), (5, 1)])
def test_cores_are_cut_into_equal_disjoint_parts(monkeypatch, processes, each):
    """Seven cores of a machine, of which a quota allows five."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 3, 5, 7, 8, 9})
    monkeypatch.setattr(shares, "cpu_cores", lambda: 5)
    parts = [share.cores for share in shares.shares(processes)]
    assert [len(cores) for cores in parts] == [each] * processes
    together = [core for cores in parts for core in cores]
    assert len(set(together)) == len(together) and set(together) <= {1, 2, 3, 5, 7}


def test_this_process_is_within_a_share_for_a_while(monkeypatch):
    monkeypatch.delenv(shares.GPU_VARIABLE, raising=False)
    cores = os.sched_getaffinity(0)
    one = min(cores)
    with shares.within(Share(cores=(one,), gpu="4"), planning=True):
        assert os.sched_getaffinity(0) == {one} and os.environ[shares.GPU_VARIABLE] == "4"
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert os.sched_getaffinity(0) == cores and shares.GPU_VARIABLE not in os.environ
    assert shares.shares(0) == [Share()]
