"""analyse(folder) on made ablations whose answers are known."""

import json

import numpy as np
import pytest
from made_ablation import cell, made_grid, write_ablation

from moejax.analysis.ablation import analyse, format_analysis, within_run_curves
from moejax.config import UserError

SEEDS = (0, 1, 2, 3, 4)


def grid(tmp_path, means, **more):
    rows = more.pop("rows", None) or made_grid(means, SEEDS)
    return write_ablation(
        tmp_path / "made", rows, variants=list(means), seeds=SEEDS, amounts=[1e6], **more
    )


def test_an_effect_is_found_and_none_where_there_is_none(tmp_path):
    # Errors of 0.01 at 5 seeds: the difference has the standard error 0.01 sqrt(2/5) = 0.006.
    means = {"aux": 1.9, "bias": 1.8, "same": 1.9, "bad": 2.0}
    found = analyse(grid(tmp_path, means, smallest_effect=0.01))
    verdicts = {name: v["difference"] and v["difference"]["verdict"]
                for name, v in found["variants"].items()}  # fmt: skip
    assert verdicts == {"aux": None, "bias": "better", "same": "cannot tell", "bad": "worse"}
    bias = found["variants"]["bias"]["difference"]
    assert bias["interval"][0] < -0.1 < bias["interval"][1] and bias["p_holm"] >= bias["p"]
    assert found["pooled"]["df"] == 12  # (4 variants - 1) (5 seeds - 1)
    assert found["pooled"]["sd"] == pytest.approx(0.01, rel=0.5)
    same = found["variants"]["same"]["difference"]
    assert same["seeds_needed"] > 0
    assert f"cannot tell at this budget: {same['seeds_needed']} more seeds needed" in same["text"]


def test_the_result_is_json_and_its_text_has_everything(tmp_path):
    rows = made_grid({"aux": 1.9, "bias": 1.8}, SEEDS)
    for row in rows:
        high = 2.0 if row["variant"] == "aux" else 1.0
        noise = 0.01 * np.random.default_rng(row["seed"]).standard_normal(2)
        row |= {"max_violation": high + noise[0], "dropped_share": 0.25,
                "max_violation_by_layer": [high + noise[1], high - noise[1]]}  # fmt: skip
    rows += [
        cell("bias", 9, 1e5, value, kind="tune", learning_rate=rate, id=f"t{rate}")
        for rate, value in ((5e-4, 2.1), (1e-3, 2.0))
    ]
    claim = {"text": "bias beats aux", "source": "a paper", "direction": "bias"}
    found = analyse(grid(tmp_path, {"aux": 1.9, "bias": 1.8}, rows=rows, claim=claim))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["claim_outcome"] == "agrees in direction"
    bias = found["variants"]["bias"]
    assert bias["learning_rate"] == {
        "chosen": 1e-3, "tried": [[5e-4, 2.1], [1e-3, 2.0]], "at_edge": True
    }  # fmt: skip
    assert bias["health"]["max_violation_difference"]["verdict"] == "better"
    layers = bias["health"]["max_violation_by_layer_difference"]
    assert [layer["verdict"] for layer in layers] == ["better", "better"]
    shown = format_analysis(found)
    for words in ("better", "AT THE EDGE", "MaxVio", "agrees in direction", "planned", "tuning",
                  "multipliers: none (a ladder of 4 budgets", "25.0 %"):  # fmt: skip
        assert words in shown, shown


def test_claims(tmp_path):
    outcomes = {}
    for direction in ("aux", "bias", "same"):
        claim = {"text": "best", "direction": direction}
        means = {"aux": 1.9, "bias": 1.8, "same": 1.8}
        found = analyse(grid(tmp_path, means, claim=claim))
        outcomes[direction] = found["claim_outcome"]
    assert outcomes == {"aux": "disagrees", "bias": "agrees in direction",
                        "same": "agrees in direction"}  # fmt: skip
    means, claim = {"aux": 1.9, "bias": 1.9}, {"text": "best", "direction": "bias"}
    assert analyse(grid(tmp_path, means, claim=claim))["claim_outcome"] == "cannot tell"
    # Better than the reference, but not the best of all.
    means, claim = {"aux": 1.9, "bias": 1.8, "new": 1.7}, {"text": "best", "direction": "bias"}
    found = analyse(grid(tmp_path, means, claim=claim))
    assert found["claim_outcome"] == "disagrees"
    assert found["claim_text"] == "better than bias: new"
    # Told apart, and yet less than what matters.
    means, claim = {"aux": 1.9, "bias": 1.8}, {"text": "best", "direction": "bias"}
    found = analyse(grid(tmp_path, means, claim=claim, smallest_effect=0.5))
    assert found["claim_outcome"] == "agrees in direction"
    assert found["claim_text"] == "bias better than aux (by less than the 0.5 of interest)"


