"""The built-in corpus: pinned for the versions at hand, and honest where it is another."""

import json
import platform
import re

import pytest

from moejax.config import ConfigError
from moejax.data import splits, stdlib_corpus
from moejax.data.stdlib_corpus import MANIFESTS, describe, library_files


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    for name in (
        "os.py",
        "json/__init__.py",
        "json/tests/test_it.py",
        "test/support.py",
        "site-packages/numpy.py",
        "idlelib/idle_test/a.py",
        "__pycache__/os.py",
        "_sysconfigdata__linux.py",
        "config-3.11-x86/python-config.py",
        "notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    return root


def test_what_is_left_out(library):
    assert [name for name, _ in library_files(library)] == ["json/__init__.py", "os.py"]


def test_an_unknown_version_says_so(library):
    corpus = stdlib_corpus.stdlib_corpus(library, "2.7.18")
    assert corpus.provenance["pinned"] == "unknown version"
    assert "not among the pinned ones" in corpus.provenance["warning"]
    assert corpus.provenance["licence"] == "PSF-2.0"
    assert [(d.name, d.key) for d in corpus.read()] == [
        ("json/__init__.py", "json/__init__.py"),
        ("os.py", "os.py"),
    ]


def test_an_edited_library_is_told_from_the_pinned_one(library, tmp_path, monkeypatch):
    manifests = tmp_path / "manifests.json"
    manifests.write_text(json.dumps({"3.11.7": describe(library_files(library))}))
    monkeypatch.setattr(stdlib_corpus, "MANIFESTS", manifests)
    assert stdlib_corpus.stdlib_corpus(library, "3.11.7").provenance["pinned"] is True
    added = library / "added.py"
    added.write_text("x = 1\n")
    try:
        provenance = stdlib_corpus.stdlib_corpus(library, "3.11.7").provenance
    finally:
        added.unlink()
    assert provenance["pinned"] is False
    assert "differs from the pinned one of Python 3.11.7" in provenance["warning"]


def test_pin_adds_the_running_version(tmp_path, monkeypatch):
    manifests = tmp_path / "manifests.json"
    monkeypatch.setattr(stdlib_corpus, "MANIFESTS", manifests)
    monkeypatch.setattr(stdlib_corpus, "library_files", lambda root: [("a.py", b"x")])
    assert stdlib_corpus.pin() == {platform.python_version(): describe([("a.py", b"x")])}
    assert json.loads(manifests.read_text()) == stdlib_corpus.pin()


def test_a_python_without_its_library(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source = 'stdlib': .*has no Python source"):
        stdlib_corpus.stdlib_corpus(tmp_path)


def test_the_committed_manifests():
    manifests = json.loads(MANIFESTS.read_text())
    assert {"3.11.7", "3.12.1"} <= set(manifests)
    for version, entry in manifests.items():
        assert re.fullmatch(r"3\.\d+\.\d+", version)
        assert set(entry) == {"files", "bytes", "sha256"}
        assert 8e6 < entry["bytes"] < 16e6


def test_the_running_library():
    corpus = stdlib_corpus.stdlib_corpus()
    provenance = corpus.provenance
    # Another build of the same version may differ from the pinned one, but then it must say so.
    assert provenance["pinned"] in (True, "unknown version") or "warning" in provenance
    split = splits.split_corpus(corpus, 0.05, 600_000)
    budget = splits.validation_budget(provenance["manifest"]["bytes"], 0.05, 600_000)
    assert 0.9 * budget <= split.validation_bytes <= budget
    assert split.train_bytes > 5_000_000
    assert split.validation_bytes + split.train_bytes == provenance["manifest"]["bytes"]
