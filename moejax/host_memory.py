"""Memory that a process on a CPU has touched once stays its own.

XLA's CPU client asks malloc for a program's temporaries at every call. The GNU C library maps
blocks of more than 32 MB anew for each call and gives them back after it, so that the kernel clears
their pages at every step: a quarter of a small model's time. Kept, they are paid for once.
"""

import ctypes
import os
from collections.abc import Mapping

# Numbers of <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = {
    _MMAP_MAX: 0,  # no blocks of their own, which would be given back when freed
    _ARENA_MAX: 1,  # one heap: what one thread frees, another may have
    _TRIM_THRESHOLD: -1,  # never
    _TOP_PAD: 2**26,
}


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Asks the GNU C library to keep what is freed; other C libraries are left as they are.

    A process then holds its peak until it ends. To be called before threads are started. Nothing is
    changed where the user set malloc's options (``MALLOC_*``, ``GLIBC_TUNABLES``).

    Returns:
      Whether it was done.
    """
    tuned = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    if tuned or any(name.startswith("MALLOC_") for name in environment):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return all([mallopt(name, value) for name, value in _SETTINGS.items()])
