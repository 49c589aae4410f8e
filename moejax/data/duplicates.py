"""Documents that occur more than once, found by the hash of their text.

Two documents are the same where their texts are, but for white space at the end: a file that was
saved with one more line end is no other text. Only hashes are kept, 32 bytes a document.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

_WIDTH = 32  # bytes of a SHA-256


class Digests:
    """The SHA-256 of each document of a corpus, in order."""

    def __init__(self):
        self._bytes = bytearray()

    def add(self, text: str) -> None:
        """Takes the next document; white space at its end does not count."""
        self._bytes += hashlib.sha256(text.rstrip().encode()).digest()

    def array(self) -> Shaped[np.ndarray, " documents"]:
        """The digests, as an array of byte strings that NumPy can sort and compare.

        NumPy leaves out zero bytes at the end, which makes no two digests of one length equal.
        """
        return np.frombuffer(self._bytes, f"S{_WIDTH}")


class Seen:
    """The documents that are kept so far, through all sources of a mixture."""

    def __init__(self):
        self._digests = np.empty(0, f"S{_WIDTH}")

    def first_copies(
        self, digests: Shaped[np.ndarray, " documents"], first: Bool[np.ndarray, " documents"]
    ) -> Bool[np.ndarray, " documents"]:
        """Which documents of a source are to be kept, each text once; they count as seen then.

        Args:
          digests: of the source's documents.
          first: documents that go before the others of their source: what it holds out itself.

        Returns:
          True for the first document of each text that no source before this one has.
        """
        order = np.argsort(~first, kind="stable")
        texts, places = np.unique(digests[order], return_index=True)
        new = ~np.isin(texts, self._digests)
        kept = np.zeros(len(digests), bool)
        kept[order[places[new]]] = True
        self._digests = np.concatenate([self._digests, texts[new]])
        return kept


def dropped_line(provenance: Mapping[str, Any]) -> str:
    """How many documents of a source were dropped as copies; empty where none were looked for."""
    if "duplicate_documents" not in provenance:
        return ""
    return (
        f"dropped {provenance['duplicate_documents']:,} of {provenance['documents']:,} documents "
        f"as copies, {provenance['duplicate_bytes'] / 1e6:.1f} MB"
    )
