"""Runs that learn from a second model: a teacher's distributions, preferences against a start."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same, letters, summary, write_config
from runs import train as command
from test_sft_run import kill

from moejax import cli
from moejax.cost import counts
from moejax.cost.bill import read
from moejax.data.pair_files import Pairs, write_pairs
from moejax.models import Transformer
from moejax.training import restore, run_config, run_dir
from moejax.training.metrics import read_metrics
from moejax.training.programs import ProgramCache
from moejax.training.train import train

STEPS = 8


@pytest.fixture(scope="module")
def cache():
    return ProgramCache()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A config file of pre-training, with pairs and preferences beside it."""
    file = write_config(tmp_path_factory.mktemp("config"))
    prompts, answers = letters(4)
    write_pairs(file.parent / "pairs.jsonl", Pairs(prompts, answers))
    lines = [
        json.dumps({"prompt": prompt, "chosen": answer, "rejected": answer.upper()[:2]})
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    (file.parent / "preferences.jsonl").write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def teacher(file, cache, tmp_path_factory):
    """Six steps on text."""
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    train(run_config.load(str(file), ["data.prefetch=0"]), str(workdir), programs=cache)
    return workdir


def settings_of(file, source, *more):
    return [
        f"data.source={source}", f"data.path={file.parent / source}.jsonl", "data.prefetch=0",
        f"train.steps={STEPS}", "optim.learning_rate=0.02", "checkpoint.every_steps=4",
        "train.seq_len=48", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def distilling(file, teacher):
    return settings_of(
        file, "pairs", "moe.num_experts=3", f"distill.run={teacher}",
        "stage=distill",
    )  # fmt: skip


@pytest.fixture(scope="module")
def preferring(file, teacher):
    return settings_of(
        file, "preferences", f"start.run={teacher}", "preferences.beta=1.0",
        "router.sequence_loss_weight=0.0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def distilled(file, distilling, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "distilled"
    train(run_config.load(str(file), distilling), str(workdir), programs=cache)
    return workdir


@pytest.fixture(scope="module")
def preferred(file, preferring, cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "preferred"
    train(run_config.load(str(file), preferring), str(workdir), programs=cache)
    return workdir


def told(workdir, name):
    return [row[name] for row in read_metrics(workdir) if name in row]


def test_a_student_comes_closer_to_its_teacher(distilled):
    found = told(distilled, "distill/divergence")
    assert len(found) == STEPS and found[-1] < 0.7 * found[0]
    assert summary(distilled)["status"] == "completed"


def test_the_teacher_is_on_the_bill_and_in_the_record(file, distilling, teacher, distilled):
    """A token costs the student's training and the teacher's forward pass."""
    config = run_config.load(str(file), distilling)
    other = run_config.load(str(file), [])
    length = config.train.seq_len
    each = (
        counts.count(config.model, length).flops_per_token.train
        + counts.count(other.model, length).flops_per_token.forward
    )
    ended = summary(distilled)
    assert ended["model_flops"] == pytest.approx(ended["tokens"] * each)
    record = run_dir.read_record(distilled)
    source = run_dir.read_record(teacher)
    assert record["distill"]["run"] == str(teacher)
    assert record["distill"]["fingerprint"] == source["fingerprint"]
    assert record["fingerprint"] == run_dir.fingerprint(record)
    assert "distill" not in source and "distill" not in source["config"]


def test_preferences_grow(preferred):
    """From none at all: at first the policy is its reference."""
    assert told(preferred, "loss")[0] == pytest.approx(np.log(2), rel=1e-4)
    assert told(preferred, "preferences/reward/margin")[0] == pytest.approx(0, abs=1e-5)
    assert told(preferred, "loss")[-1] < 0.5
    assert told(preferred, "preferences/accuracy")[-1] > 0.9
    ended = summary(preferred)
    assert ended["status"] == "completed" and ended["val_bits_per_byte"] > 0


def test_a_preferred_response_gains_on_the_other(file, preferring, teacher, preferred):
    """By both models' log-probabilities of a prompt in training, from whole logits."""
    config = run_config.load(str(file), preferring)
    apply = jax.jit(Transformer(config.model).apply)

    def score(variables, said):
        ids = [256, *b"letter 3 of 1:", *said, 256]
        tokens, targets = jnp.array([ids[:-1]]), jnp.array(ids[1:])
        found = jax.nn.log_softmax(apply(variables, tokens).logits[0])
        return float(found[jnp.arange(len(targets)), targets][-len(said) - 1 :].sum())

    margins = []
    for run in (teacher, preferred):
        _, variables = restore.load(run)
        margins.append(score(variables, b"ddd") - score(variables, b"DD"))
    assert margins[1] > margins[0] + 1


@pytest.mark.parametrize("kind", ["distilling", "preferring"])
def test_a_killed_run_resumes_to_the_same_bits(
    request, file, kind, cache, tmp_path, monkeypatch, capsys
):
    settings = request.getfixturevalue(kind)
    whole = request.getfixturevalue({"distilling": "distilled", "preferring": "preferred"}[kind])
    config = run_config.load(str(file), settings)
    with monkeypatch.context() as patch:
        kill(patch, 5)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, str(tmp_path / "run"), programs=cache)
    train(config, str(tmp_path / "run"), programs=cache)
    assert "resuming at step 4 of 8" in capsys.readouterr().err
    assert_same(tmp_path / "run", whole)


def test_a_teacher_that_changed_is_not_taken(
    file, distilling, teacher, cache, tmp_path, monkeypatch, capsys
):
    """One line, exit status 2, and the folder as it was."""
    source = tmp_path / "teacher"
    shutil.copytree(teacher, source)
    config = run_config.load(str(file), [*distilling, f"distill.run={source}"])
    with monkeypatch.context() as patch:
        kill(patch, 5)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, str(tmp_path / "run"), programs=cache)
    record = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert command(file, tmp_path / "run", *distilling, f"distill.run={source}") == 2
    line = capsys.readouterr().err.strip()
    assert "distill.run = " in line and "holds another run than the one" in line
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_the_fingerprint_is_of_the_teacher_too(distilled):
    record = run_dir.read_record(distilled)
    for field, other in (("fingerprint", "0" * 64), ("step", 2)):
        changed = {**record, "distill": {**record["distill"], field: other}}
        assert run_dir.fingerprint(changed) != record["fingerprint"]


def test_a_plan_beforehand_is_of_both_models(file, distilling, distilled, capsys):
    config = run_config.load(str(file), distilling)
    flags = [f"--config.{setting}" for setting in distilling]
    assert cli.main(["plan", f"--config={file}", *flags, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    other, length = run_config.load(str(file), []).model, config.train.seq_len
    more = counts.count(other, length).flops_per_token.forward
    own = counts.count(config.model, length).flops_per_token.train
    assert found["more_flops_per_token"] == pytest.approx(more)
    assert found["train_flops"] == pytest.approx(found["tokens"] * (own + more))
    assert found["memory_parts"]["second model"] == 4 * counts.count(other, length).params.total
    ledger = read(distilled)["plan"]["planned"]
    assert ledger["model_flops"] / ledger["tokens"] == pytest.approx(own + more)


def test_a_dense_student_can_be_upcycled_and_its_teacher_is_forgotten(
    file, teacher, tmp_path, capsys
):
    dense = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("tiny_config", {str(file)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def get_config():
    config = module.get_config()
    del config["moe"], config["router"]
    config.model.first_k_dense = 0
    config.distill = {{"run": {str(teacher)!r}}}
    config.train.steps = 1
    return config
"""
    path = tmp_path / "dense.py"
    path.write_text(dense)
    assert command(path, tmp_path / "dense") == 0
    flags = ["--config.moe.num_experts=2", "--config.moe.top_k=2", "--config.moe.d_expert=32"]
    made = tmp_path / "moe"
    status = cli.main(
        ["upcycle", f"--workdir={tmp_path / 'dense'}", f"--out={made}", *flags]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    assert "distill" not in run_dir.read_record(made)["config"]
    found = restore.load(made)[0]
    assert found.distill is None and found.start.run == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distilling", "preferring"])
def test_a_mesh_gives_the_steps_of_one_device(request, file, kind, tmp_path):
    whole = request.getfixturevalue({"distilling": "distilled", "preferring": "preferred"}[kind])
    config = run_config.load(str(file), request.getfixturevalue(kind))
    mesh = dataclasses.replace(config.mesh, data=2, fsdp=2, tensor=2)
    split = dataclasses.replace(config.train, micro_batches=2)
    train(dataclasses.replace(config, mesh=mesh, train=split), str(tmp_path / "run"))
    assert told(tmp_path / "run", "loss")[:3] == pytest.approx(told(whole, "loss")[:3], rel=2e-3)


# Refusals: one line, exit status 2, nothing written.


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("distilling", ["distill.run=/nowhere"], "distill.run = '/nowhere': no run is there"),
        ("distilling", ["distill.run="], "distill.run = '': names no teacher"),
        ("distilling", ["distill.step=5"], "distill.step = 5: is no checkpoint of"),
        ("distilling", ["distill.hard=1.0"], "distill.hard = 1.0: must be below 1"),
        ("distilling", ["distill.divergence=both"], "distill.divergence = 'both'"),
        ("distilling", ["model.vocab_size=300"], "model.vocab_size = 300: is 260 in the run"),
        ("distilling", ["data.tokenizer=bpe", "data.bpe_vocab_size=258"], "'bpe': is not the one"),
        ("preferring", ["start.run="], "start.run = '': preferences are learned against"),
        ("preferring", ["data.source=pairs"], "data.source = 'pairs': is not 'preferences'"),
        ("preferring", ["model.d_model=32"], "model.d_model = 32: is 16 in the run"),
        ("preferring", ["train.seq_len=30"], "train.seq_len = 30: 104 of 104 pairs are longer"),
        ("preferring", ["preferences.beta=0"], "preferences.beta = 0"),
        ("distilling", ["model.mtp_depth=1"], "model.mtp_depth = 1: has modules that neither"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    request, file, tmp_path, capsys, kind, settings, message
):
    workdir, given = tmp_path / "run", request.getfixturevalue(kind)
    capsys.readouterr()  # of the runs that the settings name
    assert command(file, workdir, *given, *settings) == 2
    line = capsys.readouterr().err.strip()
    assert message in line and "\n" not in line and not workdir.exists(), line


def test_preferences_without_their_block(file, tmp_path, capsys):
    assert command(file, tmp_path / "run", *settings_of(file, "preferences")) == 2
    assert "data.source = 'preferences': holds pairs of responses" in capsys.readouterr().err
