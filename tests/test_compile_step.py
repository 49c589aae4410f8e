"""DeepSeek-V3's training step, compiled at full size for 64 devices that are not there."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "launch" / "compile_step.py"


def compiled(name, devices, *settings):
    command = [sys.executable, str(SCRIPT), f"--devices={devices}"]
    command += [f"--config={ROOT / 'experiments' / 'models' / name}.py"]
    command += [f"--config.{setting}" for setting in settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_v3_compiles_for_64_devices_from_shapes():
    """671.03B parameters and 11.61B of an MTP module, 12 bytes each: FP32 weights and moments."""
    found = compiled(
        "deepseek_v3", 64, "mesh={'fsdp': 8, 'expert': 8}", "train.batch_size=64",
        "train.micro_batches=1", "model.dtype=bfloat16",
    )  # fmt: skip
    assert found["devices"] == 64
    assert found["params"] == pytest.approx(671.03e9 + 11.61e9, rel=1e-4)
    # By hand, 8 x 8 devices: 59 layers of 256 experts of 3 · 7168 · 2048 parameters are cut into
    # 64 parts, the rest into 8.
    routed = 59 * 256 * 3 * 7168 * 2048
    by_hand = 12 * (routed / 64 + (found["params"] - routed) / 8)
    assert found["counted_bytes"] == pytest.approx(by_hand, rel=1e-9)
    # What the compiled program takes on each device, and what its shardings say.
    assert found["state_bytes"] == pytest.approx(by_hand, rel=0.01)
    assert found["sharded_bytes"] == pytest.approx(by_hand, rel=0.01)
    # The state is donated: the step gives it back in place.
    assert found["output_bytes"] == pytest.approx(found["state_bytes"], rel=0.01)
    assert found["temp_bytes"] > 0
    assert found["seconds"]["total"] < 120
    assert found["peak_process_bytes"] < 6e9  # the weights alone would be 2.7e12


@pytest.mark.slow
def test_a_plan_expects_about_the_memory_that_the_program_takes():
    """Llama-3.1-8B on 16 devices: the state within 0.1 %, the temporaries of XLA's CPU backend
    within what fusion and buffers that cannot be shared make of them."""
    found = compiled(
        "llama3_1_8b", 16, "mesh={'fsdp': 16}", "train.batch_size=16", "train.micro_batches=1",
        "model.dtype=float32",
    )  # fmt: skip
    assert found["counted_bytes"] == pytest.approx(found["state_bytes"], rel=0.001)
    assert 0.7 < found["planned_temp_bytes"] / found["temp_bytes"] < 1.1
