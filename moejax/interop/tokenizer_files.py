"""A run's tokenizer as the files that Transformers reads beside a checkpoint."""

import json

import tokenizers as hf

from moejax.data.tokenizers import END_OF_TEXT, Tokenizer

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def tokenizer_files(tokenizer: Tokenizer, text: str | None, seq_len: int) -> dict[str, str]:
    """What makes Transformers encode a text as it was trained on: after the separator.

    Args:
      tokenizer: the run's.
      text: its ``tokenizer.json``; None for bytes, which are written as a byte-level BPE without
        merges, of the same ids.
      seq_len: positions of a row, the longest text that the model has seen.

    Returns:
      ``tokenizer.json`` and ``tokenizer_config.json``, content by name.
    """
    found = _bytes() if text is None else hf.Tokenizer.from_str(text)
    separator = found.id_to_token(tokenizer.separator)
    # In some files it is an ordinary token of the vocabulary.
    found.add_special_tokens([separator])
    found.post_processor = hf.processors.TemplateProcessing(
        single=[separator, "$A"], pair=[separator, "$A", separator, "$B:1"],
        special_tokens=[(separator, tokenizer.separator)],
    )  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    return {FILE: found.to_str(), CONFIG: json.dumps(config, indent=1, ensure_ascii=False) + "\n"}


def _bytes() -> hf.Tokenizer:
    """Bytes 0 to 255 as their own ids, and the separator after them.

    Byte-level encodings spell a byte as a character (GPT-2): itself where it is printable, and the
    others in order from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (i for i in range(256) if i not in printable)
    spelled = {i: chr(i) for i in printable}
    spelled |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    found = hf.Tokenizer(hf.models.BPE(vocab={c: i for i, c in spelled.items()}, merges=[]))
    found.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = hf.decoders.ByteLevel()
    found.add_special_tokens([END_OF_TEXT])
    return found
