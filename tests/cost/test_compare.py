"""The same run on several chips."""

import json
import pathlib

import pytest

from moejax import cli
from moejax.cost.compare import default_expert_devices
from moejax.models.presets import PRESETS

CHIPS = "h800_sxm,h100_sxm,h20"
DEEPSEEK_V3 = pathlib.Path(__file__).parents[2] / "experiments" / "models" / "deepseek_v3.py"


def compared(capsys, *flags, model="deepseek_v3"):
    command = ["plan", f"--model={model}", "--tokens=14.8e12", f"--compare={CHIPS}", *flags]
    assert cli.main([*command, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found, {chip["hardware"]: chip for chip in found["chips"]}


def test_v3_on_restricted_chips(capsys):
    """All hidden: the H800 costs the hours of an H100, the H20 989.4 / 148 times as many."""
    found, chips = compared(capsys, "--devices=2048")
    h800, h100, h20 = (chips[name] for name in CHIPS.split(","))
    assert found["expert_devices"] == 64 and found["mfu"] == pytest.approx(0.4052, rel=1e-3)
    assert h800["device_hours"] == pytest.approx(2.664e6, rel=0.01)
    assert h800["dollars"]["rental"] == pytest.approx(5.328e6, rel=0.01)
    assert h100["device_hours"] == pytest.approx(h800["device_hours"])
    assert h20["device_hours"] == pytest.approx(h800["device_hours"] * 989.4 / 148)
    assert h20["price"] is h20["dollars"]["rental"] is None
    assert h20["dollars"]["owned"] > 0
    assert h800["wall_days"] == pytest.approx(h800["device_hours"] / 2048 / 24)
    for chip in chips.values():
        ends = chip["range"]["device_hours"]
        assert ends["low"] <= chip["device_hours"] < ends["high"]


def test_what_is_not_hidden_is_paid_for(capsys):
    _, hidden = compared(capsys)
    _, bare = compared(capsys, "--overlap=0")
    for name, chip in bare.items():
        extra = chip["exchange"]["longest_seconds"] * 14.8e12 / 3600
        assert chip["device_hours"] == pytest.approx(hidden[name]["device_hours"] + extra)
        assert chip["range"]["device_hours"]["high"] == pytest.approx(chip["device_hours"])


def test_within_a_node_the_fast_link_decides(capsys):
    """8 devices: the H800 sends over a link of 200 GB/s what the H100 sends over one of 450."""
    _, chips = compared(capsys, "--expert-devices=8", "--overlap=0")
    seconds = {name: chip["exchange"]["exposed_seconds"] for name, chip in chips.items()}
    assert seconds["h800_sxm"] == pytest.approx(450 / 200 * seconds["h100_sxm"])
    assert seconds["h20"] == pytest.approx(seconds["h100_sxm"])
    assert chips["h800_sxm"]["device_hours"] > chips["h100_sxm"]["device_hours"]


def test_an_owner_pays_for_energy_as_the_config_says(capsys):
    command = ["plan", f"--config={DEEPSEEK_V3}", "--tokens=1e12", "--compare=h800_sxm"]
    owned = []
    for flags in ([], ["--config.cost.dollars_per_kwh=1.0771", "--config.cost.pue=1.0"]):
        assert cli.main([*command, *flags, "--format=json"]) == 0
        (chip,) = json.loads(capsys.readouterr().out)["chips"]
        owned.append(chip["dollars"]["owned"])
    kilowatts = 0.7 * 1.82 * 0.75 * chip["device_hours"]
    assert owned[1] - owned[0] == pytest.approx(kilowatts * (1.0771 - 1.25 * 0.0771))


def test_a_dense_model_has_no_exchange(capsys):
    _, chips = compared(capsys, model="llama3_1_8b")
    assert all(chip["exchange"] is None for chip in chips.values())
    command = ["plan", "--model=llama3_1_8b", "--tokens=1e12", f"--compare={CHIPS}"]
    assert cli.main(command) == 0
    assert "no tokens travel" in capsys.readouterr().out


def test_a_network_that_nobody_knows(capsys):
    """No network is named for the RTX 4090: its hours are unknown, and the others' are not."""
    command = ["plan", "--model=deepseek_v3", "--tokens=1e12", "--compare=h100_sxm,rtx_4090"]
    assert cli.main([*command, "--devices=64", "--expert-devices=64"]) == 0
    text = capsys.readouterr().out
    assert "unknown on rtx_4090" in text and "on h100_sxm" in text and "None" not in text


def test_devices_where_nobody_says():
    named = lambda name: default_expert_devices(PRESETS[name], "h800_sxm")
    assert named("deepseek_v3") == 64  # 8 groups, a node each
    assert named("deepseek_v2") == 8  # 160 experts do not go over 8 nodes of 8
    assert named("olmoe_1b_7b") == 8 and named("qwen1_5_moe_a2_7b") == 6
    assert named("llama3_1_8b") == 1


def test_the_table_prints_its_assumptions(capsys):
    command = ["plan", "--model=deepseek_v3", "--tokens=14.8e12", f"--compare={CHIPS}"]
    assert cli.main([*command, "--devices=2048"]) == 0
    text = capsys.readouterr().out
    words = [
        "40.5 % MFU", "published: DeepSeek-V3", "assumed:", "uniform routing", "4 of 8 groups",
        "0.8 of", "days on 2048 devices", "NVLink 4", "unknown",
    ]  # fmt: skip
    assert [w for w in words if w not in " ".join(text.split())] == []
    assert all(len(line) < 130 for line in text.splitlines())


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--compare=h100_sxm,h10"], "did you mean"),
        (["--compare="], "no such chip"),
        (["--compare=h100_sxm,h100_sxm"], "names a chip twice"),
        (["--compare=h100_sxm,cpu"], "compare accelerators"),
        (["--compare=h100_sxm", "--hardware=h20"], "contradicts --compare"),
        (["--compare=h100_sxm", "--price=2"], "use --price-book"),
        (["--compare=h100_sxm", "--budget=$100k"], "is what --budget chooses"),
        (["--compare=h100_sxm", "--expert-devices=7"], "does not divide moe.num_experts"),
        (["--compare=h100_sxm", "--exchange=deepep"], "no such transport"),
        (["--compare=h100_sxm", "--overlap=2"], "must be from 0 to 1"),
        (["--compare=h100_sxm", "--overlap=nan"], "must be from 0 to 1"),
    ],
)
def test_bad_comparisons_are_one_line(flags, reason, capsys):
    assert cli.main(["plan", "--model=deepseek_v3", "--tokens=1e12", *flags]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and reason in found.err


def test_a_price_of_the_config_is_one_chips(capsys):
    command = ["plan", f"--config={DEEPSEEK_V3}", "--tokens=1e12", "--compare=h800_sxm,h20"]
    assert cli.main([*command, "--config.cost.price=3.0"]) == 2
    assert "cost.price = 3.0: is one chip's" in capsys.readouterr().err
