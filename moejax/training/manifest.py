"""The SHA-256 manifest that makes a folder a checkpoint: written last, verified before a restore.

Orbax restores flipped bits silently, so every file in a step's folder is listed with its size and
digest, and the manifest carries a digest of itself.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

from moejax.config import UserError

NAME = "manifest.json"
MAX_BYTES = 64 << 20


class CheckpointError(UserError):
    """A checkpoint that could not be saved, or must not be restored; one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def refused(step: int, why: str) -> CheckpointError:
    """The error for a step that must not be restored."""
    return CheckpointError(f"checkpoint of step {step} refused: {why}")


def seal(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Hashes every file in a folder, puts it on the disk, and writes the manifest.

    Args:
      folder: a step's folder, complete.
      content: ``step``, ``val_loss`` and ``leaves`` (name, dtype and shape, three strings each).

    Raises:
      OSError: something cannot be read or written.
    """
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path, sync=True),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"format": 1, **content, "files": files}
    write_whole(folder / NAME, json.dumps({**content, "sha256": _digest(content)}, indent=1))


def read(folder: pathlib.Path, step: int) -> dict[str, Any]:
    """A step's manifest, proved whole by its own digest.

    Raises:
      CheckpointError: the folder or the manifest is missing, damaged, or of another step.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise refused(step, f"no such folder in {folder.parent}")
    if not path.is_file():
        raise refused(step, f"it has no {NAME}, so its save did not end")
    if path.stat().st_size > MAX_BYTES:
        raise refused(step, f"its {NAME} is above {MAX_BYTES} bytes")
    try:
        content = json.loads(path.read_bytes())
        whole = content["sha256"] == _digest(content) and content["step"] == step
        whole = whole and _has_its_fields(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise refused(step, f"its {NAME} is damaged or of another step")
    return content


def verify(folder: pathlib.Path, step: int) -> None:
    """Compares every file with the manifest.

    Raises:
      CheckpointError: no folder, no manifest or a damaged one, or a file (which is named) that is
        missing, of another size, changed, unreadable or outside the folder.
    """
    for name, entry in read(folder, step)["files"].items():
        path = pathlib.PurePath(name)
        try:
            inside = (folder / path).resolve().is_relative_to(folder.resolve())
            if path.is_absolute() or ".." in path.parts or not inside:
                raise refused(step, f"{name!r} in its manifest is outside its folder")
            if not (folder / path).is_file():
                raise refused(step, f"{name} is missing")
            size = (folder / path).stat().st_size
            if size != entry["bytes"]:
                raise refused(step, f"{name} has {size} bytes instead of {entry['bytes']}")
            if _sha256(folder / path) != entry["sha256"]:
                raise refused(step, f"{name} differs from its SHA-256 in the manifest")
        except (OSError, ValueError) as error:
            raise refused(step, f"{name!r} cannot be read: {error}") from error


def folders(directory: pathlib.Path) -> list[int]:
    """Steps that have a folder, sealed or not, oldest first."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        # A link is none: what is deleted with it would lie elsewhere.
        entries = os.scandir(directory)
        names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        return sorted(int(n) for n in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", n))
    return []


def sealed(directory: pathlib.Path) -> list[int]:
    """Steps that have a manifest, oldest first; their files are not verified here."""
    return [s for s in folders(directory) if (directory / str(s) / NAME).is_file()]


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all, and on the disk; raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link there would lead the writing elsewhere
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(folder: pathlib.Path) -> None:
    """Deletes a step's folder, the manifest first, so that no half of it counts as a checkpoint."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: pathlib.Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _has_its_fields(content: dict[str, Any]) -> bool:
    """Whether a manifest has the fields and types that the rest relies on."""
    files_typed = all(
        type(entry["bytes"]) is int and isinstance(entry["sha256"], str)
        for entry in content["files"].values()
    )
    leaves_typed = all(
        len(leaf) == 3 and all(isinstance(part, str) for part in leaf) for leaf in content["leaves"]
    )
    return files_typed and leaves_typed and type(content["val_loss"]) in (int, float, type(None))
