"""Plans against DeepSeek-V3's published arithmetic, and the fields that others rely on."""

import dataclasses
import json

import pytest

from moejax.config import ConfigError
from moejax.cost import counts, plan, prices
from moejax.cost.memory import Layout, Placement
from moejax.cost.plan_text import format_plan
from moejax.cost.utilisation import Utilisation, given
from moejax.models.presets import PRESETS

V3_FLOPS_PER_TOKEN = 250.45e9  # counted, no MTP, s = 4096 (ISCA 2025, table 2: 250)


def v3(**changes):
    options = {"hardware": "h800_sxm", "devices": 2048, "used": given(0.3906, "a test")} | changes
    return plan.price_flops(
        14.8e12 * V3_FLOPS_PER_TOKEN, price=prices.resolve("h800_sxm"), **options
    )


def test_v3_pre_training():
    """Technical report (arXiv 2412.19437), table 1: 2,664K H800 hours, $5.328M, under two months.

    Derived from tokens, FLOPs, 39.06 % of 989.4 TFLOP/s and $2/h; within 1 %.
    """
    bill = v3()
    assert bill["train_flops"] == pytest.approx(3.707e24, rel=0.01)
    assert bill["device_hours"] == pytest.approx(2.664e6, rel=0.01)
    assert bill["dollars"]["rental"] == pytest.approx(5.328e6, rel=0.01)
    assert bill["wall_days"] == pytest.approx(3.7 * 14.8, rel=0.02)  # 3.7 days per trillion
    assert bill["peak_flops"] == 2048 * 989.4e12


def test_hours_do_not_depend_on_the_number_of_devices_but_days_do():
    few, many = v3(devices=256), v3(devices=2048)
    assert few["device_hours"] == pytest.approx(many["device_hours"])
    assert few["wall_days"] == pytest.approx(8 * many["wall_days"])


def make(**changes):
    options = {
        "tokens": 2e12, "seq_len": 4096, "hardware": "h800_sxm", "devices": 256,
        "price": prices.resolve("h800_sxm"),
    } | changes  # fmt: skip
    return plan.make_plan(PRESETS["deepseek_moe_16b"], **options)


CONTRACT = [
    "params.total",
    "params.active.no_embedding",
    "params.active.with_head",
    "params.active.with_embeddings",
    "params.mtp",
    "flops_per_token.train",
    "flops_per_token.forward",
    "flops_per_token.train_full_attention",
    "kv_cache_bytes_per_token",
    "train_flops",
    "mfu",
    "peak_flops",
    "device_hours",
    "wall_days",
    "dollars.rental",
    "dollars.owned",
    "energy_kwh",
    "co2_kg",
    "memory_bytes_per_device",
    "mfu_source",
    "price.dollars_per_hour",
    "price.kind",
    "price.source",
    "price.date",
    "price.book",
    "purchase.dollars",
    "purchase.source",
    "purchase.date",
    "flops_per_token.conventions.causal.train.without_mtp",
    "flops_per_token.prefill",
    "flops_per_token.decode",
    "range.mfu.source",
    "range.price.low",
    "range.device_hours.high",
    "range.dollars.high",
    "layout.fsdp",
    "memory_usable_bytes",
]


@pytest.mark.parametrize("name", CONTRACT)
def test_a_plan_is_json_with_the_contracts_fields(name):
    value = json.loads(json.dumps(make(), allow_nan=False))
    for part in name.split("."):
        value = value[part]
    assert value is not None


def test_a_plans_numbers_belong_together():
    found = make(used=given(0.5, "measured here"))
    per_token = counts.count(PRESETS["deepseek_moe_16b"], 4096).flops_per_token.train
    assert found["train_flops"] == 2e12 * per_token
    seconds = found["train_flops"] / (256 * 989.4e12 * 0.5)
    assert found["wall_days"] == pytest.approx(seconds / 86400)
    assert found["dollars"]["rental"] == pytest.approx(2.0 * 256 * seconds / 3600)
    assert (found["mfu"], found["mfu_source"]) == (0.5, "measured here")
    assert make()["mfu_source"].startswith("published: DeepSeek-V3")


