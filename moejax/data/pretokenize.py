"""Pre-tokenised shards: what ``moejax tokenize`` writes, and how a run reads it back.

A folder of shards holds, for each split, ArrayRecord files with the flat sequence of ids (see
``store``) in records of equal length, and an index of the documents' lengths; and once, the
tokenizer, the target counts for the unigram baseline, and ``manifest.json`` with the fingerprint,
sizes and hashes. A run on shards sees the same rows as one on the text itself. Of a mixture, each
source has such a folder of its own, and shares and temperature stay free.
"""

import array
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int, Int64

from moejax import config as config_lib
from moejax.data import splits, store, tokenizers
from moejax.data.baselines import gzip_bytes
from moejax.data.cache import sha256_of
from moejax.data.data_config import DataConfig
from moejax.data.dataset import (
    TextDataset,
    choose_tokenizer,
    dataset_fingerprint,
    provenance_of,
    split_of,
)
from moejax.data.duplicates import dropped_line
from moejax.data.packing import Rows
from moejax.data.tokenizers import Tokenizer

MANIFEST, FORMAT = "manifest.json", 1
SPLITS = {"train": splits.TRAIN, "validation": splits.VALIDATION}


class _SplitWriter:
    """Writes one split's flat sequence as it comes, never holding more than a batch of it."""

    def __init__(self, folder: pathlib.Path, split: str, dtype, record: int, records_a_shard: int):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._record, self._records_a_shard = record, records_a_shard
        self._rest = np.empty(0, dtype)
        self._writer, self._written = None, 0
        self.tokens, self.paths = 0, []

    def write(self, ids: Int[np.ndarray, " n"]) -> None:
        self.tokens += len(ids)
        joined = np.concatenate([self._rest, ids.astype(self._dtype)])
        whole = len(joined) // self._record * self._record
        for start in range(0, whole, self._record):
            self._put(joined[start : start + self._record])
        self._rest = joined[whole:]

    def close(self) -> None:
        if len(self._rest):
            self._put(self._rest)
        if self._writer is not None:
            self._writer.close()

    def _put(self, ids: Int[np.ndarray, " n"]) -> None:
        if self._written % self._records_a_shard == 0:
            if self._writer is not None:
                self._writer.close()
            path = self._folder / f"{self._split}-{len(self.paths):05d}.array_record"
            self.paths.append(path)
            # Groups of one record can be read at random without reading their neighbours.
            self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        self._writer.write(ids.tobytes())
        self._written += 1


