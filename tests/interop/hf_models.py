"""Tiny random checkpoints of every family, written by Transformers, and what it computes of them.

Needs the extra ``parity``: import it after ``pytest.importorskip``.
"""

import json

import torch
import transformers as hf
from safetensors.torch import save_file

VOCAB = 37  # odd on purpose

SHARED = dict(
    vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, attn_implementation="eager",
)  # fmt: skip
FINE = dict(moe_intermediate_size=10, num_experts_per_tok=2, intermediate_size=22)
MLA = dict(
    num_key_value_heads=4, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5,
    q_lora_rank=14, n_routed_experts=8, n_shared_experts=2, first_k_dense_replace=1, **FINE,
)  # fmt: skip


def yarn(mscale, everywhere, **changes):
    """YaRN's block, with a context short enough for the ramp to lie inside a narrow head."""
    base = dict(
        rope_type="yarn", rope_theta=100.0, factor=8.0, original_max_position_embeddings=16,
        beta_fast=4.0, beta_slow=1.0, mscale=mscale, mscale_all_dim=everywhere,
    )  # fmt: skip
    return {**base, **changes}


LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
PLAIN = dict(rope_type="default", rope_theta=100.0)

# Family, name of a configuration, changes of its fields.
CASES = {
    "llama": ("Llama", dict(intermediate_size=20, rope_parameters=PLAIN)),
    "llama tied, biased, llama3 rope": (
        "Llama",
        dict(intermediate_size=20, tie_word_embeddings=True, attention_bias=True, head_dim=10,
             rope_parameters=LLAMA3),
    ),
    "llama linear rope, one kv head": (
        "Llama",
        dict(intermediate_size=21, num_key_value_heads=1,
             rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0)),
    ),
    "qwen2": ("Qwen2", dict(intermediate_size=20, rope_parameters=PLAIN)),
    "qwen3": ("Qwen3", dict(intermediate_size=20, head_dim=10, rope_parameters=PLAIN)),
    "qwen3 tied, window": (
        "Qwen3",
        dict(intermediate_size=20, head_dim=8, tie_word_embeddings=True, use_sliding_window=True,
             sliding_window=3, max_window_layers=1, rope_parameters=PLAIN),
    ),
    "mixtral": (
        "Mixtral",
        dict(intermediate_size=10, num_local_experts=6, num_experts_per_tok=2,
             rope_parameters=PLAIN),
    ),
    "mixtral tied, window": (
        "Mixtral",
        dict(intermediate_size=11, num_local_experts=5, num_experts_per_tok=3, sliding_window=4,
             head_dim=8, tie_word_embeddings=True, rope_parameters=PLAIN),
    ),
    "olmoe": (
        "Olmoe",
        dict(intermediate_size=10, num_experts=8, num_experts_per_tok=3, rope_parameters=PLAIN),
    ),
    "olmoe renormalised, all heads": (
        "Olmoe",
        dict(intermediate_size=9, num_experts=7, num_experts_per_tok=2, norm_topk_prob=True,
             num_key_value_heads=4, rope_parameters=PLAIN),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(num_experts=8, shared_expert_intermediate_size=20, rope_parameters=PLAIN, **FINE),
    ),
    "qwen2_moe dense by turns, renormalised": (
        "Qwen2Moe",
        dict(num_experts=6, shared_expert_intermediate_size=10, decoder_sparse_step=2,
             norm_topk_prob=True, qkv_bias=False, num_hidden_layers=4, rope_parameters=PLAIN,
             **FINE),
    ),
    "qwen3_moe": (
        "Qwen3Moe", dict(num_experts=8, head_dim=10, rope_parameters=PLAIN, **FINE),
    ),
    "qwen3_moe renormalised, a dense layer, tied": (
        "Qwen3Moe",
        dict(num_experts=8, head_dim=8, norm_topk_prob=True, mlp_only_layers=[1],
             attention_bias=True, tie_word_embeddings=True, rope_parameters=PLAIN, **FINE),
    ),
    "deepseek": None,
    "deepseek_v2": (
        "DeepseekV2",
        dict(MLA, n_group=4, topk_group=2, topk_method="group_limited_greedy",
             routed_scaling_factor=3.0, rope_parameters=yarn(0.707, 0.707)),
    ),
    "deepseek_v2 greedy, no q-LoRA, no YaRN": (
        "DeepseekV2",
        dict(MLA, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1,
             rope_parameters=PLAIN),
    ),
    "deepseek_v2 two dense layers, biased": (
        "DeepseekV2",
        dict(MLA, first_k_dense_replace=2, attention_bias=True, topk_method="greedy", n_group=1,
             topk_group=1, n_shared_experts=1, rope_parameters=yarn(1.0, 0.5)),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        dict(MLA, n_group=4, topk_group=2, routed_scaling_factor=2.5,
             rope_parameters=yarn(1.0, 1.0)),
    ),
    "deepseek_v3 no groups, no q-LoRA, no YaRN": (
        "DeepseekV3",
        dict(MLA, q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False,
             rope_parameters=PLAIN),
    ),
    "deepseek_v3 halves, tied, biased": (
        "DeepseekV3",
        dict(MLA, n_group=2, topk_group=1, rope_interleave=False, tie_word_embeddings=True,
             attention_bias=True, first_k_dense_replace=0, rope_parameters=PLAIN),
    ),
    "gpt_oss": (
        "GptOss",
        dict(intermediate_size=10, num_local_experts=6, num_experts_per_tok=2, head_dim=8,
             sliding_window=3, num_hidden_layers=4,
             rope_parameters=dict(yarn(None, None), truncate=False)),
    ),
    "gpt_oss truncated, odd layers": (
        "GptOss",
        dict(intermediate_size=9, num_local_experts=5, num_experts_per_tok=3, head_dim=6,
             sliding_window=4, rope_parameters=yarn(None, None)),
    ),
    "glm4_moe": (
        "Glm4Moe",
        dict(n_routed_experts=8, n_shared_experts=1, head_dim=12, use_qk_norm=True,
             attention_bias=True, routed_scaling_factor=2.5,
             rope_parameters=dict(PLAIN, partial_rotary_factor=0.5), **FINE),
    ),
    "glm4_moe no q/k norm, two dense layers": (
        "Glm4Moe",
        dict(n_routed_experts=8, n_shared_experts=2, head_dim=8, first_k_dense_replace=2,
             n_group=2, topk_group=1, rope_parameters=dict(PLAIN, partial_rotary_factor=0.5),
             **FINE),
    ),
}  # fmt: skip


