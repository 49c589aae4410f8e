"""What a run says of its back ends before it starts."""

import dataclasses

import jax
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.cost.prices import Price
from moejax.moe.choose import choose, choose_here
from moejax.parallel import AXES, MeshConfig, make_mesh
from moejax.training import prepare
from moejax.training.prepare import (
    Billing,
    back_end_lines,
    choose_back_ends,
    grouped_products,
    precision_lines,
)
from moejax.training.run_config import TrainConfig


def lines(**changes):
    moe = dataclasses.replace(tiny.moe_config().moe, **changes)
    return back_end_lines(moe, choose(moe, platform="cpu", expert_devices=2))


def test_devices_have_threads_before_a_type_looks_for_them(monkeypatch):
    order = []
    monkeypatch.setattr(prepare, "enough_threads", lambda: order.append("threads"))
    real = prepare.compute_dtype
    monkeypatch.setattr(prepare, "compute_dtype", lambda n: order.append("type") or real(n))
    model = dataclasses.replace(tiny.moe_config(), dtype="auto")
    config = prepare.RunConfig(model=model, train=TrainConfig(steps=1, batch_size=1, seq_len=8))
    assert prepare.with_dtype(config).model.dtype == "float32"
    assert order == ["threads", "type"]


def test_both_choices_with_their_reasons():
    assert lines(dispatch="auto") == [
        "dispatch    blocks (chosen by auto: drops nothing, runs anywhere)",
        "exchange    all_to_all (chosen by auto: runs anywhere, and on cpu nothing sends less)",
    ]
    assert lines(dispatch="dense_loop", exchange="none") == [
        "dispatch    dense_loop (config)", "exchange    none (config)",
    ]  # fmt: skip


def test_the_log_says_that_fp8_is_simulated():
    assert precision_lines(tiny.moe_config()) == []
    (line,) = precision_lines(tiny.moe_config(precision="fp8"))
    assert "simulated in float32" in line and "no product runs on FP8 hardware" in line


def test_a_warning_where_drops_leak():
    leak = dict(drop_policy="probability", allow_leak=True)
    warning = lines(dispatch="capacity", **leak)[2]
    assert warning.startswith("warning: moe.drop_policy = 'probability' lets later tokens")
    # No drops, no leak; and no leak, no warning.
    assert len(lines(dispatch="blocks", **leak)) == len(lines(dispatch="capacity")) == 2


def test_tokens_are_billed_by_the_experts_that_they_really_ran_through():
    # 10 tokens that were expected in 4 experts each, at 100 FLOPs each, of 1,000 FLOPs a token.
    price = Price(1.0, "on demand", "2026-01-01", "made up")
    billing = Billing("cpu", 1, price, 1e9, "made up", 1000.0, 100.0, 4.0)
    assert billing.model_flops(10, 40) == 10_000
    assert billing.model_flops(10, 25) == 10_000 - 1_500
    # Where the number is exact, what a float32 sum of assignments loses does not matter.
    exact = Billing("cpu", 1, price, 1e9, "made up", 1000.0)
    assert exact.model_flops(10, 39.9) == 10_000


def test_the_mesh_decides_and_a_dense_model_has_none():
    mesh = make_mesh(MeshConfig(expert=4))
    choice = choose_back_ends(tiny.moe_config(), mesh)
    assert (choice.dispatch, choice.exchange) == ("blocks", "all_to_all")
    assert choose_back_ends(tiny.dense_config(), mesh) is None
    assert back_end_lines(None, None) == []


def test_on_a_gpu_each_leg_of_the_grouped_products_is_named():
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1, 1, 4, 1, 1), AXES, (AxisType.Auto,) * 5, abstract_device=device)
    model = tiny.moe_config(dispatch="auto", dtype="bfloat16")
    with jax.sharding.use_abstract_mesh(mesh):
        choice = choose_here(model.moe)
        products = grouped_products(model, choice, 8, 16)
    assert (choice.dispatch, choice.exchange) == ("grouped", "ragged_all_to_all")
    said = back_end_lines(model.moe, choice, products)
    for matrix in ("gate_up", "down"):
        for leg in ("forward", "input_gradient", "weight_gradient"):
            (line,) = [line for line in said if f"{matrix}.{leg} " in line]
            assert products[f"{matrix}.{leg}"]["backend"] in line and "(" in line
    blocks = dataclasses.replace(choice, dispatch="blocks")
    assert grouped_products(model, blocks, 8, 16) is None
