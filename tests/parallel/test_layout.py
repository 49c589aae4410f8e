"""Layouts by the rule, and changes that make a training fit."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.cost.memory import Layout, Placement, memory_parts, usable_bytes
from moejax.models.presets import PRESETS
from moejax.parallel import check_fits
from moejax.parallel.layout import LOSS_CHUNK, MOST_TOKENS, remedies, suggest

OLMOE, LLAMA, V3 = (PRESETS[n] for n in ("olmoe_1b_7b", "llama3_1_8b", "deepseek_v3"))


def suggested(model, devices, hardware="h100_sxm", seq_len=4096):
    return suggest(model, hardware=hardware, devices=devices, seq_len=seq_len)


CASES = [
    ("olmoe_1b_7b", 64, "h100_sxm"),
    ("qwen3_30b_a3b", 64, "h100_sxm"),
    ("deepseek_v3", 2048, "h800_sxm"),
    ("llama3_1_405b", 16384, "h100_sxm"),
    ("gpt_oss_120b", 48, "h100_sxm"),
    ("mixtral_8x7b", 64, "h200_sxm"),
    ("deepseek_v2_lite", 256, "tpu_v5e"),
]


@pytest.mark.parametrize("name, devices, hardware", CASES)
def test_a_suggestion_fits_divides_and_uses_every_device(name, devices, hardware):
    found = suggested(PRESETS[name], devices, hardware)
    layout = found.layout
    assert found.fits and found.devices_needed is None
    assert layout.devices == devices
    shape = dataclasses.astuple(layout)
    check_fits(shape, found.model, layout.rows, 4096)
    assert layout.rows * 4096 <= MOST_TOKENS
    parts = memory_parts(found.model, hardware=hardware, seq_len=4096, placement=Placement(layout))
    assert sum(parts.values()) == found.memory <= usable_bytes(hardware)
    changed = {f"model.{name}": getattr(found.model, name) for name in ("remat", "loss_chunk")}
    assert found.changes.items() <= changed.items()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(["h100_sxm", "h20", "b200", "gb200", "tpu_v6e", "rtx_4090"]),
    st.integers(1, 600),
    st.sampled_from([512, 4096, 8192]),
)
def test_any_suggestion_divides_and_uses_every_device(name, hardware, devices, seq_len):
    found = suggested(PRESETS[name], devices, hardware, seq_len)
    layout = found.layout
    assert layout.devices == devices
    check_fits(dataclasses.astuple(layout), found.model, layout.rows, seq_len)
    assert found.fits == (found.memory <= usable_bytes(hardware))
    assert found.devices_needed is None or (not found.fits and found.devices_needed > devices)


def test_the_rule():
    """No tensor, experts within a node, then the smallest fsdp that fits, copies for the rest."""
    assert suggested(OLMOE, 64).layout == Layout(data=8, fsdp=1, expert=8, tensor=1)
    smaller = Layout(data=16, fsdp=2, expert=8, tensor=1)
    found = suggested(PRESETS["qwen3_30b_a3b"], 256)
    for fsdp in range(1, found.layout.fsdp):
        if 256 % fsdp == 0:
            one = dataclasses.replace(smaller, data=32 // fsdp, fsdp=fsdp)
            parts = memory_parts(
                found.model, hardware="h100_sxm", seq_len=4096, placement=Placement(one)
            )
            assert sum(parts.values()) > usable_bytes("h100_sxm")
    # A rack of 72 joins more experts' devices.
    assert suggested(OLMOE, 64, "gb200").layout.expert == 64
    # As many rows as one step takes.
    assert suggested(PRESETS["llama3_1_405b"], 16384, seq_len=8192).layout.tensor == 8
    assert not suggested(PRESETS["llama3_1_8b"], 8).layout.expert > 1


def test_what_is_changed_comes_in_the_order_of_what_it_costs():
    assert suggested(OLMOE, 64).changes == {}
    tight = [suggested(PRESETS["qwen3_32b"], devices).changes for devices in (512, 64, 16)]
    assert tight[-1] == {"model.loss_chunk": LOSS_CHUNK, "model.remat": "full"}
    cost = lambda changes: ("loss_chunk" in str(changes)) + (2 * ("remat" in changes))
    assert [*map(cost, tight)] == sorted(map(cost, tight))


def test_too_few_devices_say_how_many_it_takes():
    found = suggested(V3, 64, "h800_sxm")
    assert found.fits is False and found.memory > usable_bytes("h800_sxm")
    assert found.devices_needed > 64
    assert suggested(V3, found.devices_needed, "h800_sxm").fits
    assert not suggested(V3, found.devices_needed // 2, "h800_sxm").fits
    # Sequences so long that a part of a row never fits, whatever it is cut into.
    assert suggested(LLAMA, 8, seq_len=2**28).devices_needed is None


def test_a_cpu_has_no_limit_that_is_known():
    found = suggested(OLMOE, 8, "cpu")
    assert found.fits is None and found.layout == Layout()


def changes(model, hardware="h100_sxm", **placement):
    return remedies(model, hardware=hardware, seq_len=4096, placement=Placement(**placement))


def test_one_change_is_enough():
    """Llama-3.1-8B in full rematerialisation on 8 devices, two rows each."""
    model = dataclasses.replace(LLAMA, remat="full")
    found = changes(model, layout=Layout(data=4, fsdp=2), rows=2)
    assert all(remedy["fits"] for remedy in found)
    flags = [remedy["change"] for remedy in found]
    assert "--config.mesh.fsdp=4 --config.mesh.data=2" in flags
    for remedy in found:
        assert remedy["memory_bytes_per_device"] <= usable_bytes("h100_sxm")
        assert remedy["change"].startswith("--config.")


def test_several_changes_together():
    found = changes(LLAMA, layout=Layout(data=4, fsdp=2), rows=4)
    *alone, last = found
    assert not any(remedy["fits"] for remedy in alone) and last["fits"]
    for part in ("loss_chunk=512", "micro_batches=4", "remat=full", "mesh.fsdp"):
        assert part in last["change"]
    assert last["devices"] == 8


def test_more_devices_share_the_batch():
    """One copy, two rows a device: fsdp twice as wide leaves one; four times needs more rows."""
    found = changes(LLAMA, layout=Layout(fsdp=2), rows=2)
    wider = {r["change"]: r["devices"] for r in found if r["change"].startswith("--config.mesh")}
    assert wider["--config.mesh.fsdp=4"] == 4
    assert wider["--config.mesh.fsdp=8 --config.train.batch_size=16"] == 8
    model = dataclasses.replace(LLAMA, remat="full")
    halves = changes(model, layout=Layout(fsdp=2), rows=1, micro_batches=4)
    assert "--config.mesh.fsdp=4 --config.train.micro_batches=2" in [r["change"] for r in halves]


def test_moments_in_bfloat16_are_offered_by_themselves_only():
    flag, place = "--config.optim.moments_dtype=bfloat16", Layout(fsdp=8, expert=8)
    offered = [remedy["change"] for remedy in changes(V3, layout=place)]
    assert [change for change in offered if "moments" in change] == [flag]
    light = [remedy["change"] for remedy in changes(V3, layout=place, optimizer_bytes=4)]
    assert flag not in light


def test_devices_must_be_some():
    with pytest.raises(ConfigError, match="--devices = 0: must be above zero"):
        suggested(OLMOE, 0)


def test_rows_are_cut_only_where_a_single_one_does_not_fit():
    """Llama-3.1-70B, rows of 128k positions on 512 H100: in four parts, after all else."""
    ask, limit = dict(hardware="h100_sxm", seq_len=2**17), usable_bytes("h100_sxm")
    long = suggest(PRESETS["llama3_1_70b"], devices=512, **ask)
    assert long.fits and long.layout.context == 4 and long.layout.tensor > 1
    assert long.changes == {"model.loss_chunk": LOSS_CHUNK, "model.remat": "full"}
    check_fits(dataclasses.astuple(long.layout), long.model, long.layout.rows, 2**17)
    # In two parts a row does not fit, whatever else the devices do.
    for tensor in (1, 2, 4, 8):
        for fsdp in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            layout = Layout(max(1, 256 // tensor // fsdp), fsdp, context=2, tensor=tensor)
            parts = memory_parts(long.model, placement=Placement(layout), **ask)
            assert layout.devices != 512 or sum(parts.values()) > limit
    for name, devices, hardware in CASES:
        assert suggested(PRESETS[name], devices, hardware).layout.context == 1


def test_parts_of_a_row_divide_it():
    found = suggest(PRESETS["llama3_1_8b"], hardware="h100_sxm", devices=48, seq_len=2**18)
    assert found.fits and found.layout.devices == 48
    assert found.layout.context > 1 and 2**18 % found.layout.context == 0
