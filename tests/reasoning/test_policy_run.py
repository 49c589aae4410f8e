"""A tiny run of reinforcement: its folder and bill, a kill and a resume, and what it refuses."""

import json
import pathlib
import shutil

import pytest
from runs import assert_same, parameters, summary
from runs import train as command

from moejax.config import load
from moejax.cost.bill import summarize
from moejax.reasoning import policy_config, policy_run, stages
from moejax.training.metrics import read_metrics
from moejax.training.run_dir import read_record

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "stage": "rl_train",
        "model": {"vocab_size": 260, "d_model": 16, "num_layers": 2, "first_k_dense": 1,
                  "attention": {"num_heads": 2}, "embedding_multiplier": 4.0},
        "moe": {"num_experts": 4, "top_k": 2, "d_expert": 8, "num_shared_experts": 1},
        "router": {"name": "deepseek_v3", "bias_step": 0.01},
        "start": {"run": START},
        "task": {"names": ("add",), "difficulties": (1,)},
        "prompt": {"template": "plain"},
        "sampling": {"max_tokens": 6},
        "reward": {"format": 0.5},
        "rl": {"group_size": 4, "kl_weight": 0.01, "reference_every": 2, "minibatches": 2,
               "routing_replay": "rollout", "truncated_is": 2.0},
        "evaluation": {"problems": 4, "samples": 2, "ks": (1, 2), "every": 3},
        "train": {"steps": 4, "batch_size": 8, "seq_len": 16, "log_every": 1},
        "optim": {"learning_rate": 0.01, "warmup_steps": 2},
        "checkpoint": {"every_steps": 1, "keep_newest": 9},
    })
