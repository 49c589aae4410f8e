"""Counts against hand arithmetic, published figures and the initialised model's own shapes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.cost.counts import COMPONENTS, assignment_flops, count
from moejax.models import AttentionConfig, ModelConfig, Transformer
from moejax.models.presets import PRESETS
from moejax.moe import MoEConfig, router_options
from moejax.moe.routers import DeepSeekV3Options, RouterCounts, SoftmaxTopKOptions
from moejax.moe.routers.published import GptOssOptions


def gqa(vocab, width, layers, heads, kv_heads, head_dim, d_ff=0, moe=None):
    return ModelConfig(
        vocab_size=vocab, d_model=width, num_layers=layers, d_ff=d_ff,
        attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim),
        tie_embeddings=False, moe=moe,
    )  # fmt: skip


def softmax_moe(experts, top_k, width):
    return MoEConfig(experts, top_k, width, router=SoftmaxTopKOptions())


# Not presets: OLMoE and Qwen3 also normalise queries and keys, which adds under 0.01 % here.
OLMOE = gqa(50304, 2048, 16, 16, 16, 128, moe=softmax_moe(64, 8, 1024))
QWEN3_30B = gqa(151936, 2048, 48, 32, 4, 128, moe=softmax_moe(128, 8, 768))
QWEN2_5_72B = gqa(152064, 8192, 80, 64, 8, 128, d_ff=29568)
LLAMA2_7B = gqa(32000, 4096, 32, 32, 32, 128, d_ff=11008)

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


# Counted from the released configs; (total, active with both embeddings).
PUBLISHED = {
    "mixtral_8x7b": (PRESETS["mixtral_8x7b"], 46.70e9, 12.88e9),
    "olmoe_1b_7b": (OLMOE, 6.92e9, 1.28e9),
    "qwen3_30b_a3b": (QWEN3_30B, 30.53e9, 3.35e9),
    "llama3_1_8b": (PRESETS["llama3_1_8b"], 8.03e9, 8.03e9),
    "llama3_1_70b": (PRESETS["llama3_1_70b"], 70.55e9, 70.55e9),
    "llama3_1_405b": (PRESETS["llama3_1_405b"], 405.85e9, 405.85e9),
    "deepseek_moe_16b": (PRESETS["deepseek_moe_16b"], 16.38e9, 2.83e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    config, total, active = PUBLISHED[name]
    counts = count(config, 4096)
    assert counts.params.total == pytest.approx(total, rel=0.005)
    assert counts.params.active.with_embeddings == pytest.approx(active, rel=0.005)


def test_active_parameters_of_deepseek_moe_16b_in_three_conventions():
    """Counted: 2.41 / 2.62 / 2.83; the paper (arXiv 2401.06066) says 16.4B and 2.8B."""
    params = count(PRESETS["deepseek_moe_16b"], 4096).params
    assert params.active.no_embedding == pytest.approx(2.41e9, rel=0.005)
    assert params.active.with_head == pytest.approx(2.62e9, rel=0.005)
    assert params.active.with_embeddings == pytest.approx(2.83e9, rel=0.005)
    assert params.total == pytest.approx(16.4e9, rel=0.02)


def test_kv_cache_of_published_models():
    """'Insights into DeepSeek-V3' (ISCA 2025), table 1: exact."""
    assert count(PRESETS["llama3_1_405b"], 1).kv_cache_bytes_per_token == 516_096
    assert count(QWEN2_5_72B, 1).kv_cache_bytes_per_token == 327_680


@pytest.mark.parametrize(
    "config, tflops", [(LLAMA2_7B, 187.9), (PRESETS["deepseek_moe_16b"], 74.4)]
)
def test_training_flops_of_4k_tokens(config, tflops):
    """DeepSeekMoE paper (arXiv 2401.06066), section 5: forward and backward, full attention."""
    counts = count(config, 4096)
    found = 4096 * counts.flops_per_token.train_full_attention / 1e12
    assert found == pytest.approx(tflops, rel=0.025)


SMALL = {
    "moe, tied": dataclasses.replace(TINY, tie_embeddings=True),
    "moe, untied": TINY,
    "dense, wide heads": ModelConfig(
        17, 8, 2, attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
    ),
    "alternating, softmax": ModelConfig(
        17, 8, 5, d_ff=20, segments=((("dense",), 1), (("moe", "dense"), 2)),
        attention=AttentionConfig(num_heads=2),
        moe=MoEConfig(4, 1, 6, num_shared_experts=2, router=SoftmaxTopKOptions()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SMALL, *PRESETS])
def test_total_equals_the_initialised_model(name):
    """Exact, by shapes only: nothing is allocated."""
    config = SMALL.get(name) or PRESETS[name]
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)
    leaves = jax.tree.leaves(variables["params"])
    assert count(config, 8).params.total == sum(math.prod(leaf.shape) for leaf in leaves)


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
def configs(draw):
    size = lambda low, high: draw(st.integers(low, high))
    kv_heads, layers = size(1, 4), size(1, 6)
    moe = None
    if draw(st.booleans()):
        experts = size(2, 16)
        top_k, width, shared = size(1, experts), size(1, 64), size(0, 3)
        moe = MoEConfig(
            experts, top_k, width, num_shared_experts=shared, router=SoftmaxTopKOptions()
        )
    return ModelConfig(
        vocab_size=size(1, 1000), d_model=2 * size(1, 64), num_layers=layers,
        d_ff=size(1, 256), first_k_dense=size(0, layers), moe=moe,
        attention=AttentionConfig(kv_heads * size(1, 4), kv_heads, 2 * size(1, 16)),
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


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(1, 2048))
def test_scaling(config, seq_len):
    """Scores grow with length, nothing else does; experts held do not cost a token FLOPs."""
    short, long = count(config, seq_len), count(config, 2 * seq_len)
    scores = short.flops_per_token.by_component["attention_scores"]
    more = long.flops_per_token.forward - short.flops_per_token.forward
    assert more == pytest.approx(scores)
    assert long.params == short.params
    if config.moe is None:
        return
    layers = config.layers("moe")
    expert = layers * 3 * config.d_model * config.moe.d_expert
    wider = dataclasses.replace(config.moe, num_experts=2 * config.moe.num_experts)
    twice = count(dataclasses.replace(config, moe=wider), seq_len)
    held, router = config.moe.num_experts * expert, layers * config.d_model * config.moe.num_experts
    assert twice.params.total - short.params.total == held + router
    assert twice.params.active.no_embedding - short.params.active.no_embedding == router
    one_more = dataclasses.replace(wider, top_k=config.moe.top_k + 1)
    deeper = count(dataclasses.replace(config, moe=one_more), seq_len)
    assert deeper.params.total == twice.params.total
    assert deeper.params.active.no_embedding - twice.params.active.no_embedding == expert
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
