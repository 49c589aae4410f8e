"""Folders for results: checked before the work that fills them, and there as a whole or not."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from moejax.config import UserError


def check_output_folder(folder: str | pathlib.Path, result: str, shown: str) -> pathlib.Path:
    """The folder for the results: a new one, an empty one, or one that was written here before.

    Args:
      folder: as the user gave it.
      result: the file that tells an earlier result's folder.
      shown: the flag and its value, for messages.

    Raises:
      UserError: it is a file, holds something else, or cannot be written. Nothing is written here.
    """
    path = pathlib.Path(folder).absolute()
    why = why_not_writable(path)
    if why is not None:
        raise UserError(f"{shown}: {why}")
    if path.is_dir() and any(path.iterdir()) and not (path / result).is_file():
        raise UserError(
            f"{shown}: holds files, but no earlier {result}; give a new or an empty folder"
        )
    return path


def why_not_writable(path: pathlib.Path) -> str | None:
    """Why a folder cannot be made or written, and the remedy; None where it can be."""
    above = path
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        return f"{str(above)!r} is a file; give a folder"
    try:
        # Permissions do not tell of every file system, so it is tried.
        os.rmdir(tempfile.mkdtemp(dir=above))
    except OSError as error:
        return f"{str(above)!r} cannot be written ({error.strerror}); choose another folder"
    return None


def check_new_folder(folder: str | pathlib.Path, shown: str) -> pathlib.Path:
    """The target of ``whole_folder``: nothing may stand there but an empty folder.

    Raises:
      UserError: a file or a filled folder. Nothing is written here.
    """
    path = pathlib.Path(folder).absolute()
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{shown}: exists and holds files; give a new folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{shown}: is a file; give a new folder")
    return path


@contextlib.contextmanager
def whole_folder(target: pathlib.Path, shown: str) -> Iterator[pathlib.Path]:
    """A folder beside the target that takes its name if all goes well, and vanishes if not.

    Args:
      target: from ``check_new_folder``.
      shown: the flag and its value, for messages.

    Raises:
      UserError: it cannot be written; nothing is left behind.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, target)
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be written ({error.strerror}); nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
