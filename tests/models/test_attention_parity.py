"""Attention against Hugging Face's modules in PyTorch: values, and gradients of every tensor.

Needs the extra ``parity``; the recorded reason is the only skip here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.models import AttentionConfig, RopeConfig
from moejax.models.attention import GroupedQueryAttention, attention_mask
from moejax.models.mla import MultiHeadLatentAttention
from moejax.models.rope import frequencies

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

WIDTH, HEADS, KV_HEADS, HEAD, LENGTH, WINDOW = 24, 4, 2, 6, 9, 4
BASE = dict(
    hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, rms_norm_eps=1e-5,
    max_position_embeddings=1280, attn_implementation="eager",
)  # fmt: skip
GROUPED = dict(num_key_value_heads=KV_HEADS, head_dim=HEAD)
OURS = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD, rope_theta=100.0)
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = RopeConfig(
    scaling="llama3", factor=8.0, original_length=64,
    low_frequency_factor=1.0, high_frequency_factor=4.0,
)  # fmt: skip
# DeepSeek's: m squared on the softmax, nothing on cosine and sine.
YARN = RopeConfig(scaling="yarn", factor=40.0, original_length=32, beta_fast=4.0)
V2 = dataclasses.replace(YARN, mscale=0.707, mscale_all_dim=0.707)
V3 = dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0)
# A factor on both, which no release has: mscale over mscale_all_dim stands on cosine and sine.
BOTH = dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.5)
# gpt-oss: the paper's factor on cosine and sine, and a ramp of broken ends.
GPT_OSS = dataclasses.replace(YARN, factor=32.0, truncate=False)


def theirs(rope: RopeConfig, theta: float = 100.0) -> dict:
    """A RopeConfig as Hugging Face's ``rope_parameters``."""
    values = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    values |= {"rope_theta": theta, "factor": rope.factor}
    values["original_max_position_embeddings"] = rope.original_length
    if rope.fraction < 1:
        values["partial_rotary_factor"] = rope.fraction
    if rope.scaling == "llama3":
        values["low_freq_factor"] = rope.low_frequency_factor
        values["high_freq_factor"] = rope.high_frequency_factor
    if rope.scaling == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        values["truncate"] = rope.truncate
        if rope.mscale_all_dim:
            values |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
        if rope.attention_factor:
            values["attention_factor"] = rope.attention_factor
    return values


