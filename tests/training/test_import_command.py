"""A run from a checkpoint and a checkpoint from a run, by the command line."""

import json
import os

import jax
import jax.numpy as jnp
import pytest
import tiny
from runs import write_config

from moejax import cli
from moejax.data import tokenizers
from moejax.interop import hf
from moejax.interop.safetensors_io import open_checkpoint
from moejax.training import restore

VALUES = dict(
    model_type="qwen3_moe", vocab_size=320, hidden_size=16, num_hidden_layers=2, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, intermediate_size=24, norm_topk_prob=True, rope_theta=1000.0,
    tie_word_embeddings=False, torch_dtype="bfloat16", max_position_embeddings=64,
    architectures=["Qwen3MoeForCausalLM"], eos_token_id=0, rms_norm_eps=1e-6,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in BF16 with a tokenizer and other files, and settings for a tiny run."""
    root = tmp_path_factory.mktemp("import")
    write_config(root)
    texts = [path.read_text() for path in sorted((root / "corpus").iterdir())]
    tokenizers.save(tokenizers.train_bpe(texts, 300), root / "tokenizer")
    config = hf.config_from_hf(VALUES)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.variables(config))
    folder = root / "hf"
    hf.save(folder, config, variables)
    (folder / "config.json").write_text(json.dumps(VALUES))
    (folder / "tokenizer.json").write_text((root / "tokenizer" / "tokenizer.json").read_text())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "generation_config.json").write_text('{"top_p": 0.9}')
    (folder / "README.md").write_text("not carried")
    return folder, ["data.source=text", f"data.path={root / 'corpus'}", "train.steps=4",
                    "train.seq_len=16", "train.log_every=1"]  # fmt: skip


def run(*arguments, settings=()):
    return cli.main([*arguments, *(f"--config.{setting}" for setting in settings)])


@pytest.fixture(scope="module")
def imported(checkpoint, tmp_path_factory):
    folder, settings = checkpoint
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert run("import", f"--hf={folder}", f"--workdir={workdir}", settings=settings) == 0
    return workdir


def assert_same_tensors(got, wanted):
    got, wanted = open_checkpoint(got), open_checkpoint(wanted)
    assert got.keys() == wanted.keys()
    for name, stored in wanted.items():
        assert got[name].dtype == stored.dtype
        assert got[name].read().tobytes() == stored.read().tobytes(), name


def test_import_makes_a_run_of_masters_at_step_0(imported, checkpoint):
    config, variables = restore.load(imported)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(variables["params"])}
    assert kinds == {jnp.dtype(jnp.float32)}
    assert config.stage == "finetune" and config.train.steps == 4
    assert config.data.tokenizer == str(imported / "hf" / "tokenizer.json")
    _, source = hf.load(checkpoint[0], dtype="float32")
    tiny.assert_trees_close(variables["params"], source["params"], 0.0)
    assert os.listdir(imported / "checkpoints") == ["0"]
    assert [name for name in os.listdir(imported.parent) if name != imported.name] == []


def test_export_of_an_import_is_the_checkpoint(imported, checkpoint, tmp_path, capsys):
    folder, _ = checkpoint
    assert run("export", f"--workdir={imported}", f"--hf={tmp_path / 'out'}", "--format=json") == 0
    said = json.loads(capsys.readouterr().out)
    assert_same_tensors(tmp_path / "out", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (folder / name).read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == VALUES
    assert (
        said["files"] == sorted(os.listdir(tmp_path / "out")) and "README.md" not in said["files"]
    )


@pytest.mark.slow
def test_generate_train_inspect_and_export(imported, checkpoint, tmp_path, capsys):
    assert run("generate", f"--workdir={imported}", "--prompt=the router", "--tokens=4") == 0
    config = imported / "config.py"
    assert run("train", f"--config={config}", f"--workdir={imported}") == 0
    assert "resuming at step 0 of 4" in capsys.readouterr().err
    assert run("inspect", f"--workdir={imported}", "--batches=2") == 0
    assert run("ledger", str(imported)) == 0
    out = tmp_path / "out"
    assert run("export", f"--workdir={imported}", f"--hf={out}", "--dtype=float32") == 0
    _, trained = restore.load(imported)
    _, exported = hf.load(out)
    tiny.assert_trees_close(exported["params"], trained["params"], 0.0)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    _, before = hf.load(checkpoint[0], dtype="float32")
    moved = [
        tiny.relative_error(a, b)
        for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(before), strict=True)
    ]
    assert max(moved) > 0


@pytest.mark.slow
def test_a_run_that_was_trained_here_is_exported_with_its_tokenizer(tmp_path, capsys):
    from runs import train

    config = write_config(tmp_path / "config")
    settings = ["train.steps=1", "data.tokenizer=bpe", "data.bpe_vocab_size=257"]
    assert train(config, tmp_path / "run", *settings) == 0
    assert run("export", f"--workdir={tmp_path / 'run'}", f"--hf={tmp_path / 'out'}") == 2
    assert "embedding_multiplier = 4.0" in capsys.readouterr().err
    settings += ["model.embedding_multiplier=1.0"]
    assert train(config, tmp_path / "two", *settings) == 0
    assert run("export", f"--workdir={tmp_path / 'two'}", f"--hf={tmp_path / 'out'}") == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == "glm4_moe" and values["max_position_embeddings"] == 32
    assert (tmp_path / "out" / "tokenizer.json").is_file()


BAD_IMPORTS = {
    "another architecture": (["model.d_model=32"], "d_model = 32", "the checkpoint's is 16"),
    "another top-k": (["moe.top_k=3"], "moe.top_k = 3", "leave it out"),
    "another router": (["router={'name': 'hash'}"], "router", "leave it out"),
    "unknown field": (["train.stepz=3"], "train.stepz", "did you mean 'steps'?"),
    "missing corpus": (["data.path=/no/such/corpus"], "data.path", "/no/such/corpus"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMPORTS)
def test_a_bad_setting_is_one_line_and_writes_nothing(name, checkpoint, tmp_path, capsys):
    folder, settings = checkpoint
    more, field, remedy = BAD_IMPORTS[name]
    flags = [f"--hf={folder}", f"--workdir={tmp_path / 'run'}"]
    assert run("import", *flags, settings=[*settings, *more]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and field in line and remedy in line, line
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_without_a_tokenizer_names_the_remedy(checkpoint, tmp_path, capsys):
    folder, settings = checkpoint
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    flags = [f"--hf={bare}", f"--workdir={tmp_path / 'run'}"]
    assert run("import", *flags, settings=settings) == 2
    assert "--config.data.tokenizer=bytes" in capsys.readouterr().err
    assert run("import", *flags, settings=[*settings, "data.tokenizer=bytes"]) == 0


def test_folders_that_hold_something_are_left_alone(checkpoint, imported, tmp_path, capsys):
    folder, settings = checkpoint
    (tmp_path / "thesis.txt").write_text("my only copy")
    assert run("import", f"--hf={folder}", f"--workdir={tmp_path}", settings=settings) == 2
    assert run("export", f"--workdir={imported}", f"--hf={tmp_path}") == 2
    assert run("export", f"--workdir={tmp_path}", f"--hf={tmp_path / 'out'}") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "no run is there" in said[2]
    assert all("give a new folder" in line for line in said[:2])
    assert os.listdir(tmp_path) == ["thesis.txt"]
