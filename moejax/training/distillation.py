"""From a teacher to a student: on its answers, or on its distributions (block ``distill``).

On answers, distillation is cross-entropy (``moejax.models.loss``) with the weights made here: that
is how DeepSeek-R1's small models were made (arXiv 2501.12948, section 2.4). On distributions it is
a divergence of next-token distributions, in chunks: neither model's (B, S, V) logits exist.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import check, check_not_negative, check_positive
from moejax.models.head_chunks import head_logits, sum_over_chunks


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Options of logit distillation: a run's model learns a teacher's distributions.

    The objective is (1 - ``hard``) times the divergence plus ``hard`` times the cross-entropy, over
    the targets that count, by their weights.

    Attributes:
      divergence: ``forward``, KL(teacher || student), which covers all that the teacher says
        (Hinton et al. 2015, arXiv 1503.02531), or ``reverse``, KL(student || teacher), which keeps
        to what the teacher holds likely (MiniLLM, arXiv 2306.08543, eq. 1).
      temperature: both models' logits are divided by it, and the divergence is multiplied by its
        square, so that gradients keep their size (arXiv 1503.02531, section 2).
      hard: share of the cross-entropy with the text itself.
      run: folder of the teacher's run; of the same vocabulary and tokenizer, of any size.
      step: of its checkpoint; 0 takes the one of the lowest validation loss, or the newest where
        none was validated.
    """

    divergence: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    hard: float = 0.0
    run: str = ""
    step: int = 0

    def __post_init__(self) -> None:
        check_positive("distill", self, "temperature")
        check_not_negative("distill", self, "step", "hard")
        check(self.hard < 1, "distill.hard", self.hard, "must be below 1, which needs no teacher")


def answer_weights(
    is_answer: Bool[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None
) -> Float[Array, "B S"]:
    """Weights of targets for a loss on answers only: 1 where the *next* token is an answer's.

    Args:
      is_answer: which tokens of the row belong to answers.
      segment_ids: document of each token in a packed row, 0 for padding: a document's last position
        has no target. None: one document a row.

    Returns:
      Weights of the positions; a row's last one has 0, its target standing outside of the row.
    """
    after = lambda array: jnp.pad(array[:, 1:], ((0, 0), (0, 1)))
    counted = after(is_answer.astype(bool))
    if segment_ids is not None:
        counted &= (segment_ids > 0) & (after(segment_ids) == segment_ids)
    return counted.astype(jnp.float32)


def distillation_loss(
    config: DistillConfig,
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    teacher_hidden: Float[Array, "B S D2"],
    teacher_head: Float[Array, "D2 V"],
    weights: Float[Array, "B S"],
    chunk: int = 0,
) -> Float[Array, ""]:
    """Weighted sum over positions of the divergence between teacher and student, in nats.

    Args:
      config: the options.
      hidden: the student's final hidden states; differentiated.
      head: its output matrix; differentiated.
      teacher_hidden: the teacher's, of its own width.
      teacher_head: its output matrix, for the same vocabulary.
      weights: weight of each position, 0 for padding.
      chunk: positions of each row whose logits exist at once; 0 means all.

    Returns:
      The sum; divide it by that of the weights for a mean.
    """
    term = _term(config.divergence, config.temperature)
    parts = (teacher_hidden, weights)
    return sum_over_chunks(term, hidden, head, parts, teacher_head, chunk)[0]


def top_k_distillation_loss(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B S K"],
    teacher_logits: Float[Array, "B S K"],
    weights: Float[Array, "B S"],
    chunk: int = 0,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Forward divergence from a teacher of whose logits only the K largest were stored.

    The teacher's distribution is the softmax over those K tokens; the student's is over all of V.
    With K = V it equals ``distillation_loss``. A reverse divergence would be infinite.

    Args:
      hidden: the student's final hidden states; differentiated.
      head: its output matrix; differentiated.
      tokens: the K tokens at each position, each once.
      teacher_logits: their logits, or log-probabilities.
      weights: weight of each position, 0 for padding.
      chunk: positions of each row whose logits exist at once; 0 means all.
      temperature: as in ``DistillConfig``.
    """
    parts = (tokens, teacher_logits.astype(jnp.float32), weights)
    return sum_over_chunks(_top_k_term(temperature), hidden, head, parts, None, chunk)[0]


@functools.cache
def _term(divergence: str, temperature: float):
    """The chunk's sum and its gradient, by automatic differentiation in the student's logits."""

    def weighted(logits, weights, teacher):
        student = jax.nn.log_softmax(logits / temperature, axis=-1)
        first, second = (teacher, student) if divergence == "forward" else (student, teacher)
        kl = jnp.sum(jnp.exp(first) * (first - second), axis=-1)
        return temperature**2 * jnp.sum(weights * kl)

    def term(logits, part, teacher_head):
        rows, weights = part
        teacher = jax.nn.log_softmax(head_logits(rows, teacher_head) / temperature, axis=-1)
        return *jax.value_and_grad(weighted)(logits, weights, teacher), None

    return term


@functools.cache
def _top_k_term(temperature: float):
    def weighted(logits, tokens, teacher, weights):
        student = jax.nn.log_softmax(logits / temperature, axis=-1)
        student = jnp.take_along_axis(student, tokens, axis=-1)
        kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
        return temperature**2 * jnp.sum(weights * kl)

    def term(logits, part, whole):
        del whole
        tokens, teacher_logits, weights = part
        teacher = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
        return *jax.value_and_grad(weighted)(logits, tokens, teacher, weights), None

    return term
