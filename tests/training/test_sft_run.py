"""SFT as a run: from a pre-trained run's weights, on completions only, resumed, refused."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same, letters, parameters, summary, write_config
from runs import train as command

from moejax.config import ConfigError
from moejax.cost.bill import read
from moejax.data import open_dataset, train_iterator
from moejax.data.pair_files import Pairs, write_pairs
from moejax.models import Transformer
from moejax.training import restore, run_config, run_dir, start
from moejax.training.loop import Run
from moejax.training.metrics import read_metrics
from moejax.training.programs import ProgramCache
from moejax.training.train import train
from moejax.training.train import train as train_on

STEPS = 24


@pytest.fixture(scope="module")
def cache():
    return ProgramCache()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A config file of pre-training, and pairs beside it: a letter, asked for by its number."""
    file = write_config(tmp_path_factory.mktemp("config"))
    write_pairs(file.parent / "pairs.jsonl", Pairs(*letters(8)))
    return file


@pytest.fixture(scope="module")
def pretrained(file, cache, tmp_path_factory):
    """Six steps on text; checkpoints of steps 2, 4 and 6, the last one validated."""
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    settings = ["checkpoint.keep_newest=3", "data.prefetch=0"]
    train(run_config.load(str(file), settings), str(workdir), programs=cache)
    return workdir


def settings_of(file, run, *more):
    return [
        "data.source=pairs", f"data.path={file.parent / 'pairs.jsonl'}", "stage=sft",
        f"start.run={run}", f"train.steps={STEPS}", "optim.learning_rate=0.03",
        "data.prefetch=0", "checkpoint.every_steps=8", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config(file, pretrained):
    return run_config.load(str(file), settings_of(file, pretrained))


@pytest.fixture(scope="module")
def whole(config, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "sft"
    train(config, str(workdir), programs=cache)
    return workdir


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir) if "loss" in row]


def text_of(config):
    return open_dataset(config.data, seq_len=config.train.seq_len, vocab_size=260)


def test_it_starts_from_the_other_runs_weights_and_counts_completions_only(
    config, pretrained, whole
):
    """The first step's loss, by hand from the pre-trained run's logits."""
    rows = text_of(config).train
    batch = next(train_iterator(rows, batch_size=8, seed=config.seed, prefetch=0))
    assert 0 < batch["weights"].sum() < (batch["segment_ids"] > 0).sum() / 3
    _, variables = restore.load(pretrained)
    logits = jax.jit(Transformer(config.model).apply)(
        variables, *(jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "positions"))
    ).logits
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    chosen = np.take_along_axis(np.asarray(log_probs), batch["targets"][..., None], -1)[..., 0]
    wanted = -np.sum(batch["weights"] * chosen) / batch["weights"].sum()
    assert losses(whole)[0] == pytest.approx(wanted, rel=1e-4)


def test_its_loss_on_completions_falls_and_is_told_beside_baselines(config, whole):
    found, data = losses(whole), text_of(config)
    told = summary(whole)
    assert len(found) == STEPS and found[-1] < found[0] - 1.0
    assert told["val_loss"] < found[0] - 1.0
    wanted = told["val_loss"] / math.log(2) * data.validation.counted / data.validation_bytes
    assert told["val_bits_per_byte"] == pytest.approx(wanted)
    assert data.validation_bytes * 4 == data.validation.counted * 3  # three letters and a stop
    assert told["baselines"]["unigram"] > 3 and told["baselines"]["gzip"] > 0
    assert told["status"] == "completed" and read(whole)["stage"] == "sft"


def test_the_bill_is_of_every_token_that_was_computed(config, whole):
    rows = text_of(config).train
    batches = train_iterator(rows, batch_size=8, seed=config.seed, prefetch=0)
    computed = sum(int((next(batches)["segment_ids"] > 0).sum()) for _ in range(STEPS))
    assert summary(whole)["tokens"] == computed


def test_config_json_says_what_it_started_from(pretrained, whole):
    record, source = run_dir.read_record(whole), run_dir.read_record(pretrained)
    told = summary(pretrained)
    assert record["start"] == {
        "run": str(pretrained), "step": 6, "val_loss": told["val_loss"],
        "fingerprint": source["fingerprint"],
    }  # fmt: skip
    assert record["config"]["start"] == {"run": str(pretrained), "step": 0}
    assert record["fingerprint"] == run_dir.fingerprint(record)
    other = {**record, "start": {**record["start"], "step": 4}}
    assert run_dir.fingerprint(other) != record["fingerprint"]
    assert "start" not in source


def test_a_named_step_is_taken(config, pretrained, cache, tmp_path, monkeypatch, capsys):
    """What training begins with is that checkpoint's parameters and routers' state."""
    named = dataclasses.replace(config, start=run_config.StartConfig(str(pretrained), 4))
    seen = []

    def look(run):
        seen.append(jax.device_get((run.state.params, run.state.router_state, run.state.step)))
        raise RuntimeError("enough")

    monkeypatch.setattr(Run, "train", look)
    with pytest.raises(RuntimeError, match="enough"):
        train(named, str(tmp_path / "run"), programs=cache)
    assert "start       weights of step 4 of" in capsys.readouterr().err
    older = pathlib.Path(shutil.copytree(pretrained, tmp_path / "older"))
    shutil.rmtree(older / "checkpoints" / "6")
    got = jax.tree.leaves({"params": seen[0][0], "router_state": seen[0][1]})
    for a, b in zip(got, parameters(older), strict=True):
        np.testing.assert_array_equal(a, b)
    assert seen[0][2] == 0 and run_dir.read_record(tmp_path / "run")["start"]["step"] == 4


