"""Scaling fits recover the coefficients of laws that are known, and say how far to trust them."""

import json

import numpy as np
import pytest
from made_ablation import cell, write_ablation

from moejax.analysis.ablation import analyse, format_analysis
from moejax.analysis.scaling_fits import fit
from moejax.config import ConfigError
from moejax.cost.scaling_laws import KRAJEWSKI, LUDZIEJEWSKI


def crossed(*axes):
    return [axis.ravel() for axis in np.meshgrid(*axes)]


def assert_recovered(found, law, names, rel=1e-3):
    for name in names:
        assert found.coefficients[name] == pytest.approx(getattr(law, name), rel=rel), name


def test_a_power_law_with_and_without_noise():
    sizes = np.geomspace(1e6, 1e8, 8)
    losses = 1.5 + 20 * sizes**-0.3
    exact = fit("power_law", {"active_params": sizes}, losses)
    assert exact.coefficients == pytest.approx({"a": 20, "alpha": 0.3, "c": 1.5}, rel=1e-4)
    assert exact.left_out_error < 1e-6 < exact.constant_error
    assert exact.predict({"x": np.array([1e9])}) == pytest.approx(1.5 + 20 * 1e9**-0.3, rel=1e-4)
    noise = np.exp(0.001 * np.random.default_rng(0).standard_normal(8))
    noisy = fit("power_law", {"active_params": sizes}, losses * noise)
    assert abs(noisy.coefficients["alpha"] - 0.3) < 4 * noisy.errors["alpha"]
    assert 0 < noisy.errors["alpha"] < 0.1 and 3e-4 < noisy.left_out_error < 5e-3
    assert json.loads(json.dumps(noisy.to_dict()))["points"] == 8


def test_one_bad_point_is_shrugged_off():
    sizes = np.geomspace(1e6, 1e8, 10)
    losses = 1.5 + 20 * sizes**-0.3
    losses[4] *= 1.1
    found = fit("power_law", {"active_params": sizes}, losses)
    assert found.coefficients["alpha"] == pytest.approx(0.3, rel=0.03)  # by squares 0.03
    assert found.left_out_error > 0.02  # and yet it is reported


def test_the_granularity_law_at_one_number_of_tokens():
    sizes, grains = crossed([1e8, 1e9, 6e9], [1, 2, 4, 16])
    losses = KRAJEWSKI.loss(sizes, 3e10, grains)
    found = fit("granularity", {"total_params": sizes, "granularity": grains}, losses)
    assert_recovered(found, KRAJEWSKI, ("a", "alpha", "g", "gamma"))
    # The tokens' term cannot be told from the floor.
    assert found.coefficients["c"] == pytest.approx(0.471 + 30.78 / 3e10**0.1467, rel=1e-3)


@pytest.mark.slow
def test_the_granularity_law_with_tokens():
    sizes, grains, tokens = crossed([1e8, 4e8, 6e9], [1, 4, 16], [2e9, 1.6e10, 1.3e11])
    data = {"total_params": sizes, "granularity": grains, "tokens": tokens}
    found = fit("granularity_tokens", data, KRAJEWSKI.loss(sizes, tokens, grains))
    names = ("a", "alpha", "g", "gamma", "b", "beta", "c")
    assert_recovered(found, KRAJEWSKI, names, rel=0.01)


def test_the_joint_law_in_experts():
    sizes, experts, tokens = crossed([1e8, 1e9, 3e9], [1, 4, 16, 32], [1e9, 4e9, 1.6e10])
    losses = [LUDZIEJEWSKI.at(e).loss(n, d) for n, e, d in zip(sizes, experts, tokens, strict=True)]
    data = {"active_params": sizes, "num_experts": experts, "tokens": tokens}
    held = {"e_start": LUDZIEJEWSKI.e_start, "e_max": LUDZIEJEWSKI.e_max}
    found = fit("experts", data, np.array(losses), held=held)
    names = ("a", "alpha", "delta", "gamma", "b", "beta", "omega", "zeta", "c")
    assert_recovered(found, LUDZIEJEWSKI, names, rel=0.01)
    assert found.errors["e_max"] == 0


def test_a_held_floor_stays():
    sizes = np.geomspace(1e6, 1e8, 5)
    found = fit("power_law", {"x": sizes}, 1.5 + 20 * sizes**-0.3, held={"c": 1.5})
    assert found.coefficients == pytest.approx({"a": 20, "alpha": 0.3, "c": 1.5}, rel=1e-4)


def test_bad_input_is_named():
    sizes = np.geomspace(1, 9, 6)
    for words, form, data, losses in (
        ("did you mean 'power_law'", "power_laws", {"x": sizes}, sizes),
        ("at least 5 points", "power_law", {"x": sizes[:4]}, sizes[:4]),
        ("three or more values", "power_law", {"x": np.ones(6)}, sizes),
        ("above zero", "power_law", {"x": sizes}, -sizes),
        ("needs total_params, granularity", "granularity", {"x": sizes}, sizes),
    ):
        with pytest.raises(ConfigError, match=words):
            fit(form, data, losses)
    with pytest.raises(ConfigError, match="held"):
        fit("power_law", {"x": sizes}, sizes, held={"b": 1.0})


def test_an_ablation_over_sizes_has_its_fit(tmp_path):
    sizes = {f"w{width}": width for width in (64, 128, 256, 512, 1024)}
    random = np.random.default_rng(0)
    rows = [cell(name, seed, 1e6, 1.5 + 2 * width**-0.4 + 1e-3 * random.standard_normal())
            for name, width in sizes.items() for seed in range(3)]  # fmt: skip
    folder = write_ablation(tmp_path, rows, variants=list(sizes), seeds=range(3), amounts=[1e6])
    about = json.loads((folder / "ablation.json").read_text())
    about["spec"]["variants"] = {name: {"model.d_model": w} for name, w in sizes.items()}
    # What a variant does not edit is the base's.
    about["spec"]["variants"]["w64"], about["spec"]["base"] = {}, {"model": {"d_model": 64}}
    (folder / "ablation.json").write_text(json.dumps(about))
    plan = {"rates": {name: {"model": {"active": w**2, "total": 7}} for name, w in sizes.items()}}
    (folder / "plan.json").write_text(json.dumps(plan))
    found = analyse(folder)
    assert set(found["scaling"]) == {"model.d_model", "active_params"}  # all totals are the same
    over = found["scaling"]["model.d_model"]
    assert over["coefficients"]["alpha"] == pytest.approx(0.4, abs=3 * over["errors"]["alpha"])
    assert over["left_out_error"] < over["constant_error"]
    assert "over model.d_model: L = " in format_analysis(found)
