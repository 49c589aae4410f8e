"""Quantiles from histograms that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.moe.quantiles import histogram, quantile_of_histogram

counts_of = jax.jit(histogram)
quantile = jax.jit(quantile_of_histogram, static_argnums=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.02, 0.3]), st.sampled_from([0.05, 0.25]))
def test_the_quantile_is_numpys_up_to_a_bin(seed, spread, share):
    values = np.random.default_rng(seed).normal(spread, spread, (4096, 3))
    got = quantile(counts_of(jnp.asarray(values, jnp.float32), jnp.ones(4096, bool)), share)
    for expert in range(3):
        above = np.mean(values[:, expert] > float(got[expert]))
        # A bin is at most 0.8 % of the value wide, and holds few of the values.
        assert above == pytest.approx(share, abs=0.01)


def test_micro_batches_add_up_and_padding_is_left_out():
    values = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (512, 2)), jnp.float32)
    valid = jnp.arange(512) % 3 > 0
    whole = counts_of(values, valid)
    parts = counts_of(values[:256], valid[:256]) + counts_of(values[256:], valid[256:])
    np.testing.assert_array_equal(whole, parts)
    assert whole.sum(axis=1).tolist() == [int(valid.sum())] * 2


def test_extremes_and_layers():
    # All values equal: any quantile is in their bin. Two layers at once.
    values = jnp.full((64, 2), 0.25)
    counts = counts_of(values, jnp.ones(64, bool))
    got = quantile(jnp.stack([counts, 2 * counts]), 0.5)
    np.testing.assert_allclose(got, 0.25, rtol=0.01)
    # Beyond the range: the outermost bins.
    far = counts_of(jnp.array([[5.0, -5.0]]), jnp.ones(1, bool))
    np.testing.assert_allclose(quantile(far, 0.5), [2.0, -2.0], rtol=0.01)
