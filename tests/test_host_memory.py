"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from moejax.host_memory import keep_freed_memory

# Page faults of ten blocks of 64 MB that are written and freed one after another.
PROGRAM = """
import resource, sys
import numpy as np
from moejax.host_memory import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "kept" else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**26, np.int8)
before = faults()
for _ in range(10):
    np.ones(2**26, np.int8)
print(int(done), faults() - before)
"""


def faults(how: str) -> tuple[int, int]:
    """Whether it was done, and the page faults that followed."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    done, count = answer.stdout.split()
    return int(done), int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="an option of the GNU C library")
def test_pages_are_paid_for_once():
    left, kept = faults("left"), faults("kept")
    assert (left[0], kept[0]) == (0, 1)
    assert kept[1] < left[1] / 10, (left, kept)


@pytest.mark.parametrize(
    "given",
    [
        {"MALLOC_ARENA_MAX": "4"},
        {"MALLOC_TRIM_THRESHOLD_": "1000"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    ],
)
def test_a_users_own_options_stay(given):
    assert not keep_freed_memory(given)
