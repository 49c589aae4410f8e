"""Which back ends run where: auto's picks, and refusals that say why and what to do."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.config import ConfigError
from moejax.moe import MoEConfig
from moejax.moe.choose import choose, choose_here
from moejax.parallel import AXES, MeshConfig, make_mesh

CONFIG = MoEConfig(8, 2, 16)


def picks(platform, expert_devices=1, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    choice = choose(config, platform=platform, expert_devices=expert_devices)
    assert choice.dispatch_reason and choice.exchange_reason
    return choice.dispatch, choice.exchange


@pytest.mark.parametrize(
    ("platform", "expert_devices", "picked"),
    [
        ("cpu", 1, ("blocks", "none")),
        ("cpu", 4, ("blocks", "all_to_all")),
        ("gpu", 1, ("grouped", "none")),
        ("gpu", 8, ("grouped", "ragged_all_to_all")),
        ("cuda", 8, ("grouped", "ragged_all_to_all")),
        ("tpu", 1, ("blocks", "none")),
        ("tpu", 8, ("blocks", "ragged_all_to_all")),
    ],
)
def test_auto(platform, expert_devices, picked):
    assert picks(platform, expert_devices) == picked


@pytest.mark.parametrize("dispatch", ["dense_loop", "capacity", "blocks"])
@pytest.mark.parametrize("exchange", ["none", "all_to_all"])
def test_what_is_asked_for_is_what_runs(dispatch, exchange):
    for platform in ("cpu", "gpu", "tpu"):
        asked = {"dispatch": dispatch, "exchange": exchange}
        assert picks(platform, 2, **asked) == (dispatch, exchange)


def test_on_one_device_nothing_is_exchanged_and_the_reason_says_so():
    for exchange in ("auto", "none", "all_to_all", "ragged_all_to_all"):
        config = dataclasses.replace(CONFIG, exchange=exchange)
        choice = choose(config, platform="gpu", expert_devices=1)
        assert choice.exchange == "none"
        assert ("mesh.expert is 1" in choice.exchange_reason) == (exchange != "none")


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [
        ("cpu", {"dispatch": "grouped"}, "moe.dispatch = 'grouped': .*GPU.*this is cpu; use 'bl"),
        ("tpu", {"dispatch": "grouped"}, "moe.dispatch = 'grouped': .*GPU.*this is tpu; use 'bl"),
        (
            "cpu",
            {"exchange": "ragged_all_to_all"},
            "moe.exchange = 'ragged_all_to_all': .*on cpu; use 'all_to_all'",
        ),
    ],
)
def test_what_cannot_run_is_refused(platform, changes, message):
    for expert_devices in (1, 4):
        with pytest.raises(ConfigError, match=message):
            picks(platform, expert_devices, **changes)


def test_the_current_mesh_decides():
    assert choose_here(CONFIG).exchange == "none"
    with jax.set_mesh(make_mesh(MeshConfig(expert=4))):
        choice = choose_here(CONFIG)
        assert (choice.dispatch, choice.exchange) == ("blocks", "all_to_all")
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1, 2, 4, 1, 1), AXES, (AxisType.Auto,) * 5, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        choice = choose_here(CONFIG)
        assert (choice.dispatch, choice.exchange) == ("grouped", "ragged_all_to_all")