def kill(monkeypatch, step):
    """Ends the run in the step after ``step``, as a kill would."""
    real = Run._read

    def killed(run, done):
        real(run, done)
        if done is not None and done.step > step:
            for place in run.places:
                place.finalize()
            raise RuntimeError("killed")

    monkeypatch.setattr(Run, "_read", killed)


@pytest.mark.parametrize("after", [11, 3])
def test_a_killed_run_resumes_to_the_same_bits(
    config, pretrained, whole, cache, tmp_path, monkeypatch, capsys, after
):
    """After a checkpoint without the other run; before the first one from its weights again."""
    source = pathlib.Path(shutil.copytree(pretrained, tmp_path / "source"))
    own = dataclasses.replace(config, start=run_config.StartConfig(str(source)))
    with monkeypatch.context() as patch:
        kill(patch, after)
        with pytest.raises(RuntimeError, match="killed"):
            train(own, str(tmp_path / "run"), programs=cache)
    capsys.readouterr()
    if after > 8:
        shutil.rmtree(source)
    train(own, str(tmp_path / "run"), programs=cache)
    said = capsys.readouterr().err
    assert ("resuming at step 8 of 24" if after > 8 else "weights of step 6 of") in said
    assert ("start  " in said) == (after < 8)
    assert_same(tmp_path / "run", whole)
    assert losses(tmp_path / "run") == losses(whole)


def test_another_run_in_its_place_is_not_taken(config, pretrained, cache, tmp_path, monkeypatch):
    source = pathlib.Path(shutil.copytree(pretrained, tmp_path / "source"))
    own = dataclasses.replace(config, start=run_config.StartConfig(str(source)))
    with monkeypatch.context() as patch:
        kill(patch, 1)
        with pytest.raises(RuntimeError, match="killed"):
            train(own, str(tmp_path / "run"), programs=cache)
    record = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    with pytest.raises(Exception, match="holds another run than the one"):
        train(own, str(tmp_path / "run"), programs=cache)


@pytest.mark.slow
def test_a_mesh_gives_the_steps_of_one_device(config, whole, tmp_path, capsys):
    """Weights are cut over the mesh as their tokens are, and parameters are restored onto it."""
    mesh = dataclasses.replace(config.mesh, data=2, expert=2, tensor=2)
    train = dataclasses.replace(config.train, micro_batches=2)
    train_on(dataclasses.replace(config, mesh=mesh, train=train), str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "pairs, " in said and "the loss counts completions: " in said
    got = losses(tmp_path / "run")
    assert got[:3] == pytest.approx(losses(whole)[:3], rel=1e-3)
    assert got[-1] < got[0] - 1.0
    assert summary(tmp_path / "run")["tokens"] == summary(whole)["tokens"]


# Refusals: one line, exit status 2, nothing written.


def refused(file, workdir, settings, capsys):
    assert command(file, workdir, *settings) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and not workdir.exists(), line
    return line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["start.run=/nowhere"], "start.run = '/nowhere': no run is there"),
        (["start.step=3"], "start.step = 3: is no checkpoint of"),
        (["start.run=", "start.step=3"], "start.step = 3: names no checkpoint without start.run"),
        (["model.d_model=32"], "model.d_model = 32: is 16 in the run that start.run"),
        (["moe.top_k=3"], "moe.top_k = 3: is 2 in the run"),
        (["router.routed_scale=1.0"], "router.routed_scale = 1.0: is 2.5 in the run"),
        (["data.tokenizer=bpe", "data.bpe_vocab_size=258"], "data.tokenizer = 'bpe': is not the"),
        (["train.seq_len=16"], "train.seq_len = 16: 208 of 208 pairs are longer than a row"),
        (["data.path=/nowhere.jsonl"], "data.path = '/nowhere.jsonl': no such file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    file, pretrained, tmp_path, capsys, settings, message
):
    settings = settings_of(file, pretrained, f"data.cache_dir={tmp_path / 'cache'}", *settings)
    assert message in refused(file, tmp_path / "run", settings, capsys)


def test_a_line_without_a_completion_is_named(file, pretrained, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "answer": "b"}\n')
    settings = settings_of(file, pretrained, f"data.path={path}")
    line = refused(file, tmp_path / "run", settings, capsys)
    assert f"data.path = '{path}:2': has no field 'completion'" in line


def test_a_run_without_a_checkpoint_or_with_a_damaged_one(file, pretrained, tmp_path, capsys):
    source = pathlib.Path(shutil.copytree(pretrained, tmp_path / "source"))
    state = next(p for p in (source / "checkpoints" / "6").rglob("*") if p.stat().st_size > 1000
                 and p.is_file())  # fmt: skip
    state.write_bytes(b"\0" + state.read_bytes()[1:-1] + b"\xff")
    settings = settings_of(file, source)
    line = refused(file, tmp_path / "run", settings, capsys)
    assert "checkpoint of step 6 refused" in line and "start.step" in line
    shutil.rmtree(source / "checkpoints")
    line = refused(file, tmp_path / "run", settings, capsys)
    assert "start.run" in line and "the run has no checkpoint yet" in line


def test_how_a_model_is_computed_may_differ(file):
    other = run_config.load(str(file), [])
    free = ["model.loss_chunk=8", "model.remat=full", "model.dtype=bfloat16",
            "moe.dispatch=dense_loop", "moe.exchange=all_to_all", "router.sequence_loss_weight=0.1",
            "router.bias_step=0.0", "optim.learning_rate=0.5", "train.seq_len=64"]  # fmt: skip
    start._check_model(run_config.load(str(file), free), other, "run")
    with pytest.raises(ConfigError, match=r"router.score = 'softmax': is 'sigmoid'"):
        start._check_model(run_config.load(str(file), ["router.score=softmax"]), other, "run")
