"""Models of our own forms, as Transformers loads and runs what is exported of them.

Needs the extra ``parity``. The checkpoints of test_hf_parity.py were Transformers' own, so they
cannot show a field that its classes refuse.
"""

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.interop import hf
from moejax.models import Transformer

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
torch = pytest.importorskip("torch", reason=WHY)
hf_models = pytest.importorskip("hf_models", reason=WHY)

FINE = dict(checkpoints.DENSE, num_experts_per_tok=2, moe_intermediate_size=6)
WINDOW = dict(use_sliding_window=True, sliding_window=3)
NO_SHARED = {**checkpoints.V3, "num_nextn_predict_layers": 0, "n_shared_experts": 0}
EXPORTED = {
    "V3 without shared experts": NO_SHARED,
    "V3, heads that do not divide the width": {
        **NO_SHARED, "n_shared_experts": 1, "num_attention_heads": 5, "num_key_value_heads": 5,
    },
    "V2 without shared experts": {
        **NO_SHARED, "model_type": "deepseek_v2", "topk_method": "group_limited_greedy",
        "scoring_func": "softmax", "norm_topk_prob": False, "kv_lora_rank": 6,
    },
    "GLM without shared experts": dict(
        FINE, model_type="glm4_moe", n_routed_experts=4, n_shared_experts=0, use_qk_norm=True,
        head_dim=8, partial_rotary_factor=0.75, first_k_dense_replace=1,
    ),
    "gpt-oss without YaRN": dict(
        FINE, model_type="gpt_oss", head_dim=4, num_local_experts=4, sliding_window=3,
        rope_scaling={"rope_type": "default"},
    ),
    "Qwen2, a window": dict(checkpoints.DENSE, model_type="qwen2", max_window_layers=1, **WINDOW),
    "Qwen2-MoE, a window": dict(
        FINE, model_type="qwen2_moe", num_experts=4, shared_expert_intermediate_size=12,
        layer_types=["full_attention", "sliding_attention"], **WINDOW,
    ),
    "Qwen3-MoE, a window": dict(FINE, model_type="qwen3_moe", head_dim=4, num_experts=4, **WINDOW),
    "Mixtral, wide heads": dict(FINE, model_type="mixtral", head_dim=6, num_local_experts=4),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_transformers_runs_what_was_exported(name, tmp_path):
    values = EXPORTED[name]
    config = hf.config_from_hf(values)
    variables = tiny.variables(config)
    hf.save(tmp_path / "hf", config, variables, family=values["model_type"])
    ids = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (2, 9))
    with torch.no_grad():
        wanted = hf_models.read(tmp_path / "hf")(torch.tensor(ids)).logits.numpy()
    got = jax.jit(Transformer(config).apply)(variables, jnp.asarray(ids, jnp.int32)).logits
    assert tiny.relative_error(got, wanted) < 2e-5
