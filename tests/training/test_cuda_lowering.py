"""The whole training step lowered for CUDA on a machine without a GPU: nothing runs here."""

import jax
import pytest
from tiny import batch, moe_config

from moejax.models import AttentionConfig
from moejax.parallel import MeshConfig, make_mesh
from moejax.training.optimizers import OptimConfig, learning_rate, make_optimizer
from moejax.training.state import make_init
from moejax.training.step import make_train_step


def lowered_for_cuda(implementation: str) -> str:
    """The bfloat16 step's program, as text; heads of width 64, which cuDNN's kernels take."""
    attention = AttentionConfig(4, 2, head_dim=64, implementation=implementation)
    model = moe_config(dtype="bfloat16", attention=attention)
    optim = OptimConfig(optimizer="muon")
    optimizer = make_optimizer(optim, 10)
    shapes = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        _, state = make_init(model, optimizer, mesh)
        step = make_train_step(model, optimizer, learning_rate(optim, 10))
        traced = jax.jit(step, donate_argnums=0).trace(shapes(state), shapes(batch(1, 8, 64)))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_step_lowers_with_xlas_attention(monkeypatch):
    # On a CPU attention is another function: see moejax.models.causal_attention.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    program = lowered_for_cuda("xla")
    assert "bf16" in program and "cudnn" not in program


def test_the_step_lowers_with_cudnns_attention(monkeypatch):
    """jax asks the GPU for its cuDNN before it lowers; here it is told of one."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda *_: True)
    program = lowered_for_cuda("cudnn")
    # Forward and backward, in the dense segment and in the MoE segment.
    assert program.count("custom_call @__cudnn$fmha") == 4


def test_cudnn_without_a_gpu_is_an_error_not_a_fall_back():
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        lowered_for_cuda("cudnn")
