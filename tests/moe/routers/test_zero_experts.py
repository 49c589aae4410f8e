"""MoE++ and LongCat-Flash: experts that compute nothing, by hand and beside Hugging Face's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.moe import MoEConfig
from moejax.moe.layer import MoELayer
from moejax.moe.routers.base import RouterInputs
from moejax.moe.routers.zero_experts import (
    LongCatOptions,
    LongCatRouter,
    MoEPlusPlusOptions,
    MoEPlusPlusRouter,
)

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"

# Two experts with matrices, then zero, copy, one constant. A token's vector is its logits.
P = np.array([[0.4, 0.05, 0.3, 0.2, 0.05], [0.1, 0.1, 0.1, 0.4, 0.3], [0.1, 0.2, 0.4, 0.25, 0.05]])
X = np.log(P).astype(np.float32)[None]


def plus_plus(x=X, valid=None, previous=None, params=None, **options):
    options = {"num_constant": 1, **options}
    router = MoEPlusPlusRouter(MoEPlusPlusOptions(**options), 2, 2, parent=None)
    params = {
        "kernel": jnp.eye(5),
        "residual": jnp.zeros((5, 5)),
        "constant_kernel": jnp.zeros((5, 2)),
        "constant": jnp.arange(5.0)[None],
        **(params or {}),
    }
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.asarray(valid)
    run = jax.jit(
        lambda x: router.apply({"params": params}, RouterInputs(x, valid, previous_logits=previous))
    )
    return run(jnp.asarray(x, jnp.float32))


def test_zero_gives_0_copy_the_token_and_constant_its_mixture():
    # Token 0 chooses expert 0 (.4) and zero (.3): nothing beside the expert.
    # Token 1 chooses copy (.4) and constant (.3), with a = softmax(0, 0) = 1/2, 1/2:
    #   .4 x + .3 (x / 2 + v / 2). Token 2 chooses zero (.4) and copy (.25): .25 x.
    out = plus_plus()
    np.testing.assert_array_equal(out.expert, [[0, 2], [2, 2], [2, 2]])
    np.testing.assert_allclose(out.gate, [[0.4, 0], [0, 0], [0, 0]], rtol=1e-5)
    v = np.arange(5.0)
    wanted = [np.zeros(5), 0.55 * X[0, 1] + 0.15 * v, 0.25 * X[0, 2]]
    np.testing.assert_allclose(out.bypass[0], wanted, rtol=1e-4)
    # What ran: one expert with matrices over three tokens.
    assert float(out.stats["assignments"]) == 1
    np.testing.assert_array_equal(out.stats["load"], [1, 0])
    np.testing.assert_array_equal(out.stats["choice_load"], [1, 0, 2, 2, 1])


def test_the_constants_mixture_depends_on_the_token():
    # A token of ones, logits (0, 0, 5): the constant expert is chosen with p = e⁵ / (e⁵ + 2), and
    # a = softmax(log 3, 0) = 3/4, 1/4 of x and v.
    params = {
        "kernel": jnp.zeros((5, 3)).at[:, 2].set(1.0),
        "residual": jnp.zeros((3, 3)),
        "constant_kernel": jnp.zeros((5, 2)).at[0, 0].set(np.log(3.0)),
    }
    out = plus_plus(np.ones((1, 1, 5)), num_zero=0, num_copy=0, params=params)
    gate = np.exp(5) / (np.exp(5) + 2)
    wanted = gate * (0.75 * np.ones(5) + 0.25 * np.arange(5.0))
    np.testing.assert_allclose(out.bypass[0, 0], wanted, rtol=1e-5)


def test_the_layer_befores_logits_are_added():
    previous = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 5)), jnp.float32)
    residual = jnp.asarray(np.random.default_rng(1).normal(size=(5, 5)), jnp.float32)
    out = plus_plus(previous=previous, params={"residual": residual})
    np.testing.assert_allclose(out.logits, X + previous @ residual, rtol=1e-4)
    first = plus_plus(previous=jnp.zeros((1, 3, 5)), params={"residual": residual})
    jax.tree.map(np.testing.assert_array_equal, first, plus_plus())


def test_the_heterogeneous_loss_by_hand():
    # Tokens 0 and 1: c = (1, 0, 1, 1, 1) / 2, P = (.25, .075, .2, .3, .175), tau = .5:
    #   .125 + .5 (.1 + .15 + .0875) = .29375.
    valid = [[True, True, False]]
    out = plus_plus(valid=valid, tau=0.5, hetero_loss_weight=2.0)
    np.testing.assert_allclose(out.aux_loss, 2 * 0.29375, rtol=1e-5)
    assert not np.any(out.bypass[0, 2])


def test_gradients_reach_everything_and_padding_gets_none():
    rng = np.random.default_rng(2)
    router = MoEPlusPlusRouter(MoEPlusPlusOptions(), 4, 3, parent=None)
    x = jnp.asarray(rng.normal(size=(1, 32, 8)), jnp.float32)
    previous = jnp.asarray(rng.normal(size=(1, 32, 8)), jnp.float32)
    inputs = RouterInputs(x, jnp.asarray(np.arange(32)[None] < 30), previous_logits=previous)
    params = jax.jit(router.init)(jax.random.key(0), inputs)["params"]

    def total(params, x):
        out = router.apply({"params": params}, inputs.replace(x=x))
        return jnp.sum(out.bypass**2) + jnp.sum(out.gate) + out.aux_loss

    to_params, to_x = jax.jit(jax.grad(total, argnums=(0, 1)))(params, x)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(to_params))
    assert not np.any(to_x[0, 30:])


def test_numbers_of_constants_are_the_papers_and_the_bill_is_an_expectation():
    # Table 2: 8 + 4, 16 + 4, 32 + 8 experts.
    choices = [MoEPlusPlusOptions().num_choices(e) for e in (8, 16, 32)]
    assert choices == [12, 20, 40]
    assert MoEPlusPlusOptions(num_constant=0).num_choices(8) == 10
    counts = MoEPlusPlusOptions().counts(16, 8, 2)
    assert counts.params == 16 * 12 + 12 * 12 + 2 * 16 * 2 + 2 * 16
    # Table 1: tau N / (tau N + Z) of K: .75 · 8 / (6 + 4) · 2.
    assert counts.expected_experts == pytest.approx(1.2) and counts.measured
    for options in ({"tau": 0.0}, {"num_constant": -2}, {"num_copy": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            MoEPlusPlusOptions(**options)


def longcat(x, k=2, bias=None, valid=None, experts=2, **options):
    options = {"routed_scale": 1.0, "num_zero_experts": x.shape[-1] - experts, **options}
    router = LongCatRouter(LongCatOptions(**options), experts, k, parent=None)
    bias = jnp.zeros(x.shape[-1]) if bias is None else jnp.asarray(bias, jnp.float32)
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.asarray(valid)
    variables = {"params": {"kernel": jnp.eye(x.shape[-1])}, "router_state": {"bias": bias}}
    return jax.jit(lambda x: router.apply(variables, RouterInputs(x, valid)))(jnp.asarray(x))


def test_longcat_identities_give_the_token_and_the_bias_only_selects():
    # Choices 0 and 1 have matrices. Token 0: .4 and .3: expert 0, identity 2. Token 1: .4 + .3 at
    # identities: .7 x. Token 2: .4 and .25 at identities.
    out = longcat(X)
    np.testing.assert_array_equal(out.expert, [[0, 2], [2, 2], [2, 2]])
    np.testing.assert_allclose(out.gate, [[0.4, 0], [0, 0], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(out.bypass[0], X[0] * [[0.3], [0.7], [0.65]], rtol=1e-5)
    np.testing.assert_array_equal(out.stats["choice_load"], [1, 0, 2, 2, 1])
    # With .3 on choice 1 it is chosen by all, its gate its own p.
    out = longcat(X, bias=[0, 0.3, 0, 0, 0], routed_scale=6.0)
    assert np.all(np.any(np.asarray(out.expert) == 1, axis=1))
    np.testing.assert_allclose(out.gate.sum(axis=1), 6 * np.array([0.45, 0.1, 0.2]), rtol=1e-5)
    padded = longcat(X, valid=[[True, True, False]])
    np.testing.assert_array_equal(padded.stats["choice_load"], [1, 0, 1, 1, 1])
    assert not np.any(padded.bypass[0, 2])


def test_the_mean_of_experts_reaches_its_target_on_fixed_scores():
    # 8 experts, 4 identities, K 3; scores favour the identities. Wanted: 1.5 experts a token.
    rng = np.random.default_rng(0)
    tilt = np.where(np.arange(12) < 8, 0.0, 1.5)
    x = jnp.asarray(rng.normal(size=(1, 256, 12)) + tilt, jnp.float32)
    options = LongCatOptions(num_zero_experts=4, mean_experts=1.5, bias_step=0.1)
    router = LongCatRouter(options, 8, 3, parent=None)
    inputs = RouterInputs(x, jnp.ones((1, 256), bool))

    def step(state, _):
        variables = {"params": {"kernel": jnp.eye(12)}, "router_state": state}
        stats = router.apply(variables, inputs).stats
        return router.update(state, stats), stats["load"]

    start = {"bias": jnp.zeros(12)}
    state, load = jax.jit(lambda s: jax.lax.scan(step, s, None, 300))(start)
    mean = np.asarray(load).sum(axis=1) / 256
    assert mean[0] < 1.0
    assert abs(mean[-20:].mean() - 1.5) < 0.03
    # Each expert gets the same, and the identities' bias stays where it was.
    assert np.ptp(np.asarray(load)[-20:].mean(axis=0)) < 0.1 * 256 * 1.5 / 8
    assert np.all(np.asarray(state["bias"])[8:] == 0) and np.all(np.asarray(state["bias"])[:8] != 0)


def test_every_rule_and_stacked_layers_take_all_choices():
    load = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 12)), jnp.float32)
    for rule in ("longcat", "sign", "centred", "smebu"):
        router = LongCatRouter(LongCatOptions(bias_rule=rule), 8, 3, parent=None)
        start = router.options.rule.initial(12)
        state = jax.tree.map(lambda v: jnp.zeros((3, *v.shape), v.dtype), start)
        new = router.update(state, {"choice_load": load, "load": load[:, :8]})
        assert new["bias"].shape == (3, 12) and np.any(new["bias"])


def test_longcat_defaults_are_the_models_and_what_does_not_fit_is_refused():
    # 512 experts, half as many identities, K 12: 8 with matrices on average.
    counts = LongCatOptions().counts(64, 512, 12)
    assert counts.expected_experts == 8 and counts.params == 64 * 768 and counts.measured
    with pytest.raises(ConfigError, match="mean_experts"):
        LongCatOptions(mean_experts=3.0).check(8, 2)
    with pytest.raises(ConfigError, match="num_groups"):
        LongCatOptions(num_groups=2)


def test_the_layer_equals_hugging_faces():
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    from transformers.models.longcat_flash import modeling_longcat_flash as hf

    config = transformers.LongcatFlashConfig(
        hidden_size=16, expert_ffn_hidden_size=8, n_routed_experts=6, zero_expert_num=3,
        moe_topk=4, routed_scaling_factor=6.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape, scale: scale * torch.randn(shape, generator=generator)
    with torch.no_grad():
        moe = hf.LongcatFlashMoE(config)
        for parameter in moe.parameters():
            parameter.copy_(draw(parameter.shape, 0.3))
        moe.router.e_score_correction_bias.copy_(draw((9,), 0.1))
        x = draw((2, 24, 16), 1.0)
        wanted = moe(x).numpy()
    array = lambda tensor: jnp.asarray(tensor.detach().numpy())
    # (E + Z, 2 F, D) with gate first, of which E are used; ours is (E, D, 2, F).
    gate_up = array(moe.experts.gate_up_proj)[:6].reshape(6, 2, 8, 16).transpose(0, 3, 1, 2)
    params = {
        "experts": {"gate_up": gate_up, "down": array(moe.experts.down_proj).swapaxes(1, 2)},
        "router": {"kernel": array(moe.router.classifier.weight).T},
    }
    name = f"{LongCatRouter.__module__}.{LongCatRouter.__name__}"
    options = LongCatOptions(name=name, num_zero_experts=3)
    layer = MoELayer(MoEConfig(6, 4, 8, dispatch="dense_loop", router=options))
    bias = {"router": {"bias": array(moe.router.e_score_correction_bias)}}
    run = jax.jit(lambda x: layer.apply({"params": params, "router_state": bias}, x))
    out = run(RouterInputs(array(x), jnp.ones((2, 24), bool)))
    assert 0 < float(out.stats["assignments"]) < 48 * 4
    assert tiny.relative_error(out.y, wanted) < 1e-5
