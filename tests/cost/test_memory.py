"""Memory: state by the mesh, and activations against what the traced backward pass needs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.cost.memory import Layout, Placement, memory_parts, usable_bytes
from moejax.models import AttentionConfig, ModelConfig, Transformer
from moejax.models.presets import PRESETS
from moejax.moe import MoEConfig, router_options
from moejax.parallel import MeshConfig, make_mesh
from moejax.training.state import make_init

STATE = ("weights", "gradients", "optimizer")


def parts(config, seq_len=4096, hardware="h100_sxm", **placement):
    return memory_parts(
        config, hardware=hardware, seq_len=seq_len, placement=Placement(**placement)
    )


def test_state_is_cut_by_the_mesh():
    """16.376B parameters x (4 + 4 + 8) bytes = 262 GB; activations are not cut by fsdp."""
    config = PRESETS["deepseek_moe_16b"]
    one, eight = parts(config), parts(config, layout=Layout(fsdp=4, tensor=2))
    assert sum(one[name] for name in STATE) == pytest.approx(16 * 16.376e9, rel=0.001)
    for name in STATE:
        assert eight[name] == pytest.approx(one[name] / 8, rel=1e-3)  # norms and routers are less
    assert parts(config, layout=Layout(data=8, fsdp=8))["weights"] == pytest.approx(
        one["weights"] / 8, rel=1e-3
    )
    assert one["activations"] > parts(config, layout=Layout(tensor=2))["activations"] > 0


def test_the_expert_axis_cuts_the_experts_only_those_of_modules_ahead_too():
    # DeepSeek-V3: 58 MoE layers and one of the MTP module, 256 experts of 3 · 7168 · 2048 each.
    found = parts(PRESETS["deepseek_v3"], layout=Layout(fsdp=8, expert=8))["weights"]
    total, routed = 671.03e9 + 11.61e9, 59 * 256 * 3 * 7168 * 2048
    assert found == pytest.approx(4 * (routed / 64 + (total - routed) / 8), rel=1e-3)


def test_micro_batches_add_up_their_gradients_in_a_second_copy():
    config = PRESETS["olmoe_1b_7b"]
    one, many = parts(config), parts(config, micro_batches=4)
    assert many["gradients"] == 2 * one["gradients"] and many["weights"] == one["weights"]


def test_one_moment_instead_of_two():
    config = PRESETS["olmoe_1b_7b"]
    assert parts(config, optimizer_bytes=4)["optimizer"] == parts(config)["optimizer"] / 2


def test_scores_stand_in_memory_where_attention_is_not_fused():
    """V3's heads of 192 channels are too wide for cuDNN: 128 heads · 4096² · (4 + 2) bytes."""
    config = dataclasses.replace(PRESETS["deepseek_v3"], remat="full")
    wide, none = parts(config)["working"], parts(config, hardware="cpu")["working"]
    assert wide > 128 * 4096**2 * 6
    llama = dataclasses.replace(PRESETS["llama3_1_8b"], remat="full")
    unfused = dataclasses.replace(llama.attention, implementation="xla")
    more = parts(dataclasses.replace(llama, attention=unfused))["working"] - parts(llama)["working"]
    assert more == pytest.approx(32 * 4096**2 * 6)
    assert none < wide


def test_logits_exist_in_chunks():
    config = dataclasses.replace(PRESETS["llama3_1_8b"], remat="full")
    less = parts(config)["working"] - parts(dataclasses.replace(config, loss_chunk=512))["working"]
    assert less == pytest.approx(8 * 128256 * (4096 - 512))


def test_what_a_device_may_fill():
    assert usable_bytes("h100_sxm") == 0.9 * 80e9 and usable_bytes("cpu") is None


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)), st.sampled_from(["none", "dots", "full"]),
    st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 8),
)  # fmt: skip
def test_memory_is_never_negative_and_falls_where_it_is_cut(name, remat, expert, tensor, rows):
    config = dataclasses.replace(PRESETS[name], remat=remat)
    here = Layout(fsdp=2, expert=expert, tensor=tensor)
    one, wider = (
        parts(config, layout=dataclasses.replace(here, fsdp=fsdp), rows=rows) for fsdp in (2, 4)
    )
    assert min(one.values()) >= 0
    for part in STATE:
        assert wider[part] == pytest.approx(one[part] / 2, rel=1e-2)  # norms are whole
    more = parts(config, layout=here, rows=rows + 1)
    assert more["activations"] > one["activations"] and more["working"] > one["working"]
    kept = [
        parts(dataclasses.replace(config, remat=policy), layout=here, rows=rows)["activations"]
        for policy in ("none", "dots", "full")
    ]
    assert kept == sorted(kept, reverse=True)


ROWS, LENGTH, WIDTH = 4, 256, 128
GQA = AttentionConfig(4, 2, 32)
MLA = AttentionConfig(
    kind="mla", num_heads=4, q_lora_rank=48, kv_lora_rank=32, nope_head_dim=24, rope_head_dim=8,
    v_head_dim=24,
)  # fmt: skip


