"""The manifest: what it lists, and hostile ones that are refused in one line."""

import json

import pytest

from moejax.training import manifest
from moejax.training.manifest import CheckpointError


def seal_folder(directory):
    """The sealed folder of step 1, with two files."""
    folder = directory / "1"
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "array").write_bytes(bytes(1000))
    (folder / "extra.json").write_text("{}")
    manifest.seal(folder, {"step": 1, "val_loss": 1.5, "leaves": [["w", "float32", "4x4"]]})
    return folder


def test_every_file_is_listed(tmp_path):
    folder = seal_folder(tmp_path)
    manifest.verify(folder, 1)
    content = manifest.read(folder, 1)
    assert {name: entry["bytes"] for name, entry in content["files"].items()} == {
        "extra.json": 2,
        "state/d/array": 1000,
    }
    # sha256 of "{}", from `printf '{}' | sha256sum`
    assert content["files"]["extra.json"]["sha256"] == (
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )
    assert sorted(p.name for p in folder.iterdir()) == ["extra.json", "manifest.json", "state"]


def test_step_folder_under_another_name_is_refused(tmp_path):
    folder = seal_folder(tmp_path).rename(tmp_path / "9")
    with pytest.raises(CheckpointError, match=r"step 9 refused: .* of another step"):
        manifest.verify(folder, 9)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "state/../../../outside", "link"])
def test_manifest_cannot_name_files_outside_its_folder(tmp_path, name):
    folder = seal_folder(tmp_path / "run")
    (tmp_path / "outside").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "outside")
    content = manifest.read(folder, 1)
    content["files"][name] = {"bytes": 6, "sha256": "0" * 64}
    content["sha256"] = manifest._digest(content)
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside its folder"):
        manifest.verify(folder, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000,
        b'{"step": 1, "sha256": 3, "files": 4}',
        {"step": 1, "val_loss": None, "leaves": [], "files": {"a": 3}},
        {"step": 1, "val_loss": "low", "leaves": [], "files": {}},
        {"step": 1, "val_loss": None, "leaves": [["a", "b"]], "files": {}},
        {"step": 2, "val_loss": None, "leaves": [], "files": {}},
    ],
)  # fmt: skip
def test_hostile_manifest_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "1").mkdir()
    if isinstance(content, dict):
        content = json.dumps({**content, "sha256": manifest._digest(content)}).encode()
    (tmp_path / "1" / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or of another step"):
        manifest.verify(tmp_path / "1", 1)


def test_oversized_manifest_is_not_read(tmp_path, monkeypatch):
    folder = seal_folder(tmp_path)
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    with pytest.raises(CheckpointError, match="above 100"):
        manifest.verify(folder, 1)
