"""The cache: whole entries only, damaged ones made again, and no error where it cannot write."""

import pytest

from moejax.data import cache


def _write(folder):
    (folder / "a").write_text("one")
    (folder / "b").write_text("two")


def test_an_entry_comes_back(tmp_path):
    root = tmp_path / "cache"
    assert cache.find(root, "k") is None
    assert cache.put(root, "k", _write)
    assert (cache.find(root, "k") / "b").read_text() == "two"
    assert cache.put(root, "k", _write)  # a second writer of the same entry is no error
    assert [p.name for p in root.iterdir()] == ["k"]  # and no temporary folder stays


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "sums"])
def test_a_damaged_entry_is_taken_away(tmp_path, damage):
    cache.put(tmp_path, "k", _write)
    if damage == "changed":
        (tmp_path / "k" / "a").write_text("One")
    elif damage == "missing":
        (tmp_path / "k" / "a").unlink()
    elif damage == "added":
        (tmp_path / "k" / "c").write_text("")
    else:
        (tmp_path / "k" / cache.SUMS).write_text("[")
    assert cache.find(tmp_path, "k") is None
    assert not (tmp_path / "k").exists()
    assert cache.put(tmp_path, "k", _write)
    assert cache.find(tmp_path, "k")


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(folder):
        _write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.put(tmp_path, "k", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert not cache.put(tmp_path / "file" / "cache", "k", _write)
