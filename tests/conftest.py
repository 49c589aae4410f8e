"""Eight virtual CPU devices, a persistent compilation cache, and no silent rank promotion."""

import os
import pathlib
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import pytest
from hostile import bomb, copied, mark, whole_model  # noqa: F401 (fixtures)

from moejax.parallel.host_threads import enough_threads

enough_threads()

CACHE = pathlib.Path(tempfile.gettempdir()) / f"moejax-test-cache-{os.getuid()}"

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Linux lets a process have 65,530 memory maps by default. Every compiled program holds some, and
# beyond the limit XLA crashes where it next asks for one.
MOST_MAPS = 20_000


def memory_maps() -> int:
    """How many memory maps this process has; 0 where the system does not say."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """Lets go of compiled programs between files once they are many."""
    yield
    if memory_maps() > MOST_MAPS:
        jax.clear_caches()
