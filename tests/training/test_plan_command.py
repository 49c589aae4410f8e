"""``moejax plan --model=NAME`` for every published model."""

import json

import pytest

from moejax import cli
from moejax.cost.counts import count
from moejax.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_model_can_be_planned(name, capsys):
    flags = ["plan", f"--model={name}", "--tokens=1e12"]
    assert cli.main(flags) == 0
    assert "None" not in capsys.readouterr().out
    assert cli.main([*flags, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    counted = count(PRESETS[name], 4096)
    assert found["params"]["total"] == counted.params.total
    assert found["train_flops"] == 1e12 * counted.flops_per_token.train


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("deepseek_v33", "deepseek_v3"),
        ("qwen3-30b-a3b", "qwen3_30b_a3b"),
        ("gptoss_20b", "gpt_oss_20b"),
    ],
)
def test_a_misspelt_model_gets_its_nearest(typo, meant, capsys):
    assert cli.main(["plan", f"--model={typo}", "--tokens=1e12"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == (
        f"moejax plan: --model = {typo!r}: no such model; did you mean {meant!r}?\n"
    )