def test_the_bill_has_tuning_and_failures_as_lines(tmp_path):
    # Every cell is charged 2 dollars for 1e6 tokens, the tuning cell 0.2.
    rows = made_grid({"aux": 1.9, "bias": 1.8}, SEEDS)
    rows[7] = cell("bias", 2, 1e6, None)
    rows.append(cell("aux", 9, 1e5, 2.2, kind="tune"))
    found = analyse(grid(tmp_path, {"aux": 1.9, "bias": 1.8}, rows=rows))
    bill = found["bill"]
    assert bill["spent"]["dollars"] == pytest.approx(20.2)
    assert bill["tuning"]["dollars"] == pytest.approx(0.2)
    assert bill["failed"]["dollars"] == pytest.approx(2)
    assert bill["by_variant"]["aux"]["dollars"] == pytest.approx(10.2)
    assert bill["planned"] == {"device_hours": 2.0, "dollars": 1.0}
    assert [f["id"] for f in found["failed"]] == ["bias-seed2-1e+06"]
    difference = found["variants"]["bias"]["difference"]
    assert difference["pairs"] == 4 and "1 seed " in difference["notes"][0]
    assert "failed: bias-seed2" in format_analysis(found)


def test_an_unfinished_grid_says_what_is_missing(tmp_path):
    rows = made_grid({"aux": 1.9, "bias": 1.8}, SEEDS)[:8]
    found = analyse(grid(tmp_path, {"aux": 1.9, "bias": 1.8}, rows=rows))
    assert found["missing"] == [{"variant": "bias", "seed": seed, "budget": 1e6} for seed in (3, 4)]
    assert "unfinished: 2 cells are missing" in format_analysis(found)
    one = analyse(grid(tmp_path, {"aux": 1.9, "bias": 1.8}, rows=rows[:1]))
    assert one["variants"]["bias"]["difference"]["verdict"] == "cannot tell"
    assert "two seeds that finished" in format_analysis(one)


def test_the_last_line_of_a_cell_counts(tmp_path):
    rows = made_grid({"aux": 1.9, "bias": 1.8}, SEEDS)
    failed = [dict(cell("bias", 2, 1e6, None), id=rows[7]["id"])]
    found = analyse(grid(tmp_path, {"aux": 1.9, "bias": 1.8}, rows=failed + rows))
    assert not found["failed"] and found["variants"]["bias"]["by_budget"][0]["n"] == 5


def test_bad_folders_are_refused_in_one_line(tmp_path):
    def refused(words, folder):
        with pytest.raises(UserError, match=words) as error:
            analyse(folder)
        assert "\n" not in str(error.value)

    refused("no folder", tmp_path / "none")
    refused("holds no ablation.json", tmp_path)
    means = {"aux": 1.9, "bias": 1.8}
    refused("format = 2", grid(tmp_path, means, format=2))
    folder = grid(tmp_path, means)
    (folder / "results.jsonl").write_text("")
    refused("no cell of the ablation has ended", folder)
    (folder / "results.jsonl").write_text('{"id": 1}\n{"torn')
    refused("line 1 is damaged", folder)
    (folder / "ablation.json").write_text("{")
    refused("cannot be read", folder)
    (folder / "ablation.json").write_text('{"spec": {}}')
    refused("lacks name", folder)
    spec = json.loads((grid(tmp_path, means) / "ablation.json").read_text())["spec"]
    for broken in ({"reference": "x"}, {"variants": ["aux"]}, {"budget": {}}):
        (folder / "ablation.json").write_text(json.dumps({"spec": spec | broken}))
        refused("the spec is damaged", folder)


def test_curves_within_runs_come_from_the_runs_metrics(tmp_path):
    folder = grid(tmp_path, {"aux": 1.9, "bias": 1.8})
    run = folder / "runs" / "bias-seed3-1e+06"
    run.mkdir(parents=True)
    lines = [{"step": 5, "loss": 2.0}, {"step": 5, "val_bits_per_byte": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Step 5 of 10 has half of the cell's 1e6 tokens, 1e12 FLOPs, 1,000 seconds and one dollar.
    curves = within_run_curves(folder)
    assert curves == {"aux": {}, "bias": {"3": [
        {"step": 5, "value": 3.0, "tokens": 5e5, "flops": 5e11, "seconds": 500.0, "dollars": 0.5}
    ]}}  # fmt: skip
    assert within_run_curves(folder, "loss")["bias"]["3"][0]["value"] == 2.0
