"""The parts of a layer that the end-to-end test does not reach: grouped products, and tuning."""

import jax
import jax.numpy as jnp
import pytest

from moejax.bench import command, exchanges, pieces
from moejax.bench.loads import draw_routing
from moejax.bench.moe_suite import layer_arrays
from moejax.bench.report import Report
from moejax.bench.shapes import find_shape
from moejax.bench.tables import COLUMNS, format_table

SHAPE = find_shape("T24-D16-F32-E3-K2")


def test_the_grouped_products_interpreted():
    arrays = layer_arrays(SHAPE, "float32", 0)
    expert = jnp.asarray(draw_routing("skewed", 24, 3, 2)[0])
    found = list(pieces.grouped_products(SHAPE, arrays["moe"], arrays["x"], expert, interpret=True))
    assert [piece.name for piece in found] == [
        f"{matrix}, {leg}, pallas"
        for matrix, leg in (
            ("gate-up", "forward"), ("down", "forward"), ("down", "input gradient"),
            ("gate-up", "input gradient"), ("gate-up", "weight gradient"),
            ("down", "weight gradient"),
        )
    ]  # fmt: skip
    # 48 rows x 16 x 32 x 2 FLOPs, twice that with gate beside up.
    assert [piece.flops for piece in found] == [98304, 49152, 49152, 98304, 98304, 49152]
    outputs = [(48, 64), (48, 16), (48, 32), (48, 16), (3, 16, 64), (3, 32, 16)]
    assert [jax.eval_shape(p.function, *p.arguments).shape for p in found] == outputs
    first = found[0].function(*found[0].arguments)
    order = jnp.argsort(expert.reshape(-1), stable=True)
    rows, owner = arrays["x"][order // 2], expert.reshape(-1)[order]
    wanted = jnp.einsum("md,mdf->mf", rows, arrays["moe"].gate_up.reshape(3, 16, 64)[owner])
    assert jnp.abs(first - wanted).max() < 1e-4


def test_products_count_the_rows_they_multiply():
    # 48 assignments of 5 experts: 10 rows each, rounded up.
    shape = find_shape("T24-D4-F3-E5-K2")
    weights = layer_arrays(shape, "float32", 0)["moe"]
    found = {p.name: p for p in pieces.products(shape, weights, jnp.float32)}
    assert found["down product"].flops == 2 * 50 * 4 * 3
    for piece in found.values():
        jax.eval_shape(piece.function, *piece.arguments)


def test_movements_put_rows_where_they_belong():
    expert, gate = map(jnp.asarray, draw_routing("balanced", 24, 3, 2))
    x = jnp.tile(jnp.arange(24.0)[:, None], (1, 16))
    _, gather, combine = pieces.movements(SHAPE, x, expert, gate)
    rows = gather.function(*gather.arguments)
    # Gathered and summed by gates that add up to 1, the tokens come back.
    back = combine.function(rows, *combine.arguments[1:])
    assert jnp.abs(back - x).max() < 1e-4


@pytest.mark.parametrize(("devices", "wanted"), [(8, 6), (5, 3), (1, 1)])
def test_devices_divide_experts_and_tokens(devices, wanted):
    shape = find_shape("T24-D4-F4-E6-K2")
    assert exchanges.expert_devices(shape, devices) == wanted


def test_rows_of_a_tuned_table():
    entry = {
        "device": "NVIDIA H100", "date": "",
        "product": {"leg": "input_gradient", "dtype": "bfloat16", "experts": 64, "inputs": 2048,
                    "outputs": 1024, "rows": 1000, "gathered": False},
        "ranked": [
            {"backend": "tokamax_mosaic", "settings": {}, "milliseconds": 2.0},
            {"backend": "pallas", "settings": {"rows": 64}, "milliseconds": 3.0},
            {"backend": "pallas", "settings": {"rows": 128}, "milliseconds": 4.0},
        ],
    }  # fmt: skip
    report = Report()
    command.add_tuned(entry, report)
    assert [row["dispatch"] for row in report.results] == ["tokamax_mosaic", "pallas"]
    assert report.results[0]["flops_per_s"] == pytest.approx(2 * 1000 * 2048 * 1024 / 2e-3)
    assert report.results[1]["settings"] == {"rows": 64}
    text = format_table(report.results, COLUMNS["tune"])
    assert "input_gradient E64 A2048 B1024 M1000" in text and "pallas" in text
