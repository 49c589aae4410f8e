"""The fields of released config.json files that decide an architecture, by preset.

Sources: each model's page on the Hugging Face hub. Ids of special tokens and the like are left out.
"""

_LLAMA3 = dict(
    model_type="llama", vocab_size=128256, hidden_act="silu", rms_norm_eps=1e-5,
    num_key_value_heads=8, rope_theta=500000.0, tie_word_embeddings=False, attention_bias=False,
    mlp_bias=False, max_position_embeddings=131072, torch_dtype="bfloat16",
    rope_scaling=dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192, rope_type="llama3",
    ),
)  # fmt: skip
_DEEPSEEK = dict(
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000, tie_word_embeddings=False,
    attention_bias=False, moe_layer_freq=1, aux_loss_alpha=0.001, seq_aux=True, pretraining_tp=1,
    torch_dtype="bfloat16",
)  # fmt: skip
_MLA = dict(
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, ep_size=1,
    max_position_embeddings=163840,
)  # fmt: skip
_QWEN3 = dict(
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
    attention_bias=False, vocab_size=151936, head_dim=128, max_position_embeddings=40960,
    use_sliding_window=False, sliding_window=None, torch_dtype="bfloat16",
)  # fmt: skip
_GLM = dict(
    model_type="glm4_moe", attention_bias=True, head_dim=128, hidden_act="silu",
    partial_rotary_factor=0.5, moe_intermediate_size=1408, norm_topk_prob=True,
    num_attention_heads=96, n_group=1, topk_group=1, n_shared_experts=1, num_experts_per_tok=8,
    num_key_value_heads=8, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1000000,
    num_nextn_predict_layers=1, tie_word_embeddings=False, vocab_size=151552,
    max_position_embeddings=131072, torch_dtype="bfloat16",
)  # fmt: skip


def _yarn(factor, mscale, **changes):
    base = dict(
        beta_fast=32, beta_slow=1, factor=factor, mscale=mscale, mscale_all_dim=mscale,
        original_max_position_embeddings=4096, type="yarn",
    )  # fmt: skip
    return {**base, **changes}


def _gpt_oss(layers, experts):
    return dict(
        model_type="gpt_oss", attention_bias=True, head_dim=64, hidden_act="silu",
        hidden_size=2880, initial_context_length=4096, intermediate_size=2880,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        max_position_embeddings=131072, num_attention_heads=64, num_experts_per_tok=4,
        experts_per_token=4, num_hidden_layers=layers, num_key_value_heads=8,
        num_local_experts=experts, rms_norm_eps=1e-5, rope_theta=150000, sliding_window=128,
        swiglu_limit=7.0, tie_word_embeddings=False, vocab_size=201088,
        router_aux_loss_coef=0.9,
        rope_scaling=dict(
            beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096,
            rope_type="yarn", truncate=False,
        ),
        quantization_config=dict(quant_method="mxfp4"),
    )  # fmt: skip


