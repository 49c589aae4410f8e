"""Upcycling: the first output is the dense model's, whatever the kind; and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.cost.counts import count
from moejax.interop.config_map import runs
from moejax.interop.upcycle import UpcycleOptions, upcycle
from moejax.models import Transformer
from moejax.moe import MoEConfig, router_options

WIDTH = 24
DENSE = tiny.dense_config(d_ff=WIDTH)
KEY = jax.random.key(0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 12)))


def options(router="mixtral", shards=1, experts=4, top_k=2, more=None, moe=None, **changes):
    moe = MoEConfig(
        num_experts=experts, top_k=top_k, d_expert=WIDTH // shards, dispatch="dense_loop",
        router=router_options({"name": router, **(more or {})}), **(moe or {}),
    )  # fmt: skip
    return UpcycleOptions(moe, **changes)


@functools.cache
def dense():
    variables = tiny.variables(DENSE)
    return variables, tiny.forward(DENSE)(variables, TOKENS)


def first_output(wanted):
    config, variables = upcycle(DENSE, dense()[0], wanted, KEY)
    return config, variables, tiny.forward(config)(variables, TOKENS)


V3 = {"num_groups": 2, "groups_kept": 1, "bias_step": 0.01}
SAME = {
    "copies, renormalised": options(),
    "copies, K = 3": options("mixtral", experts=5, top_k=3),
    "copies, sigmoid, scaled 2.5": options("deepseek_v3"),
    "copies, logit bias": options("gpt_oss", moe={"expert_bias": True}),
    "copies, softmax not renormalised": options("softmax_topk"),
    "copies, one expert a token": options("softmax_topk", top_k=1),
    "copies, sigmoid not renormalised": options("deepseek_v3", more={"normalize_gates": False}),
    "2 shards of 6 experts, K = 2": options("mixtral", 2, 6, 2),
    "2 shards, K = 4": options("mixtral", 2, 8, 4),
    "3 shards, sigmoid, device groups": options("deepseek_v3", 3, 12, 3, V3),
    "4 shards, softmax not renormalised": options("softmax_topk", 4, 16, 4),
    "4 shards, K = 8": options("softmax_topk", 4, 16, 8),
    "a shared expert": options("deepseek_v3", 4, 9, 3, moe={"num_shared_experts": 1}),
    "two shared, with a gate": options(
        "mixtral", 4, 8, 2, moe={"num_shared_experts": 2, "shared_gate": True}
    ),
}  # fmt: skip
QUICK = (
    "copies, softmax not renormalised", "3 shards, sigmoid, device groups",
    "two shared, with a gate",
)  # fmt: skip
CASES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SAME]


@pytest.mark.parametrize("name", CASES)
def test_the_first_output_is_the_dense_models(name):
    config, variables, out = first_output(SAME[name])
    assert tiny.relative_error(out.logits, dense()[1].logits) < 1e-5
    # The parameters are those of the config, by the model's own shapes and by the counts.
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    wanted = tiny.variables(config)
    assert shapes(variables["params"]) == shapes(wanted["params"])
    assert shapes(variables["router_state"]) == shapes(wanted.get("router_state", {}))
    held = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert held == count(config, 8).params.total
    # Tokens are spread: in no layer do all take the same experts.
    load = np.asarray(out.router_stats["segment_0"]["layer_0"]["load"])
    moe = config.moe
    assert np.all(load.sum(axis=1) == TOKENS.size * moe.top_k)
    assert np.all((load > 0).sum(axis=1) > moe.top_k)
    # Every shard is taken equally often: the top-k takes whole virtual groups.
    routed = WIDTH // moe.d_expert - moe.num_shared_experts
    of_shard = load.reshape(len(load), -1, routed).sum(axis=1)
    np.testing.assert_array_equal(of_shard, TOKENS.size * moe.top_k / routed)


def test_the_same_tokens_run_through_one_expert_of_each_shard():
    # By hand: a dense layer y = W_down (silu(W_gate x) * W_up x) in two shards, two copies each.
    config, variables = upcycle(DENSE, dense()[0], options("deepseek_v3", 2, 4, 2), KEY)
    got = jax.tree.map(lambda leaf: leaf[0], variables["params"]["segment_0"]["layer_0"]["moe"])
    ffn = jax.tree.map(lambda leaf: leaf[0], dense()[0]["params"]["segment_0"]["layer_0"]["ffn"])
    for expert, columns in enumerate([slice(0, 12), slice(12, 24)] * 2):
        np.testing.assert_array_equal(
            got["experts"]["gate_up"][expert], ffn["gate_up"][:, :, columns]
        )
        # Two gates sum to 2.5, one for each half: a factor 2 / 2.5.
        np.testing.assert_allclose(
            got["experts"]["down"][expert], 0.8 * ffn["down"][columns], rtol=1e-6
        )
    kernel = np.asarray(got["router"]["kernel"])
    np.testing.assert_array_equal(kernel[:, [0, 2]], kernel[:, [1, 3]])
    assert np.any(kernel[:, 0] != kernel[:, 2]) and 0.01 < kernel.std() < 0.03
    assert config.moe.router.routed_scale == 2.5


def test_larger_routers_move_unnormalised_gates_but_not_normalised_ones():
    loud = {"router_std": 0.05}
    same = first_output(options(**loud))[2].logits
    assert tiny.relative_error(same, dense()[1].logits) < 1e-5
    moved = first_output(options("softmax_topk", **loud))[2].logits
    assert 1e-4 < tiny.relative_error(moved, dense()[1].logits) < 0.5


def test_gradients_reach_routers_and_chosen_experts():
    config, variables = upcycle(DENSE, dense()[0], options("deepseek_v3", 2, 8, 4, noise=0.1), KEY)

    def loss(params):
        out = Transformer(config).apply(
            {**variables, "params": params}, TOKENS, jnp.roll(TOKENS, -1, 1),
            method=Transformer.loss,
        )  # fmt: skip
        return out.nll

    gradients = jax.jit(jax.grad(loss))(variables["params"])["segment_0"]["layer_0"]["moe"]
    assert np.any(gradients["router"]["kernel"])
    for name in ("gate_up", "down"):
        by_expert = np.abs(gradients["experts"][name]).reshape(2, 8, -1).sum(-1)
        assert (by_expert > 0).sum() > 8, "more experts than one token takes have to learn"


def test_noise_makes_experts_differ_by_its_share():
    exact = upcycle(DENSE, dense()[0], options("mixtral", 2, 8, 2), KEY)[1]["params"]
    noisy = upcycle(DENSE, dense()[0], options("mixtral", 2, 8, 2, noise=0.1), KEY)[1]["params"]
    at = lambda tree, name: np.asarray(tree["segment_0"]["layer_0"]["moe"]["experts"][name])
    for name in ("gate_up", "down"):
        same, apart = at(exact, name), at(noisy, name)
        np.testing.assert_array_equal(same[:, 0], same[:, 2])
        assert np.any(apart[:, 0] != apart[:, 2])
        assert (apart - same).std() / same.std() == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(
        exact["segment_0"]["layer_0"]["moe"]["router"]["kernel"],
        noisy["segment_0"]["layer_0"]["moe"]["router"]["kernel"],
    )


WINDOWED = tiny.dense_config(
    num_layers=6, segments=((("dense_window", "dense"), 3),), mtp_depth=1,
    attention=dataclasses.replace(DENSE.attention, window=4),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({}, ((("moe_window", "moe"), 3),)),
        ({"every": 2}, ((("dense_window", "moe"), 3),)),
        ({"first_k_dense": 1}, ((("dense_window",), 1), (("moe", "moe_window"), 2), (("moe",), 1))),
        ({"segments": ((("dense_window", "dense", "moe_window"), 1), (("moe",), 1),
                       (("dense_window", "dense"), 1))}, None),
    ],
)  # fmt: skip
def test_which_layers_become_moe(changes, layout):
    wanted = options("deepseek_v3", **changes)
    variables = tiny.variables(WINDOWED)
    config, upcycled = upcycle(WINDOWED, variables, wanted, KEY)
    assert config.layout == (layout or changes["segments"])
    assert config.d_ff == WIDTH
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    found = tiny.variables(config)
    assert shapes(upcycled["params"]) == shapes(found["params"])
    assert shapes(upcycled["router_state"]) == shapes(found["router_state"])
    if changes != {"every": 2}:
        return
    # Layers keep their order: the outputs agree, the MTP module's too.
    ahead = lambda c, v: jax.jit(
        functools.partial(Transformer(c).apply, method=Transformer.encode_ahead)
    )(v, TOKENS, jnp.roll(TOKENS, -1, 1))
    (out, module), (dense_out, dense_module) = ahead(config, upcycled), ahead(WINDOWED, variables)
    assert tiny.relative_error(out.hidden, dense_out.hidden) < 1e-5
    # The last position has no target, so that routers leave it out.
    assert tiny.relative_error(module.hidden[:, :, :-1], dense_module.hidden[:, :, :-1]) < 1e-5


def test_layers_are_put_into_few_scans():
    assert runs(list("aaaa")) == ((("a",), 4),)
    assert runs(list("abab")) == ((("a", "b"), 2),)
    assert runs(list("daabaabaab")) == ((("d",), 1), (("a", "a", "b"), 3))
    assert runs(list("abc")) == ((("a",), 1), (("b",), 1), (("c",), 1))


def test_embeddings_and_attention_are_taken_as_they_are():
    params = upcycle(DENSE, dense()[0], options(), KEY)[1]["params"]
    before = dense()[0]["params"]
    assert params["embedding"] is before["embedding"] and params["head"] is before["head"]
    for name in ("attention", "attention_norm", "ffn_norm"):
        jax.tree.map(
            np.testing.assert_array_equal, params["segment_0"]["layer_0"][name],
            before["segment_0"]["layer_0"][name],
        )  # fmt: skip


REFUSED = {
    "model": (tiny.moe_config(), lambda: options()),
    "moe.d_expert": (dataclasses.replace(DENSE, d_ff=25), lambda: options(shards=4)),
    "moe.top_k": (DENSE, lambda: options(shards=4, experts=8, top_k=6)),
    "moe.num_experts": (DENSE, lambda: options(shards=4, experts=10, top_k=4)),
    "moe.num_shared_experts": (DENSE, lambda: options(moe={"num_shared_experts": 1})),
    "router.normalize_gates": (DENSE, lambda: options(top_k=1)),
    "router.name": (DENSE, lambda: options("expert_choice", moe={"allow_leak": True})),
    "router.num_groups": (DENSE, lambda: options("deepseek_v3", 3, 12, 3, {
        "num_groups": 3, "groups_kept": 1})),
    "moe.latent_dim": (DENSE, lambda: options(moe={"latent_dim": 8})),
    "moe.activation": (DENSE, lambda: options(moe={"activation": "clamped_swiglu"})),
    "upcycle.every": (DENSE, lambda: options(every=3)),
    "upcycle.noise": (DENSE, lambda: options(noise=-1.0)),
    "model.segments": (WINDOWED, lambda: options(segments=((("moe",), 6),))),
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_upcycled_is_refused_in_one_line(field):
    config, make = REFUSED[field]
    with pytest.raises(ConfigError) as error:
        upcycle(config, {"params": {}}, make(), KEY)
    assert error.value.field == field and "\n" not in str(error.value)
