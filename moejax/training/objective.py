"""What a training step minimises: cross-entropy, a divergence from a teacher, or preferences."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.models import LossOutput, ModelConfig, Transformer
from moejax.models.loss import chunked_cross_entropy
from moejax.models.mtp import divisor
from moejax.parallel import axis_rules
from moejax.training.distillation import DistillConfig, distillation_loss
from moejax.training.preferences import PreferenceConfig, preference_loss

Tree = Any


@struct.dataclass
class Batch:
    """Packed rows, one leading axis of micro-batches; a micro-batch has none.

    Attributes:
      tokens: inputs.
      targets: next tokens.
      segment_ids: document of each token in its row; 0 is padding and is not counted.
      positions: position in the document.
      weights: how much each target counts in the loss, from 0 up; None counts every one 1. In a
        row of preferences the targets of the response that was not preferred have -1.
    """

    tokens: Int[Array, "*A B S"]
    targets: Int[Array, "*A B S"]
    segment_ids: Int[Array, "*A B S"]
    positions: Int[Array, "*A B S"]
    weights: Float[Array, "*A B S"] | None = None

    @property
    def judged(self) -> "Batch":
        """The same rows, of which held-out loss counts what weighs more than 0."""
        if self.weights is None:
            return self
        return self.replace(weights=jnp.maximum(self.weights, 0))


@struct.dataclass
class Measured:
    """What an objective gives of a micro-batch.

    Attributes:
      objective: the sum that is differentiated; ``Objective.divisor`` makes it a mean.
      out: the model's sums; ``nll`` is logged as the loss.
      told: further sums to log, by name.
    """

    objective: Float[Array, ""]
    out: LossOutput
    told: dict[str, Float[Array, ""]]


class Objective(Protocol):
    """What a step minimises, auxiliary losses and MTP modules aside."""

    def divisor(self, batch: Batch) -> Float[Array, ""]:
        """What sums over a whole batch are divided by."""

    def __call__(self, variables: Tree, part: Batch, key: Array, frozen: Tree) -> Measured:
        """Sums over a micro-batch.

        Args:
          variables: of the model; its parameters are differentiated.
          part: the micro-batch.
          key: of the routers' noise.
          frozen: variables of the second model; None where there is none.
        """


class CrossEntropy:
    """Of the next tokens, by the targets' weights.

    Args:
      model: the model's config.
    """

    def __init__(self, model: ModelConfig):
        self._transformer = Transformer(model)

    def divisor(self, batch: Batch) -> Float[Array, ""]:
        """Targets that count, or the sum of their weights."""
        return _targets(batch)

    def __call__(self, variables: Tree, part: Batch, key: Array, frozen: Tree) -> Measured:
        """See ``Objective``."""
        del frozen
        out = loss_of(self._transformer, variables, part, key)
        return Measured(out.nll, out, {})


class Distillation:
    """Of a frozen teacher's distributions; see ``DistillConfig``. MTP modules do not run.

    Args:
      config: the options.
      model: the student's config.
      teacher: the teacher's.
    """

    def __init__(self, config: DistillConfig, model: ModelConfig, teacher: ModelConfig):
        self._config, self._chunk = config, model.loss_chunk
        self._student, self._teacher = Transformer(model), Transformer(teacher)

    def divisor(self, batch: Batch) -> Float[Array, ""]:
        """Targets that count, or the sum of their weights."""
        return _targets(batch)

    def __call__(self, variables: Tree, part: Batch, key: Array, frozen: Tree) -> Measured:
        """See ``Objective``; the teacher routes as in use, without noise."""
        weights = (part.segment_ids > 0).astype(jnp.float32)
        if part.weights is not None:
            weights *= part.weights.astype(jnp.float32)
        with axis_rules():
            output, head = self._student.apply(
                variables, part.tokens, part.segment_ids, part.positions, train=True,
                method=Transformer.encode_with_head, rngs={"router": key},
            )  # fmt: skip
            seen, teacher_head = self._teacher.apply(
                frozen,
                part.tokens,
                part.segment_ids,
                part.positions,
                method=Transformer.encode_with_head,
            )
        nll = chunked_cross_entropy(output.hidden, head, part.targets, weights, self._chunk)
        kl = distillation_loss(
            self._config, output.hidden, head, jax.lax.stop_gradient(seen.hidden), teacher_head,
            weights, self._chunk,
        )  # fmt: skip
        hard = self._config.hard
        objective = (1 - hard) * kl + (hard * nll if hard else 0.0)
        out = LossOutput(nll, jnp.sum(weights), output.aux_loss, output.router_stats)
        return Measured(objective, out, {"distill/divergence": kl})


class Preferences:
    """Direct preference optimization; see ``PreferenceConfig``. MTP modules do not run.

    A row is one pair: the preferred response with its prompt as segment 1, the other as segment 2.
    Routers route as in use, without noise, in both models.

    Args:
      config: the options.
      model: the config of both models.
    """

    def __init__(self, config: PreferenceConfig, model: ModelConfig):
        self._config, self._transformer = config, Transformer(model)

    def divisor(self, batch: Batch) -> Float[Array, ""]:
        """Pairs."""
        return jnp.asarray(batch.tokens.size // batch.tokens.shape[-1], jnp.float32)

    def __call__(self, variables: Tree, part: Batch, key: Array, frozen: Tree) -> Measured:
        """See ``Objective``; ``out.nll`` is the sum of the pairs' losses."""
        del key
        out, pairs = self._log_probs(variables, part), part.tokens.shape[0]
        reference = None
        if not self._config.reference_free:
            reference = jax.lax.stop_gradient(self._log_probs(frozen, part).log_probs)
        preferred, other = (part.weights * sign > 0 for sign in (1, -1))
        loss, metrics = preference_loss(
            self._config, out.log_probs, out.log_probs, preferred, other, reference, reference
        )
        told = {f"preferences/{k}": pairs * v for k, v in metrics.items() if k != "loss"}
        counted = jnp.asarray(pairs, jnp.float32)
        found = LossOutput(pairs * loss, counted, out.aux_loss, out.router_stats)
        return Measured(found.nll, found, told)

    def _log_probs(self, variables: Tree, part: Batch):
        with axis_rules():
            return self._transformer.apply(
                variables, part.tokens, part.targets, part.segment_ids, part.positions,
                method=Transformer.log_probs,
            )  # fmt: skip


def _targets(batch: Batch) -> Float[Array, ""]:
    """What the loss is divided by: the targets of a whole batch, or the sum of their weights."""
    valid = batch.segment_ids > 0
    if batch.weights is None:
        return divisor(jnp.sum(valid), weighted=False).astype(jnp.float32)
    return divisor(jnp.sum(valid * batch.weights.astype(jnp.float32)), weighted=True)


def loss_of(
    transformer: Transformer, variables: Tree, part: Batch, noise: Array | None = None
) -> LossOutput:
    """The loss of a micro-batch: of training, with MTP modules, where there is a key for the
    routers' noise."""
    with axis_rules():
        return transformer.apply(
            variables, part.tokens, part.targets, part.segment_ids, part.positions,
            train=noise is not None, mtp=noise is not None, weights=part.weights,
            method=Transformer.loss, rngs=None if noise is None else {"router": noise},
        )  # fmt: skip
