"""The model suite from end to end on a tiny model, beside a peer that computes nothing."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from moejax import cli
from moejax.bench import model_suite, peer
from moejax.bench import options as flags
from moejax.bench.models import MODELS, describe, find_model
from moejax.bench.report import Report
from moejax.bench.tables import format_tables
from moejax.bench.training_step import draw_params
from moejax.config import UserError
from moejax.moe.routers import ForceBalancedOptions, SoftmaxTopKOptions, TraceOptions

MODEL = "D16-L2-H2-E4-K2-F8-V32-B2-S8"
FAKE = pathlib.Path(__file__).with_name("fake_peer.py")


@pytest.fixture(scope="module")
def record():
    """One run: dense and MoE under the skewed load, the peer beside them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(peer, "SCRIPT", FAKE)
    patch.setattr(flags, "check_peer_installed", lambda: None)
    said = {}
    patch.setattr(cli, "_print", lambda options, record, text: said.update(record))
    arguments = ["bench", "--suite=model", f"--shapes={MODEL}", "--loads=skewed"]
    status = cli.main([*arguments, "--repeats=2", "--against=transformers"])
    patch.undo()
    assert status == 0
    return json.loads(json.dumps(said))


def test_rows(record):
    found = [(row["dispatch"], row["load"], row["pass"]) for row in record["results"]]
    candidates = [
        ("dense", None), ("blocks", "skewed"), ("transformers", "untrained"),
    ]  # fmt: skip
    assert found == [(*c, p) for p in ("forward_backward", "train_step") for c in candidates]
    shape = find_model(MODEL)
    for row in record["results"]:
        assert row["suite"] == "model" and row["shape"]["T"] == 16 and row["in_turns"]
        seconds = row["ms"]["median"] / 1e3
        assert row["tokens_per_s"] == pytest.approx(16 / seconds)
        flops = 16 * row["train_flops_per_token"]
        assert row["flops_per_s"] == pytest.approx(flops / seconds)
        assert row["mfu"] == pytest.approx(flops / seconds / record["peak_flops"])
    moe = describe(shape.config("float32", "blocks", SoftmaxTopKOptions()), 8)
    dense = describe(shape.dense_config("float32"), 8)
    # The router's matrix in each of two layers, multiplied forward and backward.
    extra = moe["train_flops_per_token"] - dense["train_flops_per_token"]
    assert extra == 3 * 2 * 2 * 16 * 4


def test_the_peer_stands_beside(record):
    rows = {(row["dispatch"], row["load"], row["pass"]): row for row in record["results"]}
    theirs = rows["transformers", "untrained", "train_step"]
    ours = rows["blocks", "skewed", "train_step"]
    assert theirs["ms"]["median"] == 30.0 and theirs["temp_bytes"] is None
    assert ours["times_faster_than_peer"] == pytest.approx(30.0 / ours["ms"]["median"])
    assert theirs["times_faster_than_peer"] == 1.0
    facts = record["peers"][MODEL]
    assert facts["params_unexplained"] == 0 and facts["query_key_norms"] == 64
    assert "x peer" in format_tables(record)
    assert any("normalises queries and keys" in note for note in record["notes"])


def test_loads_are_what_they_are_called(record):
    for row in record["results"]:
        load = row["max_over_mean"]
        # All tokens choose one of the experts: with E / K = 2, twice the mean.
        wanted = {"dense": None, "blocks": pytest.approx(2.0), "transformers": 1.5}
        assert load == wanted[row["dispatch"]]


def test_programs_tell_their_memory(record):
    for row in record["results"]:
        if row["dispatch"] != "transformers":
            # Parameters alone are 4 bytes each.
            assert row["program_bytes"] > 4 * row["params"]


def test_text_is_at_most_100_columns(record):
    assert max(map(len, format_tables(record).splitlines())) <= 100


def options(**changes):
    return dataclasses.replace(
        flags.BenchOptions(
            suite="model", dtype="float32", loads=("untrained",), budget=flags.Budget(rounds=1)
        ),
        **changes,
    )


