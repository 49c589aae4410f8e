"""Which back end is chosen, from which measurement, and with which reason."""

import json
import os

import jax
import pytest
from hopper import H100

from moejax.config import ConfigError, UserError
from moejax.moe.grouped_matmul import (
    LEGS,
    Layer,
    Product,
    available_backends,
    describe,
    layer_products,
    load_table,
    only,
    platform_and_device,
    table_path,
)
from moejax.moe.grouped_matmul.table import Entry, Measured, Table

DEVICE = "NVIDIA H100 80GB HBM3"
PRODUCT = Product("forward", "bfloat16", 64, 2048, 2048, 65536)


def changed(**changes):
    return Product(**{**vars(PRODUCT), **changes})


def entry(*names, device=DEVICE, **changes):
    """An entry in which the named back ends took 1, 2, 3 … ms."""
    ranked = tuple(Measured(name, {}, float(n)) for n, name in enumerate(names, 1))
    return Entry(device, changed(**changes), ranked)


def choose(*entries, platform="cuda", device=DEVICE, **kwargs):
    return Table(entries).choose(PRODUCT, platform=platform, device=device, **kwargs)


def tiled(tile, **changes):
    """An entry that can be told by its tile."""
    return Entry(DEVICE, changed(**changes), (Measured("pallas", {"rows": tile}, 1.0),))


def test_the_nearest_shape_wins_by_the_ratios_of_its_sizes():
    # 96 experts for 64 are 0.58 powers of two away, and twice the inputs are 1; 1.5 times the rows
    # on top of the experts make 1.17.
    far, near = tiled(16, inputs=4096), tiled(32, experts=96)
    assert choose(far, near).settings == (("rows", 32),)
    assert choose(tiled(32, experts=96, rows=98304), far).settings == (("rows", 16),)
    exact = choose(near, tiled(64), far)
    assert exact.settings == (("rows", 64),)
    assert str(PRODUCT) in exact.why and "1 ms" in exact.why


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "NVIDIA H200"},
        {"leg": "weight_gradient"},
        {"dtype": "float32"},
        {"gathered": True},
    ],
)
def test_other_devices_legs_and_types_are_no_neighbours(changes):
    choice = choose(entry("tokamax_xla", **changes))
    assert (choice.backend, choice.settings) == ("pallas", ())
    assert f"nothing measured like it on {DEVICE}" in choice.why


def test_a_faster_back_end_that_cannot_run_is_passed_over_with_its_reason():
    choice = choose(entry("removed_library", "pallas"))
    assert choice.backend == "pallas"
    assert "2 ms" in choice.why
    assert choice.why.endswith("; not removed_library, the faster one: unknown to this version")
    stale = Entry(DEVICE, PRODUCT, (Measured("pallas", {"tile": 3}, 1.0),))
    assert "tile: no such setting" in choose(stale).why


def test_interpreted_kernels_are_the_own_ones():
    choice = choose(entry("tokamax_xla", "pallas"), platform="cpu", interpret=True)
    assert choice.backend == "pallas" and "tokamax_xla" in choice.why


def test_nothing_that_runs_is_an_error_that_says_why_for_each():
    with pytest.raises(ConfigError, match=r"moe\.dispatch = 'grouped'") as error:
        choose(platform="cpu", device="cpu")
    for name, reason in available_backends("cpu").items():
        assert reason and f"{name}: {reason}" in str(error.value)
    assert "use 'blocks'" in str(error.value)


def test_a_back_end_asked_for_by_name_runs_or_says_why_not():
    table = only("pallas", rows=64)
    choice = table.choose(PRODUCT, platform="cuda", device="anything")
    assert (choice.backend, choice.settings) == ("pallas", (("rows", 64),))
    with pytest.raises(ConfigError, match="pallas: its Triton kernels need an NVIDIA GPU"):
        table.choose(PRODUCT, platform="cpu", device="cpu")
    with pytest.raises(UserError, match="did you mean 'pallas'"):
        only("palas")
    with pytest.raises(UserError, match="rows = 24: must be a power of two from 16 on"):
        only("pallas", rows=24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 8}, "rows = 8: must be a power of two from 16 on"),
        ({"warps": 3}, "warps = 3: must be a power of two"),
        ({"stages": 0}, "stages = 0: must be a whole number above zero"),
        ({"depth": "64"}, "depth = '64': must be a whole number above zero"),
        ({"block": 64}, "block: no such setting; known: rows, columns"),
    ],
)
def test_settings_that_no_kernel_takes(settings, message):
    with pytest.raises(UserError, match=message):
        only("pallas", **settings)


def test_the_program_is_traced_for_the_device_that_the_mesh_names():
    assert platform_and_device()[0] == "cpu"
    with jax.sharding.use_abstract_mesh(H100):
        assert platform_and_device() == ("cuda", DEVICE)


def test_a_layer_has_six_products():
    products = layer_products(Layer(T=16, D=8, F=3, E=4, K=2), "float32")
    assert {leg for _, leg in products} == set(LEGS) and len(products) == 6
    up, down = products["gate_up", "forward"], products["down", "forward"]
    assert (up.inputs, up.outputs, up.rows) == (8, 6, 32)
    assert (down.inputs, down.outputs, down.rows) == (3, 8, 32)
    assert up.flops == 2 * 32 * 8 * 6


def test_the_description_names_everything_that_runs():
    layer = Layer(T=16384, D=2560, F=1280, E=64, K=4)
    found = describe(layer, "bfloat16", table=Table(), platform="cuda", device=DEVICE)
    assert len(found) == 7
    assert found["swiglu.backward"]["backend"] == "pallas"
    for row in found.values():
        assert row["backend"] == "pallas" and row["why"]
    json.dumps(found)


def test_the_users_table_is_found_by_variable_or_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEJAX_GROUPED_MATMUL_TABLE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_path() == tmp_path / "moejax" / "grouped_matmul.json"
    assert load_table() == Table()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table_path() == tmp_path / ".cache" / "moejax" / "grouped_matmul.json"
    named = tmp_path / "named.json"
    monkeypatch.setenv("MOEJAX_GROUPED_MATMUL_TABLE", str(named))
    with pytest.raises(UserError, match=r"named.json.*No such file.*bench --tune"):
        load_table()
    named.write_text(json.dumps({"format": 1, "entries": []}))
    assert load_table() == Table()


GOOD = {
    "device": DEVICE,
    "product": vars(PRODUCT),
    "ranked": [{"backend": "pallas", "settings": {"rows": 64}, "milliseconds": 1.5}],
}


def test_a_table_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": 1, "entries": [GOOD]}))
    (found,) = load_table(path).entries
    assert found.product == PRODUCT
    assert found.ranked == (Measured("pallas", {"rows": 64}, 1.5),)
    path.write_text(json.dumps({"format": 1, "entries": []}))
    os.utime(path, ns=(1, 1))
    assert load_table(path) == Table()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"format": 1}', "KeyError: 'entries'"),
        ('{"format": 2, "entries": []}', "format 2, and this version reads 1"),
        (json.dumps({"format": 1, "entries": [{"device": 3}]}), r"entries\[0\].device"),
        (
            json.dumps(
                {"format": 1, "entries": [{**GOOD, "product": {**vars(PRODUCT), "rows": 0}}]}
            ),
            "above zero",
        ),
    ],
)
def test_a_malformed_table_is_one_line_that_names_the_file(tmp_path, text, reason):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"table.json': cannot be read \(.*{reason}.*delete it"):
        load_table(path)
