"""Two processes that go back: to a step that was asked for, and from a bad loss."""

import json

import pytest
from launches import launch, losses
from runs import write_config

from moejax.cost.bill import read


@pytest.mark.slow
def test_two_processes_go_back_to_a_step_together(tmp_path):
    config, workdir = write_config(tmp_path), tmp_path / "run"
    words = (f"--config={config}", f"--workdir={workdir}", "--config.mesh.data=0")
    assert launch(*words).returncode == 0
    before = losses(workdir)
    again = launch(*words, "--resume-from=4")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stderr.count("going back to step 4: given up: checkpoints of steps 6") == 1
    assert losses(workdir) == before and read(workdir)["redone"]["steps"] == 2
    refused = launch(*words, "--resume-from=3")
    assert "--resume-from = 3" in refused.stderr and "those of steps 4, 6" in refused.stderr
    assert refused.returncode == 2 and "Traceback" not in refused.stderr


@pytest.mark.slow
def test_two_processes_go_back_from_a_bad_loss_together(tmp_path):
    """A learning rate that ruins the parameters: back to step 0, and there again, which is the end;
    both processes come to it."""
    config, workdir = write_config(tmp_path), tmp_path / "run"
    bad = ("optim.learning_rate=1e30", "optim.clip_norm=0.0", "optim.warmup_steps=0",
           "checkpoint.every_steps=0", "guard.action=rewind", "mesh.data=0")  # fmt: skip
    words = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{b}" for b in bad)]
    done = launch(*words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("going back to step 0, and batch") == 1
    assert "the run failed: step" in done.stderr
    result = json.loads((workdir / "summary.json").read_text())
    assert (result["status"], result["rewinds"]) == ("failed", 1)
    assert read(workdir)["redone"]["steps"] > 0
