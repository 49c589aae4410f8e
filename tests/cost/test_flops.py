"""FLOPs by convention against published figures, and against the products of the traced model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jaxpr_flops import matmul_flops

from moejax.config import ConfigError
from moejax.cost import flops
from moejax.cost.counts import count
from moejax.models import AttentionConfig, ModelConfig, Transformer
from moejax.models.cache import init_cache
from moejax.models.presets import PRESETS
from moejax.moe import MoEConfig, router_options

V3, LLAMA = PRESETS["deepseek_v3"], PRESETS["llama3_1_405b"]


@pytest.mark.parametrize(
    "convention, part, gflop",
    [
        ("causal", "without_mtp", 250.45),  # ISCA 2025, table 2: 250
        ("causal", "mtp_layers", 254.47),
        ("causal", "with_mtp", 260.64),
        ("full_attention", "without_mtp", 281.15),  # torchtitan's convention
        ("6N", "without_mtp", 6 * 37.55),  # 37.55B active with both embeddings
    ],
)
def test_deepseek_v3_under_each_convention(convention, part, gflop):
    found = flops.conventions(V3, 4096)[convention]
    assert found["train"][part] == pytest.approx(gflop * 1e9, rel=1e-4)
    assert found["forward"][part] == pytest.approx(found["train"][part] / 3)


def test_llamas_published_flops_are_6n():
    """arXiv 2407.21783, section 3.2: 3.8e25 FLOP for 405B parameters on 15.6T tokens."""
    found = flops.conventions(LLAMA, 8192)["6N"]["train"]["without_mtp"] * 15.6e12
    assert found == pytest.approx(3.8e25, rel=0.005)


def test_names_agree_with_the_counts():
    for config in (V3, LLAMA):
        found, counted = flops.conventions(config, 4096), count(config, 4096).flops_per_token
        assert found.keys() == flops.CONVENTIONS.keys()
        assert all(part.keys() == flops.MTP.keys() for c in found.values() for part in c.values())
        assert found["causal"]["train"]["with_mtp"] == pytest.approx(counted.train)
        full = found["full_attention"]["train"]["with_mtp"]
        assert full == pytest.approx(counted.train_full_attention)
    assert len({*flops.conventions(LLAMA, 4096)["causal"]["train"].values()}) == 1


def test_inference_by_hand():
    """D 4, H 2, N 1, hd 2, 1 dense layer of width 8, V 10: 48 + 96 + 40 matrix parameters."""
    config = ModelConfig(
        10, 4, 1, 8, attention=AttentionConfig(2, 1, 2), tie_embeddings=False, mtp_depth=1
    )
    # A prompt of 6: 3 keys on average, 2 x 3 x 2 heads x (2 + 2) = 48; the head once in 6.
    assert flops.prefill(config, 6) == pytest.approx(2 * (48 + 96 + 40 / 6) + 48)
    # A token that sees 6 keys.
    assert flops.decode(config, 6) == pytest.approx(2 * (48 + 96 + 40) + 96)
    for wrong in (flops.prefill, flops.decode):
        with pytest.raises(ConfigError, match="must be above zero"):
            wrong(config, 0)


def test_decoding_with_a_window_sees_no_further():
    attention = AttentionConfig(2, 1, 2, window=4)
    segments = ((("dense_window", "dense"), 1),)
    config = ModelConfig(10, 4, 2, 8, segments=segments, attention=attention)
    more = flops.decode(config, 200) - flops.decode(config, 100)
    assert more == pytest.approx(2 * 100 * 2 * (2 + 2))


def test_mla_decodes_on_latents():
    """V3: a key costs each of 128 heads 2 x (512 + 64) for its score and 2 x 512 for its value."""
    more = flops.decode(V3, 5096) - flops.decode(V3, 4096)
    assert more == pytest.approx(1000 * 61 * 2 * 128 * (576 + 512))


GQA = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
# Values as wide as keys, since the traced attention pads narrower ones.
MLA = AttentionConfig(
    kind="mla", num_heads=4, q_lora_rank=24, kv_lora_rank=16, nope_head_dim=8, rope_head_dim=4,
    v_head_dim=12,
)  # fmt: skip


def moe(**changes) -> MoEConfig:
    """Buffers of exactly T · K rows in all: as many slots as a balanced router fills."""
    options = {"num_experts": 8, "top_k": 2, "d_expert": 16, "num_shared_experts": 1} | changes
    router = router_options({"name": "deepseek_v3"})
    return MoEConfig(**options, dispatch="capacity", capacity_factor=1.0, router=router)


TINY = ModelConfig(
    vocab_size=40, d_model=32, num_layers=3, first_k_dense=1, attention=GQA, tie_embeddings=False,
    moe=moe(),
)  # fmt: skip
MID = dataclasses.replace(
    TINY, vocab_size=4096, d_model=512, num_layers=8, d_ff=1536, mtp_depth=1,
    attention=dataclasses.replace(
        MLA, num_heads=8, q_lora_rank=192, kv_lora_rank=64, nope_head_dim=48, rope_head_dim=16,
        v_head_dim=64,
    ),
    moe=moe(num_experts=64, top_k=6, d_expert=176, num_shared_experts=2),
)  # fmt: skip
TRACED = {
    "dense, gqa": dataclasses.replace(TINY, moe=None, first_k_dense=0),
    "moe, gqa, shared": TINY,
    "moe, tied": dataclasses.replace(TINY, tie_embeddings=True, loss_chunk=8),
    "moe, mla": dataclasses.replace(TINY, attention=MLA),
    "moe, mla, two modules ahead": dataclasses.replace(TINY, attention=MLA, mtp_depth=2),
    "latent experts": dataclasses.replace(TINY, moe=moe(latent_dim=8)),
    "middle size: moe, mla, shared, a module ahead": MID,
    "middle size: moe, gqa": dataclasses.replace(
        MID, attention=AttentionConfig(8, 2, 64), mtp_depth=0
    ),
}


QUICK = ("dense, gqa", "moe, gqa, shared", "middle size: moe, mla, shared, a module ahead")
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in TRACED if n not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "forward and backward"])
def test_the_traced_models_products_equal_the_count(name, differentiated, monkeypatch):
    """Full attention, no rematerialisation, T · K expert rows: within 1 % of the count.

    A CPU's attention leaves out the blocks above the diagonal, so another platform's is traced.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config, rows, length = TRACED[name], 2, 64
    model = Transformer(config)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    state = {key: value for key, value in variables.items() if key != "params"}

    def loss(params, tokens, targets, state):
        variables = {"params": params, **state}
        output = model.apply(variables, tokens, targets, mtp=True, method=Transformer.loss)
        return output.nll + sum(jnp.sum(part) for part in jax.tree.leaves(output.mtp))

    run = jax.grad(loss) if differentiated else loss
    found = matmul_flops(run, variables["params"], tokens, tokens, state)
    wanted = flops.conventions(config, length)["full_attention"]
    part = "train" if differentiated else "forward"
    assert found / (rows * length) == pytest.approx(wanted[part]["with_mtp"], rel=0.01)


@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
def test_a_traced_decoding_step_equals_the_count(attention):
    """One token on a cache of 64 positions, all of which its attention goes through.

    MLA's values, the latents, are padded to the width of its keys, which the count leaves out.
    """
    config = dataclasses.replace(TINY, attention=attention, moe=None)
    model = Transformer(config)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), token)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 64))
    step = lambda variables, token, cache: model.apply(variables, token, cache=cache)
    found = matmul_flops(step, variables, token, cache)
    padding = config.num_layers * 2 * 64 * attention.num_heads * attention.rope_head_dim
    assert found == pytest.approx(flops.decode(config, 64) + padding, rel=0.01)
