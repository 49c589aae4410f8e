"""Prompts and completions as packed rows: every pair whole and once, weights on completions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.data import DataConfig, SourceConfig, baselines, open_dataset, train_iterator
from moejax.data.pair_files import Pairs, parse_line, read_pairs, write_pairs
from moejax.data.pairs import hold_out, pairs_dataset
from moejax.data.pipeline import validation_batches
from moejax.data.tokenizers import BytesTokenizer
from moejax.training.distillation import answer_weights

BYTES, SEPARATOR = BytesTokenizer(), 256
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
PAIR = st.tuples(TEXT, TEXT.filter(bool), st.floats(0.125, 4.0, width=32))


def dataset(pairs, seq_len=64, **options):
    prompts, completions, weights = zip(*pairs, strict=True)
    return pairs_dataset(Pairs(prompts, completions, weights), BYTES, seq_len, **options)


def unpacked(rows):
    """What each piece of each row says: prompt ids, completion ids and their weight."""
    found = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            at = np.flatnonzero(here)
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(row["positions"][here], np.arange(len(at)))
            tokens, targets = row["tokens"][here], row["targets"][here]
            assert tokens[0] == targets[-1] == SEPARATOR
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            weights = row["weights"][here]
            counted = weights > 0
            # Zeros, then one weight to the end, stop token included.
            prompt = int(np.argmax(counted))
            assert counted[prompt:].all() and not counted[:prompt].any()
            assert len(set(weights[prompt:].tolist())) == 1
            found.append((bytes(targets[:prompt].tolist()), bytes(targets[prompt:-1].tolist()),
                          float(weights[-1])))  # fmt: skip
        padding = row["segment_ids"] == 0
        assert not any(np.any(row[name][padding]) for name in row)
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(PAIR, min_size=2, max_size=30), st.integers(50, 90))
def test_every_pair_is_in_exactly_one_row_with_weights_on_its_completion(pairs, seq_len):
    if len({prompt for prompt, _, _ in pairs}) < 2:
        pairs = [*pairs, (pairs[0][0] + "!", "c", 1.0)]
    found = dataset(pairs, seq_len)
    got = {name: unpacked(getattr(found, name)) for name in ("train", "validation")}
    said = [(p.encode(), c.encode(), float(np.float32(w))) for p, c, w in pairs]
    assert sorted(got["train"] + got["validation"]) == sorted(said)
    prompts = {name: {prompt for prompt, _, _ in own} for name, own in got.items()}
    assert got["train"] and got["validation"] and not prompts["train"] & prompts["validation"]
    # The counts that metrics rest on.
    for name, own in got.items():
        rows = getattr(found, name)
        assert rows.targets == sum(len(p) + len(c) + 1 for p, c, _ in own)
        assert rows.counted == sum(len(c) + 1 for _, c, _ in own)
        assert getattr(found, f"{name}_bytes") == sum(len(c) for _, c, _ in own)
        counts = np.bincount([*b"".join(c for _, c, _ in own)], minlength=257)
        counts[SEPARATOR] = len(own)
        np.testing.assert_array_equal(getattr(found, f"{name}_counts"), counts)
    assert found.validation_tokens == found.validation.counted


def test_weights_agree_with_those_that_distillation_makes():
    """All but a piece's last target, which lies outside of a row there."""
    found = dataset([(f"p{i}", "c" * (i % 5 + 1), 1.0) for i in range(20)]).train
    for row in (found[i] for i in range(len(found))):
        tokens, segments = row["tokens"], row["segment_ids"]
        is_answer = tokens == ord("c")
        wanted = answer_weights(jnp.asarray(is_answer)[None], jnp.asarray(segments)[None])[0]
        ends = (segments > 0) & (np.append(segments[1:], 0) != segments)
        np.testing.assert_array_equal(row["weights"][~ends], wanted[~ends])
        assert (row["weights"][ends] == 1).all()


def test_by_hand():
    found = dataset([("ab", "c", 1.0), ("x", "yz", 2.0), ("ab", "d", 1.0)], 12)
    parts = [unpacked(found.train), unpacked(found.validation)]
    assert sorted(map(len, parts)) == [1, 2]
    row = found.train[0] if len(parts[0]) == 2 else found.validation[0]
    a, b, c, d = (ord(letter) for letter in "abcd")
    assert row["tokens"].tolist() == [256, a, b, c, 256, a, b, d, 0, 0, 0, 0]
    assert row["targets"].tolist() == [a, b, c, 256, a, b, d, 256, 0, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1] * 4 + [2] * 4 + [0] * 4
    assert row["weights"].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]