def small(remat, dispatch=None, **changes):
    """Four layers in bfloat16 whose compilation is never asked for."""
    moe = dispatch and MoEConfig(
        16, 4, 96, num_shared_experts=1, dispatch=dispatch, capacity_factor=1.0,
        router=router_options({"name": "deepseek_v3"}),
    )  # fmt: skip
    base = ModelConfig(
        512, WIDTH, 4, 384, attention=GQA, tie_embeddings=False, dtype="bfloat16", remat=remat,
        moe=moe,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def residual_bytes(config) -> float:
    """Bytes that the backward pass of the loss needs, parameters and masks aside."""
    model, tokens = Transformer(config), jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    state = {name: part for name, part in variables.items() if name != "params"}

    def backward(params, tokens, state):
        def loss(params):
            inputs = {"params": params, **state}
            out = model.apply(inputs, tokens, tokens, mtp=True, method=Transformer.loss)
            return out.nll + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out.mtp))

        return jax.vjp(loss, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, variables["params"], tokens, state))
    masks = {(rows, 1, LENGTH, LENGTH) for rows in (1, ROWS)}
    fixed = {leaf.shape for leaf in jax.tree.leaves(variables["params"])} | masks
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in fixed)


CASES = [
    ("none", None, {}, 0.03),
    ("dots", None, {"attention": MLA}, 0.03),
    ("full", "blocks", {"mtp_depth": 1}, 0.01),
    ("none", "capacity", {"attention": MLA}, 0.03),
    ("dots", "capacity", {}, 0.03),
    # blocks rounds the rows of each expert up to whole blocks, which is much at this size
    ("none", "blocks", {"mtp_depth": 1}, 0.15),
    ("dots", "blocks", {"mtp_depth": 1, "attention": MLA}, 0.03),
]
QUICK = [CASES[1], CASES[3]]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in QUICK]


@pytest.mark.parametrize("remat, dispatch, changes, tolerance", [*QUICK, *SLOW])
def test_activations_are_what_the_backward_pass_needs(remat, dispatch, changes, tolerance):
    config = small(remat, dispatch, **changes)
    found = parts(config, LENGTH, "cpu", rows=ROWS)["activations"]
    if remat == "none":  # the weights in bfloat16, which keep the parameters' shapes
        held = parts(config, LENGTH, "cpu")["weights"] / 4
        found -= 2 * held
    assert found == pytest.approx(residual_bytes(config), rel=tolerance)


@pytest.mark.parametrize("name", ["llama3_1_8b", "deepseek_v3", "gpt_oss_20b"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_cut_length_divides_activations_and_brings_others_keys(name, remat):
    config = dataclasses.replace(PRESETS[name], remat=remat, loss_chunk=512, mtp_depth=0)
    one, four = parts(config, 2**17), parts(config, 2**17, layout=Layout(context=4))
    for part in STATE:
        assert four[part] == one[part]
    kept = four["activations"] / one["activations"]
    if config.attention.kind == "gqa":
        assert kept == pytest.approx(1 / 4, rel=0.3 if remat == "none" else 0.05)
    else:  # without remat the keys that latents make are kept whole
        assert 1 / 4 <= kept < 1
    assert sum(four.values()) < sum(one.values())


def test_keys_of_the_other_positions_by_hand():
    """Llama-3.1-8B, 8 key/value heads of 128: 2 · 1024 numbers a token of bfloat16, twice for their
    gradients; a device has 4,096 of 16,384 positions and gathers 12,288."""
    config = dataclasses.replace(PRESETS["llama3_1_8b"], remat="full", loss_chunk=512)
    alone = parts(config, 4096, layout=Layout())["working"]
    cut = parts(dataclasses.replace(config, loss_chunk=2048), 16384, layout=Layout(context=4))
    assert cut["working"] - alone == pytest.approx(12288 * 2048 * 2 * 2)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_lite", "qwen3_30b_a3b", "llama3_1_8b",
                                  "gpt_oss_20b", "qwen2_57b_a14b"])  # fmt: skip
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, tensor=2, expert=2), MeshConfig(fsdp=8)])
def test_the_state_counted_is_the_state_that_shardings_cut(name, mesh):
    """Bytes on one device by the model's own sharding, within 0.2 % (biases are cut less)."""
    _, abstract = make_init(PRESETS[name], optax.adam(1e-3), make_mesh(mesh))
    local = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    sizes = dataclasses.asdict(mesh)
    counted = parts(PRESETS[name], layout=Layout(**sizes))
    assert counted["weights"] == pytest.approx(
        sum(local(leaf) for leaf in jax.tree.leaves(abstract.params)), rel=2e-3
    )
    assert counted["optimizer"] == pytest.approx(
        sum(local(leaf) for leaf in jax.tree.leaves(abstract.opt_state)), rel=2e-3
    )
