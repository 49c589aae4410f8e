"""``moejax upcycle``: a run that goes on from the dense one, and every kind of bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import train, write_config

from moejax import cli
from moejax.models import Transformer
from moejax.training import restore, run_config
from moejax.training.metrics import read_metrics

# A run of the tests is an MoE model's; without its blocks it is dense.
EXPERTS = ["moe.num_experts=8", "moe.top_k=2", "moe.d_expert=16"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run of two layers of width 32, six steps."""
    folder = tmp_path_factory.mktemp("dense")
    config = write_config(folder)
    text = config.read_text().splitlines()
    kept = [line for line in text if '"moe":' not in line and '"router":' not in line]
    config.write_text("\n".join(kept) + "\n")
    assert train(config, folder / "run", "model.first_k_dense=0", "model.d_ff=32") == 0
    return folder / "run"


def upcycle(source, out, *settings, flags=()) -> int:
    overrides = [f"--config.{setting}" for setting in settings]
    return cli.main(["upcycle", f"--workdir={source}", f"--out={out}", *flags, *overrides])


@pytest.fixture(scope="module")
def upcycled(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("moe") / "run"
    assert upcycle(dense, out, *EXPERTS, "train.steps=8", flags=["--every=2"]) == 0
    return out


def logits(workdir):
    config, variables = restore.load(workdir)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16)))
    return config, jax.jit(Transformer(config.model).apply)(variables, tokens).logits


@pytest.mark.slow
def test_the_new_run_begins_as_the_dense_model(dense, upcycled):
    (_, before), (config, after) = logits(dense), logits(upcycled)
    assert tiny.relative_error(after, before) < 1e-5
    # One layer stays dense, and what the user did not name is the dense run's.
    assert config.model.layout == ((("dense",), 1), (("moe",), 1))
    assert config.train.steps == 8 and config.train.batch_size == 8
    assert config.model.moe.router.name == "deepseek_v3"
    record = json.loads((upcycled / "config.json").read_text())
    assert record["from"]["upcycled"] == str(dense)


@pytest.mark.slow
def test_training_goes_on_from_it(dense, upcycled, tmp_path, capsys):
    assert cli.main(["train", f"--config={upcycled}/config.py", f"--workdir={upcycled}"]) == 0
    losses = [row["loss"] for row in read_metrics(upcycled) if "loss" in row]
    last = [row["loss"] for row in read_metrics(dense) if "loss" in row][-1]
    assert losses[0] < last + 0.2 and len(losses) == 8
    capsys.readouterr()
    shared = [*EXPERTS, "moe.num_experts=4", "moe.num_shared_experts=1", "moe.top_k=2"]
    assert upcycle(dense, tmp_path / "b", *shared, flags=["--format=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["shards"] == 2 and result["parameters"] > result["active_parameters"]


BAD = {
    "no experts": ([], (), "moe = None"),
    "widths": ([*EXPERTS, "moe.d_expert=20"], (), "moe.d_expert = 20"),
    "top-k": ([*EXPERTS, "moe.top_k=3"], (), "moe.top_k = 3"),
    "router": ([*EXPERTS, "router.name=soft_moe", "moe.allow_leak=True"], (), "router.name"),
    "another model": ([*EXPERTS, "model.vocab_size=300"], (), "vocab_size = 300"),
    "every": (EXPERTS, ["--every=0"], "--every = 0"),
    "noise": (EXPERTS, ["--noise=-1"], "--noise = -1"),
    "no layer": (EXPERTS, ["--every=5"], "upcycle.every = 5"),
}


def record(folder, **model):
    """A run's folder of which only the config is there: all that is looked at before weights."""
    values = {"vocab_size": 260, "d_model": 16, "num_layers": 2, "d_ff": 32,
              "attention": {"num_heads": 2}}  # fmt: skip
    config = run_config.from_dict({
        "model": values, "train": {"steps": 6}, "data": {"source": "text", "path": "/nowhere"},
        **model,
    })  # fmt: skip
    content = {"config": config.to_dict(), "data": {"fingerprint": ""}, "fingerprint": ""}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return record(tmp_path_factory.mktemp("records") / "dense")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(name, untrained, tmp_path, capsys):
    settings, flags, said = BAD[name]
    assert upcycle(untrained, tmp_path / "out", *settings, flags=flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_sources_and_targets_that_do_not_do(untrained, tmp_path, tmp_path_factory, capsys):
    moe = {"moe": {"num_experts": 4, "top_k": 2, "d_expert": 8}}
    sparse = record(tmp_path_factory.mktemp("records") / "moe", **moe)

    def refused(source, out, said):
        capsys.readouterr()
        assert upcycle(source, out, *EXPERTS) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0], lines

    refused(sparse, tmp_path / "a", "already has MoE layers")
    refused(tmp_path / "nothing", tmp_path / "a", "no run is there")
    refused(untrained, untrained, "holds files")
    refused(untrained, tmp_path / "a", "/nowhere")
    assert not list(tmp_path.iterdir())