def test_the_data_centre_and_the_price_of_electricity_are_choices():
    one, other = make(), make(pue=1.0, dollars_per_kwh=0.2)
    assert other["energy_kwh"] == pytest.approx(one["energy_kwh"] / 1.25)
    assert other["co2_kg"] == pytest.approx(one["co2_kg"] / 1.25)
    assert one["co2_source"] == "codecarbon 3.3.2: IEA, 2018"
    extra = other["energy_kwh"] * 0.2 - one["energy_kwh"] * 0.0771
    assert other["dollars"]["owned"] - one["dollars"]["owned"] == pytest.approx(extra)
    dearer = dataclasses.replace(prices.purchase("h800_sxm"), dollars=44_750.0)
    assert make(purchase=dearer)["dollars"]["owned"] > one["dollars"]["owned"]
    assert make(purchase=dearer)["purchase"]["dollars"] == 44_750.0


def test_the_mesh_decides_whether_it_fits():
    """16.376B parameters x (4 + 4 + 8) bytes = 262 GB on one device."""
    one, many = make(), make(placement=Placement(Layout(fsdp=256)))
    assert one["memory_bytes_per_device"] > 16 * 16.37e9 and not one["memory_fits"]
    assert many["memory_fits"] and many["layout"]["fsdp"] == 256
    assert sum(many["memory_parts"].values()) == many["memory_bytes_per_device"]
    assert many["memory_bytes_per_device"] < many["memory_usable_bytes"] == 0.9 * 80e9


def test_the_range_is_that_of_utilisation_and_rate():
    """20 to 50 % around 40 %, $1 to $4 around $2: from 0.4 / 0.5 / 2 times the dollars to 2 · 2."""
    used = Utilisation(0.4, "a test", 0.2, 0.5, "a range")
    price = dataclasses.replace(prices.resolve("h800_sxm", 2.0), low=1.0, high=4.0)
    found = make(used=used, price=price)
    spread, hours, rent = found["range"], found["device_hours"], found["dollars"]["rental"]
    assert spread["device_hours"] == pytest.approx({"low": hours * 0.8, "high": hours * 2})
    assert spread["dollars"] == pytest.approx({"low": rent * 0.4, "high": rent * 4})
    assert spread["wall_days"]["high"] == pytest.approx(2 * found["wall_days"])
    assert spread["mfu"] == {"low": 0.2, "high": 0.5, "source": "a range"}
    assert spread["price"] == {"low": 1.0, "high": 4.0}
    point = make(used=given(0.4, "a test"))["range"]["dollars"]
    assert point["low"] == pytest.approx(point["high"])


def test_no_token_travels_on_one_expert_device():
    assert make()["exchange"] is None
    found = make(placement=Placement(Layout(expert=8)))["exchange"]
    assert found["expert_devices"] == 8 and found["bytes_per_token"]["scale_out"] == 0
    seconds = 3600 * make()["device_hours"] / 2e12
    assert found["compute_seconds"] == pytest.approx(seconds)


def test_unknown_energy_and_memory_stay_unknown():
    found = make(hardware="tpu_v5p", price=prices.resolve("tpu_v5p"))
    assert found["energy_kwh"] is found["co2_kg"] is found["dollars"]["owned"] is None
    assert found["purchase"] is None
    cpu = make(hardware="cpu", price=prices.resolve("cpu"), peak_flops=1e11)
    assert cpu["memory_fits"] is None
    assert "unknown" in format_plan(found)
    assert "None" not in format_plan(found) + format_plan(cpu)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": 0}, "tokens = 0: must be above zero"),
        ({"devices": 0}, "devices = 0: must be above zero"),
        ({"expert_devices": 7}, "--expert-devices = 7: does not divide moe.num_experts = 64"),
        ({"hardware": "h800_smx"}, "did you mean 'h800_sxm'"),
        ({"region": "mars"}, r"cost\.region = 'mars'"),
        ({"pue": 0.9}, r"cost\.pue = 0.9"),
        ({"dollars_per_kwh": -1.0}, r"cost\.dollars_per_kwh = -1.0"),
    ],
)
def test_bad_plans(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_the_table_says_what_it_assumes():
    found = format_plan(make(placement=Placement(Layout(expert=8))))
    words = [
        "16.38B", "2.829B", "38.9 % (published: DeepSeek-V3", "dense BF16", "$2 per device-hour",
        "2024-12", "(estimate)", "DOES NOT FIT", "by full attention", "by 6N", "prefill", "decode",
        "25.2 to 38.9 %", "over NVLink 4", "0.8 of their rating",
    ]  # fmt: skip
    assert [w for w in words if w not in found] == []
    assert all(len(line) < 120 for line in found.splitlines())
