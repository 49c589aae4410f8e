"""Preferences as rows: two responses to a prompt, of which the first is preferred.

A row is one pair, never packed with others: ``sep prompt chosen sep`` as segment 1 and ``sep prompt
rejected sep`` as segment 2. Targets weigh 1 over the chosen response with its stop token, -1 over
the rejected one, 0 elsewhere.
"""

from collections.abc import Callable

import numpy as np

from moejax.data.data_config import DataConfig
from moejax.data.dataset import TextDataset
from moejax.data.packing import Plan
from moejax.data.pair_files import read_preferences
from moejax.data.pairs import (
    PairRows,
    check_size,
    chosen,
    dataset_of,
    encode_pairs,
    fingerprint,
    fit,
    hold_out,
    store_of,
    tokenizer_for,
)
from moejax.data.tokenizers import Tokenizer


class PreferenceRows(PairRows):
    """Rows of preferences; documents 2i and 2i + 1 of the store are row i.

    What is counted is of the responses that are preferred: a held-out loss is theirs.
    """

    def _make_plan(self) -> Plan:
        count = len(self.store.lengths) // 2
        sizes = self.store.lengths.astype(np.int32)
        return Plan(self._starts, sizes, 2 * np.arange(count + 1, dtype=np.int64))


def open_preferences(
    config: DataConfig, seq_len: int, check_tokenizer: Callable[[Tokenizer], None]
) -> TextDataset:
    """Opens the preferences that a config names, a part of them held out by their prompts.

    Args:
      config: the block ``data``.
      seq_len: S.
      check_tokenizer: refuses one that the model cannot take.

    Raises:
      ConfigError: a path or a line of no use, see ``read_preferences``; both responses with their
        prompts are longer than a row; nothing to hold out or to train on, or too much text.
    """
    preferred, others = read_preferences(config.path)
    check_size(config, preferred, others)
    tokenizer = tokenizer_for(config, preferred, check_size(config, preferred))
    check_tokenizer(tokenizer)
    encoded = [encode_pairs(pairs, tokenizer) for pairs in (preferred, others)]
    lengths = sum(
        np.array([len(p) + len(c) + 1 for p, c in zip(*side, strict=True)]) for side in encoded
    )
    numbers = np.flatnonzero(fit(preferred, lengths, seq_len, config.drop_long))
    out = hold_out(
        chosen(preferred, numbers), config.validation_fraction, config.max_validation_bytes
    )
    parts = {"train": numbers[~out], "validation": numbers[out]}
    rows = {}
    for name, own in parts.items():
        sides = ((prompts[i], said[i]) for i in own for prompts, said in encoded)
        store, prompt_lengths = store_of(sides, tokenizer)
        signs = np.tile(np.array([1, -1], np.float32), len(own))
        rows[name] = PreferenceRows(store, seq_len, prompt_lengths, signs)
    found = fingerprint(preferred, parts) + fingerprint(others, parts)
    return dataset_of(preferred, parts, rows, tokenizer, found)
