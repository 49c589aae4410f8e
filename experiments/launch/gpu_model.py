"""Training runs of a few minutes on one GPU: learned routing, with the ledger on.

For speed, not for results: 150 steps on the standard library's source, as bytes. The environment
variable ``GPU_MODEL`` names one of the models of ``moejax bench --suite=model``; ``olmoe_150m``
if it is not set. Hardware: one card of 80 GB.
"""

import os

import ml_collections

from moejax.bench.models import find_model


def get_config() -> ml_collections.ConfigDict:
    """The run's config; every field can be changed with --config.FIELD=VALUE."""
    shape = find_model(os.environ.get("GPU_MODEL", "olmoe_150m"))
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "stage": "speed",
            "model": {
                "vocab_size": shape.V,
                "d_model": shape.D,
                "num_layers": shape.L,
                "attention": {"num_heads": shape.H},
                "tie_embeddings": False,
                "norm_eps": 1e-5,
                "init_std": 0.02,
                "loss_chunk": shape.loss_chunk,
                "unroll": 0,
            },
            "moe": {"num_experts": shape.E, "top_k": shape.K, "d_expert": shape.F},
            "router": {"name": "softmax_topk"},
            "data": {"source": "stdlib", "tokenizer": "bytes", "max_validation_bytes": 100_000},
            "train": {
                "steps": 150,
                "batch_size": shape.B,
                "seq_len": shape.S,
                "log_every": 10,
            },
            "optim": {
                "learning_rate": 4e-4,
                "schedule": "wsd",
                "warmup_steps": 50,
                "moments_dtype": shape.moments_dtype,
            },
        }
    )