def test_order_is_a_function_of_the_seed():
    made = [(f"{i * 37 % 101}+{i}=", str(i), 1.0) for i in range(200)]
    first, again = dataset(made, 32), dataset(made, 32)
    assert first.fingerprint == again.fingerprint
    read = lambda data, seed, start=0: [
        batch for _, batch in zip(range(3), train_iterator(
            data.train, batch_size=4, seed=seed, start=start, prefetch=0), strict=False)
    ]  # fmt: skip
    one, two, other = read(first, 1), read(again, 1), read(first, 2)
    for a, b in zip(one, two, strict=True):
        assert all((a[name] == b[name]).all() for name in a)
        assert a["weights"].dtype == np.float32 and a["weights"].shape == (4, 32)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(one, other, strict=True))
    later = read(first, 1, start=2)[0]
    assert all((later[name] == one[2][name]).all() for name in later)
    changed = [(p, c, 2.0 if i == 5 else w) for i, (p, c, w) in enumerate(made)]
    assert dataset(changed, 32).fingerprint != first.fingerprint


def test_held_out_batches_are_filled_up_with_padding():
    rows = dataset([(str(i), "c", 1.0) for i in range(40)], 8, validation_fraction=0.3).validation
    batches = list(validation_batches(rows, batch_size=len(rows) - 1))
    assert len(batches) == 2 and not batches[1]["weights"][1:].any()
    assert sum(batch["weights"].sum() for batch in batches) == rows.counted


def test_held_out_prompts_do_not_depend_on_completions_or_order():
    prompts = [f"question {i % 50}" for i in range(100)]
    one = hold_out(Pairs(prompts, ["a"] * 100), 0.2, 10_000)
    assert {p for p, o in zip(prompts, one, strict=True) if o}.isdisjoint(
        p for p, o in zip(prompts, one, strict=True) if not o
    )
    other = hold_out(Pairs(prompts[::-1], ["b"] * 100), 0.2, 10_000)
    np.testing.assert_array_equal(one[::-1], other)
    assert 0.1 < one.mean() < 0.25


def test_baselines_are_of_completions():
    """A unigram model of one letter and the stop token; gzip of that letter alone."""
    found = dataset([(f"{i:08d}", "a" * 9, 1.0) for i in range(400)], 32)
    n = found.validation.counted
    assert found.validation_bytes == n // 10 * 9
    train = found.train.counted
    share = np.array([0.9, 0.1]) * train + 1
    bits = -np.log2(share / (train + 257)) @ (np.array([0.9, 0.1]) * n)
    got = baselines(found)
    np.testing.assert_allclose(got["unigram"], bits / found.validation_bytes, rtol=1e-6)
    assert got["gzip"] < 3


# Files.


