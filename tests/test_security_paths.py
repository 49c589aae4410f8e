"""Paths and links in a folder from elsewhere lead nowhere else."""

import json
import shutil

import jax.numpy as jnp
import made_folders
import pytest
from hostile import refused
from runs import write_config

from moejax.ablation.grid import Cell
from moejax.config import UserError
from moejax.interop import hf
from moejax.interop.safetensors_io import read_header
from moejax.training import manifest
from moejax.training.checkpoints import Checkpointer


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "..", ".", "a/b", ""])
def test_an_index_names_files_in_its_folder_only(shard, copied):
    shutil.copy(copied / "model.safetensors", copied.parent / "other.safetensors")
    names = list(read_header(copied / "model.safetensors"))
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, shard)})
    )
    with pytest.raises(UserError, match=r"index\.json|shard named by"):
        hf.load(copied)


def test_a_step_that_is_a_link_is_no_checkpoint(tmp_path):
    """Its files would be deleted with the run's old checkpoints, wherever they lie."""
    outside = tmp_path / "outside"
    with Checkpointer(outside) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "1").symlink_to(outside / "1")
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == []
        for step in (3, 4, 5):
            checkpoints.save(step, {"w": jnp.arange(8.0)}, {})
    assert manifest.read(outside / "1", 1) and (outside / "1" / "state").is_dir()


@pytest.mark.parametrize(
    "name", ["summary.json", "ledger.jsonl", "metrics.jsonl", "config.json.tmp"]
)
def test_a_run_is_not_written_through_links(name, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("my only copy")
    run = made_folders.write_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    config = write_config(tmp_path / "config")
    assert name in refused(capsys, "train", f"--config={config}", f"--workdir={run}")
    assert secret.read_text() == "my only copy"


def test_a_whole_file_replaces_a_link(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("my only copy")
    for name in ("report.html", "report.html.tmp"):
        (tmp_path / name).symlink_to(secret)
    manifest.write_whole(tmp_path / "report.html", "text")
    assert secret.read_text() == "my only copy"
    assert (tmp_path / "report.html").read_text() == "text"
    assert not (tmp_path / "report.html").is_symlink()


@pytest.mark.parametrize("name", ["../../out", "/etc/x", "..", "", "a/b", 3])
@pytest.mark.parametrize("field", ["id", "trunk"])
def test_a_cell_of_an_ablation_is_a_folder_in_it(field, name):
    good = Cell("a-seed0", "a", 0, 1.0, "final", None, 1, 1.0, 1.0, {}).to_dict()
    assert Cell.from_dict(good).id == "a-seed0"
    with pytest.raises(UserError, match="no cell"):
        Cell.from_dict(good | {field: name})
    with pytest.raises(UserError, match="no cell"):
        Cell.from_dict(good | {"more": 1})
