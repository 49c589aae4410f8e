"""Counts against hand arithmetic, published figures and the initialised model's own shapes."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.cost.counts import COMPONENTS, assignment_flops, count, routed_params
from moejax.models import AttentionConfig, ModelConfig, Transformer
from moejax.models.presets import PRESETS
from moejax.moe import MoEConfig, router_options
from moejax.moe.routers import DeepSeekV3Options, RouterCounts, SoftmaxTopKOptions
from moejax.moe.routers.published import GptOssOptions

LLAMA2_7B = ModelConfig(
    32000, 4096, 32, 11008, attention=AttentionConfig(32, 32, 128), tie_embeddings=False
)

TINY = ModelConfig(
    vocab_size=10, d_model=4, num_layers=3, first_k_dense=1,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=2),
    tie_embeddings=False,
    moe=MoEConfig(8, 2, 3, num_shared_experts=1),
)  # fmt: skip


def test_a_tiny_model_by_hand():
    """D 4, H 2, N 1, hd 2, 1 dense and 2 MoE layers, F 3, E 8, K 2, 1 shared, V 10, s = 6."""
    counts = count(TINY, seq_len=6)
    by_hand = {
        "attention_projections": 3 * (4 * 4 + 2 * 4 * 2 + 4 * 4),  # q, k and v, o: 48 a layer
        "attention_scores": 0,
        "router": 2 * 4 * 8,
        "routed_experts": 2 * 8 * (3 * 4 * 3),
        "shared_experts": 2 * (3 * 4 * 3),
        "dense_ffn": 3 * 4 * 9,  # width (2 + 1) x 3 = 9
        "norms": 4 * (2 * 3 + 1),
        "embedding": 40,
        "head": 40,
        "mtp": 0,
    }
    assert counts.params.by_component == by_hand
    assert counts.params.total == 144 + 64 + 576 + 72 + 108 + 28 + 40 + 40 == 1072
    # Of the routed experts 2 of 8 are passed: 144 of 576.
    assert counts.params.active.no_embedding == 144 + 64 + 144 + 72 + 108 + 28 == 560
    assert counts.params.active.with_head == 600
    assert counts.params.active.with_embeddings == 640
    # Scores: 3 layers x 2 x (6 / 2 keys) x 2 heads x (2 + 2). Norms and look-up multiply nothing.
    flops = counts.flops_per_token
    assert flops.by_component["attention_scores"] == 144
    assert flops.forward == 2 * (560 - 28 + 40) + 144 == 1288
    assert flops.train == 3 * 1288
    assert flops.train_full_attention == 3 * (1288 + 144)
    assert counts.kv_cache_bytes_per_token == 3 * (2 * 1 * 2) * 2


def test_a_tied_head_multiplies_but_is_held_once():
    tied = count(dataclasses.replace(TINY, tie_embeddings=True), seq_len=6)
    untied = count(TINY, seq_len=6)
    assert tied.params.total == untied.params.total - 40
    assert tied.params.active.no_embedding == untied.params.active.no_embedding
    assert tied.params.active.with_head == untied.params.active.with_head
    assert tied.params.active.with_embeddings == tied.params.active.with_head
    assert tied.flops_per_token == untied.flops_per_token


@pytest.mark.parametrize(
    "config, tflops", [(LLAMA2_7B, 187.9), (PRESETS["deepseek_moe_16b"], 74.4)]
)
def test_training_flops_of_4k_tokens(config, tflops):
    """DeepSeekMoE paper (arXiv 2401.06066), section 5: forward and backward, full attention."""
    counts = count(config, 4096)
    found = 4096 * counts.flops_per_token.train_full_attention / 1e12
    assert found == pytest.approx(tflops, rel=0.025)


GQA = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
MLA = AttentionConfig(
    kind="mla", num_heads=2, q_lora_rank=6, kv_lora_rank=4, nope_head_dim=4, rope_head_dim=2,
    v_head_dim=3,
)  # fmt: skip

SMALL = {
    "moe, tied": dataclasses.replace(TINY, tie_embeddings=True),
    "moe, untied": TINY,
    "dense, wide heads": ModelConfig(17, 8, 2, attention=GQA),
    "alternating, softmax": ModelConfig(
        17, 8, 5, d_ff=20, segments=((("dense",), 1), (("moe", "dense"), 2)),
        attention=AttentionConfig(num_heads=2),
        moe=MoEConfig(4, 1, 6, num_shared_experts=2, router=SoftmaxTopKOptions()),
    ),
    "norm of each head, biases": ModelConfig(
        17, 8, 2, attention=dataclasses.replace(GQA, qk_norm="head", bias="qkv")
    ),
    "norm of all heads, all biases, sinks, windows": ModelConfig(
        17, 8, 4, segments=((("dense_window", "dense"), 2),),
        attention=dataclasses.replace(GQA, qk_norm="all", bias="all", sinks=True, window=3),
    ),
    "expert biases": dataclasses.replace(
        TINY, moe=MoEConfig(8, 2, 3, expert_bias=True, activation="clamped_swiglu")
    ),
    "latent experts with biases": dataclasses.replace(
        TINY, d_model=8, moe=MoEConfig(8, 2, 3, expert_bias=True, latent_dim=4)
    ),
    "mla": dataclasses.replace(TINY, attention=MLA),
    "mla, full queries, biases": dataclasses.replace(
        TINY, attention=dataclasses.replace(MLA, q_lora_rank=0, bias="all")
    ),
    "mla, one module ahead": dataclasses.replace(TINY, attention=MLA, mtp_depth=1),
    "two modules ahead": dataclasses.replace(TINY, mtp_depth=2),
    "dense, one module ahead, tied": ModelConfig(17, 8, 2, attention=GQA, mtp_depth=1),
}  # fmt: skip

# One of each architecture: sizes of one family differ in numbers only.
QUICK = ("deepseek_v3", "gpt_oss_20b", "olmoe_1b_7b", "qwen2_57b_a14b", "qwen3_32b")
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in PRESETS if n not in QUICK]


@pytest.mark.parametrize("name", [*SMALL, *QUICK, *SLOW])
def test_params_equal_the_initialised_model(name):
    """Exact, at full size, by shapes only: nothing is allocated."""
    config = SMALL.get(name) or PRESETS[name]
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    init = lambda key, tokens: Transformer(config).init(key, tokens)
    params = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    ahead = {name: part for name, part in params.items() if name.startswith("mtp_")}
    found = count(config, 8).params
    assert found.mtp == size(ahead)
    assert found.total == size(params) - size(ahead)


def test_a_router_with_a_fractional_number_of_experts():
    class SkippingOptions(DeepSeekV3Options):
        def counts(self, d_model, num_experts, top_k):
            return RouterCounts(7, 11.0, 1.25)

    moe = dataclasses.replace(TINY.moe, router=SkippingOptions())
    counts = count(dataclasses.replace(TINY, moe=moe), seq_len=6)
    assert counts.params.by_component["router"] == 2 * 7
    assert counts.flops_per_token.by_component["router"] == 2 * 11
    assert counts.params.active_by_component["routed_experts"] == 2 * 1.25 * 36
    assert counts.flops_per_token.by_component["routed_experts"] == 2 * (2 * 1.25 * 36)


def test_to_dict_has_the_contracts_names():
    found = count(TINY, 6).to_dict()
    assert {"total", "active", "mtp", "by_component"} <= found["params"].keys()
    assert found["params"]["active"].keys() == {"no_embedding", "with_head", "with_embeddings"}
    flops = {"train", "forward", "train_full_attention", "by_component"}
    assert found["flops_per_token"].keys() == flops
    assert found["kv_cache_bytes_per_token"] == 24


def test_a_sequence_must_have_a_length():
    with pytest.raises(ConfigError, match=r"train\.seq_len = 0: must be above zero"):
        count(TINY, 0)


@st.composite
def attentions(draw):
    size = lambda low, high: draw(st.integers(low, high))
    bias = st.sampled_from(["none", "qkv", "all"])
    if draw(st.booleans()):
        return AttentionConfig(
            kind="mla", num_heads=size(1, 4), q_lora_rank=size(0, 8), kv_lora_rank=size(1, 8),
            nope_head_dim=size(1, 8), rope_head_dim=2 * size(1, 4), v_head_dim=size(1, 8),
            bias=draw(bias),
        )  # fmt: skip
    kv_heads = size(1, 4)
    return AttentionConfig(
        kv_heads * size(1, 4), kv_heads, 2 * size(1, 16), window=size(1, 64), bias=draw(bias),
        qk_norm=draw(st.sampled_from(["none", "head", "all"])), sinks=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def configs(draw):
    size = lambda low, high: draw(st.integers(low, high))
    layers, moe, attention = size(1, 6), None, draw(attentions())
    if draw(st.booleans()):
        experts = size(2, 16)
        top_k, width, shared = size(1, experts), size(1, 64), size(0, 3)
        moe = MoEConfig(
            experts, top_k, width, num_shared_experts=shared, router=SoftmaxTopKOptions(),
            expert_bias=draw(st.booleans()),
        )  # fmt: skip
    kinds = ["dense", "moe"] if moe else ["dense"]
    if attention.kind == "gqa":
        kinds += [kind + "_window" for kind in kinds]
    spelt_out = draw(st.booleans())
    pattern = tuple(draw(st.sampled_from(kinds)) for _ in range(layers if spelt_out else 0))
    return ModelConfig(
        vocab_size=size(1, 1000), d_model=2 * size(1, 64), num_layers=layers,
        d_ff=size(1, 256), first_k_dense=size(0, layers), moe=moe, attention=attention,
        segments=((pattern, 1),) if pattern else (), mtp_depth=size(0, 2),
        tie_embeddings=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 4096))
def test_components_add_up_and_are_never_negative(config, seq_len):
    counts = count(config, seq_len)
    params, flops = counts.params, counts.flops_per_token
    for parts in (params.by_component, params.active_by_component, flops.by_component):
        assert parts.keys() == set(COMPONENTS)
        assert min(parts.values()) >= 0
    assert sum(params.by_component.values()) == params.total + params.mtp
    assert sum(params.active_by_component.values()) == params.active.with_embeddings
    assert sum(flops.by_component.values()) == pytest.approx(flops.forward)
    assert flops.train == pytest.approx(3 * flops.forward)
    active = params.active
    assert 0 < active.no_embedding < active.with_head <= active.with_embeddings <= params.total
    if config.layers("moe") == 0:
        assert active.with_embeddings == params.total
    assert (params.mtp > 0) == (config.mtp_depth > 0) == (flops.by_component["mtp"] > 0)
    assert flops.train < flops.train_full_attention <= 2 * flops.train
    assert routed_params(config) <= params.total + params.mtp


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 2048))
def test_modules_ahead_add_only_themselves(config, seq_len):
    found = [count(dataclasses.replace(config, mtp_depth=k), seq_len) for k in range(3)]
    for one, other in itertools.pairwise(found):
        assert (one.params.total, one.params.active) == (other.params.total, other.params.active)
        assert other.params.mtp - one.params.mtp == found[1].params.mtp
        more = other.flops_per_token.train - one.flops_per_token.train
        assert more == pytest.approx(3 * found[1].flops_per_token.by_component["mtp"])


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 2048))
def test_scaling(config, seq_len):
    """Scores grow with length, nothing else does; experts held do not cost a token FLOPs."""
    config = dataclasses.replace(config, segments=(), mtp_depth=0)
    short, long = count(config, seq_len), count(config, 2 * seq_len)
    scores = short.flops_per_token.by_component["attention_scores"]
    more = long.flops_per_token.forward - short.flops_per_token.forward
    assert more == pytest.approx(scores)
    assert long.params == short.params
    if config.moe is None:
        return
    layers = config.layers("moe")
    expert = layers * 3 * config.d_model * config.moe.d_expert
    biases = layers * (2 * config.moe.d_expert + config.d_model) * config.moe.expert_bias
    wider = dataclasses.replace(config.moe, num_experts=2 * config.moe.num_experts)
    twice = count(dataclasses.replace(config, moe=wider), seq_len)
    held = config.moe.num_experts * (expert + biases)
    router = layers * config.d_model * config.moe.num_experts
    assert twice.params.total - short.params.total == held + router
    assert twice.params.active.no_embedding - short.params.active.no_embedding == router
    one_more = dataclasses.replace(wider, top_k=config.moe.top_k + 1)
    deeper = count(dataclasses.replace(config, moe=one_more), seq_len)
    assert deeper.params.total == twice.params.total
    more = deeper.params.active.no_embedding - twice.params.active.no_embedding
    assert more == expert + biases
    assert deeper.flops_per_token.forward - twice.flops_per_token.forward == pytest.approx(
        2.0 * expert
    )


@pytest.mark.parametrize(
    "moe",
    [
        dict(latent_dim=4),
        dict(gate_rank=2),
        dict(num_shared_experts=1, shared_gate=True),
        dict(router=GptOssOptions()),
        dict(latent_dim=4, gate_rank=2, num_shared_experts=2, shared_gate=True),
    ],
)
def test_variants_of_the_layer_count_what_they_hold(moe):
    config = dataclasses.replace(TINY, d_model=8, moe=MoEConfig(8, 2, 3, **moe))
    init = lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    leaves = jax.tree.leaves(jax.eval_shape(init)["params"])
    assert count(config, 6).params.total == sum(leaf.size for leaf in leaves)


def test_flops_of_the_variants_by_hand():
    # D 4, F 3, E 8, K 2, 2 MoE layers: an expert multiplies 3 · 4 · 3 = 36 parameters.
    flops = lambda **moe: (
        count(
            dataclasses.replace(TINY, moe=MoEConfig(8, 2, 3, **moe)), 6
        ).flops_per_token.by_component
    )
    assert flops()["routed_experts"] == 2 * 2 * (2 * 36) == 288
    # In a latent space of 2: experts of 3 · 2 · 3 = 18, and twice 4 · 2 for every token.
    assert flops(latent_dim=2)["routed_experts"] == 2 * 2 * (2 * 18 + 16)
    # Two factors are multiplied out: what a token multiplies is the full matrix.
    assert flops(gate_rank=1)["routed_experts"] == 288
    assert flops(num_shared_experts=1, shared_gate=True)["shared_experts"] == 2 * 2 * (36 + 4)
    assert assignment_flops(TINY) == 3 * 2 * 36


def test_experts_that_score_themselves_are_counted():
    # E 8, D 4, rank 2: 2 · 8 · 4 · 2 = 128 FLOPs in each of 2 MoE layers, no parameters.
    moe = MoEConfig(8, 2, 3, gate_rank=2, router=router_options({"name": "autonomy"}))
    counted = count(dataclasses.replace(TINY, moe=moe), 6)
    assert counted.flops_per_token.by_component["router"] == 2 * 128
    assert counted.params.by_component["router"] == 0


def test_finer_experts_have_the_same_active_parameters():
    # K 4 of E 16 experts of width 12, one shared among them: m times finer, mK - m of mE - m are
    # chosen and m are shared (DeepSeekMoE, arXiv 2401.06066, section 3.1).
    def active(m):
        router = router_options({"name": "deepseek_moe"})
        moe = MoEConfig(16 * m - m, 4 * m - m, 12 // m, num_shared_experts=m, router=router)
        parts = count(dataclasses.replace(TINY, moe=moe), 6).params.active_by_component
        return parts["routed_experts"] + parts["shared_experts"]

    assert active(1) == active(2) == active(4) == 2 * 4 * (3 * 4 * 12)
