"""Bits per byte of held-out text by domain, with intervals, beside a unigram model and gzip.

The sampling unit is the document: tokens of one document are no independent draws, so an interval
over tokens would be far too narrow.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from moejax.analysis import held_out as held_out_lib
from moejax.analysis.held_out import HeldOut
from moejax.analysis.scoring import score
from moejax.data.baselines import gzip_bytes
from moejax.data.store import TokenStore
from moejax.models import ModelConfig

CONFIDENCE = 0.95
ALL = "(all)"


@dataclasses.dataclass(frozen=True)
class Documents:
    """Held-out documents, one entry each.

    Attributes:
      targets: tokens to predict, the document's end among them.
      bytes: of its UTF-8 text.
      seen: targets that the model was run on.
      nats: of those, by the model.
      unigram_nats: of all targets, under add-one-smoothed counts of the training text.
    """

    targets: Int[np.ndarray, " N"]
    bytes: Int[np.ndarray, " N"]
    seen: Int[np.ndarray, " N"]
    nats: Float[np.ndarray, " N"]
    unigram_nats: Float[np.ndarray, " N"]


def run(
    config: ModelConfig,
    variables: dict[str, Any],
    held_out: HeldOut,
    *,
    batch_size: int,
    max_batches: int | None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Documents, int]:
    """Runs a model over held-out text, on the current mesh.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      held_out: the text, opened ``with_text``.
      batch_size: rows at once.
      max_batches: batches at most, evenly spread over the text; None takes all.
      say: takes lines about what goes on.

    Returns:
      The documents, and how many batches were run.
    """
    lengths = np.asarray(held_out.rows.store.lengths)
    sizes = np.array([len(text.encode()) for text in held_out.texts], np.int64)
    seen, nats = np.zeros(len(lengths), np.int64), np.zeros(len(lengths))
    every = -(-len(held_out.rows) // batch_size)
    count = min(every, max_batches or every)
    for batch in held_out_lib.batches(held_out.rows, batch_size=batch_size, max_batches=count):
        documents = batch.pop("documents")
        real = documents >= 0
        nll = np.asarray(jax.device_get(score(config, variables, batch).nll), np.float64)
        seen += np.bincount(documents[real], minlength=len(lengths))
        nats += np.bincount(documents[real], nll[real], minlength=len(lengths))
    say(f"held out    {seen.sum():,} tokens of {(seen > 0).sum():,} documents")
    unigram = unigram_nats(held_out.train_counts, held_out.rows.store)
    return Documents(lengths, sizes, seen, nats, unigram), count


def unigram_nats(train_counts: Int[np.ndarray, " V"], store: TokenStore) -> Float[np.ndarray, " N"]:
    """Nats of each document under add-one-smoothed training counts; see ``data.baselines``."""
    ends = np.cumsum(store.lengths)
    if not len(ends):
        return np.zeros(0)
    cost = math.log(float(train_counts.sum()) + len(train_counts)) - np.log(train_counts + 1.0)
    targets = np.asarray(store.read(0, int(ends[-1]) + 1), np.int64)[1:]
    return np.add.reduceat(cost[targets], ends - store.lengths)


def by_domain(documents: Documents, held_out: HeldOut) -> dict[str, Any]:
    """Bits per byte over all the text and by domain, JSON-ready.

    Args:
      documents: from ``run``.
      held_out: the same text.

    Returns:
      ``total`` and ``domains``, a list in the order of ``Domains.names`` (domains of which no
      document was seen are left out), each with what ``of_documents`` gives; ``kind``, what sets
      the domains apart, and ``why`` there are none.
    """
    domains, found = held_out.domains, []
    everything = np.ones(len(documents.targets), bool)
    total = {"name": ALL, **of_documents(documents, everything, held_out)}
    for number, name in enumerate(domains.names if domains else ()):
        own = domains.of_document == number
        if documents.seen[own].any():
            found.append({"name": name, **of_documents(documents, own, held_out)})
    kind = domains.kind if domains else None
    return {"total": total, "domains": found, "kind": kind, "why": held_out.why or None}


def of_documents(
    documents: Documents, own: Bool[np.ndarray, " N"], held_out: HeldOut
) -> dict[str, Any]:
    """Bits per byte of some documents.

    A document that was run in part counts with the share of its bytes that its seen targets are of
    all its targets; where all batches were run, every figure is exact.

    Args:
      documents: from ``run``.
      own: which of them.
      held_out: the same text.

    Returns:
      ``documents``, ``tokens`` and ``bytes`` that the model was run on; ``nats_per_token``;
      ``bits_per_byte`` and its ``interval`` of 95 % (see ``ratio_interval``; None for one
      document); and of the whole text of these documents, seen or not, ``unigram`` and ``gzip``
      (``gzip -9`` as one stream), bits per byte as well.
    """
    seen = own & (documents.seen > 0)
    share = documents.seen[seen] / documents.targets[seen]
    sizes = documents.bytes[seen] * share
    bits = documents.nats[seen] / math.log(2)
    text = "".join(held_out.texts[i] for i in np.flatnonzero(own)).encode()
    whole = int(documents.bytes[own].sum())
    return {
        "documents": int(seen.sum()),
        "tokens": int(documents.seen[seen].sum()),
        "bytes": round(float(sizes.sum())),
        "nats_per_token": float(documents.nats[seen].sum() / documents.seen[seen].sum()),
        "bits_per_byte": float(bits.sum() / sizes.sum()),
        "interval": ratio_interval(bits, sizes),
        "unigram": float(documents.unigram_nats[own].sum() / math.log(2) / whole),
        "gzip": 8 * gzip_bytes(text) / whole,
    }


def ratio_interval(
    above: Float[np.ndarray, " n"], below: Float[np.ndarray, " n"], confidence: float = CONFIDENCE
) -> list[float] | None:
    """Interval of ``sum(above) / sum(below)`` over units drawn from a population of such pairs.

    The jackknife's variance of a ratio, (n - 1) / n · sum (R_i - mean R)² where R_i leaves unit i
    out (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 11.3), with Student's
    t of n - 1 degrees of freedom. Units of very unequal sizes are few units in truth; then it is
    still somewhat too narrow.

    Args:
      above, below: of each unit; ``below`` is positive.
      confidence: of the interval.

    Returns:
      Its ends; None for fewer than two units.
    """
    count = len(above)
    if count < 2:
        return None
    without = (above.sum() - above) / (below.sum() - below)
    variance = (count - 1) / count * float(((without - without.mean()) ** 2).sum())
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * math.sqrt(variance)
    ratio = float(above.sum() / below.sum())
    return [ratio - reach, ratio + reach]
