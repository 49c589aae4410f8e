"""What the tests of all routers share."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def unoptimised():
    """LLVM's passes left out, in whatever is compiled meanwhile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """Loads of 8 experts, for the router that replays them."""
    path = tmp_path_factory.mktemp("trace") / "loads.npy"
    np.save(path, [[1, 2, 3, 4, 5, 6, 7, 8]])
    return str(path)
