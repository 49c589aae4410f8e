"""Stages that train nothing, and several stages in order by one config."""

import dataclasses
import json
import pathlib
import shutil

import pytest
from runs import CONFIG, summary
from runs import train as command

from moejax import cli, config
from moejax.analysis.report.gather import gather
from moejax.config import ConfigError
from moejax.cost import counts
from moejax.cost.bill import summarize
from moejax.reasoning import short_stages, stages
from moejax.reasoning.rewards import Scorer
from moejax.reasoning.tasks import TASKS, split_of
from moejax.reasoning.templates import TEMPLATES
from moejax.training import run_config
from moejax.training.run_dir import read_record

ROOT = pathlib.Path(__file__).parents[2]
HEAD = CONFIG.split("def get_config")[0]
ASKED = """"task": {"names": ("add",), "difficulties": (2,)}, "prompt": {"template": "plain"},
        "sampling": {"max_tokens": 4}, "prompt_tokens": 16,"""


def write(folder, text, **names):
    """A config file of these blocks, with names put in."""
    for name, value in names.items():
        text = text.replace(name, repr(str(value)))
    path = folder / "stage.py"
    path.write_text(f"{HEAD}def get_config():\n    return ml_collections.ConfigDict({{{text}}})\n")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    path = write(folder, ASKED + '"pairs": {"count": 60, "text": True}, "seed": 3')
    assert command(path, folder / "run", "prompt.template=r1_short") == 0
    return folder


