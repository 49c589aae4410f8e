"""Options of sampling (block ``sampling`` of a config), and what cannot be sampled."""

import dataclasses

import jax
import numpy as np

from moejax.config import check, check_not_negative, check_positive
from moejax.models.choosing import Choosing
from moejax.models.model_config import ModelConfig

# Beyond what any module guesses; each costs a pass of the module and a position of the model.
MOST_DRAFTS = 16


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Options of sampling (block ``sampling``).

    Attributes:
      max_tokens: tokens of a completion at most, the stop token included.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only the likeliest this many are drawn from; 0 means all.
      top_p: only the likeliest that together have this share, of what top_k left (nucleus
        sampling, arXiv 1904.09751).
      min_p: only tokens of at least this share of the likeliest's probability (arXiv 2407.01082).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_positive("sampling", self, "max_tokens")
        check_not_negative("sampling", self, "temperature", "top_k")
        check(
            self.temperature == 0 or self.temperature >= 1e-4, "sampling.temperature",
            self.temperature, "is too small to divide by; set 0 to take the likeliest token",
        )  # fmt: skip
        check(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "must be above 0, up to 1")
        check(0 <= self.min_p <= 1, "sampling.min_p", self.min_p, "must be from 0 to 1")

    def choosing(self, vocab_size: int) -> Choosing:
        """The options that programs take as arrays."""
        return Choosing(
            np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p),
            np.float32(self.min_p), np.int32(vocab_size),
        )  # fmt: skip


def check_speculation(config: ModelConfig, speculate: int) -> None:
    """Raises ConfigError for speculation that the model cannot do."""
    check(
        0 <= speculate <= MOST_DRAFTS, "sampling.speculate", speculate,
        f"must be from 0 to {MOST_DRAFTS} drafts a step",
    )  # fmt: skip
    check(
        not speculate or config.mtp_depth > 0, "sampling.speculate", speculate,
        "needs an MTP module to draft with, but model.mtp_depth = 0; set it to 0",
    )  # fmt: skip


def check_inputs(config, prompts, prompt_lengths, seeds, stop_ids, vocab_size) -> None:
    """Raises ConfigError for what ``sample`` cannot complete."""
    shape = np.shape(prompts)
    check(len(shape) == 2, "sampling.prompts", shape, "must have two axes, rows and tokens")
    for name, values in (("prompt_lengths", prompt_lengths), ("seeds", seeds)):
        check(
            np.shape(values) == shape[:1], f"sampling.{name}", np.shape(values),
            f"must be one a row of the prompts, {shape[:1]}",
        )  # fmt: skip
    if not isinstance(prompt_lengths, jax.Array) or prompt_lengths.is_fully_addressable:
        lengths = np.asarray(prompt_lengths)
        wrong = lengths[(lengths < 1) | (lengths > shape[1])]
        check(
            not len(wrong), "sampling.prompt_lengths", wrong.tolist(),
            f"must be from 1 to {shape[1]}, the prompts' width; begin an empty text with the "
            "separator",
        )  # fmt: skip
    check(
        1 <= vocab_size <= config.vocab_size, "sampling.vocab_size", vocab_size,
        f"must be from 1 to model.vocab_size = {config.vocab_size}",
    )  # fmt: skip
    for stop in stop_ids:
        check(
            0 <= stop < vocab_size, "sampling.stop_ids", stop,
            f"is never sampled from a vocabulary of {vocab_size}; leave it out",
        )  # fmt: skip
