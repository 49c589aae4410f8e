"""What top-k, top-p and min-p keep, against NumPy; draws against the probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.models.choosing import Choosing, draw, kept, log_probs_of

V = 12
KEPT, DRAW = jax.jit(kept), jax.jit(draw)


def choosing(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, vocab=V):
    return Choosing(
        np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(min_p),
        np.int32(vocab),
    )  # fmt: skip


def reference(probs, top_k, top_p, min_p, vocab):
    """The definitions, by a sort; probabilities are all different."""
    keep = np.arange(len(probs)) < vocab
    order = np.argsort(-np.where(keep, probs, -1), kind="stable")
    if top_k:
        keep[order[top_k:]] = False
    share = np.cumsum(np.where(keep, probs, 0)[order]) / probs[keep].sum()
    if top_p < 1:
        # All that come after the first whose cumulated share is enough.
        keep[order[np.searchsorted(share, top_p) + 1 :]] = False
    return keep & (probs >= min_p * probs[:vocab].max())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), top_k=st.integers(0, V + 2), vocab=st.integers(1, V),
    top_p=st.floats(0.01, 1.0), min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    spread=st.floats(0.1, 8.0),
)  # fmt: skip
def test_what_is_kept(seed, top_k, vocab, top_p, min_p, spread):
    logits = np.random.default_rng(seed).normal(size=(2, V)).astype(np.float32) * spread
    options = choosing(1.0, top_k, top_p, min_p, vocab)
    log_probs = log_probs_of(jnp.asarray(logits), options)
    got = np.asarray(KEPT(log_probs, options))
    for keep, row in zip(got, np.exp(np.asarray(log_probs, np.float64)), strict=True):
        # A limit that falls on a token to within rounding may keep it or not.
        near = [reference(row, top_k, p, min_p, vocab) for p in (top_p - 1e-5, top_p + 1e-5)]
        near += [reference(row, top_k, top_p, m, vocab) for m in (min_p - 1e-5, min_p + 1e-5)]
        assert np.all(keep[np.all(near, axis=0)]) and not np.any(keep[~np.any(near, axis=0)])


def test_by_hand():
    log_probs = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3] + [0.0] * (V - 4)]))
    keeps = lambda **options: np.flatnonzero(KEPT(log_probs, choosing(**options))[0]).tolist()
    assert keeps(top_k=2) == [1, 3]
    assert keeps(top_p=0.4) == [1] and keeps(top_p=0.41) == [1, 3]
    assert keeps(top_p=0.69) == [1, 3] and keeps(top_p=0.71) == [1, 2, 3]
    # Of 0.7 that top-k left, 0.4 is 57 percent.
    assert keeps(top_k=2, top_p=0.57) == [1] and keeps(top_k=2, top_p=0.58) == [1, 3]
    assert keeps(min_p=0.74) == [1, 3] and keeps(min_p=0.76) == [1]
    assert keeps(vocab=2) == [0, 1] and keeps(vocab=2, top_k=5) == [0, 1]


def test_equal_probabilities_at_a_limit_are_kept_all():
    log_probs = jnp.full((1, V), -np.log(V))
    assert KEPT(log_probs, choosing(top_k=1)).all() and KEPT(log_probs, choosing(top_p=0.1)).all()


@pytest.mark.parametrize(
    "options", [dict(temperature=1.7), dict(top_p=0.8, temperature=0.9), dict(top_k=4)]
)
def test_frequencies_are_the_probabilities(options):
    count = 20_000
    logits = np.random.default_rng(3).normal(size=(1, V)).astype(np.float32)
    chosen = choosing(**options, vocab=V - 1)
    log_probs = log_probs_of(jnp.asarray(logits), chosen)
    rows = jnp.broadcast_to(log_probs, (count, V))
    seeds = jnp.arange(count, dtype=jnp.uint32)
    got = np.bincount(DRAW(rows, chosen, seeds, jnp.full(count, 7)), minlength=V)
    keep = np.asarray(KEPT(log_probs, chosen))[0]
    assert not got[~keep].any() and 1 < keep.sum() < V
    temperature = options.get("temperature", 1.0)
    probs = np.where(keep, np.exp(logits[0] / temperature), 0)
    expected = count * probs / probs.sum()
    chi_square = np.sum((got - expected)[keep] ** 2 / expected[keep])
    # Mean and deviation of chi-square are f and sqrt(2 f).
    freedom = keep.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
    # Another position of the same rows draws other tokens, and as often.
    other = np.bincount(DRAW(rows, chosen, seeds, jnp.full(count, 8)), minlength=V)
    assert (other != got).any() and np.abs(other - expected).max() < 5 * np.sqrt(count) / 2


def test_temperature_0_takes_the_likeliest():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, V)), jnp.float32)
    options = choosing(0.0, top_k=5, vocab=7)
    log_probs = log_probs_of(logits, options)
    got = DRAW(log_probs, options, jnp.arange(50, dtype=jnp.uint32), jnp.zeros(50, jnp.int32))
    np.testing.assert_array_equal(got, logits[:, :7].argmax(axis=1))
    np.testing.assert_allclose(jnp.exp(log_probs[:, :7]).sum(axis=1), 1, rtol=1e-6)