def test_one_by_one_gives_the_same_rows_and_survives_a_failure(monkeypatch):
    """The way of machines whose memory holds one state at a time; run here all the same."""
    monkeypatch.setattr(peer, "SCRIPT", FAKE)
    monkeypatch.setattr(model_suite, "MODEL_PASSES", ("forward_backward",))
    shape, report = find_model(MODEL), Report()
    variants = {
        ("dense", None): shape.dense_config("float32"),
        ("capacity", "untrained"): object(),
    }
    measured = model_suite.bench_one_by_one(
        options(against="transformers"), shape, variants, report
    )
    assert measured["forward_backward"].keys() == {("transformers", "untrained"), ("dense", None)}
    assert [failure["dispatch"] for failure in report.failures] == ["capacity"]
    assert measured["forward_backward"]["dense", None].program.compile_seconds > 0


def test_a_peer_of_another_size_is_refused(monkeypatch):
    monkeypatch.setattr(peer, "SCRIPT", FAKE)
    real = peer.PeerProcess.__init__
    bigger = lambda self, settings: real(self, {**settings, "mode": "bigger"})
    monkeypatch.setattr(peer.PeerProcess, "__init__", bigger)
    monkeypatch.setattr(model_suite, "MODEL_PASSES", ())
    with pytest.raises(UserError, match="7 parameters more"):
        model_suite.bench_one_by_one(
            options(against="transformers"), find_model(MODEL), {}, Report()
        )


def test_routers_of_the_loads(tmp_path):
    shape = find_model("olmoe_tiny")
    router = lambda load, **changes: model_suite.make_router(
        options(**changes), shape, load, tmp_path
    )
    assert isinstance(router("balanced"), ForceBalancedOptions)
    # The peer has no z-loss.
    assert router("untrained") == SoftmaxTopKOptions(z_loss_weight=0.0)
    skewed = router("skewed").shares(32, 4)
    assert skewed.max() * 32 == pytest.approx(4.0)
    assert router("worst").shares(32, 4).max() == pytest.approx(1 / 4)
    assert router("recorded", trace="x.json") == TraceOptions(path="x.json")


SIZES = {"olmoe_150m": 150e6, "olmoe_500m": 500e6, "olmoe_1b": 1e9}


@pytest.mark.parametrize("name", SIZES)
def test_models_are_about_as_large_as_they_are_called(name):
    shape = MODELS[name]
    facts = describe(shape.config("bfloat16", "auto", SoftmaxTopKOptions()), shape.S)
    assert facts["active_params"] == pytest.approx(SIZES[name], rel=0.06)
    # Weights, gradients and AdamW's moments in float32 leave room on a card of 80 GB.
    assert 16 * facts["params"] < 60e9
    assert shape.B * shape.loss_chunk * shape.V <= 2**27


def test_olmoe_tiny_is_the_model_that_was_agreed_on():
    shape = MODELS["olmoe_tiny"]
    config = shape.config("float32", "blocks", SoftmaxTopKOptions())
    assert config.head_dim == 64 and not config.tie_embeddings and config.layers("moe") == 8
    assert (shape.V, shape.B, shape.S, shape.E, shape.K, shape.F) == (4096, 8, 256, 32, 4, 128)
    assert shape.dense_config("float32").dense_width == 4 * 128


def test_drawn_parameters():
    config = find_model(MODEL).config("float32", "blocks", SoftmaxTopKOptions())
    params, again = draw_params(config, 0), draw_params(config, 0)
    experts = params["segment_0"]["layer_0"]["moe"]["experts"]["gate_up"]
    assert experts.shape == (2, 4, 16, 2, 8) and experts.dtype == np.float32
    assert experts.std() == pytest.approx(0.02, rel=0.1)
    assert np.all(params["final_norm"]["scale"] == 1)
    np.testing.assert_array_equal(params["embedding"], again["embedding"])


def test_a_model_spelled_out_wrongly():
    with pytest.raises(UserError, match="did you mean 'olmoe_tiny'"):
        find_model("olmoe_tin")
    with pytest.raises(UserError, match="write each of D, L, H, E, K, F, V, B, S once"):
        find_model("D16-L2")
