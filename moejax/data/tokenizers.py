"""Text to ids and back: bytes, a byte-pair encoding trained on the corpus, or a tokenizer.json.

Every tokenizer has one separator, which stands before, between and after documents and which no
text encodes to: text that spells ``<|endoftext|>`` is text.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import tokenizers as hf
from jaxtyping import Int, Int32

from moejax import config

END_OF_TEXT = "<|endoftext|>"
# End-of-text tokens of published tokenizers, looked for in this order.
KNOWN_SEPARATORS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's own spelling)
    "<|endofdocument|>",
    "<|eos|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
)
FILE, DESCRIPTION = "tokenizer.json", "tokenizer_description.json"


class Tokenizer(Protocol):
    """What the rest of moejax asks of a tokenizer."""

    vocab_size: int  # ids lie below this
    separator: int  # the document separator's id
    fingerprint: str  # equal fingerprints encode alike

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Ids of a text, without any separator."""

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _"]]:
        """Ids of several texts, on all cores where that helps."""

    def decode(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> str:
        """Text of ids; separators and ids outside the vocabulary give nothing."""

    def save(self, path: pathlib.Path) -> None:
        """Writes the tokenizer into a folder; ``load_saved`` reads it back."""


class BytesTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the separator."""

    vocab_size = 257
    separator = 256
    fingerprint = hashlib.sha256(b"moejax bytes, separator 256").hexdigest()

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, path: pathlib.Path) -> None:
        _write_description(pathlib.Path(path), {"kind": "bytes"})


class JsonTokenizer:
    """A tokenizer of the ``tokenizers`` library, with one of its tokens as the separator."""

    def __init__(self, tokenizer: hf.Tokenizer, separator: int):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        self._tokenizer, self.separator = tokenizer, separator
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        described = f"{separator}\n{tokenizer.to_str()}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " _"]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Int[np.ndarray, " n"] | Sequence[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.separator]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def save(self, path: pathlib.Path) -> None:
        path = pathlib.Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(self._tokenizer.to_str(), encoding="utf-8")
        _write_description(path, {"kind": "json", "separator": self.separator})


def _write_description(path: pathlib.Path, description: dict) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")


def save(tokenizer: Tokenizer, path: str | pathlib.Path) -> None:
    """Writes a tokenizer into a folder, a run directory for example."""
    tokenizer.save(pathlib.Path(path))


def load_saved(path: str | pathlib.Path) -> Tokenizer:
    """Reads back what ``save`` wrote.

    Raises:
      UserError: the folder holds no tokenizer, or a damaged one.
    """
    path = pathlib.Path(path)
    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        if description["kind"] == "bytes":
            return BytesTokenizer()
        text = (path / FILE).read_text(encoding="utf-8")
        return JsonTokenizer(hf.Tokenizer.from_str(text), description["separator"])
    except Exception as error:  # the library raises plain Exception on a broken file
        raise config.UserError(
            f"{path}: holds no readable tokenizer ({_first_line(error)}); "
            "give a run directory or shards that moejax wrote"
        ) from error


def load_json(path: str | pathlib.Path, separator: str = "") -> JsonTokenizer:
    """Loads a given ``tokenizer.json``.

    Args:
      path: the file.
      separator: its end-of-text token; "" looks for one of ``KNOWN_SEPARATORS``.

    Raises:
      ConfigError: a missing or broken file, or no such separator in it.
    """
    path = pathlib.Path(path).expanduser()
    config.check(
        path.is_file(),
        "data.tokenizer",
        str(path),
        "no such file; use 'bytes', 'bpe' or the path of a tokenizer.json",
    )
    try:
        tokenizer = hf.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception on a broken file
        remedy = f"not a tokenizer.json that can be read ({_first_line(error)}); give a whole one"
        raise config.ConfigError("data.tokenizer", str(path), remedy) from error
    config.check(bool(vocabulary), "data.tokenizer", str(path), "has no ids; give a whole one")
    if separator:
        hint = "not a token of data.tokenizer; name its end-of-text token"
        config.check(separator in vocabulary, "data.separator", separator, hint)
    else:
        found = [token for token in KNOWN_SEPARATORS if token in vocabulary]
        hint = f"none of the usual end-of-text tokens is in {path}; name the one it has"
        config.check(bool(found), "data.separator", separator, hint)
        separator = found[0]
    return JsonTokenizer(tokenizer, vocabulary[separator])


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


# Pieces that a BPE never merges across: a word with the one mark or space before it, a number, a
# run of marks with the white space after it (so `:` takes the line end and the indentation along),
# and white space. Of seven ways tried on the built-in corpus this one compresses best.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"| ?\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+\s*"
    r"|\s+(?!\S)|\s+"
)


def spread_sample(texts: Iterable[str], total_bytes: int, max_bytes: int) -> Iterable[str]:
    """Evenly spread documents of a corpus, about ``max_bytes`` of it; all of a smaller one.

    Args:
      texts: documents in corpus order.
      total_bytes: UTF-8 bytes of all of them.
      max_bytes: how much to keep. A document is kept where what was kept so far lags behind.
    """
    share = min(1.0, max_bytes / max(1, total_bytes))
    seen = kept = 0
    for text in texts:
        seen += len(text)
        if share == 1.0 or kept < seen * share - len(text) / 2:
            kept += len(text)
            yield text


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Trains a byte-level BPE; lossless on any text, and the same for the same texts in order.

    Args:
      texts: training documents.
      vocab_size: ids to make, 256 bytes and the separator included; fewer come out where the texts
        are too short for more merges.

    Returns:
      The tokenizer; its separator is ``<|endoftext|>``.
    """
    tokenizer = hf.Tokenizer(hf.models.BPE())
    split = hf.pre_tokenizers.Split(hf.Regex(SPLIT), behavior="isolated")
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer, tokenizer.token_to_id(END_OF_TEXT))
