"""What a step minimises: against forms that build all logits, and by hand in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moejax.models import Transformer
from moejax.training.distillation import DistillConfig
from moejax.training.objective import Distillation, Preferences
from moejax.training.preferences import PreferenceConfig
from moejax.training.state import TrainState
from moejax.training.step import make_eval_step, make_train_step

STUDENT = tiny.moe_config(num_layers=1, first_k_dense=0, loss_chunk=3)
PLAIN = tiny.dense_config(num_layers=1)
TEACHER = tiny.dense_config(num_layers=1, d_model=24)


def state_of(config, seed=0):
    variables = tiny.variables(config, seed)
    params = variables["params"]
    optimizer = optax.trace(0.0)  # keeps the gradients as they are
    state = variables.get("router_state", {})
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), state), optimizer


def stepped(config, objective, batch, frozen, seed=0):
    """Gradients of one step, its metrics, and the state before it."""
    state, optimizer = state_of(config, seed)
    step = make_train_step(config, optimizer, optax.constant_schedule(0.1), objective=objective)
    new, metrics = jax.jit(step)(state, batch, frozen)
    return new.opt_state.trace, metrics, state


def logits_of(config, variables, part):
    return (
        Transformer(config).apply(variables, part.tokens, part.segment_ids, part.positions).logits
    )


def close(got, wanted, tolerance=1e-5):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(run="x"),
        pytest.param(
            DistillConfig(run="x", divergence="reverse", temperature=2.0, hard=0.25),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_distillation_is_the_divergence_of_whole_logits(config):
    """Values and gradients, over two micro-batches of weighted targets."""
    batch = tiny.batch(2)
    weights = np.random.default_rng(1).choice([0.0, 1.0, 2.5], batch.tokens.shape)
    batch = batch.replace(weights=jnp.asarray(weights, jnp.float32))
    frozen = tiny.variables(TEACHER, 5)
    got, metrics, state = stepped(STUDENT, Distillation(config, STUDENT, TEACHER), batch, frozen)

    def wanted(params):
        total = divergence = nll = aux = 0.0
        for i in range(2):
            part = jax.tree.map(lambda a, i=i: a[i], batch)
            variables = {"params": params, "router_state": state.router_state}
            output = Transformer(STUDENT).apply(
                variables, part.tokens, part.segment_ids, part.positions, train=True,
                rngs={"router": jax.random.key(0)},
            )  # fmt: skip
            w = part.weights * (part.segment_ids > 0)
            t = config.temperature
            s = jax.nn.log_softmax(output.logits / t)
            q = jax.nn.log_softmax(logits_of(TEACHER, frozen, part) / t)
            one, two = (q, s) if config.divergence == "forward" else (s, q)
            divergence += t**2 * jnp.sum(w * jnp.sum(jnp.exp(one) * (one - two), -1))
            log_probs = jax.nn.log_softmax(output.logits)
            nll -= jnp.sum(w * jnp.take_along_axis(log_probs, part.targets[..., None], -1)[..., 0])
            total += jnp.sum(w)
            aux += output.aux_loss / 2
        loss = ((1 - config.hard) * divergence + config.hard * nll) / total + aux
        return loss, (divergence / total, nll / total)

    gradients, (divergence, nll) = jax.jit(jax.grad(wanted, has_aux=True))(state.params)
    close(got, gradients)
    np.testing.assert_allclose(metrics.told["distill/divergence"], divergence, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, nll, rtol=1e-5)
    assert int(metrics.tokens) == int((batch.segment_ids > 0).sum())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    frozen = tiny.variables(TEACHER, 5)
    objective = Distillation(DistillConfig(run="x"), TEACHER, TEACHER)
    got, metrics, _ = stepped(TEACHER, objective, tiny.batch(1), frozen, seed=5)
    assert float(metrics.told["distill/divergence"]) < 1e-6
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(got)) < 1e-5


def pairs(parts):
    """Rows of two segments each, with signs on the last targets of both."""
    rng = np.random.default_rng(4)
    batch = tiny.batch(1)
    rows, length = batch.tokens.shape[1:]
    segments = np.tile(np.repeat([1, 2], [length // 2, length - length // 2]), (rows, 1))
    segments[:, -1] = 0
    weights = np.where(segments == 1, 1.0, -1.0) * (segments > 0)
    weights[:, :2] = weights[:, length // 2 : length // 2 + 1] = 0
    positions = np.concatenate([np.arange(length // 2), np.arange(length - length // 2)])
    draw = lambda: rng.integers(0, tiny.VOCAB, (rows, length))
    made = (draw(), draw(), segments, np.tile(positions, (rows, 1)), weights)
    shape = (parts, rows // parts, length)
    types = (jnp.int32,) * 4 + (jnp.float32,)
    return type(batch)(
        *(jnp.asarray(a, t).reshape(shape) for a, t in zip(made, types, strict=True))
    )


def test_preferences_are_dpos_loss_by_hand():
    """Equation 7 of arXiv 2305.18290 from whole logits, both responses in rows of their own."""
    config = PreferenceConfig(beta=0.5, label_smoothing=0.1)
    batch, frozen = pairs(2), tiny.variables(PLAIN, 7)
    got, metrics, state = stepped(PLAIN, Preferences(config, PLAIN), batch, frozen)
    flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), batch)

    def score(variables, segment):
        alone = flat.replace(segment_ids=jnp.where(flat.segment_ids == segment, 1, 0))
        log_probs = jax.nn.log_softmax(logits_of(PLAIN, variables, alone))
        chosen = jnp.take_along_axis(log_probs, flat.targets[..., None], -1)[..., 0]
        counted = (flat.segment_ids == segment) & (flat.weights != 0)
        return jnp.sum(jnp.where(counted, chosen, 0.0), axis=1)

    def wanted(params):
        variables = {"params": params, "router_state": state.router_state}
        ratio = [score(variables, s) - score(frozen, s) for s in (1, 2)]
        z = 0.5 * (ratio[0] - ratio[1])
        loss = -0.9 * jax.nn.log_sigmoid(z) - 0.1 * jax.nn.log_sigmoid(-z)
        return jnp.mean(loss), jnp.mean(ratio[0] > ratio[1])

    gradients, accuracy = jax.jit(jax.grad(wanted, has_aux=True))(state.params)
    loss, _ = wanted(state.params)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(metrics.told["preferences/accuracy"], accuracy, rtol=1e-6)
    assert float(metrics.targets) == batch.tokens.shape[0] * batch.tokens.shape[1]
    close(got, gradients)


def test_without_a_reference_none_is_asked_for():
    config = PreferenceConfig(reference_free=True, length_normalized=True, beta=2.0, margin=1.0)
    _, metrics, _ = stepped(PLAIN, Preferences(config, PLAIN), pairs(1), None)
    assert np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm)


def test_held_out_loss_is_of_the_preferred_responses():
    state, _ = state_of(PLAIN)
    batch = pairs(1)
    judge = jax.jit(make_eval_step(PLAIN))
    got = judge(state, batch)
    only = judge(state, batch.replace(weights=jnp.maximum(batch.weights, 0)))
    np.testing.assert_array_equal(got.nll, only.nll)
    assert float(got.targets) == float((batch.weights > 0).sum())
    plain = dataclasses.replace(batch, weights=None).judged
    assert plain.weights is None
