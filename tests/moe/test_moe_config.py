"""Options of the MoE layer: refusals name the field and the remedy."""

import pytest

from moejax.config import ConfigError, build
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
        ({"exchange_factor": 0.0}, "moe.exchange_factor"),
        ({"devices_per_node": 0}, "moe.devices_per_node"),
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


@pytest.mark.parametrize("policy", ["choice", "probability"])
def test_a_drop_policy_that_leaks_has_to_be_allowed(policy):
    with pytest.raises(ConfigError, match=r"moe.drop_policy.*moe.allow_leak = True"):
        MoEConfig(8, 2, 16, drop_policy=policy)
    assert MoEConfig(8, 2, 16, drop_policy=policy, allow_leak=True).drop_policy == policy
    assert MoEConfig(8, 2, 16).drop_policy == "position"


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [
        ("dispatch", "block", "blocks"),
        ("exchange", "ragged_all_to_al", "ragged_all_to_all"),
        ("drop_policy", "prob", "probability"),
        ("exchange_overflow", "droped", "drop"),
    ],
)
def test_a_misspelt_word_is_refused_with_the_nearest(field, value, near):
    values = {"num_experts": 8, "top_k": 2, "d_expert": 16, field: value}
    with pytest.raises(ConfigError, match=f"moe.{field} = .*did you mean '{near}'"):
        build(MoEConfig, values, "moe")


def test_router_options_by_name():
    assert router_options({}) == DeepSeekV3Options()
    options = router_options({"name": "softmax_topk", "z_loss_weight": 0})
    assert options == SoftmaxTopKOptions(z_loss_weight=0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "deepseek_v5"}, "router.name = 'deepseek_v5'.*did you mean 'deepseek_v"),
        ({"name": 3}, "router.name = 3"),
        ({"name": "force_balanced", "bias_rule": "sign"}, "router.bias_rule.*no selection bias"),
        ({"bias_rule": "signs"}, "router.bias_rule.*did you mean 'sign'"),
        ({"bias_rule": "longcat"}, "router.bias_rule.*some without"),
        ({"z_loss_weight": -1.0}, "router.z_loss_weight = -1.0: must not be below zero"),
        ({"layer_weights": [1.0, -1.0]}, "router.layer_weights.*below zero"),
        ({"bias_momentum": 1.0}, "router.bias_momentum = 1.0.*from 0 to below 1"),
        ({"bias_stp": 1.0}, "router.bias_stp.*did you mean 'bias_step'"),
    ],
)
def test_a_wrong_router_block_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        MoEConfig(8, 2, 16, router=router_options(values))


@pytest.mark.parametrize(
    "options",
    [
        {"name": "default_vector"},
        {"name": "autonomy"},
        {"name": "top_k", "coupling_loss_weight": 1},
    ],
)
def test_a_latent_space_is_refused_where_the_router_shows_experts_its_own(options):
    # Of the model's own width, too: the space is another one.
    with pytest.raises(ConfigError, match=r"moe.latent_dim = 16: gives experts another space"):
        MoEConfig(8, 2, 16, latent_dim=16, gate_rank=4, router=router_options(options))
