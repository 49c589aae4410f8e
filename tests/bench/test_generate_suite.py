"""Suite generate from end to end on a tiny model, beside a peer that computes nothing."""

import json
import pathlib

import pytest

from moejax import cli
from moejax.bench import generate_suite
from moejax.bench import options as flags
from moejax.bench.tables import format_markdown, format_tables

MODEL = "D16-L1-H2-E4-K2-F8-V32-B3-S16"

# The protocol of peer_generate, for prompts of 2 tokens.
FAKE = """
import json, sys
settings = json.loads(sys.stdin.readline())
assert settings["tokens"] == 2 and len(settings["prompts"]) == 3
print(json.dumps({
    "ready": True, "params": 1, "experts_implementation": "eager", "tried_ms": {"eager": 1.0},
    "completion": [[0, 0]] * 3, "versions": {"torch": "0", "transformers": "0"},
}), flush=True)
for line in sys.stdin:
    if json.loads(line) == "stop":
        break
    print(json.dumps({"ms": 30.0}), flush=True)
"""


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    script = pathlib.Path(tmp_path_factory.mktemp("peer")) / "fake.py"
    script.write_text(FAKE)
    patch.setattr(generate_suite, "PEER_SCRIPT", script)
    patch.setattr(generate_suite, "PASSES", 2)
    patch.setattr(flags, "check_peer_installed", lambda: None)
    said = {}
    patch.setattr(cli, "_print", lambda options, record, text: said.update(record))
    arguments = ["bench", "--suite=generate", f"--shapes={MODEL}", "--repeats=2"]
    status = cli.main([*arguments, "--against=transformers"])
    patch.undo()
    assert status == 0 and not said["failures"]
    return json.loads(json.dumps(said))


def test_rows(record):
    found = [(row["pass"], row["batch"], row["dispatch"]) for row in record["results"]]
    batches = [(p, n, "blocks") for n in (1, 3) for p in ("prefill", "decode")]
    assert found == [
        *batches, ("recompute", 1, "blocks"), ("decode", 1, "blocks"), ("generate", 3, "blocks"),
        ("generate", 3, "transformers"), ("speculate", 1, "blocks"),
    ]  # fmt: skip
    for row, tokens in zip(record["results"], [2, 1, 2, 1, 14, 14, 2, 2, 1], strict=True):
        assert row["suite"] == "generate" and row["shape"]["S"] == 16
        rate = row["batch"] * tokens / row["ms"]["median"] * 1e3
        assert row["tokens_per_s"] == pytest.approx(rate)


def test_ratios(record):
    rows = record["results"]
    whole, cached, ours, theirs, drafting = rows[-5:]
    ends = [row["ms"][name] * by for row in (whole, cached)
            for name, by in (("p10", 0.9), ("p90", 1.1))]  # fmt: skip
    assert ends[0] / ends[3] < cached["times_faster_than_recompute"] < ends[1] / ends[2]
    assert theirs["ms"]["median"] == 30.0 and theirs["times_faster_than_peer"] is None
    # Both rounds' times, from their quantiles.
    low, high = ours["ms"]["p10"], ours["ms"]["p90"]
    beyond = 0.1 * (high - low) / 0.8
    ratio = (30 / (low - beyond) + 30 / (high + beyond)) / 2
    assert ours["times_faster_than_peer"] == pytest.approx(ratio)
    assert 0 <= drafting["accepted_share"] <= 1 and drafting["step_cost"] > 0
    assert record["peers"][MODEL]["equal_tokens"] < 1
    notes = "\n".join(record["notes"])
    assert "14 of 14 tokens are the same" in notes and "drafts of an untrained MTP" in notes


def test_tables(record):
    text = format_tables(record)
    for word in ("x recompute", "x peer", "accepted", "tokens/s", "speculate"):
        assert word in text
    assert "suite generate" in format_markdown(record)


@pytest.mark.slow
def test_the_peer_completes_with_the_same_weights(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from moejax.bench.options import BenchOptions
    from moejax.bench.report import Report
    from moejax.bench.timing import Budget

    options = BenchOptions(
        suite="generate", dtype="float32", budget=Budget(rounds=1), against="transformers"
    )
    report = Report()
    generate_suite.run(options, [generate_suite.find(MODEL)], report)
    assert not report.failures
    assert report.extra["peers"][MODEL]["equal_tokens"] == 1.0
