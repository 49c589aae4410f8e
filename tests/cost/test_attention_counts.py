"""One layer's attention by hand, and the keys that a query sees against a count of them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.cost.attention_counts import all_keys, attention_counts, mean_keys
from moejax.cost.counts import count
from moejax.models import AttentionConfig, ModelConfig

GQA = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6)
MLA = AttentionConfig(
    kind="mla", num_heads=2, q_lora_rank=3, kv_lora_rank=5, nope_head_dim=4, rope_head_dim=2,
    v_head_dim=7,
)  # fmt: skip


def counted(attention, **changes):
    return attention_counts(ModelConfig(11, 8, attention=dataclasses.replace(attention, **changes)))


def test_gqa_by_hand():
    # D 8, H 4, N 2, d 6: queries 24 wide, keys and values 12 each.
    found = counted(GQA)
    assert found.matrices == 8 * 24 + 2 * 8 * 12 + 24 * 8
    assert (found.vectors, found.norms) == (0, 0)
    assert found.score_width == 4 * (6 + 6)
    assert found.cache_values == 2 * 12


@pytest.mark.parametrize(
    "changes, vectors, norms",
    [
        ({"bias": "qkv"}, 24 + 12 + 12, 0),
        ({"bias": "all"}, 24 + 12 + 12 + 8, 0),
        ({"sinks": True}, 4, 0),
        ({"bias": "all", "sinks": True}, 56 + 4, 0),
        ({"qk_norm": "head"}, 0, 6 + 6),
        ({"qk_norm": "all"}, 0, 24 + 12),
    ],
)
def test_what_multiplies_nothing(changes, vectors, norms):
    found = counted(GQA, **changes)
    assert (found.vectors, found.norms) == (vectors, norms)
    assert found.matrices == counted(GQA).matrices


def test_mla_by_hand():
    # D 8, H 2, rq 3, rkv 5, dn 4, dr 2, dv 7.
    found = counted(MLA)
    query, latent, up, out = 8 * 3 + 3 * 2 * 6, 8 * (5 + 2), 5 * 2 * (4 + 7), 2 * 7 * 8
    assert found.matrices == query + latent + up + out == 338
    assert (found.vectors, found.norms) == (0, 3 + 5)
    assert found.score_width == 2 * (6 + 7)  # d_qk = 4 + 2, d_v = 7
    assert found.cache_values == 5 + 2
    assert counted(MLA, bias="all").vectors == 3 + (5 + 2) + 8


def test_mla_without_a_rank_for_queries():
    found = counted(MLA, q_lora_rank=0)
    assert found.matrices == 8 * 2 * 6 + 56 + 110 + 112
    assert found.norms == 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400))
def test_the_mean_of_the_keys_seen(seq_len, window):
    """Within half a key of counting them: the diagonal's half is dropped, as in s / 2."""
    exact = sum(min(i, window) for i in range(1, seq_len + 1)) / seq_len
    width = min(window, seq_len)
    assert mean_keys(seq_len, window) == pytest.approx(exact - width / (2 * seq_len))
    assert 0 < mean_keys(seq_len, window) <= mean_keys(seq_len) == seq_len / 2
    assert all_keys(seq_len, window) == max(min(i, window) for i in range(1, seq_len + 1))


def test_only_layers_with_a_window_see_less():
    # D 8, H 2, d 4, s = 16, w = 4: 4 - 16 / 32 = 3.5 keys instead of 8, in one layer of three.
    attention = AttentionConfig(num_heads=2, head_dim=4, window=4)
    full = ModelConfig(11, 8, 3, d_ff=10, attention=attention)
    mixed = dataclasses.replace(full, segments=((("dense", "dense_window", "dense"), 1),))
    scores = lambda c: count(c, 16).flops_per_token.by_component["attention_scores"]
    a_key = 2 * 2 * (4 + 4)
    assert scores(full) == 3 * 8 * a_key
    assert scores(mixed) == (8 + 3.5 + 8) * a_key
    found = count(mixed, 16)
    assert found.params == count(full, 16).params
    assert found.kv_cache_bytes_per_token == count(full, 16).kv_cache_bytes_per_token
    more = found.flops_per_token.train_full_attention - found.flops_per_token.train
    assert more == 3 * (16 + 4 + 16 - 8 - 3.5 - 8) * a_key
