"""The built-in corpus: the source of the running Python's standard library.

Every machine that can run moejax has it: about 11 MB of code and prose under the PSF licence. It
differs between Python versions, even patch versions, so ``stdlib_manifests.json`` pins the ones at
hand: the provenance says whether this library is the pinned one, and the corpus fingerprint goes
into every run. ``pin()`` writes the running version's entry.
"""

import hashlib
import json
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any

from moejax import config
from moejax.data.documents import Corpus, Document

MANIFESTS = pathlib.Path(__file__).with_name("stdlib_manifests.json")
LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    # Generated character tables, near-copies of one another: some would be held out while their
    # twins are trained on, and the held-out loss would be that of a memory test.
    "encodings",
}  # fmt: skip


def library_files(root: pathlib.Path) -> list[tuple[str, bytes]]:
    """Relative path and content of each UTF-8 ``.py`` file of the library, sorted by path.

    Tests, installed packages, character tables and the files that record how this Python was
    built are left out.
    """
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        built = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith(
            "config-"
        )
        if built or LEFT_OUT & set(relative.parts[:-1]) or not path.is_file():
            continue
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            continue
        files.append((relative.as_posix(), content))
    return files


def describe(files: list[tuple[str, bytes]]) -> dict[str, Any]:
    """The manifest entry of a library: files, bytes, and one hash over paths and file hashes."""
    digest = hashlib.sha256()
    for name, content in files:
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return {
        "files": len(files),
        "bytes": sum(len(content) for _, content in files),
        "sha256": digest.hexdigest(),
    }


def stdlib_corpus(root: pathlib.Path | None = None, version: str | None = None) -> Corpus:
    """The standard library's source; each file is one document, held out by the hash of its path.

    Args:
      root: the library's folder; None is the running Python's.
      version: the Python version to compare with the pinned manifests; None is the running one.

    Raises:
      ConfigError: this Python has no library source on disk.
    """
    root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
    version = version or platform.python_version()
    files = library_files(root)
    remedy = f"{root} has no Python source; use data.source 'text' with a data.path of your own"
    config.check(bool(files), "data.source", "stdlib", remedy)
    found = describe(files)
    manifests = json.loads(MANIFESTS.read_text())
    pinned = manifests.get(version)
    provenance = {
        "source": "stdlib",
        "python": version,
        "licence": "PSF-2.0",
        "manifest": found,
        "pinned": found == pinned if pinned else "unknown version",
    }
    if not pinned:
        provenance["warning"] = (
            f"the standard library of Python {version} is not among the pinned ones "
            f"({', '.join(manifests)}): compare runs by fingerprint only"
        )
    elif found != pinned:
        provenance["warning"] = (
            f"the standard library in {root} differs from the pinned one of Python {version} "
            f"(edited, or built by another distributor): compare runs by fingerprint only"
        )

    def read() -> Iterator[Document]:
        for name, content in files:
            yield Document(content.decode(), name, key=name)

    return Corpus(read, provenance)


def pin() -> dict[str, Any]:
    """Writes the running Python's entry into the manifests file, and returns all entries."""
    manifests = json.loads(MANIFESTS.read_text()) if MANIFESTS.exists() else {}
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    manifests[platform.python_version()] = describe(library_files(root))
    MANIFESTS.write_text(json.dumps(dict(sorted(manifests.items())), indent=2) + "\n")
    return manifests