def test_pairs_by_rule(pairs):
    lines = [json.loads(line) for line in (pairs / "run/pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    documents = (pairs / "run/text.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in documents] == [
        line["prompt"] + line["completion"] for line in lines
    ]
    template = TEMPLATES["r1_short"]
    for line in lines:
        read = template.parse(line["completion"])
        assert not read.fault and read.think.endswith(read.answer)
        assert line["prompt"].startswith("User: ") and line["difficulty"] == 2
    bill = summarize([pairs / "run"])
    assert bill["runs"][0]["stage"] == "sft" and bill["runs"][0]["dollars"] > 0


def test_pairs_hold_nothing_that_is_held_out(pairs):
    task, template = TASKS["add"], TEMPLATES["r1_short"]
    made = [task.problem(3, index, 2, "sft") for index in range(60)]
    lines = [json.loads(line) for line in (pairs / "run/pairs.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [template.prompt(p.prompt) for p in made]
    assert {split_of("add", problem.key) for problem in made} == {"train"}


def test_an_evaluation_counts_what_was_asked(tiny_start, tmp_path):
    text = ASKED + '"start": {"run": START}, "evaluation": {"problems": 6, "samples": 2}'
    path = write(tmp_path, text, START=tiny_start)
    assert command(path, tmp_path / "run") == 0
    found = json.loads((tmp_path / "run/evaluations.json").read_text())["0"]
    assert len(found["correct"]) == 6 and all(len(row) == 2 for row in found["correct"])
    rate = sum(map(sum, found["correct"])) / 12
    assert found["pass_at"]["1"]["mean"] == pytest.approx(rate)
    assert summary(tmp_path / "run")["rollout_flops"] > 0
    assert read_record(tmp_path / "run")["config"]["stage"] == "eval"


def test_no_right_answer_is_no_data_set(tiny_start, tmp_path, capsys):
    text = ASKED + '"start": {"run": START}, "rejection": {"questions": 2, "batch": 8}'
    path = write(tmp_path, text, START=tiny_start)
    assert command(path, tmp_path / "run") == 1
    assert "none reached rejection.reward" in capsys.readouterr().err
    assert not (tmp_path / "run/pairs.jsonl").exists()


def test_the_shortest_right_answers_are_kept(tiny_start, tmp_path):
    """By a reward of the format alone, so that an untrained model has some."""
    text = ASKED + (
        '"start": {"run": START}, "reward": {"accuracy": 0.0, "format": 1.0},'
        '"rejection": {"questions": 6, "samples": 4, "keep": 2, "batch": 8}'
    )
    path = write(tmp_path, text, START=tiny_start)
    assert command(path, tmp_path / "run") == 0
    found = summary(tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/pairs.jsonl").read_text().splitlines()]
    assert found["pairs"] == len(lines) <= min(12, found["right"]) and found["asked"] == 24
    by_prompt = {}
    for line in lines:
        assert not TEMPLATES["plain"].parse(line["completion"]).fault
        by_prompt.setdefault(line["prompt"], []).append(line["completion"])
    assert all(len({*kept}) == len(kept) <= 2 for kept in by_prompt.values())


def test_preferences_are_right_answers_beside_wrong_ones(tiny_start, tmp_path, monkeypatch):
    """By a judge to whom an answer of even length is right."""
    judge = Scorer.score

    def score(self, problem, text, tokens):
        return dataclasses.replace(judge(self, problem, text, tokens), total=1 - len(text) % 2)

    monkeypatch.setattr(Scorer, "score", score)
    text = ASKED + (
        '"start": {"run": START}, '
        '"rejection": {"questions": 6, "samples": 8, "keep": 2, "batch": 8, "preferences": True}'
    )
    path = write(tmp_path, text, START=tiny_start)
    assert command(path, tmp_path / "run") == 0
    lines = (tmp_path / "run/preferences.jsonl").read_text().splitlines()
    preferred = [json.loads(line) for line in lines]
    assert summary(tmp_path / "run")["preferences"]["pairs"] == len(preferred) > 0
    kept = (tmp_path / "run/pairs.jsonl").read_text().splitlines()
    right = {(line["prompt"], line["completion"]) for line in map(json.loads, kept)}
    for line in preferred:
        assert (line["prompt"], line["chosen"]) in right
        assert len(line["chosen"]) % 2 == 0 and len(line["rejected"]) % 2 == 1


PIPELINE = """"pipeline": (
    {"name": "cold", "task": {"names": ("add",)}, "prompt": {"template": "plain"},
     "pairs": {"count": 40}},
    {"name": "asked", "start": {"run": START}, "task": {"names": ("add",)},
     "prompt": {"template": "plain"}, "prompt_tokens": 16, "sampling": {"max_tokens": 4},
     "reward": {"accuracy": 0.0, "format": 1.0},
     "rejection": {"questions": 6, "samples": 4, "batch": 8}},
)"""


def test_a_pipeline_runs_its_stages_once(tiny_start, tmp_path, capsys):
    path = write(tmp_path, PIPELINE, START=tiny_start)
    workdir = tmp_path / "run"
    assert command(path, workdir, "until=cold") == 0
    assert not (workdir / "asked").exists()
    assert command(path, workdir) == 0
    result = json.loads((workdir / "pipeline.json").read_text())
    assert [stage["name"] for stage in result["stages"]] == ["cold", "asked"]
    bill = summarize([workdir])
    assert result["dollars"] == pytest.approx(bill["total"]["all_in"]["dollars"])
    assert [*bill["total"]["by_stage"]] == ["sft", "rl_rollout"]
    # What was killed is done again, what is complete is not.
    (workdir / "asked/summary.json").unlink()
    kept = (workdir / "asked/pairs.jsonl").read_text()
    first = (workdir / "cold/ledger.jsonl").read_text()
    capsys.readouterr()
    assert command(path, workdir) == 0
    assert capsys.readouterr().err.count("nothing to do") == 1
    assert (workdir / "asked/pairs.jsonl").read_text() == kept
    assert (workdir / "cold/ledger.jsonl").read_text() == first
    # A stage's seconds are those of both times, as its dollars are.
    (_, asked) = json.loads((workdir / "pipeline.json").read_text())["stages"]
    once, both = (sum(part["seconds"].values()) for part in (result["stages"][1], asked))
    assert both == pytest.approx(once + sum(asked["summary"]["seconds"].values()), abs=0.01)
    assert both > once
    # Up to an earlier stage, what is known of the others stays.
    assert command(path, workdir, "until=cold") == 0
    kept = json.loads((workdir / "pipeline.json").read_text())
    assert kept["step"] == 1 and kept["stages"][1] == asked
    dollars = sum(entry["summary"]["dollars"] for entry in kept["stages"])
    assert kept["dollars"] == pytest.approx(dollars, rel=1e-3)


def test_a_pipeline_whose_stage_fails_says_so(tiny_start, tmp_path, monkeypatch, capsys):
    path = write(tmp_path, PIPELINE, START=tiny_start)
    real = short_stages.do_stage

    def fails(stage, workdir, **more):
        if workdir.endswith("asked"):
            raise config.UserError("asked: nobody answers")
        return real(stage, workdir, **more)

    monkeypatch.setattr(short_stages, "do_stage", fails)
    assert command(path, tmp_path / "run") == 2
    result = json.loads((tmp_path / "run/pipeline.json").read_text())
    assert result["status"] == "failed" and [s["name"] for s in result["stages"]] == ["cold"]
    monkeypatch.undo()
    assert command(path, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/pipeline.json").read_text())["status"] == "completed"


def test_the_start_of_the_process_is_billed_to_the_first_stage_that_runs(
    tiny_start, tmp_path, monkeypatch, capsys
):
    path = write(tmp_path, PIPELINE, START=tiny_start)
    assert command(path, tmp_path / "run", "until=cold") == 0
    real, asked = short_stages.do_stage, []

    def noted(stage, workdir, bill_process=False):
        asked.append(bill_process)
        return real(stage, workdir, bill_process=bill_process)

    monkeypatch.setattr(short_stages, "do_stage", noted)
    pipeline = stages.read_pipeline(config.load(str(path)))
    stages.run_pipeline(pipeline, str(tmp_path / "run"), bill_process=True)
    assert asked == [True, True]  # of which the first had nothing to do


def test_a_pipeline_runs_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.together, "count", lambda: 2)
    pipeline = stages.read_pipeline({"pipeline": (COLD,)})
    with pytest.raises(ConfigError, match="processes = 2: a pipeline runs in one process"):
        stages.run_pipeline(pipeline, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_pipeline_looks_for_no_devices_before_its_stages_do(tmp_path, monkeypatch):
    def looked(*_):
        raise AssertionError("devices were looked for before the host had threads for them")

    for name in ("process_count", "devices", "device_count", "default_backend"):
        monkeypatch.setattr(f"jax.{name}", looked)

    def begun(*_, **__):
        raise ConfigError("stage", 0, "begun")

    monkeypatch.setattr(short_stages, "do_stage", begun)
    with pytest.raises(ConfigError, match="begun"):
        stages.run_pipeline(stages.read_pipeline({"pipeline": (COLD,)}), str(tmp_path / "run"))


def test_a_pipelines_seed_is_added_to_every_stages():
    read = stages.read_pipeline({"pipeline": (COLD, {**COLD, "name": "b", "seed": 3}), "seed": 4})
    assert [blocks["seed"] for _, blocks in read.stages] == [4, 7]


def test_a_stage_is_referred_to_from_within_a_list():
    parts = ({"source": "stdlib"}, {"source": "text", "path": "@cold/text.jsonl"})
    found = stages._resolved({"data": {"mixture": parts}}, pathlib.Path("run"), ["cold"])
    assert found["data"]["mixture"][1]["path"] == "run/cold/text.jsonl"


def test_a_stage_that_is_none_is_not_the_last():
    stage = lambda name: {**COLD, "name": name}
    values = {"pipeline": (stage("a"), stage("b"))}
    assert stages.read_pipeline(values).until == "b"
    with pytest.raises(config.ConfigError, match="until = 'c': is no stage; there are: a, b"):
        stages.read_pipeline({**values, "until": "c"})


SPENDING = """"pipeline": (
    {"name": "cold", "task": {"names": ("add",)}, "prompt": {"template": "plain"},
     "pairs": {"count": 40}},
    {"name": "paid", "task": {"names": ("add",)}, "prompt": {"template": "plain"},
     "pairs": {"count": 40}},
    {"name": "more", "start": {"run": START}, **OTHERS,
     "data": {"source": "pairs", "path": "@cold/pairs.jsonl", "prefetch": 0},
     "train": {"steps": 100000, "batch_size": 4, "seq_len": 32},
     "spend": {"as": "paid", "less": ["cold"]}},
    {"name": "last", "task": {"names": ("add",)}, "prompt": {"template": "plain"},
     "pairs": {"count": 4}},
)"""


def test_a_stage_spends_what_another_cost(tiny_start, tmp_path, monkeypatch, capsys):
    """It is done when that is spent, is not begun again, and the stages after it run."""
    recorded = read_record(tiny_start)["config"]
    blocks = {name: recorded[name] for name in ("model", "moe", "router", "optim")}
    blocks["model"] = {**blocks["model"], "dtype": "auto"}  # what a config that is silent has
    path = write(tmp_path, SPENDING.replace("**OTHERS", f"**{blocks!r}"), START=tiny_start)
    real = stages.Spend.dollars
    asked = []

    def dollars(self, cost):
        asked.append((self, cost))
        return real(self, {"cold": 1e-4, "paid": 3e-4})

    monkeypatch.setattr(stages.Spend, "dollars", dollars)
    workdir = tmp_path / "run"
    assert command(path, workdir) == 0
    assert asked[0][0] == stages.Spend("paid", ("cold",)) and {"cold", "paid"} <= asked[0][1].keys()
    result = json.loads((workdir / "pipeline.json").read_text())
    assert [s["summary"]["status"] for s in result["stages"]] == [
        "completed", "completed", "budget", "completed",
    ]  # fmt: skip
    assert result["status"] == "completed"
    spent = summary(workdir / "more")
    assert spent["dollars"] >= 2e-4 and spent["step"] < 100000
    before = (workdir / "more/ledger.jsonl").read_text()
    assert command(path, workdir) == 0
    assert (workdir / "more/ledger.jsonl").read_text() == before


def test_nothing_left_to_spend():
    with pytest.raises(config.UserError, match=r"nothing of the .* is left after cold"):
        stages.Spend("paid", ("cold",)).dollars({"paid": 1.0, "cold": 2.0})


def test_a_pipeline_in_a_folder_of_something_else_is_refused(tiny_start, tmp_path, capsys):
    path = write(tmp_path, PIPELINE, START=tiny_start)
    shutil.copytree(tiny_start, tmp_path / "run")
    assert command(path, tmp_path / "run") == 2
    assert "no stage's" in capsys.readouterr().err


COLD = {"name": "cold", "task": {"names": ("add",)}, "pairs": {"count": 4}}


@pytest.mark.parametrize(
    ("blocks", "field"),
    [
        ({"pipeline": ()}, "pipeline"),
        ({"pipeline": (COLD, COLD)}, "pipeline.1.name"),
        ({"pipeline": ({**COLD, "name": "../up"},)}, "pipeline.0.name"),
        ({"pipeline": (COLD,), "seed": -1}, "seed"),
        ({"pipeline": (COLD,), "model": {}}, "model"),
        ({"pipeline": ({**COLD, "seed": "x"},), "seed": 1}, "pipeline.0 (cold): seed"),
        ({"pipeline": (COLD, {**COLD, "name": "b", "spend": {"as": "cold"}})}, "pipeline.1.spend"),
        ({"pipeline": (COLD, {**COLD, "name": "b", "spend": {"as": "warm"}})}, "pipeline.1.spend"),
        ({"pipeline": (COLD, {**COLD, "name": "b", "spend": "cold"})}, "pipeline.1.spend"),
        ({"pipeline": (COLD, {**COLD, "name": "b", "spend": {"as": "cold", "less": "b"}})},
         "pipeline.1.spend.less"),
        ({"pipeline": (COLD, {"name": "b", "data": {"path": "@warm"}, "pairs": {}})},
         "pipeline.1 (b): reference"),
        ({"pipeline": ({**COLD, "pairs": {"count": 0}},)}, "pipeline.0 (cold): pairs.count"),
        ({"pipeline": ({**COLD, "rejection": {}},)}, "pipeline.0 (cold): stage"),
        ({"pipeline": ({"name": "a", "evaluation": {}},)}, "pipeline.0 (a): start.run"),
    ],
)  # fmt: skip
def test_a_pipeline_that_cannot_run_is_refused_before_its_first_stage(blocks, field):
    with pytest.raises(ConfigError) as refused:
        stages.read_pipeline(blocks)
    assert refused.value.field.startswith(field)


@pytest.mark.parametrize("name", ["small", "controls", "zero", "pipeline"])
def test_packaged_pipelines_can_be_read(name):
    """And their docstrings give the command."""
    path = ROOT / f"experiments/r1/{name}.py"
    read = stages.read_pipeline(config.load(str(path), ["seed=1"]))
    assert f"moejax train --config=experiments/r1/{name}.py" in path.read_text()
    assert all(blocks.get("seed", 0) >= 1 for _, blocks in read.stages)
    for spend in read.spends.values():
        assert spend.like in ("rl", "dense_rl")


@pytest.mark.slow
def test_a_part_of_the_small_pipeline(tmp_path):
    """As it is shipped, with fewer pairs, steps and questions: reinforced, and not beyond."""
    changes = (
        "until=rl", "pipeline[0].pairs.count=400", "pipeline[1].train.steps=3",
        "pipeline[2].train.steps=2", "pipeline[2].train.batch_size=16",
        "pipeline[2].evaluation.problems=4", "pipeline[2].evaluation.samples=2",
    )  # fmt: skip
    assert command(ROOT / "experiments/r1/small.py", tmp_path / "run", *changes) == 0
    result = json.loads((tmp_path / "run/pipeline.json").read_text())
    cold, rl = (entry["summary"] for entry in result["stages"][1:])
    assert len(result["stages"]) == 3 and rl["status"] == "completed"
    assert cold["step"] == 3 and rl["step"] == 2
    assert rl["before"]["problems"] == rl["after"]["problems"] == 4
    assert [*result["by_stage"]] == ["sft", "rl_rollout", "rl_train"]


def test_the_small_pipelines_dense_model_has_the_size_of_its_teacher():
    pipeline = stages.read_pipeline(config.load(str(ROOT / "experiments/r1/small.py")))
    assert [name for name, _ in pipeline.stages] == [
        "cold_pairs", "cold_start", "rl", "own_answers", "distilled", "distilled_asked",
    ]  # fmt: skip
    active = []
    for name in ("cold_start", "distilled"):
        blocks = dict(pipeline.stages)[name] | {"data": {}}
        counted = counts.count(run_config.from_dict(blocks).model, 256)
        active.append(counted.params.active.no_embedding)
    assert active[1] == pytest.approx(active[0], rel=0.02)


def test_the_kind_of_a_config():
    assert stages.stage_of({"model": {}, "train": {}}) is None
    for kind in ("pairs", "rejection", "evaluation"):
        assert stages.stage_of({kind: {}}).train is short_stages.do_stage
    assert stages.stage_of({"rl": {}, "evaluation": {}}).train is not short_stages.do_stage


def test_other_commands_say_what_a_stage_is_not(pairs, tmp_path, capsys):
    for command_line in (
        ["plan", f"--config={pairs / 'stage.py'}"],
        ["report", str(pairs / "run"), f"--output={tmp_path / 'report.html'}"],
    ):
        assert cli.main(command_line) == 2
    plan, report = capsys.readouterr().err.strip().splitlines()[-2:]
    assert "moejax train alone" in plan
    assert "trained no model" in report and not (tmp_path / "report.html").exists()


def test_a_report_on_a_folder_of_stages_shows_those_with_models(pairs, tiny_start, tmp_path):
    shutil.copytree(pairs / "run", tmp_path / "runs/cold")
    shutil.copytree(tiny_start, tmp_path / "runs/base")
    subject = gather([str(tmp_path / "runs")])
    assert [run.name for run in subject.runs] == ["base"]
    assert "cold" in subject.notes[0] and len(subject.bill["runs"]) == 2
