"""The bracket's outcome on made results: winner, edge, one extension within the share."""

import pytest
from ablations import write_ablation
from test_grid import RATES

from moejax.ablation import grid, spec, tuning

METRIC = "val_bits_per_byte"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_ablation(tmp_path_factory.mktemp("config"))


def made(config, factors, seeds=(7,), share=0.5):
    """An ablation of 100 steps a run that tunes, and its cells."""
    block = {"factors": list(factors), "seeds": list(seeds), "max_share": share}
    found = spec.load(str(config), [f"tuning={block!r}", "budget.amounts=[10000]"])
    return found, grid.make_cells(found, {"bias": RATES, "aux": RATES})


def results(cells, losses: dict[float, list[float | None]]):
    """Lines of ``bias``'s tuning: losses by factor, one a seed; None failed."""
    rows = {}
    for factor, values in losses.items():
        mine = [c for c in cells if c.variant == "bias" and c.factor == factor]
        for cell, loss in zip(mine, values, strict=True):
            status = "failed" if loss is None else "completed"
            rows[cell.id] = {"id": cell.id, "status": status, METRIC: loss}
    return rows


def decide(found, cells, losses):
    return tuning.decide(found, "bias", RATES, cells, results(cells, losses))


def test_the_best_mean_over_seeds_wins(config):
    found, cells = made(config, [0.5, 1, 2], seeds=[7, 8])
    outcome, more = decide(found, cells, {0.5: [3.0, 3.0], 1: [2.0, 2.4], 2: [1.9, 2.8]})
    assert more == [] and outcome["chosen"] == 0.01 and not outcome["at_edge"]
    assert outcome["tried"] == [[0.005, 3.0], [0.01, pytest.approx(2.2)],
                                [0.02, pytest.approx(2.35)]]  # fmt: skip


def test_a_best_at_the_edge_extends_the_bracket_once_and_is_flagged_if_still_there(config):
    found, cells = made(config, [0.5, 1, 3])
    losses = {0.5: [4.0], 1: [3.0], 3: [2.0]}
    _, more = decide(found, cells, losses)
    assert [(c.id, c.factor, c.learning_rate) for c in more] == [
        ("bias-tune-x9-seed7", 9.0, pytest.approx(0.09))
    ]
    outcome, again = decide(found, [*cells, *more], {**losses, 9: [1.0]})
    assert again == [] and outcome["chosen"] == pytest.approx(0.09)
    assert outcome["at_edge"] and outcome["extended"]
    outcome, again = decide(found, [*cells, *more], {**losses, 9: [2.5]})
    assert again == [] and outcome["chosen"] == pytest.approx(0.03) and not outcome["at_edge"]


def test_the_lower_edge_extends_downwards(config):
    found, cells = made(config, [0.5, 1, 2])
    _, more = decide(found, cells, {0.5: [1.0], 1: [2.0], 2: [3.0]})
    assert [c.factor for c in more] == [0.25]


def test_no_extension_beyond_the_share(config):
    """Three runs of 100 steps are all of 1.5 times the two runs; a fourth is too much."""
    found, cells = made(config, [0.5, 1, 2], share=1.5)
    assert {c.steps for c in cells if c.kind == "tune"} == {75}
    block = {"factors": [0.5, 1, 2], "seeds": [7], "max_share": 1.5, "amount": 10000.0}
    found = spec.load(str(config), [f"tuning={block!r}", "budget.amounts=[10000]"])
    cells = grid.make_cells(found, {"bias": RATES, "aux": RATES})
    outcome, more = decide(found, cells, {0.5: [1.0], 1: [2.0], 2: [3.0]})
    assert more == [] and outcome["chosen"] == 0.005 and outcome["at_edge"]


def test_a_factor_that_fails_for_a_seed_is_no_candidate(config):
    found, cells = made(config, [0.5, 1, 2], seeds=[7, 8])
    outcome, more = decide(found, cells, {0.5: [3.0, 3.0], 1: [2.5, 2.5], 2: [1.0, None]})
    assert more == [] and outcome["chosen"] == 0.01
    assert outcome["tried"][2] == [0.02, None]
    outcome, more = decide(found, cells, {f: [None, None] for f in (0.5, 1, 2)})
    assert more == [] and outcome["chosen"] is None
