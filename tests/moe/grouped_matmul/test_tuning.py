"""Tuning with interpreted kernels of tiny shapes, without waiting for meaningful times."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from moejax.config import UserError
from moejax.moe.grouped_matmul import Layer, Product, layer_products, load_table, tuning
from moejax.moe.grouped_matmul.backends import BACKENDS, default_tiles

LAYER = Layer(T=4, D=16, F=16, E=2, K=2)
FORWARD = Product("forward", "float32", 2, 16, 32, 8, gathered=True)


@pytest.fixture
def one_product(monkeypatch):
    """Layers of one product, so that a test compiles one kernel."""
    products = lambda layer, dtype: {("gate_up", "forward"): FORWARD}
    monkeypatch.setattr(tuning, "layer_products", products)


def tune(path, **kwargs):
    lines = []
    record = tuning.tune(
        [LAYER], path=path, report=lines.append, dtype="float32", interpret=True, **kwargs
    )
    return record, lines


def test_all_six_products_are_measured_and_written(tmp_path):
    path = tmp_path / "deep" / "table.json"
    record, lines = tune(path)
    assert json.loads(path.read_text()) == record
    assert record["device"] == "interpreter" and record["versions"]["jax"]
    entries = load_table(path).entries
    assert len(entries) == 6 and len({entry.product for entry in entries}) == 6
    for entry in entries:
        assert entry.device == "interpreter" and entry.date and not entry.failed
        assert {best.backend for best in entry.ranked} == {"pallas"}
        assert all(best.milliseconds > 0 for best in entry.ranked)
    assert sum("TFLOP/s" in line for line in lines) == 6
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_measuring_again_replaces_one_entry_and_keeps_the_others(tmp_path, one_product):
    path = tmp_path / "table.json"
    tune(path)
    record = json.loads(path.read_text())
    other = json.loads(json.dumps(record["entries"][0]))
    other["device"] = "NVIDIA H200"
    record["entries"] = [other, {**record["entries"][0], "date": "long ago"}]
    path.write_text(json.dumps(record))
    tune(path)
    kept, measured = load_table(path).entries
    assert (kept.device, measured.device) == ("NVIDIA H200", "interpreter")
    assert measured.date != "long ago"


class Wrong:
    """The own kernels, with one configuration that is fast and wrong, and one that fails."""

    def __init__(self):
        self.real = BACKENDS["pallas"]

    def candidates(self, product):
        return [(), (("rows", 32),), (("rows", 64),)]

    def forward(self, rows, weights, group_sizes, source, settings, interpret):
        if settings == (("rows", 64),):
            raise NotImplementedError("no such\ntile")
        out = self.real.forward(rows, weights, group_sizes, source, (), interpret)
        return out * 1.01 if settings else out


def test_what_is_wrong_or_fails_cannot_win(tmp_path, one_product, monkeypatch):
    monkeypatch.setattr(tuning, "BACKENDS", {"pallas": Wrong()})
    _, lines = tune(tmp_path / "table.json")
    (entry,) = load_table(tmp_path / "table.json").entries
    assert [best.settings for best in entry.ranked] == [{}]
    wrong, failing = entry.failed
    assert wrong.settings == {"rows": 32} and "differs" in wrong.reason
    assert failing.reason == "NotImplementedError: no such tile"
    assert sum("failed" in line for line in lines) == 2


class Several(Wrong):
    """The own kernels under three names."""

    def forward(self, rows, weights, group_sizes, source, settings, interpret):
        return self.real.forward(rows, weights, group_sizes, source, (), interpret)


def test_the_fastest_comes_first(tmp_path, one_product, monkeypatch):
    monkeypatch.setattr(tuning, "BACKENDS", {"pallas": Several()})
    times = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(tuning, "_time", lambda call: next(times))
    _, lines = tune(tmp_path / "table.json")
    (entry,) = load_table(tmp_path / "table.json").entries
    assert [best.settings for best in entry.ranked] == [{"rows": 32}, {"rows": 64}, {}]
    # 2 · 8 · 16 · 32 FLOPs in a millisecond.
    assert lines[-1] == "  pallas {'rows': 32}: 1 ms, 8.192e-06 TFLOP/s"


@pytest.mark.parametrize(
    ("name", "leg", "gathered"),
    [
        ("gate_up", "forward", [True, False]),
        ("gate_up", "input_gradient", [False, False]),
        ("gate_up", "weight_gradient", [True, False]),
        ("down", "forward", [False, False]),
        ("down", "input_gradient", [True, False]),
        ("down", "weight_gradient", [False, True]),
    ],
)
def test_operands_are_read_as_the_layer_reads_them(name, leg, gathered):
    product = layer_products(LAYER, "float32")[name, leg]
    operands, sources = tuning._draw_operands(name, product, tuning._draw_routing(LAYER))
    assert [source is not None for source in sources] == gathered
    heights = [LAYER.T if there else LAYER.T * LAYER.K for there in gathered]
    count = 2 if leg == "weight_gradient" else 1
    assert [len(operand) for operand in operands[:count]] == heights[:count]


def test_nan_is_a_difference():
    product = Product("weight_gradient", "float32", 1, 2, 2, 2)
    with pytest.raises(ValueError, match="differs"):
        tuning._compare(jnp.full((1, 2, 2), jnp.nan), jnp.ones((1, 2, 2)), product, 2)


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(UserError, match="measures an NVIDIA GPU, and this is cpu"):
        tuning.tune([LAYER], path=tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path, one_product):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"table\.json': cannot be written"):
        tune(tmp_path / "file" / "table.json")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layer", [*tuning.default_shapes(), LAYER])
def test_every_candidate_is_one_that_its_back_end_takes(layer, dtype):
    for product in layer_products(layer, dtype).values():
        for name, backend in BACKENDS.items():
            found = backend.candidates(product)
            assert len(found) == len(set(found)) >= 1
            assert not any(backend.check(settings) for settings in found), name


@pytest.mark.parametrize(
    ("product", "tile"),
    [
        # 1,024 rows an expert fill large tiles.
        (Product("forward", "bfloat16", 64, 2560, 2560, 65536), (128, 256, 64)),
        (Product("weight_gradient", "bfloat16", 64, 2560, 2560, 65536), (128, 128, 64)),
        # Nor is a matrix of 200 columns worth 256.
        (Product("forward", "bfloat16", 64, 2560, 200, 65536), (128, 128, 64)),
        # 16 rows an expert would leave them almost empty.
        (Product("forward", "bfloat16", 256, 512, 512, 4096), (16, 128, 64)),
        (Product("input_gradient", "bfloat16", 64, 40, 24, 65536), (128, 64, 32)),
        (Product("weight_gradient", "bfloat16", 64, 40, 24, 65536), (64, 32, 64)),
        # FP32 runs without tensor cores, in registers.
        (Product("forward", "float32", 64, 2560, 2560, 65536), (64, 64, 32)),
    ],
)
def test_the_cut_without_a_measurement_follows_the_shape(product, tile):
    tiles = default_tiles(product)
    assert (tiles.rows, tiles.columns, tiles.depth) == tile


@pytest.mark.parametrize(
    ("capability", "columns"),
    [("9.0", 256), ("8.0", 256), ("10.0", 256), ("8.9", 128), ("8.6", 128), ("12.0", 128)],
)
def test_the_cut_fits_the_card(monkeypatch, capability, columns):
    card = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    tiles = default_tiles(Product("forward", "bfloat16", 64, 2560, 2560, 65536))
    assert (tiles.rows, tiles.columns) == (128, columns)