PUBLISHED = {
    "llama3_1_8b": dict(
        _LLAMA3, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        intermediate_size=14336,
    ),
    "llama3_1_70b": dict(
        _LLAMA3, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
        intermediate_size=28672,
    ),
    "llama3_1_405b": dict(
        _LLAMA3, hidden_size=16384, num_hidden_layers=126, num_attention_heads=128,
        intermediate_size=53248,
    ),
    "mixtral_8x7b": dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        num_local_experts=8, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=None, tie_word_embeddings=False, router_aux_loss_coef=0.02,
        hidden_act="silu", max_position_embeddings=32768,
    ),
    "olmoe_1b_7b": dict(
        model_type="olmoe", vocab_size=50304, hidden_size=2048, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, intermediate_size=1024, num_experts=64,
        num_experts_per_tok=8, norm_topk_prob=False, clip_qkv=None, attention_bias=False,
        rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False,
        router_aux_loss_coef=0.01, hidden_act="silu", max_position_embeddings=4096,
    ),
    "qwen1_5_moe_a2_7b": dict(
        model_type="qwen2_moe", vocab_size=151936, hidden_size=2048, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, intermediate_size=5632,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
        num_experts_per_tok=4, norm_topk_prob=False, decoder_sparse_step=1, rms_norm_eps=1e-6,
        rope_theta=1000000.0, use_sliding_window=False, sliding_window=32768,
        max_window_layers=21, tie_word_embeddings=False, hidden_act="silu",
        max_position_embeddings=8192, router_aux_loss_coef=0.001,
    ),
    "qwen2_57b_a14b": dict(
        model_type="qwen2_moe", vocab_size=151936, hidden_size=3584, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        moe_intermediate_size=2560, shared_expert_intermediate_size=20480, num_experts=64,
        num_experts_per_tok=8, norm_topk_prob=False, decoder_sparse_step=1, rms_norm_eps=1e-6,
        rope_theta=1000000.0, use_sliding_window=False, sliding_window=65536,
        max_window_layers=28, tie_word_embeddings=False, hidden_act="silu",
        max_position_embeddings=32768, router_aux_loss_coef=0.001,
    ),
    "qwen3_0_6b": dict(
        _QWEN3, model_type="qwen3", hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, intermediate_size=3072, max_window_layers=28,
        tie_word_embeddings=True,
    ),
    "qwen3_8b": dict(
        _QWEN3, model_type="qwen3", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=12288, max_window_layers=36,
        tie_word_embeddings=False,
    ),
    "qwen3_30b_a3b": dict(
        _QWEN3, model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], max_window_layers=48,
        tie_word_embeddings=False, router_aux_loss_coef=0.001,
    ),
    "qwen3_235b_a22b": dict(
        _QWEN3, model_type="qwen3_moe", hidden_size=4096, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, intermediate_size=12288,
        moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], max_window_layers=94,
        tie_word_embeddings=False, router_aux_loss_coef=0.001,
    ),
    "deepseek_moe_16b": dict(
        _DEEPSEEK, model_type="deepseek", vocab_size=102400, hidden_size=2048,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, norm_topk_prob=False,
        scoring_func="softmax", rope_scaling=None, max_position_embeddings=4096,
    ),
    "deepseek_v2_lite": dict(
        _DEEPSEEK, **_MLA, model_type="deepseek_v2", vocab_size=102400, hidden_size=2048,
        num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, norm_topk_prob=False,
        n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0,
        scoring_func="softmax", rope_scaling=_yarn(40, 0.707),
    ),
    "deepseek_v2": dict(
        _DEEPSEEK, **_MLA, model_type="deepseek_v2", vocab_size=102400, hidden_size=5120,
        num_hidden_layers=60, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
        intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, norm_topk_prob=False,
        n_group=8, topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
        scoring_func="softmax", rope_scaling=_yarn(40, 0.707),
    ),
    "deepseek_v3": dict(
        _DEEPSEEK, **_MLA, model_type="deepseek_v3", vocab_size=129280, hidden_size=7168,
        num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536,
        intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, norm_topk_prob=True,
        n_group=8, topk_group=4, topk_method="noaux_tc", routed_scaling_factor=2.5,
        scoring_func="sigmoid", num_nextn_predict_layers=1, rope_scaling=_yarn(40, 1.0),
        quantization_config=dict(
            activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
            weight_block_size=[128, 128],
        ),
    ),
    "kimi_k2": dict(
        _DEEPSEEK, **{**_MLA, "max_position_embeddings": 131072}, model_type="kimi_k2",
        vocab_size=163840, hidden_size=7168, num_hidden_layers=61, num_attention_heads=64,
        num_key_value_heads=64, q_lora_rank=1536, intermediate_size=18432,
        moe_intermediate_size=2048, n_routed_experts=384, n_shared_experts=1,
        num_experts_per_tok=8, first_k_dense_replace=1, norm_topk_prob=True, n_group=1,
        topk_group=1, topk_method="noaux_tc", routed_scaling_factor=2.827,
        scoring_func="sigmoid", num_nextn_predict_layers=0,
        rope_scaling=_yarn(32.0, 1.0, beta_fast=1.0, beta_slow=1.0),
    ) | {"rope_theta": 50000.0},
    "glm4_5": dict(
        _GLM, hidden_size=5120, intermediate_size=12288, num_hidden_layers=92,
        n_routed_experts=160, first_k_dense_replace=3, routed_scaling_factor=2.5,
        use_qk_norm=True,
    ) | {"moe_intermediate_size": 1536},
    "glm4_5_air": dict(
        _GLM, hidden_size=4096, intermediate_size=10944, num_hidden_layers=46,
        n_routed_experts=128, first_k_dense_replace=1, routed_scaling_factor=1.0,
        use_qk_norm=False,
    ),
    "gpt_oss_20b": _gpt_oss(24, 32),
    "gpt_oss_120b": _gpt_oss(36, 128),
}  # fmt: skip
