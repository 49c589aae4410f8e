"""Plans against DeepSeek-V3's published arithmetic, and the fields that others rely on."""

import dataclasses
import json

import pytest

from moejax.config import ConfigError
from moejax.cost import counts, plan, prices
from moejax.models import AttentionConfig, ModelConfig
from moejax.models.presets import PRESETS

V3_FLOPS_PER_TOKEN = 250.45e9  # counted, no MTP, s = 4096 (ISCA 2025, table 2: 250)


def v3(**changes):
    options = {"hardware": "h800_sxm", "devices": 2048, "mfu": 0.3906} | changes
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


@pytest.mark.parametrize("price, millions", [(33_800, 4.5), (44_750, 5.9)])
def test_v3_by_the_owned_lens(price, millions):
    """V3's 2,788K hours by Epoch's formula, about $4.5M / $5.9M."""
    found = plan.owned_dollars("h800_sxm", 2.788e6, purchase_dollars=price)
    assert found == pytest.approx(millions * 1e6, rel=0.01)


def test_owned_hardware_loses_value():
    """0.14 orders of magnitude a year; energy costs the same."""
    new = plan.owned_dollars("h800_sxm", 1e6)
    old = plan.owned_dollars("h800_sxm", 1e6, years_since_acquisition=1.0)
    power = 1e6 * 0.7 * 1.82 * 0.75 * 1.25 * 0.0771
    assert (old - power) == pytest.approx((new - power) * 10**-0.14)


def test_no_purchase_price_no_owned_lens():
    assert plan.owned_dollars("tpu_v4", 1.0) is None


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
]


@pytest.mark.parametrize("name", CONTRACT)
def test_a_plan_is_json_with_the_contracts_fields(name):
    value = json.loads(json.dumps(make(), allow_nan=False))
    for part in name.split("."):
        value = value[part]
    assert value is not None


def test_a_plans_numbers_belong_together():
    found = make(mfu=0.5, mfu_source="measured here")
    per_token = counts.count(PRESETS["deepseek_moe_16b"], 4096).flops_per_token.train
    assert found["train_flops"] == 2e12 * per_token
    seconds = found["train_flops"] / (256 * 989.4e12 * 0.5)
    assert found["wall_days"] == pytest.approx(seconds / 86400)
    assert found["dollars"]["rental"] == pytest.approx(2.0 * 256 * seconds / 3600)
    assert (found["mfu"], found["mfu_source"]) == (0.5, "measured here")
    assert make()["mfu_source"] == "default"


def test_weights_gradients_and_moments_are_split_over_shards():
    """16.376B parameters x (4 + 4 + 8) bytes = 262 GB; activations are not split."""
    one, eight = make(shards=1)["memory_parts"], make(shards=8)["memory_parts"]
    state = sum(one[name] for name in ("weights", "gradients", "optimizer"))
    assert state == pytest.approx(16 * 16.376e9, rel=0.001)
    for name in ("weights", "gradients", "optimizer"):
        assert eight[name] == one[name] / 8
    assert eight["activations"] == one["activations"] > 0
    assert not make(shards=1)["memory_fits"]
    assert make(shards=256)["memory_fits"]


def test_remat_saves_activations():
    config = PRESETS["deepseek_moe_16b"]
    kept = {
        remat: plan.memory_parts(
            dataclasses.replace(config, remat=remat), 1, hardware="b200", shards=1,
            tokens_per_device=4096,
        )["activations"]
        for remat in ("none", "dots", "full")
    }  # fmt: skip
    assert kept["none"] > kept["dots"] > kept["full"]


def test_activations_of_latent_attention_and_of_modules_ahead_by_hand():
    """MLA of the widths rq 3, rkv 5, dn 4, dr 2, dv 7, two heads, D 8, F 10, V 11, one layer.

    The products that "dots" keeps: both latents and the shared key 3 + 5 + 2, queries 2 · 6, keys
    and values 2 · (4 + 7), values mixed 2 · 7; the layer's input and the outputs of attention and
    feed-forward 3 · 8, gate and up 2 · 10. Logits and their gradient are 2 · 4 · 11 bytes.
    """
    config = ModelConfig(
        11, 8, 1, 10, remat="dots", dtype="float32",
        attention=AttentionConfig(
            kind="mla", num_heads=2, q_lora_rank=3, kv_lora_rank=5, nope_head_dim=4,
            rope_head_dim=2, v_head_dim=7,
        ),
    )  # fmt: skip
    activations = lambda config: plan.memory_parts(
        config, 0, hardware="b200", shards=1, tokens_per_device=6
    )["activations"]
    layer = 10 + 12 + 22 + 14 + 3 * 8 + 2 * 10
    assert activations(config) == 6 * (4 * layer + 88)
    # One module more: its layer, its two inputs normalised and joined, its own logits.
    ahead = dataclasses.replace(config, mtp_depth=1)
    assert activations(ahead) == 6 * (4 * (2 * layer + 4 * 8) + 2 * 88)
    # Logits in parts of three positions: one part at a time, whoever asks for it.
    parts = dataclasses.replace(ahead, loss_chunk=3)
    assert activations(parts) == 6 * (4 * (2 * layer + 4 * 8) + 88 / 2)


def test_unknown_energy_and_memory_stay_unknown():
    found = make(hardware="tpu_v5p", price=prices.resolve("tpu_v5p"))
    assert found["energy_kwh"] is found["co2_kg"] is found["dollars"]["owned"] is None
    cpu = make(hardware="cpu", price=prices.resolve("cpu"), peak_flops=1e11)
    assert cpu["memory_fits"] is None
    assert "unknown" in plan.format_plan(found)
    assert "None" not in plan.format_plan(found) + plan.format_plan(cpu)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mfu": 0.0}, r"cost\.mfu = 0.0"),
        ({"mfu": 1.5}, r"cost\.mfu = 1.5"),
        ({"tokens": 0}, "tokens = 0: must be above zero"),
        ({"devices": 0}, "devices = 0: must be above zero"),
        ({"shards": 0}, "shards = 0: must be above zero"),
        ({"hardware": "h800_smx"}, "did you mean 'h800_sxm'"),
        ({"region": "mars"}, r"cost\.region = 'mars'"),
    ],
)
def test_bad_plans(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_the_table_says_what_it_assumes():
    found = plan.format_plan(make())
    for words in ("16.38B", "2.829B", "35.0 % MFU (default)", "dense BF16", "$2 per device-hour",
                  "2024-12", "(estimate)", "DOES NOT FIT"):  # fmt: skip
        assert words in found
    assert all(len(line) < 120 for line in found.splitlines())