def fill(model, seed=0):
    """Fills a model with random values, norms around 1, and returns it; buffers of routers too."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda like: torch.randn(like.shape, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name
            parameter.copy_(1 + 0.1 * draw(parameter) if norm else 0.3 * draw(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * draw(buffer))
    return model.eval()


def make(case, **changes):
    """A model of a case."""
    if case == "deepseek":
        return make_deepseek()
    kind, fields = CASES[case]
    config = getattr(hf, f"{kind}Config")(**{**SHARED, **fields, **changes})
    config._experts_implementation = "eager"
    return fill(getattr(hf, f"{kind}ForCausalLM")(config))


def read(folder):
    """A checkpoint as Transformers reads it, in float32; tiny experts are too narrow for its
    grouped products."""
    return hf.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype="float32"
    )


def tokens(rows=2, length=11, seed=1):
    """Token ids, none of them the padding's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def logits(model, ids, mask=None):
    """The model's logits as a NumPy array."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits.numpy()


def gradients(model, ids):
    """Gradients of the mean next-token loss, by name."""
    model.zero_grad()
    chances = torch.log_softmax(model(ids, use_cache=False).logits[:, :-1], dim=-1)
    (-chances.gather(-1, ids[:, 1:, None]).mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Deepseek(hf.LlamaForCausalLM):
    """DeepSeekMoE-16B's form, which Transformers has no class for: Llama with V2's MoE layers.

    Its released code has Llama's attention, rotary halves included, and routes as V2's greedy
    method does with scale 1.
    """

    def __init__(self, config, experts, width, first=1):
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

        super().__init__(config)
        self.moe = hf.DeepseekV2Config(
            **{**MLA, "n_routed_experts": experts, "moe_intermediate_size": width},
            hidden_size=config.hidden_size, topk_method="greedy", n_group=1, topk_group=1,
            routed_scaling_factor=1.0, num_attention_heads=4,
        )  # fmt: skip
        self.moe._experts_implementation = "eager"
        for layer in self.model.layers[first:]:
            layer.mlp = DeepseekV2Moe(self.moe)

    def released(self):
        """Config and tensors as the released checkpoint has them."""
        kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "rms_norm_eps", "intermediate_size", "tie_word_embeddings",
                "max_position_embeddings", "hidden_act", "attention_bias")  # fmt: skip
        config = {name: getattr(self.config, name) for name in kept}
        config |= dict(
            model_type="deepseek", architectures=["DeepseekForCausalLM"], scoring_func="softmax",
            rope_theta=100.0, rope_scaling=None, n_routed_experts=self.moe.n_routed_experts,
            n_shared_experts=2, num_experts_per_tok=2, moe_layer_freq=1,
            moe_intermediate_size=self.moe.moe_intermediate_size,
            first_k_dense_replace=1, norm_topk_prob=False, aux_loss_alpha=0.001, seq_aux=True,
            torch_dtype="float32", auto_map={"AutoModel": "modeling_deepseek.DeepseekModel"},
        )  # fmt: skip
        tensors = {}
        for name, tensor in self.state_dict().items():
            block = name.rpartition(".")[0]
            if name.endswith("experts.gate_up_proj"):
                for e, both in enumerate(tensor):
                    for kind, part in zip(("gate", "up"), both.chunk(2), strict=True):
                        tensors[f"{block}.{e}.{kind}_proj.weight"] = part.contiguous()
            elif name.endswith("experts.down_proj"):
                tensors |= {
                    f"{block}.{e}.down_proj.weight": t.clone() for e, t in enumerate(tensor)
                }
            else:
                tensors[name] = tensor
        return config, tensors

    def save_pretrained(self, folder):
        """Writes the released layout."""
        config, tensors = self.released()
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_deepseek(experts=8, width=10, **changes):
    """A random model of DeepSeekMoE-16B's form."""
    fields = {**SHARED, "num_key_value_heads": 4, "rope_parameters": PLAIN, "intermediate_size": 22}
    return fill(Deepseek(hf.LlamaConfig(**{**fields, **changes}), experts, width))
