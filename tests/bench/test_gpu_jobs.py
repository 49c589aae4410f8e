"""The list of GPU jobs: its dry run, and a run whose interpreter only pretends."""

import os
import pathlib
import subprocess

import pytest

from moejax import cli
from moejax.bench import shapes
from moejax.bench.models import MODELS
from moejax.moe.routers import SoftmaxTopKOptions
from moejax.training import run_config

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "launch" / "gpu_jobs.sh"


def run(*arguments, folder, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, cwd=folder,
        env={**os.environ, **environment}, timeout=60,
    )  # fmt: skip


def test_the_dry_run_lists_the_jobs_in_order_and_writes_nothing(tmp_path):
    said = run("--dry-run", "out", folder=tmp_path)
    assert said.returncode == 0 and list(tmp_path.iterdir()) == []
    names = [line.split()[0].split("_", 1)[1] for line in said.stdout.splitlines()]
    assert names[:5] == ["card", "packages", "ceilings", "agreement", "tune"]
    moe = [f"moe_{n}" for n in ("sonicmoe", "olmoe", "qwen3_30b", "deepseek_v2_lite")]
    assert names[5:10] == [*moe, "attention"]
    large = [name for name, shape in MODELS.items() if shape.needs_gpu]
    assert names[10:13] == [f"model_{name}" for name in large]
    assert names[-5:-2] == [f"transformers_{name}" for name in large]
    assert names[-2:] == ["ablate_dense_vs_moe", "ablate_router_shootout"]
    assert [n.removeprefix("moe_") for n in moe] == [
        name for name, shape in shapes.SHAPES.items() if shape.needs_gpu
    ]


def test_the_commands_are_ones_that_moejax_knows(tmp_path):
    unset = {"XLA_PYTHON_CLIENT_ALLOCATOR": "", "XLA_PYTHON_CLIENT_MEM_FRACTION": ""}
    said = run("--dry-run", "out", folder=tmp_path, **unset)
    commands = [line.split(": ", 1)[1].split() for line in said.stdout.splitlines()]
    benches = [words[words.index("bench") :] for words in commands if "bench" in words]
    assert len(benches) == 17
    training = [words for words in commands if "train" in words]
    assert len(training) == 3
    for words in training:
        assert "XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async" in words
        assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in words
    for words in benches:
        parsed = cli.parser_of_commands().parse_args(words)
        assert parsed.command == "bench" and parsed.format == "json"
    ablations = [words[words.index("ablate") :] for words in commands if "ablate" in words]
    for words in ablations:
        parsed = cli.parser_of_commands().parse_args(words)
        assert parsed.command == "ablate" and (SCRIPT.parents[2] / parsed.config).is_file()
    assert len(ablations) == 2


def test_a_job_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    python = tmp_path / "python"
    # Writes a result, but for attention, which fails; the summary finds no results anywhere.
    python.write_text(
        '#!/bin/sh\ncase "$*" in *attention*) echo broken >&2; exit 3;; esac\necho "{}"\n'
    )
    python.chmod(0o755)
    said = run("out", folder=tmp_path, PYTHON=str(python))
    assert said.returncode == 1
    lines = (tmp_path / "out" / "jobs.tsv").read_text().splitlines()
    statuses = dict(line.split("\t")[:2] for line in lines[1:])
    assert statuses["10_attention"] == "failed (3)"
    assert statuses["22_transformers_olmoe_1b"] == "ok"
    assert (tmp_path / "out" / "10_attention.log").read_text() == "broken\n"
    assert (tmp_path / "out" / "03_ceilings.json").read_text() == "{}\n"
    assert said.stdout.strip().endswith((tmp_path / "out" / "summary.txt").read_text().strip())
    again = run("out", folder=tmp_path, PYTHON=str(python))
    assert again.returncode == 2 and "holds an earlier run" in again.stderr


@pytest.mark.parametrize("arguments", [["--dry"], ["a", "b"]])
def test_wrong_usage(arguments, tmp_path):
    said = run(*arguments, folder=tmp_path)
    assert said.returncode == 2 and said.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name, shape in MODELS.items() if shape.needs_gpu])
def test_training_runs_have_the_models_of_the_benchmark(name, monkeypatch):
    monkeypatch.setenv("GPU_MODEL", name)
    config = run_config.load(str(SCRIPT.with_name("gpu_model.py")), [])
    shape = MODELS[name]
    assert config.model == shape.config("auto", "auto", SoftmaxTopKOptions())
    assert (config.train.batch_size, config.train.seq_len) == (shape.B, shape.S)


def test_a_model_that_there_is_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GPU_MODEL", "olmoe_2b")
    config = SCRIPT.with_name("gpu_model.py")
    assert cli.main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert "olmoe_2b" in capsys.readouterr().err