"""


@pytest.fixture(scope="module")
def config(tiny_start, tmp_path_factory):
    path = tmp_path_factory.mktemp("rl") / "rl.py"
    path.write_text(CONFIG.replace("START", repr(str(tiny_start))))
    return path


@pytest.fixture(scope="module")
def whole(config):
    workdir = config.parent / "whole"
    assert command(config, workdir) == 0
    return workdir


def test_what_a_run_leaves(whole):
    found = summary(whole)
    assert (found["status"], found["step"]) == ("completed", 4)
    assert found["before"]["step"] == 0 and found["after"]["step"] == 4
    told = json.loads((whole / policy_run.EVALUATIONS).read_text())
    assert [*told] == ["0", "3", "4"]
    for entry in told.values():
        assert (entry["problems"], entry["samples"]) == (4, 2)
        low, high = entry["pass_at"]["2"]["interval"]
        assert 0 <= low <= entry["pass_at"]["2"]["mean"] <= high <= 1
    rows = [row for row in read_metrics(whole) if "reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["gap/max"] < 1e-4  # one set of weights, in sampler and trainer
        assert row["response/tokens"] <= 6
        assert row["share/rollout"] + row["share/reward"] + row["share/train"] == pytest.approx(1)
    assert read_record(whole)["start"]["step"] > 0


def test_the_bill_has_rollouts_and_updates_apart(whole):
    bill = summarize([whole])
    run, stages = bill["runs"][0], bill["total"]["by_stage"]
    assert [*stages] == ["rl_rollout", "rl_train"]
    assert run["steps"] == 4 and run["rollout_tokens"] > 0 and run["rollout_flops"] > 0
    assert stages["rl_rollout"]["tokens"] == run["rollout_tokens"]
    assert stages["rl_train"]["tokens"] == run["tokens"] > 0
    assert sum(s["dollars"] for s in stages.values()) == pytest.approx(run["dollars"])
    assert run["seconds"]["rollout"] > 0 and run["seconds"]["eval"] > 0


def test_the_updates_are_planned_and_the_plan_is_kept(whole):
    """As if all answers were as long as they may be: a bound on tokens and FLOPs, not on time."""
    run = summarize([whole])["runs"][0]
    planned, actual = run["plan"]["planned"], run["plan"]["actual"]
    recorded = policy_config.from_dict(read_record(whole)["config"])
    rows, epochs = recorded.run.train, recorded.rl.resolved().epochs
    assert planned["tokens"] == 4 * rows.batch_size * rows.seq_len * epochs
    assert 0 < actual["tokens"] <= planned["tokens"]
    assert 0 < actual["model_flops"] <= planned["model_flops"]
    assert run["plan"]["parts"]["rollout"]["device_hours"] > 0


@pytest.mark.parametrize("after", [1, 3])
def test_killed_and_resumed_it_ends_with_the_same_bits(whole, config, tmp_path, after):
    """After step 3 the reference is that of step 2, and no longer in memory."""
    workdir = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    (workdir / "summary.json").unlink()
    for step in range(after + 1, 5):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    before = read_metrics(workdir)
    assert command(config, workdir) == 0
    assert_same(workdir, whole)
    timed = ("seconds", "dollars", "share/rollout", "share/reward", "share/train", "model_flops")
    bare = lambda rows: [
        {k: v for k, v in row.items() if k not in timed and not k.startswith("time")}
        for row in rows if "reward/mean" in row
    ]  # fmt: skip
    assert bare(read_metrics(workdir)) == bare(before)
    assert json.loads((workdir / policy_run.EVALUATIONS).read_text()).keys() == {"0", "3", "4"}


def test_a_complete_run_is_left_alone_and_its_model_can_be_read(whole, config, capsys):
    before = (whole / "ledger.jsonl").read_text()
    assert command(config, whole) == 0
    assert (whole / "ledger.jsonl").read_text() == before
    assert "nothing to do" in capsys.readouterr().err
    assert parameters(whole)


def test_having_spent_its_dollars_it_is_known_to_a_pipeline(whole, config, tmp_path):
    workdir = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    found = summary(workdir)
    (workdir / "summary.json").write_text(json.dumps({**found, "status": "budget"}))
    read = lambda *changes: policy_config.from_dict(load(str(config), changes))
    assert stages._spent(workdir, read())["step"] == 4
    assert stages._spent(workdir, read("seed=3")) is None
    assert stages._spent(whole, read()) is None  # did all of its steps


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("rl.group_size=1", "rl.group_size = 1"),
        ("rl.algorithm=ppo", "rl.algorithm = 'ppo'"),
        ("rl.group_size=3", "train.batch_size = 8"),
        ("rl.minibatches=3", "rl.minibatches = 3"),
        ("start.run=/no/such/run", "start.run = '/no/such/run'"),
        ("start.run=", "start.run = ''"),
        ("start.step=77", "start.step = 77"),
        ("task.names=('sums',)", "task.names = 'sums'"),
        ("prompt.template=r2", "prompt.template = 'r2'"),
        ("sampling.top_p=0.9", "sampling.top_p = 0.9"),
        ("sampling.max_tokens=16", "train.seq_len = 16"),
        ("evaluation.problems=5000", "evaluation.problems = 5000"),
        ("reward.function=nowhere:f", "reward.function = 'nowhere:f'"),
        ("model.d_model=32", "model.d_model = 32"),
        ("rl.mystery=1", "rl.mystery = 1"),
        ("guard.action=rewind", "guard"),
        ("distill={'run': '/no/such/run'}", "distill = "),
    ],
)
def test_refused_in_one_line_and_nothing_is_written(config, tmp_path, capsys, setting, told):
    assert command(config, tmp_path / "run", setting) == 2
    err = capsys.readouterr().err.strip()
    assert told in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_start_without_a_checkpoint_is_refused(config, tiny_start, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_start, bare, ignore=shutil.ignore_patterns("checkpoints"))
    assert command(config, tmp_path / "run", f"start.run={bare}") == 2
    assert "has no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_reward_that_is_no_number_fails_the_run_and_its_bill_stands(
    config, tmp_path, capsys, monkeypatch
):
    (tmp_path / "mine.py").write_text("def f(problem, text):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    workdir = tmp_path / "run"
    settings = ("reward.function=mine:f", "evaluation.problems=2")
    assert command(config, workdir, *settings) == 1
    err = capsys.readouterr().err
    assert "reward.function = 'mine:f'" in err and "returned nan" in err
    assert summarize([workdir])["runs"][0]["status"] == "failed"
