"""FP8 blocks and MXFP4 by hand-made files; the arithmetic is spelled out in NumPy."""

import json

import checkpoints
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from moejax.config import UserError
from moejax.interop import hf, quantized

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def test_fp8_with_ragged_blocks():
    # Blocks of 2 x 2 over 3 x 5: the last row of blocks is one row high, the last column one wide.
    weight = np.array([[1, 2, 3, 4, 5], [-1, 0.5, 448, 1, 2], [2, 2, 2, 2, 2]], E4M3)
    scale = np.array([[1, 10, 100], [0.5, 0.25, 3]], np.float32)
    wanted = [[1, 2, 30, 40, 500], [-1, 0.5, 4480, 10, 200], [1, 1, 0.5, 0.5, 6]]
    got = quantized.dequantize_fp8(weight, scale, (2, 2))
    assert got.dtype == BF16
    np.testing.assert_array_equal(got, np.array(wanted, BF16))


def test_mxfp4_by_hand():
    # One row of two groups. Codes 0 to 15 in pairs, the first of a pair in the low half of a byte:
    # 0x10 is (0, 0.5). The exponent byte 128 doubles, 126 halves.
    pairs = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    blocks = np.array([[[*pairs, *pairs], [*pairs, *pairs]]], np.uint8)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    scales = np.array([[128, 126]], np.uint8)
    wanted = [[2 * v for v in values * 2] + [v / 2 for v in values * 2]]
    got = quantized.dequantize_mxfp4(blocks, scales)
    assert got.dtype == BF16 and got.shape == (1, 64)
    np.testing.assert_array_equal(got, np.array(wanted, BF16))


def test_mxfp4_in_chunks_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 5, 3, 16), np.uint8)
    scales = rng.integers(120, 132, (2, 5, 3), np.uint8)
    whole = quantized.dequantize_mxfp4(blocks, scales)
    monkeypatch.setattr(quantized, "CHUNK", 1)
    np.testing.assert_array_equal(quantized.dequantize_mxfp4(blocks, scales), whole)