RELEASED = RopeConfig(scaling="yarn", factor=40.0, original_length=4096)
ROPES = {
    "linear": (64, RopeConfig(scaling="linear", factor=4.0)),
    "llama3": (128, dataclasses.replace(LLAMA3, original_length=8192)),
    "v2": (64, dataclasses.replace(RELEASED, mscale=0.707, mscale_all_dim=0.707)),
    "v3": (64, dataclasses.replace(RELEASED, mscale=1.0, mscale_all_dim=1.0)),
    "both": (64, dataclasses.replace(RELEASED, mscale=1.0, mscale_all_dim=0.5)),
    "paper": (64, RELEASED),
    "gpt-oss": (64, dataclasses.replace(RELEASED, factor=32.0, truncate=False)),
    "given": (64, dataclasses.replace(RELEASED, attention_factor=1.25)),
    "partial": (128, dataclasses.replace(RELEASED, fraction=0.5)),
    "narrow": (6, dataclasses.replace(RELEASED, original_length=16)),
    # The ramp's end, pair 4, is beyond the last pair of three and below the last channel of six.
    "long": (6, dataclasses.replace(RELEASED, original_length=1_000_000, beta_fast=10_000.0)),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_factor(name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width, rope = ROPES[name]
    config = transformers.LlamaConfig(
        hidden_size=4 * width, num_attention_heads=4, head_dim=width,
        max_position_embeddings=163_840, rope_parameters=theirs(rope, 10_000.0),
    )  # fmt: skip
    wanted, factor = ROPE_INIT_FUNCTIONS[rope.scaling](config, "cpu")
    got = frequencies(10_000.0, int(width * rope.fraction), rope)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=2e-6)
    assert rope.cos_sin_factor == pytest.approx(factor, rel=1e-6)


def filled(module):
    """A module with random values: vectors around 1, matrices of deviation 0.3."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.3 * noise)
    return module


def inputs():
    """The layer's input, its output's cotangent, and positions; the second row starts at 50."""
    rng = np.random.default_rng(1)
    x, cotangent = rng.normal(size=(2, 2, LENGTH, WIDTH)).astype(np.float32)
    return x, cotangent, np.arange(LENGTH)[None] + np.array([[0], [50]])


def their_run(module, rotary, window=0):
    """Output, the gradient of x, and values and gradients of the parameters by name."""
    x, cotangent, positions = inputs()
    x = torch.tensor(x, requires_grad=True)
    mask = np.asarray(attention_mask(None, LENGTH, window))
    mask = torch.tensor(np.where(mask, 0.0, np.finfo(np.float32).min), dtype=torch.float32)
    angles = rotary(x, torch.tensor(positions))
    out = module(hidden_states=x, position_embeddings=angles, attention_mask=mask)[0]
    (out * torch.tensor(cotangent)).sum().backward()
    values = {name: p.detach().numpy() for name, p in module.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters()}
    return out.detach().numpy(), x.grad.numpy(), values, gradients


def check(module, rotary, attention, copy, window=0):
    """Our layer with the same weights, ``copy`` of theirs, gives the same."""
    out, d_x, values, gradients = their_run(filled(module), rotary, window)
    config = tiny.dense_config(d_model=WIDTH, attention=attention, norm_eps=1e-5)
    if attention.kind == "mla":
        layer = MultiHeadLatentAttention(config)
    else:
        layer = GroupedQueryAttention(config, window)
    x, cotangent, positions = map(jnp.asarray, inputs())
    positions, mask = positions.astype(jnp.int32), attention_mask(None, LENGTH, window)

    @jax.jit
    def run(params, x):
        apply = lambda params, x: layer.apply({"params": params}, x, positions, mask)[0]
        got, backward = jax.vjp(apply, params, x)
        return got, *backward(cotangent)

    params = jax.tree.map(jnp.asarray, copy(values))
    wanted = jax.eval_shape(layer.init, jax.random.key(0), x, positions, mask)["params"]
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    assert shapes(params) == shapes(tiny.nn.meta.unbox(wanted))
    got, d_params, d_ours = run(params, x)
    assert tiny.relative_error(got, out) < 2e-5
    assert tiny.relative_error(d_ours, d_x) < 1e-4
    tiny.assert_trees_close(d_params, jax.tree.map(jnp.asarray, copy(gradients)), 1e-4)


def grouped(state):
    """Our tree of a ``gqa`` layer from Hugging Face's names; gradients go the same way."""
    tree = {}
    for ours, name, count in (
        ("query", "q", HEADS),
        ("key", "k", KV_HEADS),
        ("value", "v", KV_HEADS),
    ):
        tree[ours] = {"kernel": state[f"{name}_proj.weight"].T.reshape(WIDTH, count, HEAD)}
        if f"{name}_proj.bias" in state:
            tree[ours]["bias"] = state[f"{name}_proj.bias"].reshape(count, HEAD)
        if f"{name}_norm.weight" in state:
            tree[f"{ours}_norm"] = {"scale": state[f"{name}_norm.weight"]}
    tree["out"] = {"kernel": state["o_proj.weight"].T.reshape(HEADS, HEAD, WIDTH)}
    if "o_proj.bias" in state:
        tree["out"]["bias"] = state["o_proj.bias"]
    if "sinks" in state:
        tree["sinks"] = state["sinks"]
    return tree


def test_llama_with_its_scaled_frequencies():
    from transformers.models.llama import modeling_llama as hf

    config = transformers.LlamaConfig(**BASE, **GROUPED, rope_parameters=theirs(LLAMA3))
    attention = AttentionConfig(**OURS, rope=LLAMA3)
    check(hf.LlamaAttention(config, 0), hf.LlamaRotaryEmbedding(config), attention, grouped)


def test_qwen3_normalises_each_head():
    from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

    config = transformers.Qwen3MoeConfig(**BASE, **GROUPED, rope_parameters=PLAIN)
    attention = AttentionConfig(**OURS, qk_norm="head")
    check(hf.Qwen3MoeAttention(config, 0), hf.Qwen3MoeRotaryEmbedding(config), attention, grouped)


def test_olmoe_normalises_all_heads_at_once():
    from transformers.models.olmoe import modeling_olmoe as hf

    config = transformers.OlmoeConfig(**BASE, num_key_value_heads=KV_HEADS, rope_parameters=PLAIN)
    attention = AttentionConfig(**OURS, qk_norm="all")
    check(hf.OlmoeAttention(config, 0), hf.OlmoeRotaryEmbedding(config), attention, grouped)


def test_qwen2_has_biases_before_attention_only():
    from transformers.models.qwen2_moe import modeling_qwen2_moe as hf

    config = transformers.Qwen2MoeConfig(
        **BASE, num_key_value_heads=KV_HEADS, rope_parameters=PLAIN
    )
    attention = AttentionConfig(**OURS, bias="qkv")
    check(hf.Qwen2MoeAttention(config, 0), hf.Qwen2MoeRotaryEmbedding(config), attention, grouped)


def test_glm4_turns_a_part_of_each_head():
    from transformers.models.glm4_moe import modeling_glm4_moe as hf

    rope = RopeConfig(fraction=0.4)
    config = transformers.Glm4MoeConfig(
        **BASE, **GROUPED, attention_bias=True, use_qk_norm=True,
        rope_parameters=theirs(rope),
    )  # fmt: skip
    attention = AttentionConfig(**OURS, qk_norm="head", bias="qkv", rope=rope)
    assert attention.rotary_dim(HEAD) == 2
    check(hf.Glm4MoeAttention(config, 0), hf.Glm4MoeRotaryEmbedding(config), attention, grouped)


@pytest.mark.parametrize("windowed", [True, False])
def test_gpt_oss_has_sinks_windows_and_all_biases(windowed):
    from transformers.models.gpt_oss import modeling_gpt_oss as hf

    config = transformers.GptOssConfig(
        **BASE, **GROUPED, rope_parameters=theirs(GPT_OSS), sliding_window=WINDOW,
        attention_bias=True, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    attention = AttentionConfig(**OURS, window=WINDOW, sinks=True, bias="all", rope=GPT_OSS)
    module = hf.GptOssAttention(config, 0 if windowed else 1)
    rotary = hf.GptOssRotaryEmbedding(config)
    check(module, rotary, attention, grouped, WINDOW if windowed else 0)


def test_a_window_is_as_wide_as_hugging_faces():
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = transformers.GptOssConfig(**BASE, **GROUPED, sliding_window=WINDOW)
    embeddings, positions = torch.zeros(1, LENGTH, WIDTH), torch.arange(LENGTH)[None]
    # No padding and no cache; the name of that argument depends on the version.
    mask = create_sliding_window_causal_mask(config, embeddings, None, None, position_ids=positions)
    np.testing.assert_array_equal(mask == 0, attention_mask(None, LENGTH, WINDOW))


# Latent attention: rank of queries 10, of keys and values 8; 6 channels still, 4 turning, values 5.
NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 6, 4, 5, 10, 8
# Hugging Face turns neighbouring channels, we turn those half a head apart.
SPLIT = [*range(0, ROPE, 2), *range(1, ROPE, 2)]


def latent(state):
    """Our tree of an ``mla`` layer from Hugging Face's names; gradients go the same way."""

    def halves(x, first):
        return np.concatenate([x[..., :first], x[..., first:][..., SPLIT]], axis=-1)

    def bias(name):
        return {"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {}

    heads = lambda name, width: state[name].T.reshape(-1, HEADS, width)
    down, tree = bias("kv_a_proj_with_mqa"), {}
    down = {key: halves(value, KV_RANK) for key, value in down.items()}
    down["kernel"] = halves(state["kv_a_proj_with_mqa.weight"].T, KV_RANK)
    if "q_proj.weight" in state:
        tree["query"] = {"kernel": halves(heads("q_proj.weight", NOPE + ROPE), NOPE)}
    else:
        tree["query_down"] = {"kernel": state["q_a_proj.weight"].T, **bias("q_a_proj")}
        tree["query_norm"] = {"scale": state["q_a_layernorm.weight"]}
        tree["query_up"] = {"kernel": halves(heads("q_b_proj.weight", NOPE + ROPE), NOPE)}
    out = state["o_proj.weight"].T.reshape(HEADS, VALUE, WIDTH)
    return tree | {
        "kv_down": down,
        "kv_norm": {"scale": state["kv_a_layernorm.weight"]},
        "kv_up": {"kernel": heads("kv_b_proj.weight", NOPE + VALUE)},
        "out": {"kernel": out, **bias("o_proj")},
    }


@pytest.mark.parametrize(
    ("version", "q_rank", "rope", "bias"),
    [
        (3, Q_RANK, V3, "none"),
        (3, 0, RopeConfig(), "all"),
        (2, Q_RANK, V2, "none"),
        (2, 0, BOTH, "none"),
        (3, Q_RANK, BOTH, "all"),
        (2, Q_RANK, RopeConfig(), "all"),
    ],
)
def test_deepseek(version, q_rank, rope, bias):
    values = dict(
        **BASE, num_key_value_heads=HEADS, q_lora_rank=q_rank or None, kv_lora_rank=KV_RANK,
        qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE,
        attention_bias=bias == "all", rope_parameters=theirs(rope),
    )  # fmt: skip
    if version == 3:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

        config = transformers.DeepseekV3Config(**values)
        module, rotary = hf.DeepseekV3Attention, hf.DeepseekV3RotaryEmbedding
    else:
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

        config = transformers.DeepseekV2Config(**values)
        module, rotary = hf.DeepseekV2Attention, hf.DeepseekV2RotaryEmbedding
    attention = AttentionConfig(
        num_heads=HEADS, kind="mla", q_lora_rank=q_rank, kv_lora_rank=KV_RANK, nope_head_dim=NOPE,
        rope_head_dim=ROPE, v_head_dim=VALUE, bias=bias, rope_theta=100.0, rope=rope,
    )  # fmt: skip
    check(module(config, 0), rotary(config), attention, latent)
