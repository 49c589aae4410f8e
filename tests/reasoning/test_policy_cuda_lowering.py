"""Sampling, speculation, replay and the policy's update lowered for CUDA; nothing runs here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hopper import H100_OF_MODELS, kernels, lowered_for_h100

from moejax.models.decode import Rules, sample_program
from moejax.models.sampling_config import SamplingConfig
from moejax.reasoning.policy_step import make_policy_step, make_scorer, parts_of
from moejax.reasoning.rl_config import RLConfig
from moejax.reasoning.rollouts import PolicyRows
from moejax.training.schedules import LearningRate
from moejax.training.state import TrainState

ROWS, WIDTH, TOKENS = 8, 8, 4
OPTIMIZER = optax.sgd(0.1)
SCHEDULE = LearningRate.of("cosine", peak=0.1, final_fraction=1.0, warmup=0, start=0, length=1)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """jax asks the GPU for its cuDNN before it lowers; here it is told of one."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda *_: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def model(**changes):
    """In bfloat16, with the dispatcher that runs on a GPU."""
    return tiny.moe_config(
        dispatch="grouped", dtype="bfloat16", d_model=128, moe={"d_expert": 128}, **changes
    )


def here(config):
    """The same model with a dispatcher whose shapes are found without a GPU."""
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="blocks"))


@functools.cache
def variables(config):
    config = here(config)
    shapes = jax.eval_shape(functools.partial(tiny.variables, config))
    return {name: shapes.get(name, {}) for name in ("params", "router_state")}


def lowered(function, *given):
    shaped = lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
    return lowered_for_h100(function, *jax.tree.map(shaped, given), mesh=H100_OF_MODELS)


@pytest.mark.parametrize("speculate", [0, 1])
def test_sampling_lowers(speculate):
    config = model(mtp_depth=speculate)
    rules = Rules.of(SamplingConfig(max_tokens=TOKENS), 30, (1,), np.zeros(ROWS, np.uint32))
    prompts = np.zeros((ROWS, WIDTH - TOKENS), np.int32)
    lengths = np.ones(ROWS, np.int32)
    program = functools.partial(
        sample_program.__wrapped__, config, max_tokens=TOKENS, keep_experts=not speculate,
        speculate=speculate,
    )  # fmt: skip
    text = lowered(program, variables(config), prompts, lengths, rules)
    assert kernels(text) > 0 and "bf16" in text and "stablehlo.while" in text


def rows_of(config, experts):
    """Shapes of a rollout's rows, with the experts that its routers chose."""
    tokens = jnp.zeros((ROWS, WIDTH), jnp.int32)
    plain = PolicyRows(
        tokens, jnp.ones(ROWS, jnp.int32), jnp.ones((ROWS, WIDTH)), jnp.ones(ROWS),
        jnp.ones((ROWS, WIDTH)),
    )  # fmt: skip
    if not experts:
        return plain
    score = make_scorer(here(config), RLConfig().resolved(), 30, keep_experts=True)
    _, chosen = jax.eval_shape(score, *variables(config).values(), plain)
    return plain.replace(experts=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), chosen))


@pytest.mark.parametrize("replay", [False, True])
def test_the_policys_update_lowers(replay):
    config = model(num_layers=2)
    rl = RLConfig(kl_weight=0.0, routing_replay="rollout" if replay else "none").resolved()
    step = make_policy_step(config, rl, OPTIMIZER, SCHEDULE, max_tokens=TOKENS, vocab_size=30)
    params, router_state = variables(config).values()
    state = TrainState(
        jnp.zeros((), jnp.int32), params, jax.eval_shape(OPTIMIZER.init, params), router_state
    )
    text = lowered(step, state, parts_of(rows_of(config, replay), 2))
    assert kernels(text) > 0 and "bf16" in text
    # Replayed choices are given, and no scores are sorted for them.
    assert ("top_k" in text) != replay
