"""Recorded pipelines as tables and figures: by hand, and against the bill of DeepSeek."""

import json
import pathlib
import re

import pytest

from moejax.analysis import r1_runs
from moejax.config import UserError

RECORDS = pathlib.Path(__file__).parents[2] / "experiments/results/r1"
SECONDS = {"startup": 1.0, "compile": 2.0, "data_wait": 0.0, "train": 30.0, "rollout": 0.0,
           "eval": 0.0, "checkpoint": 0.0, "other": 0.0}  # fmt: skip
WAYS = ("rl", "own")


def asked(rate, said="<think>1</think><answer>2</answer>", right=True):
    one = {"mean": rate, "interval": [rate - 0.05, rate + 0.05]}
    shown = [{"prompt": "1+1=", "answer": "2", "said": said, "right": right}]
    return {
        "status": "completed", "pass_at": {"1": one}, "formed": 0.99, "shown": shown,
        "dollars": 1e-4, "seconds": SECONDS | {"train": 0.0, "eval": 5.0},
    }  # fmt: skip


def write(folder, rates):
    """A pipeline whose models have these rates, its record as a run leaves it."""
    trained = {"status": "completed", "step": 350, "val_loss": 0.0124, "dollars": 0.002,
               "seconds": SECONDS}  # fmt: skip
    reinforced = {
        **trained, "val_loss": None, "seconds": SECONDS | {"rollout": 20.0}, "reward_seconds": 2.0,
        "before": asked(0.25), "after": asked(0.5), "dollars": 0.006,
    }  # fmt: skip
    answers = {"asked": 8000, "right": 3803, "pairs": 1695, "dollars": 0.001, "seconds": SECONDS}
    stages = {"cold": trained, "rl": reinforced, "answers": answers, "own": trained}
    stages |= {f"{name}_asked": asked(rate) for name, rate in rates.items()}
    # The cold start was killed once: all of its processes took ten seconds more than the last.
    longer = {"cold": {**SECONDS, "startup": 11.0}}
    entries = [
        {"name": n, "summary": s, "seconds": longer.get(n, s["seconds"])} for n, s in stages.items()
    ]
    folder.mkdir()
    (folder / "pipeline.json").write_text(json.dumps({"stages": entries}))


