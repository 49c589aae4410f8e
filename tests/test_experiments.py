"""The configs of published models: they load and plan, and their docstrings say what comes out."""

import importlib.util
import json
import pathlib
import re

import pytest

from moejax import cli
from moejax.cost.counts import count
from moejax.models.presets import PRESETS
from moejax.parallel.mesh import check_fits
from moejax.training import run_config

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "models"
FILES = {path.stem: path for path in FOLDER.glob("*.py") if path.stem != "published"}
# R1 and R1-Zero are trained from V3's checkpoint: what they cost is in its file.
TRAINED_FROM = {"deepseek_r1": "deepseek_v3", "deepseek_r1_zero": "deepseek_v3"}


def planned(name, capsys):
    assert cli.main(["plan", f"--config={FILES[name]}", "--format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def amount(text):
    """The number that ``1.234M`` or ``56.7K`` stands for."""
    return float(text[:-1].replace(",", "")) * {"K": 1e3, "M": 1e6}[text[-1]]


def test_every_published_model_has_a_config():
    assert FILES.keys() == PRESETS.keys() - TRAINED_FROM.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_published_models_config(name, capsys, monkeypatch):
    config = run_config.load(str(FILES[name]), [])
    for seq_len in (1, 4096):
        assert count(config.model, seq_len) == count(PRESETS[name], seq_len)
    shape = config.mesh.shape(10**6)
    train = config.train
    check_fits(shape, config.model, train.batch_size // train.micro_batches, train.seq_len)
    plan = planned(name, capsys)
    assert plan["memory_fits"]
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FILES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pattern = r"moejax plan: (\S+) device-hours, \$(\S+) at \$(\S+) an hour"
    hours, dollars, rate = re.search(pattern, module.__doc__).groups()
    assert plan["device_hours"] == pytest.approx(amount(hours), rel=0.002)
    assert plan["dollars"]["rental"] == pytest.approx(amount(dollars), rel=0.002)
    assert plan["price"]["dollars_per_hour"] == float(rate)


def test_v3s_published_bill_follows_from_its_config(capsys):
    """Technical report, table 1: 2,664K H800 hours, $5.328M, 2,048 GPUs for under two months.

    Derived from tokens, FLOPs and 38.94 % of the peak (ISCA 2025, table 4), which is without the
    MTP module's FLOPs; within 0.5 %.
    """
    plan = planned("deepseek_v3", capsys)
    assert plan["devices"] == 2048
    assert plan["flops_per_token"]["train"] == pytest.approx(260.64e9, rel=1e-4)
    assert plan["device_hours"] == pytest.approx(2.664e6, rel=0.005)
    assert plan["dollars"]["rental"] == pytest.approx(5.328e6, rel=0.005)
    assert plan["wall_days"] < 60


def test_v2s_and_llamas_published_hours_are_plausible_utilisations(capsys):
    """172.8K H800 hours a trillion tokens (arXiv 2405.04434); 30.84M H100 hours (model card)."""
    plan = planned("deepseek_v2", capsys)
    used = plan["train_flops"] / (8.1 * 172.8e3 * 3600 * 989.4e12)
    assert used == pytest.approx(0.252, rel=0.01)
    plan = planned("llama3_1_405b", capsys)
    # 34.6 % from 3.8e25 FLOP, the paper's; these are 3.94e25 at length 8,192.
    used = plan["train_flops"] / (30.84e6 * 3600 * 989.4e12)
    assert used == pytest.approx(0.346, rel=0.04)