def write(path, *lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


GOOD = b'{"prompt": "1+1=", "completion": "2"}'


def test_a_file_a_folder_and_what_is_written(tmp_path):
    write(
        tmp_path / "a.jsonl", GOOD, b"", b'{"prompt": "", "completion": "x", "weight": 2, "z": 0}'
    )
    write(tmp_path / "b.jsonl", b'{"prompt": "q", "completion": "\\u00fc"}')
    write(tmp_path / ".hidden.jsonl", b"{")
    pairs = read_pairs(str(tmp_path))
    assert list(pairs.prompts) == ["1+1=", "", "q"] and list(pairs.completions) == ["2", "x", "ü"]
    assert list(pairs.weights) == [1.0, 2.0, 1.0]
    assert [name.rpartition("/")[2] for name in pairs.names] == [
        "a.jsonl:1", "a.jsonl:3", "b.jsonl:1",
    ]  # fmt: skip
    write_pairs(tmp_path / "c", pairs)
    again = read_pairs(str(tmp_path / "c"))
    assert (again.prompts, again.completions, again.weights) == (
        pairs.prompts, pairs.completions, pairs.weights,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a"}', "no field 'completion'"),
        (b'{"completion": "a"}', "no field 'prompt'"),
        (b'{"prompt": "a", "completion": ""}', "empty completion"),
        (b'{"prompt": 1, "completion": "a"}', "holds int in 'prompt'"),
        (b'{"prompt": "a", "completion": null}', "holds NoneType in 'completion'"),
        (b'{"prompt": "\xff", "completion": "a"}', "not UTF-8"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "not Unicode"),
        (b'{"prompt": "a", "completion": "b\0"}', "binary"),
        (b'{"prompt": "a"', "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'["a", "b"]', "not a JSON object"),
        (b'{"prompt": "a", "completion": "b", "weight": 0}', "weight 0"),
        (b'{"prompt": "a", "completion": "b", "weight": -1.5}', "weight -1.5"),
        (b'{"prompt": "a", "completion": "b", "weight": true}', "weight True"),
        (b'{"prompt": "a", "completion": "b", "weight": "1"}', "weight '1'"),
        (b'{"prompt": "a", "completion": "b", "weight": NaN}', "weight nan"),
        (b'{"prompt": "a", "completion": "b", "weight": 1e999}', "weight inf"),
        (b'{"prompt": "a", "completion": "b", "weight": 1' + b"0" * 400 + b"}", "weight 10000"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_remedy(tmp_path, line, said):
    path = write(tmp_path / "pairs.jsonl", GOOD, b"", line)
    with pytest.raises(ConfigError) as error:
        read_pairs(str(path))
    text = str(error.value)
    assert f"{path}:3" in text and said in text and ";" in text
    assert "\n" not in text and len(text) < 300


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_any_bytes_are_a_pair_or_one_line(line):
    try:
        prompt, completion, weight, name = parse_line(line, "f:1")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(prompt, str) and completion and weight > 0 and name == "f:1"


def opened(path, seq_len=16, **options):
    config = DataConfig(source="pairs", path=str(path), **options)
    return open_dataset(config, seq_len=seq_len, vocab_size=257)


def test_long_pairs_are_refused_or_dropped_and_never_cut(tmp_path):
    lines = [
        json.dumps({"prompt": f"{i}", "completion": "c" * (30 if i % 4 == 1 else 3)}).encode()
        for i in range(12)
    ]
    path = write(tmp_path / "pairs.jsonl", *lines)
    with pytest.raises(ConfigError) as error:
        opened(path)
    text = str(error.value)
    assert "train.seq_len = 16" in text and "3 of 12 pairs" in text and "data.drop_long" in text
    assert f"{path}:2" in text and "32 tokens" in text
    found = opened(path, drop_long=True)
    assert len(unpacked(found.train) + unpacked(found.validation)) == 9
    assert found.provenance["dropped_long_pairs"] == 3 and found.provenance["pairs"] == 12
    assert opened(path, 32).provenance["dropped_long_pairs"] == 0
    with pytest.raises(ConfigError, match="12 of 12 pairs are longer"):
        opened(path, 4, drop_long=True)


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, said in [
        (tmp_path / "none", "no such file"),
        (tmp_path / "empty", "no .jsonl files"),
        (write(tmp_path / "blank.jsonl", b" ", b""), "no pairs at all"),
        (write(tmp_path / "one.jsonl", GOOD, GOOD), "single prompt"),
    ]:
        with pytest.raises(ConfigError, match=said):
            opened(path)
    two = write(tmp_path / "two.jsonl", GOOD, b'{"prompt": "q", "completion": "r"}')
    with pytest.raises(ConfigError, match="the pairs have 7 bytes"):
        opened(two, max_bytes=3)
    with pytest.raises(ConfigError, match=r"model.vocab_size = 100"):
        open_dataset(DataConfig(source="pairs", path=str(two)), seq_len=16, vocab_size=100)
    with pytest.raises(ConfigError, match=r"pairs.completions = 1"):
        Pairs(["a", "b"], ["c"])


def test_options_that_are_not_of_pairs():
    for options, field in [
        ({"source": "pairs"}, "data.path"),
        ({"drop_long": True}, "data.drop_long"),
        ({"source": "pairs", "path": "x", "deduplicate": "exact"}, "data.deduplicate"),
        ({"mixture": (SourceConfig(source="pairs", path="x"),)}, "data.mixture[0].source"),
    ]:
        with pytest.raises(ConfigError) as error:
            DataConfig(**options)
        assert error.value.field == field


def test_a_trained_tokenizer_sees_training_pairs_only(tmp_path):
    lines = [
        json.dumps({"prompt": f"say {i}", "completion": f"the number {i}"}).encode()
        for i in range(50)
    ]
    path = write(tmp_path / "pairs.jsonl", *lines)
    found = opened(path, 64, tokenizer="bpe", bpe_vocab_size=257, cache_dir=str(tmp_path / "c"))
    assert found.tokenizer.vocab_size == 257 and found.validation.counted > 0
    again = opened(path, 64, tokenizer="bpe", bpe_vocab_size=257, cache_dir=str(tmp_path / "c"))
    assert again.fingerprint == found.fingerprint
