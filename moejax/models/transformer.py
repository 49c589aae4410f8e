"""The decoder-only transformer: dense and MoE layers, scanned segment by segment."""

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from moejax.models.cache import Caches, cached_masks, layer_caches, make_masks
from moejax.models.decoder import Carry, Stats, scanned
from moejax.models.layers import RMSNorm, compute_dtype
from moejax.models.log_probs import token_log_probs
from moejax.models.loss import chunked_cross_entropy, chunked_cross_entropy_and_guess
from moejax.models.model_config import ModelConfig
from moejax.models.mtp import Ahead, AheadSums, PredictionModule, counted_segments, shift
from moejax.moe.layer import MoELayer
from moejax.moe.routers import RouterInputs


@struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      logits: scores of the next token; None from ``Transformer.encode``.
      hidden: final, normalised hidden states.
      aux_loss: weighted auxiliary losses, summed over MoE layers: add it to the loss.
      router_stats: sums over tokens, by segment and layer; leaves have a leading axis of repeats.
      cache: what attention keeps, after the call, if a cache was given.
    """

    logits: Float[Array, "B S V"] | None
    hidden: Float[Array, "B S D"]
    aux_loss: Float[Array, ""]
    router_stats: Stats
    cache: Caches | None


@struct.dataclass
class LossOutput:
    """Sum of negative log-likelihoods (nats), targets counted, and the routers' losses and sums.

    ``mtp`` has the sums of the MTP modules where they were asked for; they are not in ``nll``.
    """

    nll: Float[Array, ""]
    targets: Float[Array, ""]
    aux_loss: Float[Array, ""]
    router_stats: Stats
    mtp: AheadSums | None = None


@struct.dataclass
class LogProbsOutput:
    """Log-probabilities of the targets and entropies, nats, and the routers' losses and sums."""

    log_probs: Float[Array, "B S"]
    entropy: Float[Array, "B S"]
    aux_loss: Float[Array, ""]
    router_stats: Stats


