"""The exchange: bytes and seconds by hand, and what DeepSeek-V3 says of its own."""

import dataclasses

import pytest

from moejax.config import ConfigError
from moejax.cost import hardware as chips
from moejax.cost.exchange import TRANSPORTS, exchange, key_gather, transport
from moejax.models import AttentionConfig, ModelConfig
from moejax.models.presets import PRESETS
from moejax.moe import MoEConfig

V3 = PRESETS["deepseek_v3"]


def sent(model=V3, hardware="h800_sxm", devices=64, how="deepseek_v3", compute=650e-6, **changes):
    transported = dataclasses.replace(TRANSPORTS[how], **changes)
    return exchange(
        model, hardware=hardware, expert_devices=devices, how=transported, compute_seconds=compute
    )


def test_two_experts_on_two_devices_by_hand():
    """K 2 of E 2 on two devices: a token reaches both, and one of them is its own.

    Two layers, D 10, float32, forward and backward, there and back: 2 · 2 · 10 · (4 + 4) · 1.
    """
    model = ModelConfig(10, 10, 2, attention=AttentionConfig(1), dtype="float32",
                        moe=MoEConfig(2, 2, 4))  # fmt: skip
    found = sent(model, devices=2, how="moejax")
    assert found["devices_reached"] == 2 and found["nodes_reached"] == 1
    assert found["bytes_per_token"] == {"scale_up": 320, "scale_out": 0}
    assert found["seconds_per_token"]["scale_up"] == pytest.approx(320 / (0.8 * 200e9))
    assert found["exposed_seconds"] == found["longest_seconds"]
    again = sent(dataclasses.replace(model, remat="full"), devices=2, how="moejax")
    assert again["bytes_per_token"]["scale_up"] == 480


def test_deepseek_v3s_own_exchange():
    """64 devices of 8 nodes, FP8 there (1 + 4/128 bytes) and BF16 back, 59 layers, twice.

    At most 4 nodes a token; a token is for another node 7 times in 8 (arXiv 2412.19437, 3.2.2).
    """
    found = sent()
    assert found["devices_per_node"] == 8 and 3.5 < found["nodes_reached"] <= 4
    each = 59 * 2 * 7168 * (1 + 4 / 128 + 2)
    assert found["bytes_per_token"]["scale_out"] == pytest.approx(
        each * found["nodes_reached"] * 7 / 8
    )
    assert found["bytes_per_token"]["scale_up"] == pytest.approx(
        each * found["devices_reached"] * 7 / 8
    )
    # As its design wants it, the network is the slower one: 3.2 experts of a node for each copy.
    assert found["seconds_per_token"]["scale_out"] > found["seconds_per_token"]["scale_up"]
    assert found["exposed_seconds"] == 0


def test_an_h800_differs_from_an_h100_by_its_fast_link_only():
    slow, fast = sent(), sent(hardware="h100_sxm")
    seconds = lambda found, name: found["seconds_per_token"][name]
    assert seconds(slow, "scale_up") == pytest.approx(450 / 200 * seconds(fast, "scale_up"))
    assert seconds(slow, "scale_out") == seconds(fast, "scale_out")
    # Without the limit to 4 groups a token reaches more nodes.
    free = dataclasses.replace(V3.moe.router, groups_kept=8)
    free = dataclasses.replace(V3, moe=dataclasses.replace(V3.moe, router=free))
    more, less = sent(free)["bytes_per_token"], slow["bytes_per_token"]
    assert more["scale_out"] > 1.4 * less["scale_out"]


def test_what_is_hidden_is_an_assumption():
    whole = sent(overlap=0.0)
    assert whole["exposed_seconds"] == whole["longest_seconds"]
    half = sent(overlap=0.5, compute=200e-6)
    assert half["exposed_seconds"] == pytest.approx(half["longest_seconds"] - 100e-6)
    assert half["exposed_share"] == pytest.approx(half["exposed_seconds"] / 200e-6)
    assert transport("moejax").overlap == 0 and transport("moejax", 0.25).overlap == 0.25


def test_by_node_sends_less_over_the_network_than_by_device():
    by_node, by_device = sent(), sent(by_node=False)
    assert by_node["bytes_per_token"]["scale_out"] < by_device["bytes_per_token"]["scale_out"]
    total = by_device["bytes_per_token"]
    each = 59 * 2 * 7168 * (1 + 4 / 128 + 2)
    assert sum(total.values()) == pytest.approx(each * by_device["devices_reached"] * 63 / 64)


def test_nothing_travels_without_experts_elsewhere():
    assert sent(PRESETS["llama3_1_8b"]) is None and sent(devices=1) is None


def test_a_network_that_nobody_knows():
    found = sent(hardware="rtx_4090")
    assert found["seconds_per_token"]["scale_out"] is found["exposed_seconds"] is None
    assert sent(hardware="rtx_4090", devices=8)["exposed_seconds"] is not None


@pytest.mark.parametrize("devices", [3, 48, 512])
def test_devices_that_do_not_divide_the_experts(devices):
    with pytest.raises(ConfigError, match=f"--expert-devices = {devices}: does not divide"):
        sent(devices=devices)


def test_bad_transports():
    with pytest.raises(ConfigError, match="did you mean 'deepseek_v3'"):
        transport("deepseek")
    for overlap in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="--overlap"):
            transport("moejax", overlap)


def test_gathered_keys_by_hand():
    """DeepSeek-V3, rows on 4 devices: a latent of 512 and a key of 64 to three others, forward and
    back, in 61 layers and the MTP module's, bfloat16."""
    v3 = PRESETS["deepseek_v3"]
    ask = dict(hardware="h800_sxm", context=4, tensor=1, compute_seconds=1e-3)
    found = key_gather(v3, **ask)
    assert found["values_per_layer"] == 576
    assert found["bytes_per_token"] == 62 * 2 * 3 * 576 * 2
    # Within a node: NVLink.
    assert found["link"]["name"] == chips.lookup("h800_sxm").scale_up.name
    assert found["share"] == found["seconds_per_token"] / 1e-3
    again = key_gather(dataclasses.replace(v3, remat="full"), **ask)
    assert again["bytes_per_token"] == 1.5 * found["bytes_per_token"]
    wide = key_gather(v3, **{**ask, "context": 16})
    assert wide["link"]["name"] == chips.lookup("h800_sxm").scale_out.name
    # Llama-3.1-8B: 8 heads of 128, keys and values, of which each of two devices sends half.
    llama = key_gather(PRESETS["llama3_1_8b"], **{**ask, "tensor": 2})
    assert llama["bytes_per_token"] == 32 * 2 * 3 * 2048 * 2
    assert key_gather(v3, **{**ask, "context": 1}) is None
