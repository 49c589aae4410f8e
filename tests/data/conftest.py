"""A cache folder of its own, and small corpora."""

import pytest

from moejax.data import DataConfig


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path_factory.getbasetemp() / "moejax-cache"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 40 short texts of uneven length, in sub-folders."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        file = root / f"part{i % 3}" / f"{i}.txt"
        file.parent.mkdir(exist_ok=True)
        lines = (f"{i} times {k} is {i * k}, naïvely\n" for k in range(1, 3 + 7 * i % 29))
        file.write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture
def config(folder):
    return DataConfig(source="text", path=str(folder))
