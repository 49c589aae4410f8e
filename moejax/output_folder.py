"""Checks a folder for results before the work that fills it."""

import os
import pathlib
import tempfile

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
    above = path
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise UserError(f"{shown}: {str(above)!r} is a file; give a folder")
    try:
        # Permissions do not tell of every file system, so it is tried.
        os.rmdir(tempfile.mkdtemp(dir=above))
    except OSError as error:
        raise UserError(
            f"{shown}: {str(above)!r} cannot be written ({error.strerror}); choose another folder"
        ) from None
    if path.is_dir() and any(path.iterdir()) and not (path / result).is_file():
        raise UserError(
            f"{shown}: holds files, but no earlier {result}; give a new or an empty folder"
        )
    return path
