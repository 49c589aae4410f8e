"""Shapes by name and spelled out, and the FLOPs by hand."""

import pytest

from moejax.bench.shapes import SHAPES, LayerShape, find_shape, gigaflops, layer_flops
from moejax.config import UserError


def test_flops_by_hand():
    # 3 tokens, 2 experts each: 6 rows. Gate and up, 5 x 7 each, and down, 7 x 5: 105
    # multiply-adds a row, 1,260 FLOPs in all. Backward: once more for each operand.
    shape = LayerShape("hand", T=3, D=5, F=7, E=4, K=2)
    assert layer_flops(shape, "forward") == 1260
    assert layer_flops(shape, "forward_backward") == 3 * 1260


def test_flops_are_those_of_sonicmoe():
    # Published: 8.446 ms forward and backward at this shape, 458 TFLOP/s.
    flops = layer_flops(SHAPES["sonicmoe"], "forward_backward")
    assert flops / 8.446e-3 == pytest.approx(458e12, rel=0.01)


def test_the_table_spans_what_it_says():
    experts = {shape.E for shape in SHAPES.values()}
    assert {8, 32, 128, 256} <= experts
    assert {shape.K for shape in SHAPES.values()} >= {1, 2, 4, 8}
    assert all(name == shape.name for name, shape in SHAPES.items())


def test_a_shape_spelled_out():
    shape = find_shape("T64-K2-D16-E4-F8")
    assert shape.sizes == {"T": 64, "D": 16, "F": 8, "E": 4, "K": 2}
    assert shape.mean_load == 32
    assert find_shape("fine_e32") is SHAPES["fine_e32"]


def test_sequences_cut_the_tokens_evenly():
    assert find_shape("fine_e8").sequence == 2048
    assert find_shape("T100-D1-F1-E2-K1").sequence == 100


BAD = {
    "misspelt": ("fine_e3", "did you mean 'fine_e32'?"),
    "a letter missing": ("T64-D16-F8-E4", "write each of T, D, F, E, K once"),
    "a letter twice": ("T64-T65-D16-F8-E4-K2", "once"),
    "an unknown letter": ("T64-D16-F8-E4-K2-Q3", "once"),
    "no number": ("T64-D16-F8-E4-K", "spell one out as"),
    "zero": ("T64-D16-F8-E4-K0", "--shapes.K = 0"),
    "K above E": ("T64-D16-F8-E4-K5", "K is above E"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shape_says_what_to_write(name):
    text, remedy = BAD[name]
    with pytest.raises(UserError, match="--shapes") as error:
        find_shape(text)
    assert remedy in str(error.value)


def test_flops_for_people():
    assert gigaflops(25.8e9) == "25.8 GFLOP"
    assert gigaflops(0.0) == "0 FLOP"
    assert gigaflops(1260) == "1.26 kFLOP"
