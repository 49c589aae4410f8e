"""Speculative decoding: the model's own distribution, whatever the MTP module drafts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import ConfigError
from moejax.models import AttentionConfig
from moejax.models.decode import SamplingConfig, sample
from moejax.models.speculate import accept

VOCAB, MOST = 21, 8
PROMPTS = np.array([[0, 3, 1, 4], [0, 15, 9, 9], [7, 9, 9, 9]])
LENGTHS = np.array([4, 2, 1])
SEEDS = np.array([5, 6, 7], np.uint32)
LATENT = AttentionConfig(
    4, kind="mla", kv_lora_rank=8, nope_head_dim=6, rope_head_dim=4, v_head_dim=5
)  # fmt: skip
KINDS = {
    # The module's layer has a window too: its kind is that of the last layer.
    "window, sinks, moe": tiny.moe_config(
        attention=AttentionConfig(4, 2, window=3, sinks=True), mtp_depth=1, num_layers=2,
        segments=((("moe", "moe_window"), 1),),
    ),
    "mla, dense": tiny.dense_config(attention=LATENT, mtp_depth=2),
}  # fmt: skip


def good_drafts(config):
    """Variables by which the module's drafts are right now and then.

    The layers add little to the embedding, so that the next token is nearly a function of the one
    before; the module's projection is that of the embedding alone, whose head then says nearly what
    the model will.
    """
    values = tiny.variables(config)
    params = values["params"]
    for name in params:
        if name.startswith("segment") or name.endswith("_layer"):
            params[name] = jax.tree.map(lambda leaf: 0.3 * leaf, params[name])
    kernel = params["mtp_0"]["projection"]["kernel"]
    half = kernel.shape[0] // 2
    params["mtp_0"]["projection"]["kernel"] = jnp.concatenate(
        [jnp.eye(half), jnp.zeros((half, half))]
    )
    return values


VARIABLES = {kind: good_drafts(config) for kind, config in KINDS.items()}


def run(kind, speculate=0, stops=(), prompts=PROMPTS, lengths=LENGTHS, seeds=SEEDS, **options):
    options = SamplingConfig(**{"max_tokens": MOST, "temperature": 0.0, **options})
    return jax.device_get(sample(
        KINDS[kind], VARIABLES[kind], prompts, lengths, seeds, options=options, stop_ids=stops,
        vocab_size=VOCAB, keep_experts=True, speculate=speculate,
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "drafts"),
    [
        ("window, sinks, moe", 1),
        pytest.param("window, sinks, moe", 3, marks=pytest.mark.slow),
        pytest.param("mla, dense", 2, marks=pytest.mark.slow),
    ],
)
def test_temperature_0_gives_the_tokens_of_plain_decoding(kind, drafts):
    plain = run(kind)
    stop = int(plain.tokens[0, 6])
    for stops in ((), (stop,)):
        wanted, got = run(kind, stops=stops), run(kind, drafts, stops=stops)
        assert 0 < got.accepted.sum() < got.drafted.sum()
        assert not (got.drafted % drafts).any()
        for name in ("tokens", "lengths", "finished", "experts"):
            jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(wanted, name))
        np.testing.assert_allclose(got.log_probs, wanted.log_probs, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_tokens_are_distributed_as_the_models():
    """Pairs of tokens, the first chosen by the prompt's pass, the second after a draft."""
    kind, rows, rounds = "window, sinks, moe", 512, 8
    prompts, lengths = np.tile(PROMPTS[:1], (rows, 1)), np.full(rows, 4)
    counts = {}
    for speculate in (0, 1):
        counts[speculate] = np.zeros((VOCAB, VOCAB))
        for i in range(rounds):
            seeds = np.arange(rows, dtype=np.uint32) + rows * (i + rounds * speculate)
            options = dict(max_tokens=3, temperature=1.0, top_k=4)
            got = run(kind, speculate, (), prompts, lengths, seeds, **options)
            np.add.at(counts[speculate], (got.tokens[:, 5], got.tokens[:, 6]), 1)
    assert 0.1 < got.accepted.sum() / got.drafted.sum() < 0.95
    plain, drafted = counts[0], counts[1]
    seen = plain + drafted >= 10
    chi_square = np.sum((plain - drafted)[seen] ** 2 / (plain + drafted)[seen])
    freedom = seen.sum() - 1
    assert freedom > 8 and chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_what_is_accepted_is_distributed_as_the_model():
    """Three tokens; q is far from p, the first of two drafts is drawn from it."""
    count = 40_000
    p = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]])
    q = jnp.array([[0.2, 0.2, 0.6], [0.3, 0.6, 0.1]])
    rng = np.random.default_rng(0)
    draft = np.stack([rng.choice(3, count, p=np.asarray(row)) for row in q], axis=1)
    rows = lambda values: jnp.broadcast_to(values[None], (count, *values.shape))
    tokens, accepted = map(np.asarray, jax.jit(accept)(
        rows(p), rows(q), draft, jnp.arange(count, dtype=jnp.uint32), jnp.full(count, 3)
    ))  # fmt: skip
    close = lambda got, wanted: np.testing.assert_allclose(
        np.bincount(got, minlength=3) / len(got), wanted, atol=0.015
    )
    close(tokens[:, 0], p[0])
    close(tokens[accepted >= 1, 1], p[1])
    close(tokens[accepted == 2, 2], p[2])
    # The share accepted is the sum of min(p, q).
    assert np.mean(accepted >= 1) == pytest.approx(0.2 + 0.2 + 0.2, abs=0.01)
    assert np.mean(accepted[accepted >= 1] == 2) == pytest.approx(0.1 + 0.1 + 0.1, abs=0.015)
    for i in range(2):
        np.testing.assert_array_equal(tokens[accepted > i, i], draft[accepted > i, i])


def test_speculation_needs_a_module():
    config = dataclasses.replace(KINDS["mla, dense"], mtp_depth=0)
    with pytest.raises(ConfigError, match=r"sampling\.speculate = 1: needs an MTP module"):
        sample(config, {}, PROMPTS, LENGTHS, SEEDS, options=SamplingConfig(), speculate=1)
    with pytest.raises(ConfigError, match=r"sampling\.speculate = -1"):
        run("mla, dense", -1)
