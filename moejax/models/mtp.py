"""Multi-token prediction: modules that each predict one token further than the one before.

Module k (from 0) stands at position t, takes the hidden state of depth k - 1 there (for k = 0 the
main model's) and the embedding of token t + k + 1, and predicts token t + k + 2 (DeepSeek-V3,
arXiv 2412.19437, section 2.2, eq. 21 to 25). ``moejax.models.Transformer`` runs the modules, each
with a layer of its own; what is theirs alone, and how tokens are shifted for them, stands here.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from moejax.models.layers import Linear, RMSNorm
from moejax.models.model_config import ModelConfig


@struct.dataclass
class Ahead:
    """What the modules give; depth first.

    Attributes:
      hidden: normalised hidden states: the head's input, and the next module's.
      targets: what each predicts, 0 where nothing is counted.
      segment_ids: document of each position that has a target there, 0 elsewhere.
    """

    hidden: Float[Array, "M B S D"]
    targets: Int[Array, "M B S"]
    segment_ids: Int[Array, "M B S"]


@struct.dataclass
class AheadSums:
    """Sums over the counted targets of each module.

    Attributes:
      nll: negative log-likelihoods, nats.
      targets: how many there are; the sum of their weights where targets have some.
      accepted: those for which the module's likeliest token is the main model's, one position
        before the target: what greedy speculative decoding would accept of this module's drafts,
        if the text itself had been written so far.
      weighted: targets count by weights, not one each.
    """

    nll: Float[Array, " M"]
    targets: Float[Array, " M"]
    accepted: Float[Array, " M"]
    weighted: bool = struct.field(pytree_node=False, default=False)

    @property
    def loss(self) -> Float[Array, ""]:
        """Mean over the modules of the mean cross-entropy, to be weighted (eq. 25)."""
        return jnp.mean(self.nll / self.divisor)

    @property
    def divisor(self) -> Float[Array, " M"]:
        """What sums over the targets are divided by for their means."""
        return divisor(self.targets, self.weighted)


class PredictionModule(nn.Module):
    """What a module has around its layer: norms of both inputs, their projection, a final norm.

    The order of the projection's inputs is that of the released weights, embedding first; the
    report's eq. 21 writes it the other way round. The hidden state comes normalised, from the main
    model's final norm or from the module before, as in the code of Transformers and Megatron; the
    report says only 'the representation given by the main model'.
    """

    config: ModelConfig

    def setup(self) -> None:
        norm = lambda: RMSNorm(self.config.norm_eps)
        self.hidden_norm, self.embedding_norm, self.final_norm = norm(), norm(), norm()
        self.projection = Linear(
            (self.config.d_model,), ("embed", None), init_std=self.config.init_std
        )

    def enter(
        self, hidden: Float[Array, "B S D"], embedding: Float[Array, "B S D"]
    ) -> Float[Array, "B S D"]:
        """The layer's input (eq. 21)."""
        both = [self.embedding_norm(embedding), self.hidden_norm(hidden)]
        return self.projection(jnp.concatenate(both, axis=-1))

    def leave(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """The head's input, from the layer's output (eq. 22 and 23)."""
        return self.final_norm(x)


def shift(values: Int[Array, "*rows S"], by: int) -> Int[Array, "*rows S"]:
    """Each row's values from ``by`` positions later, zeros at the end."""
    by = min(by, values.shape[-1])
    return jnp.pad(values[..., by:], [(0, 0)] * (values.ndim - 1) + [(0, by)])


def counted_segments(segment_ids: Int[Array, "*rows S"], depth: int) -> Int[Array, "*rows S"]:
    """Document of each position whose target at ``depth`` lies in that document too, 0 elsewhere.

    So a document is ``depth`` + 1 positions shorter. What is cut off its end nothing in it could
    see, and routers treat it as padding.

    Args:
      segment_ids: document of each token in a packed row, 0 for padding.
      depth: number of the module, k.
    """
    return jnp.where(shift(segment_ids, depth + 1) == segment_ids, segment_ids, 0)


def counted_targets(
    segment_ids: Int[Array, "*rows S"], depths: int, weights: Float[Array, "*rows S"] | None = None
) -> Float[Array, " M"]:
    """How many targets each of ``depths`` modules has in packed rows; with weights, their sum."""
    counted = [counted_segments(segment_ids, k) > 0 for k in range(depths)]
    if weights is not None:  # a token weighs in every module what it weighs as the next one
        weights = jnp.where(segment_ids > 0, weights, 0).astype(jnp.float32)
        counted = [own * shift(weights, k + 1) for k, own in enumerate(counted)]
    return jnp.stack([jnp.sum(own) for own in counted]).astype(jnp.float32)


def divisor(total: Array, weighted: bool) -> Array:
    """What a sum over targets is divided by for their mean: how many they are, or their total
    weight, which may be below 1; 1 where there is none."""
    return jnp.where(total > 0, total, 1.0) if weighted else jnp.maximum(total, 1)
