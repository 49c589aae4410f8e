"""Options of the MoE layer: refusals name the field and the remedy."""

import dataclasses

import pytest

from moejax.config import ConfigError
from moejax.moe import MoEConfig, router_options
from moejax.moe.routers import DeepSeekV3Options, SoftmaxTopKOptions


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_experts": 0}, "moe.num_experts"),
        ({"top_k": 9}, "moe.top_k"),
        ({"top_k": 0}, "moe.top_k"),
        ({"d_expert": -1}, "moe.d_expert"),
        ({"capacity_factor": 0.0}, "moe.capacity_factor"),
        ({"num_shared_experts": -1}, "moe.num_shared_experts"),
        ({"router": DeepSeekV3Options(num_groups=3)}, "router.num_groups"),
        ({"top_k": 1}, "router.normalize_gates"),
        (
            {"top_k": 1, "router": SoftmaxTopKOptions(normalize_gates=True)},
            "router.normalize_gates",
        ),
    ],
)
def test_refusals(changes, field):
    with pytest.raises(ConfigError) as error:
        MoEConfig(**{"num_experts": 8, "top_k": 2, "d_expert": 16, **changes})
    assert error.value.field == field


def test_auto_is_blocks():
    config = MoEConfig(8, 2, 16)
    assert config.chosen_dispatch == "blocks"
    assert dataclasses.replace(config, dispatch="capacity").chosen_dispatch == "capacity"


def test_router_options_by_name():
    assert router_options({}) == DeepSeekV3Options()
    options = router_options({"name": "softmax_topk", "z_loss_weight": 0})
    assert options == SoftmaxTopKOptions(z_loss_weight=0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "deepseek_v4"}, "router.name = 'deepseek_v4'.*did you mean 'deepseek_v3'"),
        ({"name": 3}, "router.name = 3"),
        ({"name": "softmax_topk", "bias_step": 1.0}, "router.bias_step.*no such field"),
        ({"bias_stp": 1.0}, "router.bias_stp.*did you mean 'bias_step'"),
    ],
)
def test_a_wrong_router_block_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        router_options(values)
