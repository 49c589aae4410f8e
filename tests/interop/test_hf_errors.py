"""Every bad checkpoint is one line that names file, tensor and remedy; nothing is written."""

import json
import os
import pathlib

import checkpoints
import numpy as np
import pytest

from moejax import cli
from moejax.config import UserError
from moejax.interop import hf

Q = "model.layers.0.self_attn.q_proj.weight"


def rewrite(folder, change):
    found = checkpoints.tensors(folder)
    change(found)
    checkpoints.write_file(folder / "model.safetensors", found)


def truncate(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)


def cut_in_header(folder):
    os.truncate(folder / "model.safetensors", 100)


def drop_tensor(folder):
    rewrite(folder, lambda found: found.pop(Q))


def quantized_somehow(folder):
    edit(folder, quantization_config="fp8")


def add_tensor(folder):
    rewrite(folder, lambda found: found.update({"model.layers.9.x.weight": np.zeros(2)}))


def wrong_shape(folder):
    rewrite(folder, lambda found: found.update({Q: np.zeros((8, 9), np.float32)}))


def integers(folder):
    rewrite(folder, lambda found: found.update({Q: np.zeros((8, 8), np.int8)}))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def nothing(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama"')


def a_list(folder):
    (folder / "config.json").write_text("[]")


def misspelt(folder):
    edit(folder, model_type="lama")


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BROKEN = {
    "truncated": (truncate, ["model.safetensors", "truncated or damaged", "again"]),
    "cut in its header": (cut_in_header, ["model.safetensors", "truncated or damaged"]),
    "missing tensor": (drop_tensor, ["model.safetensors", Q, "missing", "restore"]),
    "unexpected tensor": (add_tensor, ["model.layers.9.x.weight", "unexpected"]),
    "wrong shape": (wrong_shape, [Q, "[8, 9] instead of [8, 8]"]),
    "integers": (integers, [Q, "I8", "BF16"]),
    "quantised, no block": (quantized_somehow, ["quantization_config = 'fp8'", "block of fields"]),
    "pickle only": (pickled, ["pytorch_model.bin", "pickled", "safetensors"]),
    "no weights": (nothing, ["holds no model.safetensors"]),
    "no config": (no_config, ["config.json", "no such file"]),
    "broken config": (broken_config, ["config.json", "cannot be read"]),
    "a list for a config": (a_list, ["config.json", "no JSON object"]),
    "unknown model": (misspelt, ["model_type = 'lama'", "did you mean 'llama'?"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_line(name, tmp_path, capsys):
    breaks, words = BROKEN[name]
    checkpoints.write(tmp_path / "hf", checkpoints.DENSE)
    breaks(tmp_path / "hf")
    flags = [f"--hf={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(["import", *flags, "--config.data.tokenizer=bytes"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "Traceback" not in said.err, said.err
    for word in words:
        assert word in said.err, said.err
    assert os.listdir(tmp_path) == ["hf"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "hf"
    checkpoints.write(folder, checkpoints.DENSE, shard_bytes=1000)
    return folder


def test_shards_and_their_index(sharded, tmp_path):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    whole = checkpoints.tensors(sharded)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    again = checkpoints.write(tmp_path / "one", checkpoints.DENSE)
    _, variables = hf.load(sharded)
    checkpoints.tiny.assert_trees_close(variables, again, 0.0)


def move_to_another_shard(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    other = next(name for name in index["weight_map"].values() if name != index["weight_map"][Q])
    index["weight_map"][Q] = other
    file.write_text(json.dumps(index))


BROKEN_SHARDS = {
    "missing shard": (
        lambda folder: next(folder.glob("model-00002*")).unlink(),
        ["model-00002", "missing", "again"],
    ),
    "missing index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        ["model.safetensors.index.json", "no such file beside model-00001"],
    ),
    "an index that is wrong": (move_to_another_shard, [Q, "holds no tensor"]),
    "an index without a map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ["index.json", "weight_map"],
    ),
    "a shard outside the folder": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {Q: "../other.safetensors"}})
        ),
        ["index.json", "weight_map"],
    ),
}


@pytest.mark.parametrize("name", BROKEN_SHARDS)
def test_broken_shards_are_one_line(name, sharded, tmp_path):
    breaks, words = BROKEN_SHARDS[name]
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in sharded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    breaks(folder)
    with pytest.raises(UserError) as error:
        hf.load(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


def test_folders_that_are_none(tmp_path):
    file = tmp_path / "file"
    file.write_text("my only copy")
    for folder, reason in ((file, "is not a folder"), (tmp_path / "no", "no such folder")):
        with pytest.raises(UserError, match=reason):
            hf.load(folder)


def test_a_target_that_holds_something_is_left_alone(tmp_path):
    variables = checkpoints.write(tmp_path / "hf", checkpoints.DENSE)
    config = hf.config_from_hf(checkpoints.DENSE)
    file = tmp_path / "file"
    file.write_text("my only copy")
    before = sorted(os.listdir(tmp_path / "hf"))
    targets = {
        tmp_path / "hf": "holds files",
        file: "is a file",
        file / "out": "cannot be written",
        pathlib.Path("/proc/out"): "cannot be written",
    }
    for target, reason in targets.items():
        with pytest.raises(UserError, match=reason):
            hf.save(target, config, variables)
    assert sorted(os.listdir(tmp_path / "hf")) == before
    assert sorted(os.listdir(tmp_path)) == ["file", "hf"] and file.read_text() == "my only copy"


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    from moejax.interop import safetensors_io

    variables = checkpoints.write(tmp_path / "hf", checkpoints.DENSE)
    config = hf.config_from_hf(checkpoints.DENSE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_io.os, "pwrite", full)
    with pytest.raises(UserError, match="No space left on device"):
        hf.save(tmp_path / "out", config, variables)
    assert os.listdir(tmp_path) == ["hf"]


def test_variables_of_another_model_are_refused(tmp_path):
    variables = checkpoints.write(tmp_path / "hf", checkpoints.DENSE)
    wider = hf.config_from_hf({**checkpoints.DENSE, "intermediate_size": 7})
    with pytest.raises(UserError, match="ffn/down has shape"):
        hf.save(tmp_path / "out", wider, variables)
    with pytest.raises(UserError, match="d_ff is 6 there and 7 here"):
        hf.save(tmp_path / "out", wider, checkpoints.tiny.variables(wider), like=tmp_path / "hf")
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_family_holds_names_what_is_lost(tmp_path):
    config = checkpoints.tiny.moe_config(router="remoe", options={}, num_layers=2)
    with pytest.raises(UserError, match=r"no Hugging Face family holds this model.*router"):
        hf.save(tmp_path / "out", config, checkpoints.tiny.variables(config))
    with pytest.raises(UserError, match="family = 'gtp'"):
        hf.save(tmp_path / "out", config, {}, family="gtp")
    assert not (tmp_path / "out").exists()
