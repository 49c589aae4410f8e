"""Routing replay: choices kept from one call and given to another, against NumPy and itself."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.models import Transformer, update_router_state
from moejax.models.replay import as_replay, check_replay
from moejax.moe.routers import REGISTRY, RouterInputs, TopKOptions, TopKRouter
from moejax.parallel import MeshConfig, axis_rules, make_mesh, sharding

EXPERTS, TOP_K, WIDTH = 8, 2, 6
REPLAYING = sorted(name for name, router in REGISTRY.items() if router.replays)
# Experts in a scan of two repeats, under remat, with an MTP module that is not run; and unrolled.
PLAIN = dict(first_k_dense=0, num_layers=2, moe={"num_shared_experts": 0})
SCANNED = tiny.moe_config(remat="full", loss_chunk=3, mtp_depth=1, **PLAIN)
MODELS = {
    "scan, remat": SCANNED,
    "unrolled": tiny.moe_config(
        "softmax_topk", unroll=2, options={"sequence_loss_weight": 0.1}, **PLAIN
    ),
}
EACH = ["scan, remat", pytest.param("unrolled", marks=pytest.mark.slow)]
DATA_EXPERT = MeshConfig(data=2, expert=2, tensor=2)
MESHES = [DATA_EXPERT, pytest.param(MeshConfig(expert=4, context=2), marks=pytest.mark.slow)]


def gradients(config):
    """Jitted gradients of the loss in the parameters, with its parts and the choices beside them.

    Returns:
      ``run(params, others, part)``, ``others`` the collections ``router_state`` and maybe
      ``router_replay``: gradients, then (LossOutput, written variables).
    """

    def objective(params, others, part):
        with axis_rules():
            out, written = Transformer(config).apply(
                {"params": params, **others}, part.tokens, part.targets, part.segment_ids,
                part.positions, train=True, method=Transformer.loss, mutable=["router_choice"],
                rngs={"router": jax.random.key(0)},
            )  # fmt: skip
        return out.nll / out.targets + out.aux_loss, (out, written)

    return jax.jit(jax.grad(objective, has_aux=True))


@functools.cache
def case(name):
    """A model's config, parameters, router state and one micro-batch."""
    config = MODELS[name]
    state = tiny.variables(config)
    params = state.pop("params")
    return config, params, state, jax.tree.map(lambda a: a[0], tiny.batch())


@functools.cache
def own(name):
    """What a model's loss gives by its own choices."""
    config, *inputs = case(name)
    return gradients(config)(*inputs)


def replay(name, choice, mesh=None):
    config, params, state, part = case(name)
    others = {**state, **as_replay(choice)}
    if mesh is None:
        return gradients(config)(params, others, part)
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        part = jax.device_put(part, sharding(devices, "batch", "length"))
        return jax.device_get(gradients(config)(params, others, part))


def others_of(choice, shift=3):
    """Every expert ``shift`` further round the circle; none stays none."""
    move = lambda e: jnp.where(e < EXPERTS, (e + shift) % EXPERTS, e)
    return jax.tree.map(move, choice)


def same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", EACH)
def test_ones_own_choices_give_equal_bits(name):
    gradient, (out, written) = own(name)
    same(replay(name, written), (gradient, (out, written)))


@pytest.mark.parametrize("name", EACH)
def test_choices_lie_by_router_repeat_row_and_position(name):
    config, _, _, part = case(name)
    _, (out, written) = own(name)
    for segment, layers in written["router_choice"].items():
        for layer, leaf in layers.items():
            expert = np.asarray(leaf["moe"]["router"]["expert"])
            repeats = config.layout[int(segment.split("_")[1])][1]
            assert expert.shape == (repeats, *part.tokens.shape, TOP_K)
            assert expert.dtype == np.int32
            padding = np.broadcast_to(part.segment_ids == 0, expert.shape[:3])
            assert (expert[padding] == EXPERTS).all() and (expert[~padding] < EXPERTS).all()
            load = np.stack([np.bincount(e[e < EXPERTS], minlength=EXPERTS) for e in expert])
            np.testing.assert_array_equal(out.router_stats[segment][layer]["load"], load)


