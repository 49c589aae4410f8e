"""A loss on chosen targets: by hand from full logits, its gradients, micro-batches and meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_step import CONFIGS, gradients, run, take_step

from moejax.models import Transformer
from moejax.models.mtp import counted_targets
from moejax.training.state import TrainState
from moejax.training.step import make_eval_step

MTP = CONFIGS["mtp"]
DENSE = tiny.dense_config(num_layers=1, loss_chunk=3)


def weighted(parts: int = 1):
    """A batch whose targets weigh 0, 1 or something else; its halves weigh very differently."""
    batch = tiny.batch(parts)
    rng = np.random.default_rng(3)
    weights = rng.choice([0.0, 1.0, 2.5], (8, 8), p=[0.5, 0.3, 0.2])
    weights[:4] *= 0.1
    return batch.replace(weights=jnp.asarray(weights.reshape(batch.tokens.shape), jnp.float32))


@functools.cache
def losses(config, mtp=False):
    """The loss of one micro-batch with weights."""
    return lambda variables, part: Transformer(config).apply(
        variables, part.tokens, part.targets, part.segment_ids, part.positions, mtp=mtp,
        weights=part.weights, method=Transformer.loss,
    )  # fmt: skip


@functools.cache
def dense():
    """Jitted gradient of the dense model's summed loss, and the sums; and its variables."""

    def total(params, part):
        out = losses(DENSE)({"params": params}, part)
        return out.nll, out

    return jax.jit(jax.grad(total, has_aux=True)), tiny.variables(DENSE)["params"]


@functools.cache
def ahead():
    return jax.jit(losses(MTP, mtp=True)), tiny.variables(MTP)


def loss_of(part):
    """Sums of the model with a module ahead."""
    run, variables = ahead()
    return run(variables, part)


def gradient_of(part):
    """Of the dense model: gradients and sums."""
    run, params = dense()
    return run(params, part)


def first(batch):
    return jax.tree.map(lambda leaf: leaf[0], batch)


def test_by_hand_from_full_logits():
    part = first(weighted())
    _, out = gradient_of(part)
    rows = part.tokens, part.segment_ids, part.positions
    logits = np.asarray(tiny.forward(DENSE)({"params": dense()[1]}, *rows).logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, np.asarray(part.targets)[..., None], -1)[..., 0]
    weights = np.where(part.segment_ids > 0, part.weights, 0.0)
    np.testing.assert_allclose(out.nll, -np.sum(weights * chosen), rtol=1e-5)
    np.testing.assert_allclose(out.targets, weights.sum(), rtol=1e-6)
    assert 0 < weights.sum() != (np.asarray(part.segment_ids) > 0).sum()


def test_modules_weigh_a_token_as_the_model_does():
    """Position t of module 0 predicts token t + 2, the main model's target at t + 1."""
    part = first(weighted())
    counted = 0.0
    for segments, weights in zip(
        np.asarray(part.segment_ids), np.asarray(part.weights), strict=True
    ):
        for t in range(len(segments) - 1):
            if segments[t] and segments[t] == segments[t + 1]:
                counted += weights[t + 1]
    out = loss_of(part)
    np.testing.assert_allclose(out.mtp.targets, [counted], rtol=1e-6)
    np.testing.assert_allclose(
        counted_targets(part.segment_ids, 1, part.weights), [counted], rtol=1e-6
    )
    # Two halves of the targets sum to all of them, in every sum there is.
    ones = jnp.ones(part.weights.shape)
    half = (part.weights > 0).astype(jnp.float32)

    def sums(weights):
        out = loss_of(part.replace(weights=weights))
        return out.nll, out.targets, out.mtp

    both = jax.tree.map(jnp.add, sums(half), sums(1 - half))
    tiny.assert_trees_close(both, sums(ones), 1e-6)


def test_masked_targets_have_exactly_no_gradient():
    part = first(weighted())
    # What a masked target is makes no difference to any bit of any gradient.
    masked = (part.weights == 0) | (part.segment_ids == 0)
    changed = part.replace(targets=jnp.where(masked, (part.targets + 7) % 32, part.targets))
    assert np.any(changed.targets != part.targets)
    (one, _), (other, _) = gradient_of(part), gradient_of(changed)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(one["head"])
    nothing, out = gradient_of(part.replace(weights=jnp.zeros(part.weights.shape)))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))
    assert float(out.nll) == float(out.targets) == 0.0


@functools.cache
def step(parts=1, mesh="one device"):
    return take_step(weighted(parts), mesh, "mtp")


def test_a_step_divides_by_the_weights_of_the_whole_batch():
    new, metrics = step()
    out = loss_of(first(weighted()))
    np.testing.assert_allclose(metrics.loss, out.nll / out.targets, rtol=1e-5)
    np.testing.assert_allclose(metrics.targets, out.targets, rtol=1e-6)
    assert float(metrics.tokens) == 52  # what was computed, and is paid for
    np.testing.assert_allclose(metrics.mtp.loss, out.mtp.nll / out.mtp.targets, rtol=1e-5)
    assert np.any(gradients(new)["head"])


@pytest.mark.parametrize(
    ("parts", "mesh"),
    [(2, "one device"), pytest.param(2, "data 2 x expert 2 x tensor 2", marks=pytest.mark.slow)],
)
def test_micro_batches_equal_one_batch(parts, mesh):
    """Their weights differ: the mean of the micro-batches' means would be another number."""
    (one, whole), (two, halves) = step(), step(parts, mesh)
    tiny.assert_trees_close(gradients(two), gradients(one), 2e-5)
    tiny.assert_trees_close(halves.mtp, whole.mtp, 2e-5)
    for name in ("loss", "targets", "tokens", "aux_loss"):
        np.testing.assert_allclose(getattr(halves, name), getattr(whole, name), rtol=2e-5)
    rows = lambda i: jax.tree.map(lambda a: jnp.roll(a, -4 * i, axis=0), first(weighted()))
    half = lambda i: rows(i).replace(weights=rows(i).weights.at[4:].set(0.0))
    means = [float(out.nll / out.targets) for out in (loss_of(half(0)), loss_of(half(1)))]
    assert abs(np.mean(means) - float(whole.loss)) > 1e-3


def test_without_weights_every_target_counts_one():
    part = first(tiny.batch())
    out = loss_of(part.replace(weights=jnp.ones(part.tokens.shape)))
    metrics = run(model="mtp")[1]
    assert metrics.computed is None and float(metrics.tokens) == float(metrics.targets) == 52
    np.testing.assert_allclose(metrics.loss, out.nll / 52, rtol=1e-5)


def test_validation_counts_by_weight():
    params = dense()[1]
    state = TrainState(jnp.zeros((), jnp.int32), params, (), {})
    seen = jax.jit(make_eval_step(DENSE))(state, weighted())
    _, out = gradient_of(first(weighted()))
    np.testing.assert_allclose(seen.nll, out.nll, rtol=1e-6)
    np.testing.assert_allclose(seen.targets, out.targets, rtol=1e-6)
