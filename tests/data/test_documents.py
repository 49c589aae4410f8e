"""Local text: files, folders, JSONL and parquet, and what is wrong with them in one line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.data import documents
from moejax.data.documents import text_corpus


def _read(path, field="text", held_out=lambda size: max(1, size // 10)):
    return list(text_corpus(str(path), field, held_out).read())


def _jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_a_folder_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    found = _read(tmp_path)
    assert [document.key for document in found] == ["a/z.md", "b.txt", "c"]
    assert found[0].text == "text of a/z.md"
    assert found[0].split is None


def test_the_end_of_a_single_file_is_held_out_at_a_line_end(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("".join(f"line {i}\n" for i in range(10)))  # 70 bytes, 7 a line
    train, validation = _read(file, held_out=lambda size: 20)
    # 70 - 20 = 50 lies in line 7 (bytes 49 to 56): the cut is after it.
    assert (train.split, validation.split) == ("train", "validation")
    assert validation.text == "line 8\nline 9\n"
    assert train.text + validation.text == file.read_text()


@settings(max_examples=60, deadline=None)
@given(text=st.text("aé漢😀\n", min_size=2, max_size=60), share=st.floats(0.05, 0.95))
def test_any_single_file_is_cut_between_characters(tmp_path_factory, text, share):
    file = tmp_path_factory.mktemp("single") / "a.txt"
    file.write_text(text, encoding="utf-8", newline="")
    budget = max(1, int(share * len(text.encode())))
    found = _read(file, held_out=lambda size: budget)
    assert "".join(document.text for document in found) == text
    held_out = [d.text for d in found if d.split == "validation"]
    assert len("".join(held_out).encode()) <= budget


def test_a_long_file_is_several_documents_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 64)
    text = "".join(f"naïve line {i}\n" for i in range(30)) + "x" * 200 + "é" * 50
    for name in ("a", "b"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = [d for d in _read(tmp_path) if d.name.endswith("a")]
    assert "".join(document.text for document in found) == text
    assert found[0].text.endswith("\n")
    assert all(len(document.text.encode()) <= 65 for document in found)
    assert len({document.key for document in found}) == len(found)


def test_records_of_jsonl_and_parquet(tmp_path):
    _jsonl(tmp_path / "a.jsonl", [{"body": "one"}, {"body": "two é"}])
    pq.write_table(pa.table({"body": ["three", "four"], "n": [1, 2]}), tmp_path / "b.parquet")
    found = _read(tmp_path, "body")
    assert [document.text for document in found] == ["one", "two é", "three", "four"]
    assert {document.key for document in found} == {None}
    assert [d.text for d in _read(tmp_path / "a.jsonl", "body")] == ["one", "two é"]
    assert [d.text for d in _read(tmp_path / "b.parquet", "body")] == ["three", "four"]


def _bad(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "where", "message"),
    [
        ("x.txt", b"ab\0cd", "x.txt", "is binary"),
        ("x.txt", b"caf\xe9 au lait", "x.txt", "is not UTF-8 text (byte 3)"),
        ("x.txt", b"cut \xc3", "x.txt", "is not UTF-8 text"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', "x.jsonl:2", "is not a line of JSON"),
        ("x.jsonl", b"[1]\n", "x.jsonl:1", "is not a JSON object"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl:1", "is not Unicode"),
        ("x.jsonl", b"\xff\n", "x.jsonl:1", "is not a line of JSON"),
        ("x.parquet", b"not parquet at all", "x.parquet", "is not a parquet file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, where, message):
    with pytest.raises(ConfigError) as error:
        _read(_bad(tmp_path, name, content))
    assert error.value.field == "data.path"
    assert str(error.value.value).endswith(where)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [({"txt": "a"}, "did you mean 'txt'?"), ({"text": 3}, "holds int, not text")],
)
def test_a_record_without_text(tmp_path, record, message):
    with pytest.raises(ConfigError) as error:
        _read(_jsonl(tmp_path / "a.jsonl", [record]))
    assert str(error.value).startswith("data.text_field = 'text': ")
    assert message in str(error.value)


def test_a_parquet_file_without_the_field(tmp_path):
    pq.write_table(pa.table({"txt": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="did you mean 'txt'"):
        _read(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        _read(tmp_path / "absent")
    with pytest.raises(ConfigError, match="the folder has no files"):
        _read(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match="holds no text at all"):
        _read(tmp_path)