def test_other_experts_are_counted_and_move_the_bias():
    """Loads turn with the experts; the bias moves by what was replayed, up where load is low."""
    config, _, state, _ = case("scan, remat")
    _, (out, written) = own("scan, remat")
    _, (turned, again) = replay("scan, remat", others_of(written))
    same(again, others_of(written))
    for was, now in zip(layers(out.router_stats), layers(turned.router_stats), strict=True):
        if was["load"].shape == now["load"].shape and was is layers(out.router_stats)[0]:
            # The first MoE layer sees the same tokens, so its loads only turn.
            np.testing.assert_array_equal(np.roll(was["load"][0], 3), now["load"][0])
        assert np.asarray(now["tokens"] == was["tokens"]).all()
        assert not np.array_equal(now["gate_mass"], was["gate_mass"])
    new = update_router_state(config, state["router_state"], turned.router_stats)
    for segment, layer_states in turned.router_stats.items():
        for layer, stats in layer_states.items():
            find = lambda tree, s=segment, name=layer: tree[s][name]["moe"]["router"]["bias"]
            moved = np.asarray(find(new)) - np.asarray(find(state["router_state"]))
            mean = stats["load"].mean(axis=-1, keepdims=True)
            np.testing.assert_array_equal(np.sign(moved), np.sign(mean - stats["load"]))


def layers(stats):
    """The statistics of all layers, in order."""
    return [layer for segment in stats.values() for layer in segment.values()]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_mesh_gives_the_values_of_one_device(mesh):
    _, (_, written) = own("scan, remat")
    turned = others_of(written)
    (wanted, (out, _)) = replay("scan, remat", turned)
    (got, (cut, kept)) = replay("scan, remat", turned, mesh)
    same(kept, turned)
    tiny.assert_trees_close(got, wanted, 2e-5)
    for name in ("nll", "targets", "aux_loss"):
        tiny.assert_trees_close(getattr(cut, name), getattr(out, name), 1e-5)


# A router by itself.


def by_hand(options: TopKOptions, logits, expert):
    """Gates of given experts from logits, in NumPy's float64."""
    scores = {
        "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    }[options.score](np.asarray(logits, np.float64))
    none = expert >= EXPERTS
    gate = np.take_along_axis(scores, np.minimum(expert, EXPERTS - 1), axis=-1)
    gate = np.where(none, 0.0, gate)
    if options.normalize_gates:
        gate = gate / np.maximum(gate.sum(-1, keepdims=True), 1e-20)
    return options.routed_scale * gate


@functools.cache
def routed(name, given=True):
    """A router over 3 x 5 tokens with given experts: its gates, their gradient in the kernel."""
    rng = np.random.default_rng(1)
    router = REGISTRY[name]
    top_k = 1 if name == "switch" else TOP_K
    # The coupling loss looks at experts, of which there are none here.
    options = {"coupling_loss_weight": 0.0} if name == "expert_coupling" else {}
    made = router(router.Options(**options), EXPERTS, top_k)
    x = jnp.asarray(rng.normal(size=(3, 5, WIDTH)), jnp.float32)
    valid = jnp.asarray(np.arange(5)[None] < np.array([[5], [3], [5]]))
    inputs = RouterInputs(x, valid)
    state = tiny.draw(jax.eval_shape(lambda: made.init(jax.random.key(0), inputs)))
    params = nn.meta.unbox(state.pop("params"))
    expert = np.argsort(rng.random((3, 5, EXPERTS)), -1)[..., :top_k].astype(np.int32)
    expert[0, 1, -1], expert[2, 4] = EXPERTS, EXPERTS + 3  # one of two is none; none at all
    if given:
        state["router_replay"] = {"expert": jnp.asarray(expert)}
    weigh = jnp.asarray(rng.normal(size=(15, top_k)), jnp.float32)

    def total(params):
        out, written = made.apply({"params": params, **state}, inputs, mutable=["router_choice"])
        return jnp.sum(weigh * out.gate), (out, written)

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (out, written)), gradient = run(params)
    return made.options, params, x, np.asarray(valid), expert, weigh, out, written, gradient


COMPOSED = sorted(n for n in REPLAYING if issubclass(REGISTRY[n], TopKRouter))


def test_which_routers_replay():
    """The composed router's presets, and two that choose by scores of their own."""
    assert {"deepseek_v3", "softmax_topk", "mixtral", "deepseek_v2", "gpt_oss"} <= set(COMPOSED)
    assert set(REPLAYING) - set(COMPOSED) == {"moge", "x_moe"}
    assert not {"longcat", "gshard", "expert_choice", "soft_moe", "hash"} & set(REPLAYING)


