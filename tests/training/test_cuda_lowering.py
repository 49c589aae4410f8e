"""The whole training step lowered for CUDA on a machine without a GPU: nothing runs here."""

import dataclasses

import jax
import pytest
from tiny import batch, moe_config

from moejax.models import AttentionConfig
from moejax.parallel import MeshConfig, make_mesh
from moejax.training.optimizers import OptimConfig, learning_rate, make_optimizer
from moejax.training.state import make_init
from moejax.training.step import make_train_step


def lowered_for_cuda(implementation: str, attention=None, context=1, **changes) -> str:
    """The bfloat16 step's program, as text; heads of width 64, which cuDNN's kernels take."""
    attention = attention or AttentionConfig(4, 2, head_dim=64)
    attention = dataclasses.replace(attention, implementation=implementation)
    model = moe_config(dtype="bfloat16", attention=attention, **changes)
    optim = OptimConfig(optimizer="muon")
    optimizer = make_optimizer(optim, 10)
    shapes = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    mesh = make_mesh(MeshConfig(context=context))
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


@pytest.fixture
def cudnn(monkeypatch):
    """jax asks the GPU for its cuDNN before it lowers; here it is told of one."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda *_: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_the_step_lowers_with_cudnns_attention(cudnn):
    # Forward and backward, in the dense segment and in the MoE segment.
    program = lowered_for_cuda("cudnn")
    assert program.count("custom_call @__cudnn$fmha") == 4
    assert program.count("CAUSAL") == 4


def test_queries_of_a_cut_length_are_cudnns_too_and_not_causal(cudnn):
    # A quarter of 64 positions to them all: the mask says which, and cuDNN adds it as a bias.
    program = lowered_for_cuda("cudnn", context=4, **ONE_SEGMENT)
    calls = [line for line in program.splitlines() if "custom_call @__cudnn$fmha" in line]
    assert len(calls) == 2 and not any("CAUSAL" in call for call in calls)
    assert all("8x16x4x64xbf16" in call and "8x64x2x64xbf16" in call for call in calls)
    assert all("x16x64xbf16" in call for call in calls), "the bias is of a quarter's queries"


ONE_SEGMENT = {"num_layers": 2, "first_k_dense": 0}


@pytest.mark.parametrize("implementation", ["auto", "cudnn"])
def test_latent_attentions_narrow_values_are_padded_for_cudnn(cudnn, implementation):
    # Keys of 48 + 16 channels, values of 48: cuDNN gets values of 64.
    attention = AttentionConfig(
        4, kind="mla", kv_lora_rank=32, nope_head_dim=48, rope_head_dim=16, v_head_dim=48
    )
    program = lowered_for_cuda(implementation, attention, **ONE_SEGMENT)
    calls = [line for line in program.splitlines() if "custom_call @__cudnn$fmha" in line]
    assert len(calls) == 2
    assert all(call.count("8x64x4x64xbf16") >= 3 and "x48xbf16" not in call for call in calls)


def test_auto_with_sinks_is_xlas_and_lowers(cudnn):
    # Without sinks both layers would be cuDNN's: see the next test.
    attention = AttentionConfig(4, 2, head_dim=64, window=16, sinks=True)
    layers = {"num_layers": 2, "segments": ((("moe_window", "moe"), 1),)}
    program = lowered_for_cuda("auto", attention, **layers)
    assert "bf16" in program and "cudnn" not in program


def test_windows_lower_with_cudnns_attention(cudnn):
    attention = AttentionConfig(4, 2, head_dim=64, window=16)
    layers = {"num_layers": 2, "segments": ((("moe_window", "moe"), 1),)}
    program = lowered_for_cuda("auto", attention, **layers)
    assert program.count("custom_call @__cudnn$fmha") == 4


def test_cudnn_without_a_gpu_is_an_error_not_a_fall_back():
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        lowered_for_cuda("cudnn")
