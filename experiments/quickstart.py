"""Quickstart: a DeepSeek-V3-style MoE on the Python standard library's source, on two CPU cores.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "stage": "pretrain",
            "model": {
                "vocab_size": 2048,
                "d_model": 256,
                "num_layers": 4,
                "first_k_dense": 1,
                "attention": {"num_heads": 4},
                "embedding_multiplier": 16.0,
                "loss_chunk": 128,
            },
            "moe": {"num_experts": 16, "top_k": 2, "d_expert": 128, "num_shared_experts": 1},
            "router": {"name": "deepseek_v3", "bias_step": 0.01, "routed_scale": 1.0},
            "data": {"source": "stdlib", "tokenizer": "bpe", "bpe_vocab_size": 2048},
            "train": {
                "steps": 300,
                "batch_size": 16,
                "seq_len": 256,
                "log_every": 10,
                "sample_prompt": "def ",
                "sample_tokens": 120,
            },
            "optim": {
                "optimizer": "muon",
                "learning_rate": 3e-3,
                "schedule": "wsd",
                "warmup_steps": 20,
                "decay_fraction": 0.4,
                "final_fraction": 0.0,
            },
            "checkpoint": {"every_steps": 100},
            "cost": {"final": True},
        }
    )
