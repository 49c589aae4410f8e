"""What is made of a checkpoint's run: shapes for JSON, and what is left out with its reason."""

import dataclasses
import math
import types

import numpy as np
import tiny

from moejax.analysis import measure
from moejax.data.tokenizers import BytesTokenizer


def seen(chosen):
    return measure.Seen(1.0, np.zeros((1, 1, 4)), {}, chosen, np.zeros(4, int), np.zeros((1, 2, 8)))


def text(domains=None, why="no paths"):
    held_out = types.SimpleNamespace(domains=domains, why=why, tokenizer=BytesTokenizer())
    batch = {name: np.array([[97, 98, 97, 98]]) for name in ("tokens", "targets")}
    batch["segment_ids"] = np.ones((1, 4), int)
    return measure.Text([batch], np.array([0, 0, 1, 1]), np.arange(2), held_out)


def test_rows_that_are_mixtures_leave_out_what_needs_a_tokens_experts():
    history, left_out = measure.History(None), {}
    history.add(2, None)
    history.add(4, None)
    assert measure._saturation(history, left_out) is None
    assert measure._flips(history, left_out) is None
    assert measure._domains(seen(None), text(), left_out) is None
    found = measure._by_token(seen(None), text(), {}, left_out)
    assert found == {"coactivation": None, "vocabulary": None}
    names = {"saturation", "flip_rate", "domains", "coactivation", "vocabulary"}
    assert left_out == dict.fromkeys(names, measure.MIXED)


def test_history_is_against_the_final_routing_and_from_one_to_the_next():
    # Two tokens, one of two experts each: token 1 changes after step 2, token 0 after step 4.
    early, middle = np.eye(2, dtype=bool)[[[0, 0]]], np.eye(2, dtype=bool)[[[0, 1]]]
    final = np.eye(2, dtype=bool)[[[1, 1]]]
    history = measure.History(final)
    for step, chosen in ((2, early), (4, middle), (6, final)):
        history.add(step, chosen)
    left_out = {}
    found = measure.plain(measure._saturation(history, left_out))
    assert found == {"reference": 6, "steps": [2, 4, 6], "by_layer": [[0], [0.5], [1]]}
    found = measure.plain(measure._flips(history, left_out))
    assert found == {"steps": [[2, 4], [4, 6]], "by_layer": [[0.5], [0.5]]}
    assert left_out == {}


def test_domains_of_too_few_sampled_tokens_are_not_shown(monkeypatch):
    monkeypatch.setattr(measure, "MIN_DOMAIN", 2)
    chosen = np.eye(4, dtype=bool)[[[0, 0, 1, 2]]]
    domains = types.SimpleNamespace(
        names=("a", "b", "c"), of_document=np.array([2, 0]), kind="file kind"
    )
    found = measure.plain(measure._domains(seen(chosen), text(domains), {}))
    assert found["names"] == ["a", "c"] and found["tokens"] == [2, 2]
    # Document 0 is of c, and expert 0 takes both its tokens; 1 is of a, with experts 1 and 2.
    assert found["share"] == [[[0, 1], [0.5, 0], [0.5, 0], [0, 0]]]
    monkeypatch.setattr(measure, "MIN_DOMAIN", 3)
    left_out = {}
    assert measure._domains(seen(chosen), text(domains), left_out) is None
    assert "raise --batches" in left_out["domains"]


def test_the_names_of_tokens():
    assert measure._token_text(text(), 97) == "a"
    assert measure._token_text(text(), 256) == "<separator>"
    assert measure._token_text(text(), 200) == "<200>"  # no character by itself


def test_layers_are_numbered_as_in_the_model():
    config = tiny.moe_config(segments=((("dense", "moe"), 2), (("moe",), 1)), num_layers=5)
    assert measure.moe_layers(config) == [1, 3, 4]
    # MTP modules have the kind of the last layer and follow it, as layer 61 of DeepSeek-V3 does.
    assert measure.moe_layers(dataclasses.replace(config, mtp_depth=2)) == [1, 3, 4, 5, 6]
    assert measure.moe_layers(tiny.dense_config(mtp_depth=1)) == []
    windowed = tiny.moe_config(
        segments=((("dense_window", "moe_window", "moe"), 1),), num_layers=3,
        attention=tiny.AttentionConfig(4, 2, window=2),
    )  # fmt: skip
    assert measure.moe_layers(windowed) == [1, 2]


def test_json_has_five_digits_and_no_nan():
    values = {"a": np.array([1 / 3, math.nan]), "b": [np.int64(3), (True, "x")], "c": None}
    assert measure.plain(values) == {"a": [0.33333, None], "b": [3, [True, "x"]], "c": None}
