"""A moejax model as lm-evaluation-harness asks for one. Imports the extra ``eval``.

A text is given to the model as in training: after the separator, which begins every document. That
is also what a checkpoint of ``moejax export`` does in the harness's own Hugging Face model, since
its tokenizer puts the separator in front.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moejax.analysis.scoring import score
from moejax.config import UserError
from moejax.data.tokenizers import Tokenizer
from moejax.models import ModelConfig
from moejax.models.decode import SamplingConfig, sample

# Tokens to generate where a task does not say, as in the harness's own models.
GENERATED = 256
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
OPTIONS = {*LENGTHS, "until", "do_sample", "temperature"}

Pair = tuple[Any, list[int], list[int]]


class HarnessModel(TemplateLM):
    """Answers the harness's requests on the current mesh.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      tokenizer: the one it was trained with.
      max_length: positions of a row; longer texts lose their beginning, as in the harness.
      batch_size: rows at once.
      seed: of the sampling, where a task samples.
    """

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
        seed: int = 0,
    ):
        super().__init__()
        self._config, self._variables, self._ids = config, variables, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._seeds = np.random.default_rng(seed)

    @property
    def eot_token_id(self) -> int:
        """The separator, which ends a document and begins it."""
        return self._ids.separator

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, after the separator unless ``add_special_tokens`` is False."""
        start = [] if add_special_tokens is False else [self._ids.separator]
        return [*start, *(int(i) for i in self._ids.encode(string))]

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Summed log-likelihood of each continuation after its context, and whether it is greedy.

        Rows are cut to a power of two, so that few programs are compiled.
        """
        found: dict[int, tuple[float, bool]] = {}
        # The longest first: neighbours are of like length, and memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for chunk in _chunks(order, self.batch_size):
            rows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in chunk]
            scores = jax.device_get(self._score(rows))
            for place, i in enumerate(chunk):
                end, count = len(rows[place]) - 1, len(requests[i][2])
                own = slice(max(0, end - count), end)
                nll = float(scores.nll[place, own].astype(np.float64).sum())
                found[i] = (-nll, bool(scores.likeliest[place, own].all()))
        return [found[i] for i in range(len(requests))]

    def _score(self, rows: list[list[int]]) -> Any:
        """Scores of rows of ids, each of whose ids but the first is a target."""
        width = _width(max(len(row) for row in rows) - 1, self.max_length)
        names = ("tokens", "targets", "segment_ids")
        batch = {name: np.zeros((self.batch_size, width), np.int32) for name in names}
        for place, row in enumerate(rows):
            count = len(row) - 1
            batch["tokens"][place, :count], batch["targets"][place, :count] = row[:-1], row[1:]
            batch["segment_ids"][place, :count] = 1
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), (self.batch_size, width))
        return score(self._config, self._variables, {**batch, "positions": positions})

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows of ``max_length``."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [found for found, _ in self._loglikelihood_tokens(windows)])
        return totals.tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to a stop string or the document's end.

        Raises:
          UserError: a task asks for an option of generation that there is not, or for as many
            tokens as a row has.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        found: dict[int, str] = {}
        for group in groups.values():
            options = _options(requests[group[0]].args[1], self.max_length)
            contexts = {i: self.tok_encode(requests[i].args[0]) for i in group}
            group.sort(key=lambda i: -len(contexts[i]))
            for chunk in _chunks(group, self.batch_size):
                texts = self._generate([contexts[i] for i in chunk], *options)
                found |= dict(zip(chunk, texts, strict=True))
        return [found[i] for i in range(len(requests))]

    def _generate(
        self, contexts: list[list[int]], stops: list[str], count: int, temperature: float
    ) -> list[str]:
        room = self.max_length - count
        rows = [context[-room:] for context in contexts]
        width = _width(max(len(row) for row in rows), room)
        prompt = np.zeros((self.batch_size, width), np.int32)
        for place, row in enumerate(rows):
            prompt[place, : len(row)] = row
        lengths = np.ones(self.batch_size, np.int32)
        lengths[: len(rows)] = [len(row) for row in rows]
        seeds = self._seeds.integers(0, 2**32, self.batch_size, np.uint32)
        sampled = jax.device_get(sample(
            self._config, self._variables, prompt, lengths, seeds,
            options=SamplingConfig(max_tokens=count, temperature=temperature),
            stop_ids=(self._ids.separator,), vocab_size=self._ids.vocab_size,
        ))  # fmt: skip
        texts = []
        for place, row in enumerate(rows):
            end = sampled.lengths[place] - sampled.finished[place]
            added = sampled.tokens[place, len(row) : end].tolist()
            texts.append(_until(self._ids.decode(added), stops))
        return texts


def _options(given: dict[str, Any], max_length: int) -> tuple[list[str], int, float]:
    """Stop strings, tokens at most and temperature of a task's ``generation_kwargs``.

    Without ``do_sample`` a temperature samples, and with ``do_sample`` false it does not.
    """
    unknown = {name for name in given.keys() - OPTIONS if given[name] is not None}
    if unknown:
        raise UserError(
            f"--lm-eval: the task generates with {', '.join(sorted(unknown))}, which moejax does "
            f"not do; of generation_kwargs it knows {', '.join(sorted(OPTIONS))}"
        )
    lengths = [given[name] for name in LENGTHS if given.get(name) is not None]
    count = int(lengths[0]) if lengths else GENERATED
    if count >= max_length:
        raise UserError(
            f"--lm-eval: the task generates {count} tokens, and rows have {max_length} "
            "(train.seq_len); evaluate a run with longer ones"
        )
    stops = given.get("until") or []
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") is False:
        temperature = 0.0
    return [stops] if isinstance(stops, str) else list(stops), count, temperature


def _until(text: str, stops: Iterable[str]) -> str:
    """A text before the first of its stop strings."""
    return functools.reduce(lambda rest, stop: rest.split(stop)[0] if stop else rest, stops, text)


def _width(length: int, most: int) -> int:
    """The next power of two, from 16 on, or ``most`` where that is less."""
    return min(most, max(16, 2 ** math.ceil(math.log2(max(length, 1)))))


def _chunks(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[i : i + size] for i in range(0, len(numbers), size))