def quantize(weight, block):
    """Values over their block's largest, in E4M3, and the factors."""
    rows, columns = weight.shape
    scale = np.ones((-(-rows // block), -(-columns // block)), np.float32)
    stored = np.empty(weight.shape, E4M3)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scale[i, j] = np.abs(weight[part]).max() / 448
            stored[part] = (weight[part] / scale[i, j]).astype(E4M3)
    return stored, scale


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A V3 checkpoint in blocks of 4 x 4, none of whose matrices is a multiple of them."""
    folder, block = tmp_path_factory.mktemp("fp8") / "hf", 4
    values = {**checkpoints.V3, "torch_dtype": "bfloat16",
              "quantization_config": {**FP8, "weight_block_size": [block, block]}}  # fmt: skip
    checkpoints.write(folder, values)
    stored, wanted = {}, {}
    for name, array in checkpoints.tensors(folder).items():
        kept = any(part in name for part in ("norm", "embed", "head", "gate.", "eh_proj"))
        if kept or array.ndim != 2:
            kind = np.float32 if "correction_bias" in name else BF16
            stored[name] = wanted[name] = array.astype(kind)
            continue
        stored[name], scale = quantize(array, block)
        stored[name + "_scale_inv"] = scale
        spread = np.kron(scale, np.ones((block, block), np.float32))
        spread = spread[: array.shape[0], : array.shape[1]]
        wanted[name] = (stored[name].astype(np.float32) * spread).astype(BF16)
    checkpoints.write_file(folder / "model.safetensors", stored)
    return folder, wanted


def test_a_v3_checkpoint_in_fp8_comes_back_in_bf16(fp8, tmp_path):
    folder, wanted = fp8
    config, variables = hf.load(folder)
    assert config.mtp_depth == 1
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(variables["params"])}
    assert kinds == {"bfloat16"}
    said = []
    hf.save(tmp_path / "again", config, variables, like=folder, say=said.append)
    assert len(said) == 1 and "quantised (fp8)" in said[0] and "BF16" in said[0]
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    source = json.loads((folder / "config.json").read_text())
    del source["quantization_config"]
    assert values == source
    got = checkpoints.tensors(tmp_path / "again")
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes(), name
    _, again = hf.load(tmp_path / "again")
    tiny.assert_trees_close(again, variables, 0.0)


def test_quantised_tensors_without_what_they_need(fp8, tmp_path):
    source, _ = fp8
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    values = json.loads((source / "config.json").read_text())
    config = values["quantization_config"]
    stored = checkpoints.tensors(source)
    scale = stored[name + "_scale_inv"]
    cases = [
        ({}, {name + "_scale_inv": None}, f"{name} is quantised, but its .*scale_inv is missing"),
        ({}, {name + "_scale_inv": scale[:1]}, f"scales of {name} have shape"),
        ({"quant_method": "awq"}, {}, "quant_method = 'awq'.*BF16"),
        ({"weight_block_size": None}, {}, "weight_block_size = None"),
        (None, {}, "is FP8, but the config has no"),
    ]
    for i, (changes, arrays, words) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        kept = {n: a for n, a in {**stored, **arrays}.items() if a is not None}
        checkpoints.write_file(folder / "model.safetensors", kept)
        changed = None if changes is None else {**config, **changes}
        (folder / "config.json").write_text(json.dumps({**values, "quantization_config": changed}))
        with pytest.raises(UserError, match=words) as error:
            hf.load(folder)
        assert "\n" not in str(error.value)


GPT_OSS = dict(
    checkpoints.DENSE, model_type="gpt_oss", hidden_size=32, head_dim=4, intermediate_size=32,
    num_local_experts=3, num_experts_per_tok=2, sliding_window=3,
    rope_scaling={"rope_type": "default"}, torch_dtype="bfloat16",
    quantization_config={"quant_method": "mxfp4"},
)  # fmt: skip


def test_a_gpt_oss_checkpoint_in_mxfp4(tmp_path):
    """Rows of the blocks are outputs, gate and up by turns; ours have them side by side, last."""
    folder, rng = tmp_path / "hf", np.random.default_rng(0)
    checkpoints.write(folder, GPT_OSS)
    stored, wanted = {}, {}
    for name, array in checkpoints.tensors(folder).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = array.astype(BF16)
            continue
        experts, inputs, outputs = array.shape
        codes = rng.integers(0, 16, (experts, outputs, inputs))
        power = rng.integers(125, 130, (experts, outputs, inputs // 32))
        packed = codes[..., ::2] | codes[..., 1::2] << 4
        stored[name + "_blocks"] = packed.reshape(experts, outputs, -1, 16).astype(np.uint8)
        stored[name + "_scales"] = power.astype(np.uint8)
        value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes > 7, -1, 1)
        wanted[name] = value * 2.0 ** (np.repeat(power, 32, axis=-1) - 127)
    checkpoints.write_file(folder / "model.safetensors", stored)
    config, variables = hf.load(folder)
    assert config.layout == ((("moe_window",), 1), (("moe",), 1))
    for i in range(2):
        experts = variables["params"][f"segment_{i}"]["layer_0"]["moe"]["experts"]
        rows = wanted[f"model.layers.{i}.mlp.experts.gate_up_proj"]  # (E, 2F, D)
        side_by_side = np.stack([rows[:, ::2], rows[:, 1::2]], axis=1).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(np.float64(experts["gate_up"][0]), side_by_side)
        rows = wanted[f"model.layers.{i}.mlp.experts.down_proj"]  # (E, D, F)
        np.testing.assert_array_equal(np.float64(experts["down"][0]), rows.transpose(0, 2, 1))
    said = []
    hf.save(tmp_path / "again", config, variables, like=folder, say=said.append)
    assert len(said) == 1 and "mxfp4" in said[0]
    _, again = hf.load(tmp_path / "again")
    tiny.assert_trees_close(again, variables, 0.0)
