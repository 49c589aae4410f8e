"""Documents: what every source yields, and the files of local text that yield them."""

import codecs
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moejax import config

# A longer text file is read as several documents, cut at line ends, so that memory stays bounded.
LONGEST_DOCUMENT = 16 * 2**20


class Document(NamedTuple):
    """One document of a corpus.

    ``name`` says where it is from, for messages. ``key`` decides by its hash whether the document
    is held out: its path for a file, and None for a record, which is judged by its content.
    ``split`` is set where the source has splits of its own: "train" or "validation".
    """

    text: str
    name: str
    key: str | None = None
    split: str | None = None


class Corpus(NamedTuple):
    """A source that was opened.

    ``read()`` yields every document, in the same order each time it is called. ``provenance`` is
    JSON-ready: source, path or name, licence where known, and what else identifies the text.
    """

    read: Callable[[], Iterator[Document]]
    provenance: dict[str, Any]


def text_corpus(path: str, text_field: str, validation_bytes: Callable[[int], int]) -> Corpus:
    """A file or folder of text; hidden files and folders are left out.

    A text file is one document (very long ones are cut at line ends), a line of a .jsonl and a row
    of a .parquet file are one each. Of a single text file the **last** bytes are held out, cut at a
    line end where there is one; files of a folder are held out by the hash of their path in it, and
    records by the hash of their text.

    Args:
      path: the file or folder.
      text_field: the field of records that holds the text.
      validation_bytes: from the bytes of a single text file to the bytes to hold out.

    Raises:
      ConfigError: nothing there, or nothing in it.
    """
    root = pathlib.Path(path).expanduser()
    config.check(root.exists(), "data.path", path, "no such file or folder; give text that exists")
    files = [root] if root.is_file() else _visible_files(root)
    config.check(bool(files), "data.path", path, "the folder has no files; put text in it")
    if sum(file.stat().st_size for file in files) == 0:
        raise config.ConfigError("data.path", path, "holds no text at all; put text in it")
    alone = len(files) == 1 and files[0].suffix not in (".jsonl", ".parquet")

    def read() -> Iterator[Document]:
        try:
            if alone:
                yield from _single_file(files[0], validation_bytes)
                return
            for file in files:
                yield from _documents_of(file, file.relative_to(root).as_posix(), text_field)
        except OSError as error:
            remedy = f"cannot be read ({error.strerror}); mend it or leave it out"
            raise config.ConfigError("data.path", error.filename or path, remedy) from error

    return Corpus(read, {"source": "text", "path": str(root.resolve()), "licence": "unknown"})


def _visible_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file below a folder that is not hidden, nor in a hidden folder, sorted by path."""
    files = (p for p in root.rglob("*") if p.is_file())
    visible = [
        p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)
    ]
    return sorted(visible, key=lambda p: p.relative_to(root).as_posix())


def _documents_of(file: pathlib.Path, key: str, text_field: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _jsonl(file, text_field)
    elif file.suffix == ".parquet":
        yield from _parquet(file, text_field)
    else:
        for part, text in enumerate(_text_parts(file, 0, file.stat().st_size)):
            yield Document(text, str(file), key=key if not part else f"{key}\n{part}")


def _single_file(file: pathlib.Path, validation_bytes: Callable[[int], int]) -> Iterator[Document]:
    size = file.stat().st_size
    boundary = _line_end(file, max(1, size - validation_bytes(size)), size)
    for split, start, stop in (("train", 0, boundary), ("validation", boundary, size)):
        for text in _text_parts(file, start, stop):
            yield Document(text, str(file), split=split)


def _line_end(file: pathlib.Path, offset: int, size: int) -> int:
    """Where to cut a file, at ``offset`` or soon after it.

    After the first line end from there on, if that leaves half of the rest; or else at the start of
    a character.
    """
    with file.open("rb") as stream:
        stream.seek(offset - 1)
        before, rest = stream.read(1), stream.read(2**20)
    if before == b"\n":
        return offset
    newline = rest.find(b"\n", 0, (size - offset) // 2)
    if newline >= 0:
        return offset + newline + 1
    while rest and 0x80 <= rest[0] < 0xC0:
        offset, rest = offset + 1, rest[1:]
    return offset


def _text_parts(file: pathlib.Path, start: int, stop: int) -> Iterator[str]:
    """The text of a range of a file's bytes, in parts no longer than LONGEST_DOCUMENT."""
    with file.open("rb") as stream:
        stream.seek(start)
        decoder = codecs.getincrementaldecoder("utf-8")()
        while start < stop:
            raw = stream.read(min(LONGEST_DOCUMENT, stop - start))
            if not raw:
                return
            if start + len(raw) < stop and (end := raw.rfind(b"\n") + 1):
                raw = raw[:end]
                stream.seek(start + end)
            start += len(raw)
            yield decode(raw, str(file), decoder, final=start >= stop)


def decode(
    raw: bytes, name: str, decoder: codecs.IncrementalDecoder | None = None, final: bool = True
) -> str:
    """UTF-8 bytes as text.

    Raises:
      ConfigError: bytes that are binary or in another encoding; the file is named.
    """
    decoder = decoder or codecs.getincrementaldecoder("utf-8")()
    if b"\0" in raw:
        raise config.ConfigError("data.path", name, "is binary (it holds zero bytes); leave it out")
    try:
        return decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        raise config.ConfigError(
            "data.path", name, f"is not UTF-8 text (byte {error.start}); convert it or leave it out"
        ) from error


def _jsonl(file: pathlib.Path, text_field: str) -> Iterator[Document]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            name = f"{file}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                remedy = "is not a line of JSON; mend it, or name the file .txt"
                raise config.ConfigError("data.path", name, remedy) from error
            config.check(isinstance(record, dict), "data.path", name, "is not a JSON object")
            yield Document(field_of(record, text_field, name), name)


def _parquet(file: pathlib.Path, text_field: str) -> Iterator[Document]:
    import pyarrow as pa  # slow to import, and only parquet needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                remedy = f"no such field in {file}; {config.nearest(text_field, names)}"
                raise config.ConfigError("data.text_field", text_field, remedy)
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for record in batch.to_pylist():
                    yield Document(field_of(record, text_field, f"{file}:{row}"), f"{file}:{row}")
                    row += 1
    except pa.ArrowInvalid as error:
        remedy = "is not a parquet file that can be read; write it again"
        raise config.ConfigError("data.path", str(file), remedy) from error


def field_of(record: dict[str, Any], text_field: str, name: str) -> str:
    """The text of a record.

    Args:
      record: field names to values; text may be bytes.
      text_field: which field.
      name: where the record is, for messages.

    Raises:
      ConfigError: no such field, no text in it, or text that UTF-8 cannot hold.
    """
    if text_field not in record:
        hint = config.nearest(text_field, record)
        raise config.ConfigError("data.text_field", text_field, f"no such field in {name}; {hint}")
    value = record[text_field]
    if isinstance(value, bytes):
        return decode(value, name)
    if not isinstance(value, str):
        remedy = f"holds {type(value).__name__}, not text, in {name}; name a field of text"
        raise config.ConfigError("data.text_field", text_field, remedy)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
        raise config.ConfigError("data.path", name, "holds text that is not Unicode") from error
    return value
