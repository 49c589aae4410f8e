"""``moejax plan --model=NAME`` for every published model."""

import json

import pytest

from moejax import cli
from moejax.cost.counts import count
from moejax.models.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_model_can_be_planned(name, capsys):
    flags = ["plan", f"--model={name}", "--tokens=1e12"]
    assert cli.main(flags) == 0
    assert "None" not in capsys.readouterr().out
    assert cli.main([*flags, "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    counted = count(PRESETS[name], 4096)
    assert found["params"]["total"] == counted.params.total
    assert found["train_flops"] == 1e12 * counted.flops_per_token.train


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("deepseek_v33", "deepseek_v3"),
        ("qwen3-30b-a3b", "qwen3_30b_a3b"),
        ("gptoss_20b", "gpt_oss_20b"),
    ],
)
def test_a_misspelt_model_gets_its_nearest(typo, meant, capsys):
    assert cli.main(["plan", f"--model={typo}", "--tokens=1e12"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == (
        f"moejax plan: --model = {typo!r}: no such model; did you mean {meant!r}?\n"
    )


def planned(capsys, *flags):
    command = ["plan", "--model=deepseek_v3", "--tokens=14.8e12", "--format=json", *flags]
    assert cli.main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_the_flags_choose_the_rate(tmp_path, capsys):
    assert planned(capsys)["price"]["kind"] == "specialised_cloud"
    spot = planned(capsys, "--price-kind=spot")
    assert spot["price"]["kind"] == "spot" and spot["price"]["book"] == "moejax"
    book = tmp_path / "ours.yaml"
    book.write_text(
        "h20:\n  rates: {reserved: {dollars_per_hour: 0.9, date: 2026-01, source: us}}\n"
        "  purchase: {dollars: 9000, date: 2026, source: us}\n"
    )
    ours = planned(capsys, "--hardware=h20", f"--price-book={book}")
    assert (ours["price"]["dollars_per_hour"], ours["price"]["book"]) == (0.9, str(book))
    assert ours["purchase"]["dollars"] == 9000
    assert ours["dollars"]["rental"] == pytest.approx(0.9 * ours["device_hours"])


def test_renting_at_an_owners_rate_is_owning(capsys):
    """H20: nobody lists a rent, so that its owner's rate is what can be asked for."""
    found = planned(capsys, "--hardware=h20", "--price-kind=owned")
    assert found["dollars"]["rental"] == pytest.approx(found["dollars"]["owned"])


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--hardware=h20"], "no rate is known for h20"),
        (["--price-kind=sopt"], "did you mean 'spot'"),
        (["--price-kind=spot", "--price=2"], "has no use beside cost.price"),
        (["--price-book=none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_rates_that_cannot_be_had_are_one_line(flags, reason, capsys):
    assert cli.main(["plan", "--model=deepseek_v3", "--tokens=1e12", *flags]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and reason in found.err