class Transformer(nn.Module):
    """A decoder-only transformer.

    Parameters stand under ``embedding``, ``segment_i/layer_j/{attention_norm, attention, ffn_norm,
    ffn | moe}`` (each leaf with a leading axis of the segment's repeats), ``final_norm`` and, where
    it is not tied, ``head``. Routers with state keep it under the same path in the collection
    ``router_state``. MTP modules stand under ``mtp_k`` and ``mtp_k_layer/layer_0``; they run only
    where they are asked for, in ``loss``, ``encode_ahead`` and ``draft``.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        std = config.init_std or config.d_model**-0.5
        init = nn.with_logical_partitioning(nn.initializers.normal(std), ("vocab", "embed"))
        shape = (config.vocab_size, config.d_model)
        self.embedding = self.param("embedding", init, shape, jnp.float32)
        for i, (kinds, repeats) in enumerate(config.layout):
            setattr(self, f"segment_{i}", scanned(config, kinds, repeats, f"segment_{i}"))
        for k in range(config.mtp_depth):
            setattr(self, f"mtp_{k}", PredictionModule(config))
            layer = scanned(config, (config.mtp_kind,), 1, f"mtp_{k}_layer")
            setattr(self, f"mtp_{k}_layer", layer)
        self.final_norm = RMSNorm(config.norm_eps)
        if not config.tie_embeddings:
            init = nn.with_logical_partitioning(nn.initializers.normal(std), ("embed", "vocab"))
            self.head = self.param("head", init, shape[::-1], jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        cache: Caches | None = None,
        train: bool = False,
        fresh: bool = False,
    ) -> Output:
        """Next-token logits of every position, in float32.

        Args:
          tokens: token ids.
          segment_ids: document of each token in a packed row, 0 for padding; None means one
            document a row.
          positions: position of each token in its document; None counts from 0, or from the
            cache's length.
          cache: from ``init_cache``, or an earlier call's; then rows hold one document each, and
            padding (``segment_ids`` of 0) stands behind all else. What is padding is not kept.
          train: routers may draw noise, from the rng stream ``router``, and make the choices that
            are for training only; False has them route as in use.
          fresh: the cache is an empty one: the call computes what it would without, and fills it.
        """
        output = self.encode(tokens, segment_ids, positions, cache, train, fresh)
        return output.replace(logits=self.logits(output.hidden))

    def encode(
        self, tokens, segment_ids=None, positions=None, cache=None, train=False, fresh=False
    ) -> Output:
        """As ``__call__``, without the logits."""
        batch, length = tokens.shape
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache["index"]
        if positions is None:
            positions = start[:, None] + jnp.arange(length)[None]
        if cache is None:
            masks = make_masks(self.config, segment_ids, length)
        else:
            layers = layer_caches(self.config, cache)
            masks = cached_masks(self.config, layers, start, valid, fresh)
        x = self._embed(tokens)
        inputs = RouterInputs(None, valid, tokens, positions, segment_ids, train=train)
        carry, stats = self._carry(x), {}
        new_cache = None if cache is None else {**cache, "index": start + jnp.sum(valid, axis=1)}
        for i in range(len(self.config.layout)):
            name = f"segment_{i}"
            caches = None if cache is None else cache[name]
            carry, (segment_stats, caches) = getattr(self, name)(carry, caches, inputs, masks)
            if segment_stats:
                stats[name] = segment_stats
            if cache is not None:
                new_cache[name] = caches
        output = Output(None, self.final_norm(carry.x), carry.aux_loss, stats, new_cache)
        if self.is_initializing():  # the modules' parameters, whatever method initialises
            self._run_ahead(output, tokens, segment_ids, positions, train)
        return output

    def encode_with_head(
        self, tokens, segment_ids=None, positions=None, train=False
    ) -> tuple[Output, Float[Array, "D V"]]:
        """As ``encode``, and the output matrix, for losses that chunk the logits themselves."""
        return self.encode(tokens, segment_ids, positions, train=train), self._head()

    def encode_ahead(
        self,
        tokens: Int[Array, "B S"],
        targets: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> tuple[Output, Ahead]:
        """As ``encode``, and the MTP modules after it, on the text itself.

        Args:
          tokens: token ids.
          targets: the next tokens, from which the modules take theirs.
          segment_ids: as in ``__call__``; a target beyond the document's end is none.
          positions: as in ``__call__``.
          train: as in ``__call__``.

        Returns:
          The output, its auxiliary losses and router statistics those of all layers, and what the
          modules give.
        """
        output = self.encode(tokens, segment_ids, positions, train=train)
        return self._run_ahead(output, targets, segment_ids, positions, train)

    def _run_ahead(self, output, targets, segment_ids, positions, train) -> tuple[Output, Ahead]:
        if segment_ids is None:
            segment_ids = jnp.ones(targets.shape, jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(targets.shape[1])[None], targets.shape)
        hidden, aux_loss, stats = output.hidden, output.aux_loss, dict(output.router_stats)
        found = []
        for k in range(self.config.mtp_depth):
            segments, following = counted_segments(segment_ids, k), shift(targets, k)
            inputs = RouterInputs(None, segments > 0, following, positions, segments, train=train)
            masks = make_masks(self.config, segments, targets.shape[1])
            hidden, more, layer_stats, _ = self._module(k, hidden, inputs, masks, None)
            aux_loss += more
            if layer_stats:
                stats[f"mtp_{k}_layer"] = layer_stats
            found.append((hidden, jnp.where(segments > 0, shift(targets, k + 1), 0), segments))
        output = output.replace(aux_loss=aux_loss, router_stats=stats)
        return output, Ahead(*map(jnp.stack, zip(*found, strict=True))) if found else None

    def _module(self, k, hidden, inputs, masks, caches):
        """One MTP module: its hidden states, auxiliary losses, statistics and caches."""
        module, layer = getattr(self, f"mtp_{k}"), getattr(self, f"mtp_{k}_layer")
        x = module.enter(hidden, self._embed(inputs.tokens))
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        number = jnp.asarray(self.config.layers("moe") + k, jnp.int32)
        carry = self._carry(x).replace(layer=number)
        carry, (stats, caches) = layer(carry, caches, inputs, masks)
        return module.leave(carry.x), carry.aux_loss, stats, caches

    def draft(
        self,
        k: int,
        hidden: Float[Array, "B S D"],
        following: Int[Array, "B S"],
        cache: Caches,
        valid: Bool[Array, "B S"] | None = None,
        fresh: bool = False,
    ) -> Output:
        """Module k over further positions of rows that it has seen the beginnings of.

        Args:
          k: number of the module, from 0.
          hidden: ``Output.hidden`` of the main model, for k > 0 of module k - 1.
          following: the token k + 1 positions later, drafted or given.
          cache: from ``init_cache`` with ``mtp``, or an earlier call's.
          valid: False for padding, which stands behind all else; None means none is.
          fresh: as in ``__call__``.

        Returns:
          Logits of the token k + 2 positions later, and the cache after the call.
        """
        name, start = f"mtp_{k}_layer", cache[f"mtp_{k}"]
        valid = jnp.ones(following.shape, bool) if valid is None else valid
        positions = start[:, None] + jnp.arange(following.shape[1])[None]
        inputs = RouterInputs(None, valid, following, positions)
        layers = [(self.config.mtp_kind, cache[name]["layer_0"])]
        masks = cached_masks(self.config, layers, start, valid, fresh)
        hidden, aux_loss, stats, caches = self._module(k, hidden, inputs, masks, cache[name])
        cache = {**cache, f"mtp_{k}": start + jnp.sum(valid, axis=1), name: caches}
        stats = {name: stats} if stats else {}
        return Output(self.logits(hidden), hidden, aux_loss, stats, cache)

    def _embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        x = jnp.take(self.embedding, tokens, axis=0).astype(compute_dtype(self.config.dtype))
        x = x * jnp.asarray(self.config.embedding_multiplier, x.dtype)
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act"))

    def _carry(self, x: Float[Array, "B S D"]) -> Carry:
        """What the first layer starts from."""
        moe, logits = self.config.moe, None
        if moe is not None and moe.router.carries_logits:
            choices = moe.router.num_choices(moe.num_experts)
            logits = jnp.zeros((*x.shape[:2], choices), jnp.float32)
        return Carry(x, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), logits)

    def loss(
        self,
        tokens: Int[Array, "B S"],
        targets: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        train: bool = False,
        mtp: bool = False,
        weights: Float[Array, "B S"] | None = None,
    ) -> LossOutput:
        """Summed cross-entropy over the tokens that are not padding, never building the logits.

        The chunks are ``model.loss_chunk`` positions of every row; ``train`` as in ``__call__``;
        ``mtp`` runs the MTP modules as well, if there are any.

        ``weights`` says how much each target counts, from 0 up: the sum is weighted, and what is
        counted is their sum. MTP modules weigh a token as the main model does. Auxiliary losses
        and router statistics are of all tokens: those in between are computed as well.
        """
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        given, weights = weights, valid.astype(jnp.float32)
        if given is not None:
            weights = given = weights * given.astype(jnp.float32)
        head, chunk = self._head(), self.config.loss_chunk
        if not (mtp and self.config.mtp_depth):
            output = self.encode(tokens, segment_ids, positions, train=train)
            nll, sums = chunked_cross_entropy(output.hidden, head, targets, weights, chunk), None
        else:
            output, ahead = self.encode_ahead(tokens, targets, segment_ids, positions, train)
            nll, guess = chunked_cross_entropy_and_guess(
                output.hidden, head, targets, weights, chunk
            )
            sums = self._sums(ahead, guess, given)
        return LossOutput(nll, jnp.sum(weights), output.aux_loss, output.router_stats, sums)

    def log_probs(
        self,
        tokens: Int[Array, "B S"],
        targets: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
        train: bool = False,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> LogProbsOutput:
        """Each target's log-probability, never building the logits; see ``token_log_probs``.

        The chunks are ``model.loss_chunk`` positions of every row; ``train`` as in ``__call__``.
        """
        output = self.encode(tokens, segment_ids, positions, train=train)
        chunk = self.config.loss_chunk
        found = token_log_probs(
            output.hidden, self._head(), targets, chunk, temperature, vocab_size
        )
        return LogProbsOutput(*found, output.aux_loss, output.router_stats)

    def _sums(
        self, ahead: Ahead, guess: Int[Array, "B S"], given: Float[Array, "B S"] | None
    ) -> AheadSums:
        """The modules' losses.

        Args:
          ahead: what they give.
          guess: the main model's likeliest next token.
          given: weights of the main model's targets; None weighs each 1.
        """
        head, chunk, sums = self._head(), self.config.loss_chunk, []
        for k in range(self.config.mtp_depth):
            weights = (ahead.segment_ids[k] > 0).astype(jnp.float32)
            if given is not None:
                weights *= shift(given, k + 1)
            nll, drafted = chunked_cross_entropy_and_guess(
                ahead.hidden[k], head, ahead.targets[k], weights, chunk
            )
            # The main model says token t + k + 2 at position t + k + 1.
            accepted = jnp.sum(weights * (drafted == shift(guess, k + 1)))
            sums.append((nll, jnp.sum(weights), accepted))
        return AheadSums(*map(jnp.stack, zip(*sums, strict=True)), weighted=given is not None)

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Next-token logits from ``Output.hidden``, in float32."""
        kernel = self._head().astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def _head(self) -> Float[Array, "D V"]:
        return self.embedding.T if self.config.tie_embeddings else self.head


def update_router_state(config: ModelConfig, router_state: Stats, router_stats: Stats) -> Stats:
    """Applies every router's ``update`` once, to statistics summed over the whole batch.

    Args:
      config: the model's config.
      router_state: the collection ``router_state``; empty where no router keeps state.
      router_stats: ``Output.router_stats``, summed over micro-batches and devices. Routers of MTP
        modules that did not run have none, and keep their state.

    Returns:
      The new collection, of the same structure.
    """
    if not router_state:
        return router_state
    router = MoELayer.make_router(config.moe, config.init_std, parent=None)
    update = lambda state, stats: {"moe": {"router": router.update(state["moe"]["router"], stats)}}
    ran = {name for name in router_state if name in router_stats or not name.startswith("mtp_")}
    return {
        segment: {
            layer: update(state, router_stats[segment][layer]) if segment in ran else state
            for layer, state in layers.items()
        }
        for segment, layers in router_state.items()
    }
