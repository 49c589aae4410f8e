"""Files that may be lost at no loss: trained tokenizers and tokens, kept by fingerprint.

Entries are folders, written whole or not at all (a temporary folder is renamed), with the size and
SHA-256 of each file beside it; an entry that does not match is taken away and made again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

SUMS = "sums.json"


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find(root: pathlib.Path, key: str) -> pathlib.Path | None:
    """The folder of a whole entry, or None; a damaged one is removed."""
    entry = root / key
    if not entry.is_dir():
        return None
    try:
        sums = json.loads((entry / SUMS).read_text())
        names = {path.name for path in entry.iterdir()} - {SUMS}
        if names == set(sums) and all(sha256_of(entry / name) == sums[name] for name in sums):
            return entry
    except (OSError, ValueError, TypeError):
        pass
    shutil.rmtree(entry, ignore_errors=True)
    return None


@contextlib.contextmanager
def alone(root: pathlib.Path, key: str) -> Iterator[None]:
    """Lets one process of a machine at a time fill a cache: the others wait, and then find it full.

    Without a lock where the cache cannot be written.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(root / f".{key}.lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def put(root: pathlib.Path, key: str, write: Callable[[pathlib.Path], None]) -> bool:
    """Keeps what ``write(folder)`` writes, under a key.

    Args:
      root: the cache; it is made if need be.
      key: name of the entry, a fingerprint.
      write: writes the entry's files into the folder that it is given.

    Returns:
      Whether it is kept; a cache that cannot be written is no error.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
    except OSError:
        return False
    try:
        write(temporary)
        sums = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        (temporary / SUMS).write_text(json.dumps(sums))
        # Another process may have put the same entry there meanwhile: then that one stays.
        with contextlib.suppress(OSError):
            os.rename(temporary, root / key)
        return (root / key).is_dir()
    except OSError:
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