def tokenize_corpus(
    config: DataConfig,
    out: str | pathlib.Path,
    *,
    shard_tokens: int = 2**27,
    record_tokens: int = 4096,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tokenises a config's text into a folder of shards, a batch of documents at a time.

    A mixture goes into a folder for each source, named by its label, under one tokenizer.

    Args:
      config: the block ``data``, with any source of text.
      out: the folder to write; it must be new or empty, and appears only once it is whole.
      shard_tokens: ids in a shard file, about.
      record_tokens: ids in a record, the unit that is read.
      report: is told about progress in lines of text.

    Returns:
      The manifest, and ``path``, where it went; of a mixture ``path``, ``fingerprint``,
      ``temperature`` and ``sources``: a manifest with ``path`` and ``weight`` by label.

    Raises:
      ConfigError: a source or an output folder that cannot be used.
    """
    out = pathlib.Path(out).expanduser()
    remedy = "holds shards already; name a source of text"
    config_lib.check(config.source != "shards", "data.source", config.source, remedy)
    for i, source in enumerate(config.mixture):
        where = f"data.mixture[{i}].source"
        config_lib.check(source.source != "shards", where, source.source, remedy)
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    config_lib.check(not taken, "--out", str(out), "is not an empty folder; name a new one")
    record_tokens = max(1, record_tokens)
    sizes = record_tokens, max(1, shard_tokens // record_tokens)
    if config.mixture:
        return _tokenize_mixture(config, out, sizes, report)
    corpus = split_of(config, None)
    tokenizer = choose_tokenizer(config, corpus)
    with _whole_folder(out) as temporary:
        manifest = _write_shards(corpus, tokenizer, temporary, *sizes, report)
    return {**manifest, "path": str(out)}


def _tokenize_mixture(
    config: DataConfig, out: pathlib.Path, sizes: tuple[int, int], report: Callable[[str], None]
) -> dict[str, Any]:
    """A folder of shards for each source of a mixture; see ``tokenize_corpus``."""
    from moejax.data import mixture  # it builds upon this module

    sources = mixture.open_sources(config, 1, None)
    tokenizer = mixture.choose_tokenizer(config, sources)
    whole = mixture.fingerprint(config, sources, tokenizer)
    found = {}
    with _whole_folder(out) as temporary:
        for block, source in zip(config.mixture, sources, strict=True):
            folder, label = temporary / source.label, source.label
            folder.mkdir()
            say = lambda line, label=label: report(f"{label}: {line}")
            together = {mixture.TOGETHER: whole}
            manifest = _write_shards(source.corpus, tokenizer, folder, *sizes, say, together)
            found[label] = {**manifest, "path": str(out / label), "weight": block.weight}
    about = {"fingerprint": whole, "temperature": config.temperature}
    return {"path": str(out), **about, "sources": found}


@contextlib.contextmanager
def _whole_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes ``out`` once everything is there, or goes away."""
    temporary = out.parent / f".{out.name}.writing-{os.getpid()}"
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            remedy = f"cannot be written ({error.strerror}); name a folder that can"
            raise config_lib.ConfigError("--out", str(out), remedy) from error
        yield temporary
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def format_result(result: dict[str, Any]) -> str:
    """What ``tokenize_corpus`` returned, as a few lines for people."""
    if "sources" not in result:
        remedy = f"train on it with data.source='shards' and data.path={result['path']!r}"
        return "\n".join([*_counted(result), f"fingerprint {result['fingerprint']}", remedy])
    lines, blocks = [], []
    for label, manifest in result["sources"].items():
        lines += _counted(manifest)
        block = {"source": "shards", "path": manifest["path"], "label": label}
        if manifest["weight"] is not None:
            block["weight"] = manifest["weight"]
        blocks.append(block)
    lines += [f"fingerprint {result['fingerprint']}", f"train on it with data.mixture={blocks!r}"]
    if result["temperature"] != 1:
        lines[-1] += f" and data.temperature={result['temperature']!r}"
    return "\n".join(lines)


def _counted(manifest: dict[str, Any]) -> list[str]:
    """Lines about one folder of shards."""
    lines = [f"shards in {manifest['path']}, {manifest['vocab_size']:,} ids"]
    if dropped := dropped_line(manifest["provenance"]):
        lines.append(dropped)
    for split, counts in manifest["splits"].items():
        ratio = counts["bytes"] / counts["tokens"]
        lines.append(
            f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes ({ratio:.2f} bytes a token), {len(counts['files'])} files"
        )
    return lines


def _write_shards(
    corpus: splits.SplitCorpus,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    record_tokens: int,
    records_a_shard: int,
    report: Callable[[str], None],
    more_provenance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes both splits, their indices, the tokenizer and the manifest, which is returned."""
    dtype = store.token_dtype(tokenizer.vocab_size)
    written = {}
    for split, code in SPLITS.items():
        writer = _SplitWriter(folder, split, dtype, record_tokens, records_a_shard)
        lengths, counts = _stream(corpus.texts(code), tokenizer, writer, split, report)
        np.save(folder / f"{split}_lengths.npy", lengths)
        np.save(folder / f"{split}_counts.npy", counts)
        written[split] = {
            "files": [{"name": p.name, "size": p.stat().st_size} for p in writer.paths],
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "bytes": corpus.train_bytes if code == splits.TRAIN else corpus.validation_bytes,
        }
    tokenizers.save(tokenizer, folder)
    held_out = "".join(corpus.validation_texts).encode()
    beside = [p for p in sorted(folder.iterdir()) if p.suffix != ".array_record"]
    manifest = {
        "format": FORMAT,
        "fingerprint": dataset_fingerprint(corpus.fingerprint, tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.str,
        "record_tokens": record_tokens,
        "gzip_bytes": gzip_bytes(held_out),
        "splits": written,
        "sha256": {p.name: sha256_of(p) for p in beside},
        "provenance": {**provenance_of(corpus, tokenizer), **(more_provenance or {})},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _stream(
    texts: Iterator[str],
    tokenizer: Tokenizer,
    writer: _SplitWriter,
    split: str,
    report: Callable[[str], None],
) -> tuple[Int64[np.ndarray, " documents"], Int64[np.ndarray, " V"]]:
    """Encodes a split into its writer; returns the documents' lengths and the target counts."""
    separator = np.array([tokenizer.separator], np.int32)
    lengths = array.array("q")
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    writer.write(separator)
    for batch in store.batches_of_text(texts):
        encoded = tokenizer.encode_batch(batch)
        lengths.extend(len(ids) + 1 for ids in encoded)
        flat = np.concatenate([part for ids in encoded for part in (ids, separator)])
        counts += np.bincount(flat, minlength=len(counts))
        writer.write(flat)
        report(f"{split}: {len(lengths):,} documents, {writer.tokens:,} tokens")
    writer.close()
    return np.array(lengths, np.int64), counts


def open_shards(path: str | pathlib.Path, seq_len: int) -> TextDataset:
    """Opens a folder that ``tokenize_corpus`` wrote; the shards' records carry their own checksums.

    Args:
      path: the folder.
      seq_len: S, positions of a row.

    Raises:
      ConfigError: no such folder, no manifest in it, or files that do not match the manifest.
    """
    folder = pathlib.Path(path).expanduser()
    manifest = _read_manifest(folder)
    dtype, record_tokens = np.dtype(manifest["dtype"]), manifest["record_tokens"]
    load = lambda name: _array(folder, f"{name}.npy")
    rows, counts = {}, {}
    for split in SPLITS:
        paths = [str(folder / file["name"]) for file in manifest["splits"][split]["files"]]
        lengths = load(f"{split}_lengths")
        counts[split] = load(f"{split}_counts")
        rows[split] = Rows(store.ShardStore(paths, lengths, record_tokens, dtype), seq_len)
    return TextDataset(
        tokenizer=tokenizers.load_saved(folder),
        train=rows["train"],
        validation=rows["validation"],
        train_bytes=manifest["splits"]["train"]["bytes"],
        validation_bytes=manifest["splits"]["validation"]["bytes"],
        fingerprint=manifest["fingerprint"],
        provenance={**manifest["provenance"], "shards": str(folder.resolve())},
        train_counts=counts["train"],
        validation_counts=counts["validation"],
        gzip_bytes=manifest["gzip_bytes"],
    )


def _array(folder: pathlib.Path, name: str) -> Int64[np.ndarray, " N"]:
    """A file of integers; never pickled objects, nor more memory than the file is long."""
    try:
        values = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        if values.ndim != 1 or values.dtype != np.int64:
            raise ValueError(f"{values.dtype} of shape {values.shape}")
        return np.array(values)
    except (OSError, ValueError, TypeError, OverflowError, EOFError) as error:
        raise config_lib.ConfigError(
            "data.path", str(folder), f"its file {name} holds no integers; write the shards again"
        ) from error


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a folder, once every file beside it has the size or hash that it says."""

    def fail(remedy: str, cause: BaseException | None = None):
        raise config_lib.ConfigError("data.path", str(folder), remedy) from cause

    if not (folder / MANIFEST).is_file():
        within = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        if within:
            fail(f"holds the shards of several sources ({', '.join(within)}); name each folder in "
                 "data.mixture")  # fmt: skip
        fail(f"has no {MANIFEST}; write the shards with `moejax tokenize`")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            fail(f"has format {manifest['format']}, not {FORMAT}; write it again")
        files = [file["name"] for split in SPLITS for file in manifest["splits"][split]["files"]]
        for name in [*files, *manifest["sha256"]]:
            if name != pathlib.PurePath(name).name or name == "..":
                fail(f"{name!r} in its {MANIFEST} is outside of it; write the shards again")
        store_types = (store.token_dtype(1).str, store.token_dtype(2**20).str)
        if manifest["dtype"] not in store_types or type(manifest["record_tokens"]) is not int:
            raise ValueError("no type of tokens")
        if manifest["record_tokens"] <= 0:
            raise ValueError("no tokens in a record")
        for name, digest in manifest["sha256"].items():
            if sha256_of(folder / name) != digest:
                fail(f"its file {name} is damaged; write the shards again")
        for split in SPLITS:
            for file in manifest["splits"][split]["files"]:
                size = (folder / file["name"]).stat().st_size
                if size != file["size"]:
                    expected = f"{size} bytes, not {file['size']}"
                    fail(f"its shard {file['name']} has {expected}; copy it again")
    except OSError as error:
        name = pathlib.Path(error.filename or "?").name
        fail(f"its file {name} is missing; copy the shards again", error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"its {MANIFEST} is damaged; write the shards again", error)
    return manifest
