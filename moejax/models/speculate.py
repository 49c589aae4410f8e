"""Speculative decoding: the MTP module drafts, the model verifies all drafts in one pass.

A draft x drawn from the module's distribution q is accepted with probability min(1, p(x) / q(x)),
where p is the model's; in place of the first one refused a token is drawn from max(p - q, 0),
normalised. So tokens are distributed as the model's own (Leviathan et al., arXiv 2211.17192,
theorem in appendix A.1), and at temperature 0 they are the same. Both distributions are those after
temperature, top-k, top-p and min-p.

DeepSeek-V3 drafts one token by its one module (arXiv 2412.19437, section 5.4.3). Further drafts are
by the same module on its own hidden states, as servers of its weights do; modules of greater depth
are not used. What it keeps of drafts, and what the model keeps of refused ones, is taken back by
lowering the row's index.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.models.choosing import distribution, draw, log_probs_of, noisy_argmax, row_keys

if TYPE_CHECKING:
    from moejax.models.decode import Decoder, Rules, State

# Draws at one position: of the draft, of its acceptance, of what takes its place.
DRAFT, ACCEPT, INSTEAD = 1, 2, 3


def speculation(
    model: "Decoder", state: "State", active: Bool[Array, " B"], rules: "Rules", drafts: int
) -> "State":
    """One to ``drafts`` + 1 tokens more on each active row."""
    draft, q, cache = _drafts(model, state, active, rules, drafts)
    at = state.lengths - 1
    current = jnp.take_along_axis(state.tokens, at[:, None], axis=1)
    tokens = jnp.concatenate([current, draft], axis=1)
    valid = jnp.broadcast_to(active[:, None], tokens.shape)
    hidden, cache, chosen = model.run(tokens, valid, cache)
    logits = model.logits(hidden)
    flat = log_probs_of(logits.reshape(-1, logits.shape[-1]), rules.choosing)
    p = distribution(flat, rules.choosing).reshape(logits.shape)
    found, accepted = accept(p, q, draft, rules.seeds, at)
    log_probs = jnp.take_along_axis(flat.reshape(logits.shape), found[..., None], axis=-1)[..., 0]
    # A stop token ends the row, and so does its end.
    stops = rules.stopped(found)
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1) + 1, drafts + 1)
    count = jnp.minimum(jnp.minimum(accepted + 1, until_stop), state.end - state.lengths)
    count = jnp.where(active, count, 0)
    if state.experts is not None:
        state = state.with_experts(chosen, count)
    cache = {**cache, "index": jnp.where(active, at + count, cache["index"])}
    kept = jnp.arange(drafts + 1)[None, :] < count[:, None]
    ahead, cache = model.draft(hidden, found, kept, cache)
    ahead = jnp.take_along_axis(ahead, jnp.maximum(count, 1)[:, None, None] - 1, axis=1)
    state = state.appended(found, log_probs, count, rules)
    return state.replace(
        cache=cache, ahead=jnp.where(active[:, None, None], ahead, state.ahead),
        drafted=state.drafted + jnp.where(active, drafts, 0),
        accepted=state.accepted + jnp.where(active, accepted, 0),
    )  # fmt: skip


def _drafts(model, state, active, rules, count):
    """Drafts (B, n), the distributions that they were drawn from (B, n, V), and the cache."""
    hidden, cache = state.ahead, state.cache
    start, tokens, found = cache["mtp_0"], [], []
    for i in range(count):
        if i:
            hidden, cache = model.draft(hidden, tokens[-1][:, None], active[:, None], cache)
        log_probs = log_probs_of(model.logits(hidden)[:, 0], rules.choosing)
        at = state.lengths - 1 + i
        tokens.append(draw(log_probs, rules.choosing, rules.seeds, at, DRAFT))
        found.append(distribution(log_probs, rules.choosing))
    return jnp.stack(tokens, axis=1), jnp.stack(found, axis=1), {**cache, "mtp_0": start}


def accept(
    p: Float[Array, "B m V"],
    q: Float[Array, "B n V"],
    draft: Int[Array, "B n"],
    seeds: Array,
    at: Int[Array, " B"],
) -> tuple[Int[Array, "B m"], Int[Array, " B"]]:
    """The tokens of each row, and how many of its drafts stand at their beginning.

    Args:
      p: the model's distributions after the last token and after each draft, m = n + 1.
      q: the distributions that the drafts were drawn from.
      draft: the drafts.
      seeds: of the rows.
      at: position of each row's last token.

    Returns:
      Accepted drafts and one token more, then what does not count; and how many were accepted.
    """
    count = draft.shape[1]
    pick = lambda values: jnp.take_along_axis(values, draft[..., None], axis=-1)[..., 0]
    chances = [row_keys(seeds, at + i, ACCEPT) for i in range(count)]
    uniform = jnp.stack([jax.vmap(jax.random.uniform)(keys) for keys in chances], axis=1)
    taken = uniform * pick(q) < pick(p[:, :count])
    accepted = jnp.sum(jnp.cumprod(taken, axis=1), axis=1)
    here = lambda values: jnp.take_along_axis(values, accepted[:, None, None], axis=1)[:, 0]
    # After the last draft nothing was refused, and all of p is left.
    left = here(p) - here(jnp.pad(q, ((0, 0), (0, 1), (0, 0))))
    # Where p and q are one but for rounding, nothing is left, and either will do.
    left = jnp.where(jnp.max(left, axis=-1, keepdims=True) > 0, left, here(p))
    keys = row_keys(seeds, at + accepted, INSTEAD)
    more = noisy_argmax(jnp.log(jnp.maximum(left, 0.0)), keys)
    tokens = jnp.pad(draft, ((0, 0), (0, 1)))
    place = jnp.arange(count + 1)[None, :] == accepted[:, None]
    return jnp.where(place, more[:, None], tokens), accepted
