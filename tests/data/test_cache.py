"""The cache: whole entries only, damaged ones made again, and no error where it cannot write."""

import threading
import time

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


def test_one_at_a_time_fills_a_cache_and_the_others_find_it(tmp_path):
    made, found = [], []

    def use():
        with cache.alone(tmp_path / "cache", "corpus"):
            if cache.find(tmp_path / "cache", "k"):
                found.append(1)
                return
            made.append(1)
            time.sleep(0.2)
            cache.put(tmp_path / "cache", "k", _write)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(found)) == (1, 3)


def test_without_a_place_for_a_lock_there_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with cache.alone(tmp_path / "file" / "cache", "corpus"):
        pass
