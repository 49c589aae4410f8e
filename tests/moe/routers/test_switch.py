"""Switch, GShard, Llama 4 and grouped experts: cases by hand; Llama 4 against Transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe import MoEConfig
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs
from moejax.moe.routers.switch import (
    GShardOptions,
    GShardRouter,
    Llama4Options,
    Llama4Router,
    MoGEOptions,
    MoGERouter,
    SwitchOptions,
    SwitchRouter,
    top_two,
)


@functools.cache
def compiled(kind, experts, top_k, train, options):
    router = kind(kind.Options(**dict(options)), experts, top_k)
    run = lambda x, valid, key: router.apply(
        {"params": {"kernel": jnp.eye(experts)}}, RouterInputs(x, valid, train=train),
        rngs={"router": key},
    )  # fmt: skip
    return jax.jit(run)


def route(kind, logits, top_k, train=False, seed=0, valid=None, **options):
    """Routes tokens with the given logits (B, S, E): the kernel is the identity."""
    run = compiled(kind, logits.shape[-1], top_k, train, tuple(options.items()))
    valid = jnp.ones(logits.shape[:2], bool) if valid is None else jnp.asarray(valid)
    return run(jnp.asarray(logits, jnp.float32), valid, jax.random.key(seed))


def test_the_gate_of_switch_is_the_probability_of_its_expert():
    # p = (.5, .25, .125, .125) and (.1, .1, .2, .6): gates .5 and .6, not 1.
    # f = (1/2, 0, 0, 1/2), P = (.3, .175, .1625, .3625): loss 4 · (.15 + .18125) = 1.325.
    logits = np.log([[[4, 2, 1, 1], [1, 1, 2, 6]]])
    out = route(SwitchRouter, logits, 1)
    np.testing.assert_array_equal(out.expert, [[0], [3]])
    np.testing.assert_allclose(out.gate, [[0.5], [0.6]], rtol=1e-5)
    np.testing.assert_allclose(out.aux_loss, 0.01325, rtol=1e-5)


def test_jitter_of_switch_moves_the_logits_by_a_hundredth_in_training_only():
    logits = np.log([[[4, 2, 1.5, 0.5], [3, 1.5, 2, 6]]])
    plain, noisy = route(SwitchRouter, logits, 1), route(SwitchRouter, logits, 1, True)
    ratio = np.asarray(noisy.logits) / np.asarray(plain.logits)
    assert np.all(np.abs(ratio - 1) <= 0.0101) and np.ptp(ratio) > 0.002
    assert not np.array_equal(noisy.gate, plain.gate)
    # The expert computes the token as it is.
    x = jnp.ones((1, 2, 4))
    assert noisy.rows.enter(x) is x


def test_gshard_gates_are_the_two_best_over_their_sum():
    # Probabilities (.5, .3, .1, .1) and (.2, .05, .15, .6): gates 5/8, 3/8 and 3/4, 1/4.
    # Loss of first choices: f = (1/2, 0, 0, 1/2), P = (.35, .175, .125, .35): 4 · .35 = 1.4.
    logits = np.log([[[5, 3, 1, 1], [2, 0.5, 1.5, 6]]])
    out = route(GShardRouter, logits, 2)
    np.testing.assert_array_equal(out.expert, [[0, 1], [3, 0]])
    np.testing.assert_allclose(out.gate, [[5 / 8, 3 / 8], [3 / 4, 1 / 4]], rtol=1e-5)
    np.testing.assert_allclose(out.aux_loss, 0.014, rtol=1e-5)
    # Token 1 as padding: loss of token 0 alone, 4 · .5 = 2.
    out = route(GShardRouter, logits, 2, valid=[[True, False]])
    np.testing.assert_array_equal(out.expert, [[0, 1], [4, 4]])
    np.testing.assert_allclose(out.aux_loss, 0.02, rtol=1e-5)


def test_gshard_keeps_the_second_expert_with_twice_its_gate():
    # g2 = 0.1 is kept in 20 % of 4096 draws, g2 = 0.4 in 80 %: three deviations are 0.019. With
    # equal gates of 1/2 it is kept always. A first choice left alone keeps its gate g1.
    tokens = 4096
    for second, wanted in ((0.1, 0.2), (0.4, 0.8), (0.5, 1.0)):
        # A third expert, so that the gate over the sum is not the probability.
        logits = np.tile(np.log([1 - second, second, 0.75 * second]), (1, tokens, 1))
        out = route(GShardRouter, logits, 2, True)
        kept = np.asarray(out.expert)[:, 1] == 1
        assert abs(kept.mean() - wanted) <= 0.019
        np.testing.assert_array_equal(np.asarray(out.expert)[~kept, 1], 3)
        np.testing.assert_array_equal(np.asarray(out.gate)[~kept, 1], 0.0)
        np.testing.assert_allclose(out.gate[:, 0], 1 - second, rtol=1e-5)
        assert float(out.stats["assignments"]) == tokens + kept.sum()
    always = route(GShardRouter, logits, 2, True, keep_factor=1e9)
    assert np.all(np.asarray(always.expert)[:, 1] == 1)


def test_the_two_best_with_ties_and_infinities():
    scores = jnp.array([[1.0, 3, 2], [2, 2, 2], [-jnp.inf, -jnp.inf, 0], [0, 5, 5]])
    np.testing.assert_array_equal(top_two(scores), [[1, 2], [0, 1], [2, 0], [1, 2]])


def test_llama4_scales_the_input_and_leaves_the_output():
    # Logits (0, ln 3): sigmoid(ln 3) = 3/4 chooses expert 1 and scales its input. Token 1's logits
    # 40 and 30 have the same float32 sigmoid, 1; the larger is chosen all the same.
    logits = np.array([[[0, np.log(3)], [30.0, 40.0]]])
    out = route(Llama4Router, logits, 1)
    np.testing.assert_array_equal(out.expert, [[1], [1]])
    np.testing.assert_array_equal(out.gate, [[1.0], [1.0]])
    rows = out.rows.enter(jnp.full((1, 2, 3), 8.0))
    np.testing.assert_allclose(rows, np.array([[[6.0] * 3, [8.0] * 3]]), rtol=1e-6)


def test_llama4_equals_transformers():
    why = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    from transformers.models.llama4 import modeling_llama4 as hf

    width, experts, d_expert = 6, 4, 5
    config = transformers.Llama4TextConfig(
        hidden_size=width, intermediate_size=d_expert, num_local_experts=experts,
        num_experts_per_tok=1,
    )  # fmt: skip
    theirs = hf.Llama4TextMoe(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(1, 12, width, generator=generator, requires_grad=True)
    y, _ = theirs(x)
    y.square().sum().backward()

    # Transposed weights; gate and up side by side in one axis of twice the width.
    numpy = lambda tensor: jnp.asarray(tensor.detach().numpy())
    gate_up = numpy(theirs.experts.gate_up_proj).reshape(experts, width, 2, d_expert)
    shared = theirs.shared_expert
    both = jnp.stack([numpy(shared.gate_proj.weight).T, numpy(shared.up_proj.weight).T], axis=1)
    params = {
        "experts": {"gate_up": gate_up, "down": numpy(theirs.experts.down_proj)},
        "router": {"kernel": numpy(theirs.router.weight).T},
        "shared": {"gate_up": both, "down": numpy(shared.down_proj.weight).T},
    }
    config = MoEConfig(
        num_experts=experts, top_k=1, d_expert=d_expert, num_shared_experts=1, dispatch="blocks",
        exchange="none", router=Llama4Options(name="moejax.moe.routers.switch.Llama4Router"),
    )  # fmt: skip
    layer = MoELayer(config)

    def run(params, x):
        out = layer.apply({"params": params}, RouterInputs(x, jnp.ones(x.shape[:2], bool)))
        return jnp.sum(out.y**2), out.y

    grads, ours = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(params, numpy(x))
    assert tiny.relative_error(ours.reshape(-1, width), y.detach().numpy()) < 1e-5
    assert tiny.relative_error(grads[1], x.grad.numpy()) < 1e-4
    to_router = grads[0]["router"]["kernel"].T
    assert tiny.relative_error(to_router, theirs.router.weight.grad.numpy()) < 1e-4


def test_moge_takes_as_many_from_each_group():
    # E = 8, p ∝ (8 7 6 5 | 1 2 4 3), sum 36. Two groups, K = 2: the best of each, 0 and 6; plain
    # top-k would take 0 and 1. K = 4: 0, 1 and 6, 7.
    logits = np.log([[[8, 7, 6, 5, 1, 2, 4, 3]]])
    out = route(MoGERouter, logits, 2)
    np.testing.assert_array_equal(out.expert, [[0, 6]])
    np.testing.assert_allclose(out.gate, [[8 / 36, 4 / 36]], rtol=1e-5)
    out = route(MoGERouter, logits, 4, num_groups=2)
    np.testing.assert_array_equal(out.expert, [[0, 1, 6, 7]])
    np.testing.assert_allclose(out.gate, [[8 / 36, 7 / 36, 4 / 36, 3 / 36]], rtol=1e-5)
    # f = (1/4 at the four chosen), P = p: loss 8 · (8 + 7 + 4 + 3) / 36 / 4 = 44/36.
    np.testing.assert_allclose(out.aux_loss, 0.01 * 44 / 36, rtol=1e-5)


def test_moge_loads_every_group_alike_whatever_the_logits():
    # A router that has collapsed onto expert 5 still sends each group K / G of every token.
    logits = np.random.default_rng(0).normal(size=(2, 16, 12)) + 20 * (np.arange(12) == 5)
    out = route(MoGERouter, logits, 6, num_groups=3, valid=[[True] * 16, [True] * 10 + [False] * 6])
    groups = np.asarray(out.stats["load"]).reshape(3, 4).sum(axis=1)
    np.testing.assert_array_equal(groups, [52, 52, 52])
    # One group is plain top-k.
    plain = route(MoGERouter, logits, 6, num_groups=1)
    np.testing.assert_array_equal(plain.expert, jax.lax.top_k(logits.reshape(32, 12), 6)[1])


@pytest.mark.parametrize(
    ("kind", "top_k", "train"),
    [
        (SwitchRouter, 1, True),
        (GShardRouter, 2, True),
        (Llama4Router, 1, False),
        (MoGERouter, 2, False),
    ],
)
def test_a_later_token_changes_no_earlier_one(kind, top_k, train):
    logits = np.random.default_rng(0).normal(size=(1, 2, 4))
    changed = logits + 9.0 * np.array([[[0], [1]]]) * np.arange(4)
    one, two = (route(kind, values, top_k, train) for values in (logits, changed))
    np.testing.assert_array_equal(one.expert[0], two.expert[0])
    np.testing.assert_array_equal(one.gate[0], two.gate[0])
    x = jnp.ones((1, 2, 4))
    np.testing.assert_array_equal(one.rows.enter(x)[0, 0], two.rows.enter(x)[0, 0])
    assert not np.array_equal(one.logits[0, 1], two.logits[0, 1])


@pytest.mark.parametrize(
    ("kind", "top_k"), [(SwitchRouter, 1), (GShardRouter, 2), (Llama4Router, 1), (MoGERouter, 2)]
)
def test_gradients_reach_the_router_and_padding_gets_none(kind, top_k):
    rng = np.random.default_rng(0)
    router = kind(kind.Options(), 4, top_k)
    x = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    valid = jnp.array([[True] * 3, [True, True, False]])

    def used(kernel, x):
        inputs = RouterInputs(x, valid, train=True)
        out = router.apply(
            {"params": {"kernel": kernel}}, inputs, rngs={"router": jax.random.key(1)}
        )
        # What an expert sees, weighted: one that returns its row.
        rows = out.rows.enter(x).reshape(6, 5)
        running = jnp.sum(out.gate, axis=-1)[:, None]
        scores = jnp.sum(out.gate * (1.0 + jnp.arange(out.gate.size).reshape(out.gate.shape)))
        return jnp.sum(rows**2 * running) + scores + out.aux_loss

    to_kernel, to_x = jax.jit(jax.grad(used, argnums=(0, 1)))(kernel, x)
    assert np.all(np.any(to_kernel, axis=0)) and np.isfinite(to_kernel).all()
    np.testing.assert_array_equal(to_x[1, 2], np.zeros(5))
    assert np.all(np.any(to_x[valid], axis=-1))
    assert router.options.counts(5, 4, top_k).params == kernel.size


@pytest.mark.parametrize(
    ("options", "experts", "top_k", "field"),
    [
        (SwitchOptions(), 8, 2, "moe.top_k"),
        (GShardOptions(), 8, 1, "moe.top_k"),
        (Llama4Options(), 8, 2, "moe.top_k"),
        (MoGEOptions(num_groups=3), 9, 2, "router.num_groups"),
        (MoGEOptions(num_groups=2), 9, 2, "router.num_groups"),
        (MoGEOptions(), 8, 3, "router.num_groups"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, experts, top_k, field):
    with pytest.raises(ConfigError) as error:
        options.check(experts, top_k)
    assert error.value.field == field


def test_values_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"router.keep_factor"):
        GShardOptions(keep_factor=0.0)
    with pytest.raises(ConfigError, match=r"router.num_groups"):
        MoGEOptions(num_groups=-1)
    for options, top_k in ((SwitchOptions(), 1), (GShardOptions(), 2), (MoGEOptions(), 4)):
        options.check(8, top_k)