def write_metrics(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.fixture
def runs(tmp_path):
    """Reinforcement adds 10, 12 and 14 points, the own answers nothing on average."""
    starts = (0.40, 0.50, 0.45)
    gains = {"rl": (0.10, 0.12, 0.14), "own": (0.02, -0.02, 0.0)}
    for seed, start in enumerate(starts):
        rates = {"cold": start} | {name: start + gain[seed] for name, gain in gains.items()}
        write(tmp_path / f"seed{seed}", rates)
    return r1_runs.read_seeds(tmp_path)


def test_a_stage_says_what_it_came_to(runs):
    lines = r1_runs.stage_table(runs[0]).splitlines()
    wanted = {
        "cold": r"43\.0 s +- +30\.0 s +\$0\.002  350 steps, held-out loss 0\.0124",
        "rl": r"53\.0 s +20\.0 s +30\.0 s +\$0\.006  pass@1 0\.250 \(0\.200 to 0\.300\) -> 0\.500",
        "answers": r".* 3,803 of 8,000 answers right, 1,695 kept",
        "rl_asked": r"8\.0 s +- +- +\$0\.0001  pass@1 0\.500 .* 99 % in form",
        "all": r"3 min 06 s +\$0\.011",
    }
    for name, rest in wanted.items():
        (line,) = (line for line in lines if line.split()[0] == name)
        assert re.match(rf"{name} +{rest}", line), line


def test_differences_are_gains_over_seeds(runs):
    found = r1_runs.differences(runs, WAYS, "cold")
    assert found["rl"].mean == pytest.approx(-0.12) and found["rl"].pairs == 3
    assert found["rl"].verdict == "better" and found["own"].verdict == "cannot tell"
    table = r1_runs.ways_table(runs, WAYS, "cold")
    assert re.search(
        r"rl +0\.500 +0\.620 +0\.590 +\$0\.006 +\+12\.0 \(\+.* to \+.*\) +better", table
    )
    assert re.search(r"cold +0\.400 +0\.500 +0\.450 +\$0\.002$", table, re.M)


def test_a_step_s_time_adds_up(runs):
    # Of 50 s, judging took 2 of the 20 of rollouts.
    assert r1_runs.step_shares(runs[0], ["rl"]).endswith("   36.0 %    4.0 %   60.0 %")


def test_answers_side_by_side(runs):
    text = r1_runs.said(runs[0], ["cold", "rl"], 1)
    assert text.startswith("1+1=  (right: 2)") and text.count("right  '<think>") == 2


def test_beside_deepseeks_bill(runs):
    kinds = {"pre-training": ["cold"], "R1": ["rl"], "tests": ["cold_asked"]}
    text = r1_runs.beside_deepseek(runs[0], kinds)
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert re.search(r"\$82,000 +1\.4 % +\$0\.006 +53\.1 %", rows["R1"])
    assert re.search(r"\$10,000 +0\.2 % +- +-$", rows["SFT data"])
    assert re.search(r"tests +- +- +\$0\.0001 +0\.9 %", rows["tests"])
    # Answers, their training, and two models asked.
    assert re.search(r"all else +- +- +\$0\.0032 +28\.3 %", rows["all else"])
    assert "$5,870,000" in rows["sum"] and "$0.011" in rows["sum"]


def test_figures_show_what_was_measured(runs, tmp_path):
    folder = tmp_path / "seed0"
    steps = [{"step": n, "reward/accuracy": n / 10, "entropy": 1.0, "response/tokens": 5.0}
             for n in (1, 2)]  # fmt: skip
    write_metrics(folder / "rl", [{"step": 0, "eval/pass_at_1": 0.1}, *steps])
    write_metrics(folder / "cold", [{"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 3.0}])
    write_metrics(folder / "own", [{"step": 1, "loss": 2.0}])
    axes = r1_runs.plot_reinforced(folder, "rl").axes
    assert axes[0].lines[0].get_ydata().tolist() == [0.1, 0.2]
    assert axes[0].lines[1].get_xydata().tolist() == [[0, 0.1]]
    assert len(r1_runs.plot_supervised(folder, ["cold", "own"]).axes[1].lines) == 1
    drawn = r1_runs.plot_supervised(folder, ["cold"]).axes[0].lines
    assert [line.get_ydata().tolist() for line in drawn] == [[2.0], [3.0]]
    (axes,) = r1_runs.plot_ways(runs, WAYS, "cold").axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert len(points) == 9
    assert sorted(line.get_xdata()[0] for line in points)[-1] == pytest.approx(0.62)
    (axes,) = r1_runs.plot_dollars(runs[0]).axes
    widths = sum(bar.get_width() for bar in axes.patches)
    assert widths == pytest.approx(sum(found["dollars"] for found in runs[0].values()))


@pytest.mark.parametrize("text", ["", "{}", '{"stages": [1]}', "no JSON"])
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "pipeline.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        r1_runs.read(tmp_path)


def test_what_is_not_there_is_said(runs, tmp_path):
    with pytest.raises(UserError, match="no pipeline is recorded there"):
        r1_runs.read(tmp_path / "none")
    with pytest.raises(UserError, match="has no folders seed0"):
        r1_runs.read_seeds(tmp_path / "seed0")
    with pytest.raises(UserError, match="no such file"):
        r1_runs.metrics(tmp_path / "seed0", "dpo")
    (tmp_path / "seeds").mkdir()  # is no seed's
    assert len(r1_runs.read_seeds(tmp_path)) == 3
    for missing in (
        lambda: r1_runs.pass_at_1(runs[0], "dpo"),
        lambda: r1_runs.said(runs[0], ["dpo"]),
        lambda: r1_runs.step_shares(runs[0], ["dpo"]),
        lambda: r1_runs.plot_ways(runs, ["dpo"], "cold"),
        lambda: r1_runs.beside_deepseek(runs[0], {"R1": ["dpo"]}),
    ):
        with pytest.raises(UserError, match=r"dpo.*: is no stage of this pipeline; known: cold, "):
            missing()
    with pytest.raises(UserError, match="two seeds"):
        r1_runs.ways_table(runs[:1], WAYS, "cold")


def test_every_record_can_be_read():
    folders = sorted(path.parent for path in RECORDS.rglob("pipeline.json"))
    assert {"small", "later", "zero", "controls", "pipeline"} <= {
        part for folder in folders for part in folder.relative_to(RECORDS).parts
    }
    for folder in folders:
        stages = r1_runs.read(folder)
        assert len(r1_runs.stage_table(stages).splitlines()) == len(stages) + 2
