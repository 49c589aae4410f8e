"""``moejax plan --model=NAME`` for every published model."""

import json
import math

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


def planned(capsys, *flags):
    command = ["plan", "--model=deepseek_v3", "--tokens=14.8e12", "--format=json", *flags]
    assert cli.main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_the_flags_choose_the_rate(tmp_path, capsys):
    assert planned(capsys)["price"]["kind"] == "specialised_cloud"
    spot = planned(capsys, "--price-kind=spot")
    assert spot["price"]["kind"] == "spot" and spot["price"]["book"] == "moejax"
    book = tmp_path / "ours.yaml"
    book.write_text(
        "h20:\n  rates: {reserved: {dollars_per_hour: 0.9, date: 2026-01, source: us}}\n"
        "  purchase: {dollars: 9000, date: 2026, source: us}\n"
    )
    ours = planned(capsys, "--hardware=h20", f"--price-book={book}")
    assert (ours["price"]["dollars_per_hour"], ours["price"]["book"]) == (0.9, str(book))
    assert ours["purchase"]["dollars"] == 9000
    assert ours["dollars"]["rental"] == pytest.approx(0.9 * ours["device_hours"])


def test_renting_at_an_owners_rate_is_owning(capsys):
    """H20: nobody lists a rent, so that its owner's rate is what can be asked for."""
    found = planned(capsys, "--hardware=h20", "--price-kind=owned")
    assert found["dollars"]["rental"] == pytest.approx(found["dollars"]["owned"])


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--hardware=h20"], "no rate is known for h20"),
        (["--price-kind=sopt"], "did you mean 'spot'"),
        (["--price-kind=spot", "--price=2"], "has no use beside cost.price"),
        (["--price-book=none.yaml"], "'none.yaml': cannot be read"),
    ],
)
def test_rates_that_cannot_be_had_are_one_line(flags, reason, capsys):
    assert cli.main(["plan", "--model=deepseek_v3", "--tokens=1e12", *flags]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and reason in found.err


def refused(capsys, *flags):
    """The one line that a request ends with."""
    assert cli.main(["plan", *flags]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1
    return found.err


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--mfu=0.4", "--measured=somewhere"], "contradicts --measured"),
        (["--measured=nowhere"], "has no summary.json"),
        (["--tokens=1e308"], "train_flops = inf"),
        (["--region=frnace"], "did you mean 'france'?"),
        (["--price=nan"], "must be a finite number of dollars"),
        (["--price=-1"], "must be a finite number of dollars"),
        (["--mfu=nan"], "must be above 0 and at most 1"),
        (["--expert-devices=0"], "must be a finite number above zero"),
        (["--hardware=h100_smx"], "did you mean 'h100_sxm'?"),
        (["--model=llama3_1_8b", "--exchange=moejax"], "no use for a model without experts"),
        (["--model=llama3_1_8b", "--expert-devices=8"], "no use for a model without experts"),
    ],
)
def test_flags_that_contradict_each_other_or_are_out_of_range(flags, reason, capsys):
    assert reason in refused(capsys, "--model=deepseek_v3", "--tokens=1e12", *flags)


def test_a_budget_has_no_exchange_to_ask_for(capsys):
    assert "does not go with --budget" in refused(capsys, "--budget=$1k", "--overlap=0.5")


def test_a_region_and_a_transport_by_flag(capsys):
    world, sweden = planned(capsys), planned(capsys, "--region=sweden")
    assert sweden["region"] == "sweden" and sweden["co2_kg"] < 0.1 * world["co2_kg"]
    found = planned(capsys, "--expert-devices=64", "--exchange=deepseek_v3", "--overlap=0.5")
    sent = found["exchange"]
    assert (sent["transport"], sent["overlap"], sent["expert_devices"]) == ("deepseek_v3", 0.5, 64)


def test_a_published_model_is_planned_on_the_suggested_mesh(capsys):
    found = planned(capsys, "--hardware=h800_sxm", "--devices=2048")
    layout, suggested = found["layout"], found["suggested_layout"]
    assert layout["source"] == "suggested" and found["memory_fits"]
    sizes = {name: suggested[name] for name in ("data", "fsdp", "expert", "tensor")}
    assert sizes.items() <= layout.items() and math.prod(sizes.values()) == 2048
    few = planned(capsys, "--hardware=h800_sxm", "--devices=64")
    assert not few["memory_fits"] and few["suggested_layout"]["devices_needed"] > 64


CONFIG = """
import ml_collections
def get_config():
    return ml_collections.ConfigDict({
        "model": {"vocab_size": 50304, "d_model": 2048, "num_layers": 16, "dtype": "bfloat16",
                  "attention": {"num_heads": 16}},
        "moe": {"num_experts": 64, "top_k": 8, "d_expert": 1024},
        "train": {"steps": 10, "batch_size": 64, "seq_len": 4096},
        "mesh": {"data": 8, "expert": 8},
        "cost": {"hardware": "h100_sxm"},
    })
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return f"--config={path}"


def of_config(capsys, config, *flags):
    assert cli.main(["plan", config, *flags, "--format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_configs_own_mesh_is_what_is_planned(config, capsys):
    found = of_config(capsys, config)
    assert found["layout"] == {
        "data": 8, "fsdp": 1, "expert": 8, "context": 1, "tensor": 1, "source": "config",
    }  # fmt: skip
    assert found["devices"] == 64 and found["memory_fits"] and found["remedies"] == []
    assert found["exchange"]["transport"] == "moejax"


def test_a_config_that_does_not_fit_says_what_to_change(config, capsys):
    small = ["--config.mesh.data=1", "--config.train.batch_size=64"]
    found = of_config(capsys, config, *small)
    assert not found["memory_fits"] and found["remedies"]
    best = next(remedy for remedy in found["remedies"] if remedy["fits"])
    again = of_config(capsys, config, *small, *best["change"].split())
    assert again["memory_fits"]
    assert again["memory_bytes_per_device"] == pytest.approx(best["memory_bytes_per_device"])
    assert cli.main(["plan", config, *small]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and best["change"] in text


def test_a_mesh_that_cannot_be_is_refused(config, capsys):
    seven = ["--config.mesh.expert=7", "--config.train.batch_size=56"]
    assert "does not divide moe.num_experts" in refused(capsys, config, *seven)
    assert "make an axis smaller" in refused(capsys, config, "--devices=32")
    assert "choose a multiple" in refused(capsys, config, "--config.train.batch_size=65")


def test_the_optimizers_state_is_what_the_config_keeps(config, capsys):
    adam, muon, short = (
        of_config(capsys, config, f"--config.optim.{setting}")["memory_parts"]["optimizer"]
        for setting in ("optimizer=adamw", "optimizer=muon", "moments_dtype=bfloat16")
    )
    assert 0.5 < muon / adam < 0.55 and short == adam / 2
