"""Threads for several devices of a CPU: as many as their collectives may hold at once."""

import os

import pytest

from moejax.parallel.host_threads import EACH, enough_threads

COUNT = "--xla_force_host_platform_device_count"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"XLA_FLAGS": f"--xla_dump_to=x {COUNT}=64"}, str(64 * EACH)),
        ({"XLA_FLAGS": f"{COUNT}=2 {COUNT}=64"}, str(64 * EACH)),  # the last one counts
        ({"XLA_FLAGS": f"{COUNT}=1"}, None),
        ({"XLA_FLAGS": f"{COUNT}=many"}, None),  # jax says what is wrong with it
        ({"XLA_FLAGS": f"{COUNT}=8", "PJRT_NPROC": "3"}, "3"),
        ({"XLA_FLAGS": f"{COUNT}=8", "NPROC": "3"}, None),
        ({}, None),
    ],
)
def test_what_is_asked_for(given, wanted):
    enough_threads(given)
    assert given.get("PJRT_NPROC") == wanted


def test_these_tests_have_enough():
    """Without, programs with many collectives stood still on two cores: see test_context."""
    assert int(os.environ["PJRT_NPROC"]) >= 64