@pytest.mark.parametrize("name", COMPOSED)
def test_given_experts_by_hand(name):
    options, params, x, valid, expert, weigh, out, written, gradient = routed(name)
    wanted_expert = np.where(valid[..., None] & (expert < EXPERTS), expert, EXPERTS)
    np.testing.assert_array_equal(out.expert, wanted_expert.reshape(15, -1))
    np.testing.assert_array_equal(written["router_choice"]["expert"], wanted_expert)
    flat = np.asarray(x, np.float64).reshape(15, WIDTH)
    bias = np.asarray(params.get("logit_bias", np.zeros(EXPERTS)), np.float64)
    kernel = np.asarray(params["kernel"], np.float64)
    flat_expert = wanted_expert.reshape(15, -1)
    gate = lambda kernel: by_hand(options, flat @ kernel + bias, flat_expert)
    np.testing.assert_allclose(out.gate, gate(kernel), rtol=2e-5, atol=1e-7)
    load = np.bincount(flat_expert[flat_expert < EXPERTS], minlength=EXPERTS)
    np.testing.assert_array_equal(out.stats["load"], load)
    assert out.stats["unrouted"] == 1 + (options.name == "switch")
    # The gradient flows into the router through the gates: central differences in float64.
    for at in [(0, 0), (3, 5), (5, 2)]:
        step = np.zeros_like(kernel)
        step[at] = 1e-5
        slope = np.sum(np.asarray(weigh) * (gate(kernel + step) - gate(kernel - step))) / 2e-5
        np.testing.assert_allclose(gradient["kernel"][at], slope, rtol=2e-3, atol=2e-5)
    assert np.any(gradient["kernel"])


@pytest.mark.parametrize("name", ["moge", "x_moe"])
def test_routers_of_their_own_take_what_is_given(name):
    *_, valid, expert, _, out, written, gradient = routed(name)
    wanted = np.where(valid[..., None] & (expert < EXPERTS), expert, EXPERTS)
    np.testing.assert_array_equal(written["router_choice"]["expert"], wanted)
    assert np.any(gradient["kernel"])
    assert (np.asarray(out.gate) > 0).tolist() == (wanted.reshape(15, -1) < EXPERTS).tolist()


def test_padding_and_absent_experts_have_no_gate():
    *_, valid, expert, _, out, _, _ = routed("deepseek_v3")
    there = (valid[..., None] & (expert < EXPERTS)).reshape(15, -1)
    np.testing.assert_array_equal(np.asarray(out.gate) > 0, there)


# Refusals.


def test_a_router_that_cannot_replay_is_refused_at_config_time():
    check_replay(SCANNED)
    with pytest.raises(ConfigError, match=r"router.name = 'expert_choice': .*rl.routing_replay"):
        check_replay(
            tiny.moe_config("expert_choice", moe={"allow_leak": True}), "rl.routing_replay", "R3"
        )
    with pytest.raises(ConfigError, match=r"routing_replay = True: .*no MoE layer"):
        check_replay(tiny.dense_config())


def test_a_router_that_cannot_replay_refuses_given_choices():
    with pytest.raises(ConfigError, match=r"router.name = 'gshard': .*cannot be replayed"):
        routed("gshard")


def test_a_router_whose_rows_are_no_tokens_refuses_to_keep_choices():
    with pytest.raises(ConfigError, match=r"router.name = 'soft_moe': .*rows that are no tokens"):
        routed("soft_moe", given=False)


def test_choices_of_another_shape_are_refused():
    made = TopKRouter(TopKOptions(), EXPERTS, TOP_K)
    inputs = RouterInputs(jnp.ones((1, 3, WIDTH)), jnp.ones((1, 3), bool))
    variables = {
        "params": {"kernel": jnp.ones((WIDTH, EXPERTS))},
        "router_replay": {"expert": jnp.zeros((1, 4, TOP_K), jnp.int32)},
    }
    with pytest.raises(ValueError, match=r"shape \(1, 4, 2\)"):
        made.apply(variables, inputs)


def test_a_router_with_a_call_of_its_own_says_anew_that_it_replays():
    class Own(TopKRouter):
        @nn.compact
        def __call__(self, inputs):
            return super().__call__(inputs)

    class Other(TopKRouter):
        Options = dataclasses.make_dataclass("Other", [], bases=(TopKOptions,), frozen=True)

    assert not Own.replays and Other.replays
