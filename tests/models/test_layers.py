"""RMSNorm, the linear map over several axes, and compute types."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.layers import Linear, RMSNorm, compute_dtype


def test_rms_norm_by_hand():
    # rms of (3, 4) is sqrt(12.5); scale (1, 2).
    got = RMSNorm(0.0).apply({"params": {"scale": jnp.array([1.0, 2.0])}}, jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(got, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)


def test_rms_norm_is_computed_in_float32():
    # 300 squared overflows float16, whose largest value is 65,504.
    x = jnp.full((1, 4), 300.0, jnp.float16)
    got = RMSNorm().apply({"params": {"scale": jnp.ones(4)}}, x)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got, np.ones((1, 4)), rtol=1e-3)


@pytest.mark.parametrize(
    ("features", "num_inputs", "x_shape", "formula"),
    [((3, 5), 1, (2, 4, 8), "bsd,dhk->bshk"), ((7,), 2, (2, 4, 3, 5), "bshk,hkd->bsd")],
)
def test_linear_contracts_the_last_axes(features, num_inputs, x_shape, formula):
    rng = np.random.default_rng(0)
    x = rng.normal(size=x_shape).astype(np.float32)
    kernel = rng.normal(size=x_shape[-num_inputs:] + features).astype(np.float32)
    axes = ("embed",) * kernel.ndim
    got = Linear(features, axes, num_inputs).apply({"params": {"kernel": jnp.asarray(kernel)}}, x)
    np.testing.assert_allclose(got, np.einsum(formula, x, kernel), rtol=1e-4, atol=1e-5)


def test_linear_starts_with_variance_one_over_all_its_inputs():
    # The output projection of attention: 8 heads of 16 are 128 inputs, 48 outputs.
    layer = Linear((48,), ("heads", "head_dim", "embed"), 2)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 8, 16)))["params"]
    np.testing.assert_allclose(np.std(nn.meta.unbox(params)["kernel"]), 128**-0.5, rtol=0.05)


def test_compute_dtype():
    assert compute_dtype("auto") == jnp.float32, "on a CPU"
    assert compute_dtype("bfloat16") == jnp.bfloat16
