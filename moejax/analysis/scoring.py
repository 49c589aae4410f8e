"""What a model makes of each token of a text: its loss, and whether it would have written it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.models import ModelConfig, Transformer
from moejax.parallel import axis_rules


@struct.dataclass
class Scores:
    """Of each target.

    Attributes:
      nll: negative log-likelihood, nats; 0 for padding.
      likeliest: whether no other token is likelier.
    """

    nll: Float[Array, "B S"]
    likeliest: Bool[Array, "B S"]


@functools.partial(jax.jit, static_argnames="config")
def score(
    config: ModelConfig, variables: dict[str, Any], batch: dict[str, Int[Array, "B S"]]
) -> Scores:
    """Runs a model over a batch as in use (``train=False``), without MTP modules.

    Args:
      config: the model's config.
      variables: its parameters and router state.
      batch: ``tokens``, ``targets``, ``segment_ids`` and ``positions``.
    """
    with axis_rules():
        output = Transformer(config).apply(
            variables, batch["tokens"], batch["segment_ids"], batch["positions"],
            method=Transformer.encode,
        )  # fmt: skip
    params = variables["params"]
    head = params["embedding"].T if config.tie_embeddings else params["head"]

    def row(_, part):
        hidden, target, real = part
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        right = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - right
        return None, (jnp.where(real, nll, 0.0), right >= jnp.max(logits, axis=-1))

    # Row by row, so that the logits of a whole batch never exist.
    parts = (output.hidden, batch["targets"], batch["segment_ids"] > 0)
    _, (nll, likeliest) = jax.lax.scan(row, None, parts)
    return Scores(nll, likeliest)
