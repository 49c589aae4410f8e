"""Tiny checkpoints written without torch, and tensors changed in them by hand."""

import json
import pathlib
import struct

import numpy as np
import tiny

from moejax.interop import hf
from moejax.interop.safetensors_io import NAMES, open_checkpoint

VOCAB = 21

DENSE = dict(
    model_type="llama", vocab_size=VOCAB, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=6, rms_norm_eps=1e-6, rope_theta=100.0,
    tie_word_embeddings=False, max_position_embeddings=64, torch_dtype="float32",
)  # fmt: skip
V3 = dict(
    model_type="deepseek_v3", vocab_size=VOCAB, hidden_size=12, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=2, intermediate_size=10, moe_intermediate_size=6,
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
    topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
    first_k_dense_replace=1, moe_layer_freq=1, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=3, num_nextn_predict_layers=1, rope_theta=100.0,
    rope_scaling=None, rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=False,
    max_position_embeddings=64, torch_dtype="float32",
)  # fmt: skip


def write(folder: pathlib.Path, values: dict, seed: int = 0, **options) -> dict:
    """A random checkpoint of a config.json, which is written as given; returns the variables."""
    config = hf.config_from_hf(values)
    variables = tiny.variables(config, seed)
    hf.save(folder, config, variables, family=values["model_type"], **options)
    (folder / "config.json").write_text(json.dumps(values))
    return variables


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint."""
    return {name: stored.read() for name, stored in open_checkpoint(folder).items()}


def write_file(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """A safetensors file, spelled out: length, header, bytes."""
    header, parts, end = {}, [], 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]
        }  # fmt: skip
        parts.append(array.tobytes())
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
