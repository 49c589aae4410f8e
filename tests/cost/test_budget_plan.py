"""``moejax plan --budget``: the contract of its fields, the bill, and bad input."""

import json

import pytest

from moejax import cli
from moejax.config import ConfigError
from moejax.cost import budget_plan, budget_text
from moejax.cost.budget_plan import plan_budget
from moejax.cost.cost_config import CostConfig
from moejax.cost.scaling_laws import LAWS
from moejax.training import run_config

FACTS = ("title", "source", "equation", "parameters", "corpus", "tokenizer", "fitted", "inverse",
         "reading", "caveat")  # fmt: skip
OPTIMUM = ("flops", "active_params", "total_params", "tokens", "loss", "leverage", "num_experts",
           "top_k", "num_shared_experts", "granularity")  # fmt: skip
MODEL = ("config", "params", "granularity", "flops_per_token", "tokens", "loss")


def make(amount, price=None, **options):
    options["cost"] = CostConfig(price=price)
    return plan_budget(amount, **{"hardware": "h100_sxm", "seq_len": 4096} | options)


@pytest.fixture(scope="module")
def plan():
    return make("$100k")


def test_the_fields(plan):
    assert json.loads(json.dumps(plan)) == plan
    assert set(plan) == {
        "budget", "hardware", "mfu", "dollars_per_hour", "flops", "dollars", "laws",
        "disagreement", "note", "law", "plan",
    }  # fmt: skip
    assert plan["budget"] == {"text": "$100k", "dollars": 1e5, "flops": None}
    assert set(plan["laws"]) == set(LAWS) and plan["law"] == "krajewski_2024"
    for law in plan["laws"].values():
        assert set(law) == {*FACTS, "optimum", "low", "high", "extrapolated", "model"}
        assert set(law["optimum"]) == set(law["low"]) == set(law["high"]) == set(OPTIMUM)
        assert set(law["model"]) == set(MODEL)
        assert set(law["extrapolated"]) <= set(OPTIMUM)


def test_the_bill_is_the_budget(plan):
    """Every law's model uses up the FLOPs; the chosen one's plan costs the dollars, within 1 %."""
    assert plan["plan"]["dollars"]["rental"] == pytest.approx(1e5, rel=1e-6)
    assert plan["plan"]["train_flops"] == pytest.approx(plan["flops"]["expected"], rel=1e-6)
    for law in plan["laws"].values():
        spent = law["model"]["tokens"] * law["model"]["flops_per_token"]
        assert spent == pytest.approx(plan["flops"]["expected"], rel=1e-6)


def test_the_plan_is_of_the_chosen_laws_model(plan):
    model = plan["laws"]["krajewski_2024"]["model"]
    assert plan["plan"]["params"] == model["params"]
    assert plan["plan"]["tokens"] == model["tokens"]
    config = budget_plan.chosen_config(plan)
    assert config.moe.num_experts == model["config"]["num_experts"]
    assert config.d_model == model["config"]["d_model"]
    other = make("$100k", law="chinchilla_refit_2024")
    assert other["plan"]["params"] == other["laws"]["chinchilla_refit_2024"]["model"]["params"]


def test_the_ranges(plan):
    flops = plan["flops"]
    assert flops["low"] < flops["expected"] < flops["high"]
    for law in plan["laws"].values():
        assert law["low"]["flops"] == flops["low"] and law["high"]["flops"] == flops["high"]
        assert law["low"]["active_params"] < law["high"]["active_params"]
        if law["optimum"]["loss"] is not None:
            assert law["low"]["loss"] > law["optimum"]["loss"] > law["high"]["loss"]
    for name, (low, high) in plan["disagreement"].items():
        advised = [law["optimum"][name] for law in plan["laws"].values()]
        assert (low, high) == (min(advised), max(advised))


def test_a_budget_in_flops():
    found = make("1e21FLOP", price=2.0, mfu=0.4, mfu_source="--mfu", devices=8)
    assert found["flops"] == {"low": 1e21, "expected": 1e21, "high": 1e21}
    expected = 1e21 / (989.4e12 * 0.4) / 3600 * 2.0
    assert found["plan"]["dollars"]["rental"] == pytest.approx(expected, rel=1e-6)
    assert found["dollars"]["expected"] == pytest.approx(expected)
    assert found["plan"]["devices"] == 8 and found["plan"]["mfu_source"] == "--mfu"


def test_devices_are_as_many_as_it_takes(plan):
    """A power of two: it ends in 90 days and holds the model; half as many would not."""
    chosen = plan["plan"]
    assert chosen["wall_days"] <= 90 and chosen["memory_fits"]
    half = make("$100k", devices=chosen["devices"] // 2)["plan"]
    assert half["wall_days"] > 90 or not half["memory_fits"]


def test_a_cpu():
    found = make("$20", hardware="cpu", law="chinchilla_2022")
    assert found["plan"]["hardware"] == "cpu"
    assert found["plan"]["dollars"]["rental"] == pytest.approx(20, rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [({"amount": "$0.0001"}, "too small"), ({"amount": "1e12FLOP"}, "too small"),
     ({"amount": "1e31FLOP"}, "widest"), ({"law": "kaplan_2020"}, "--law"),
     ({"hardware": "h1000"}, "h100_sxm"), ({"price": -1.0}, "cost.price"),
     ({"mfu": 1.2}, "cost.mfu"), ({"devices": -1}, "devices")],
)  # fmt: skip
def test_bad_input(options, message):
    options = {"amount": "$1k"} | options
    with pytest.raises(ConfigError, match=message) as error:
        make(options.pop("amount"), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [["--budget=$1k", "--model=olmoe_1b_7b"], ["--budget=$1k", "--config=x.py"],
     ["--budget=$1k", "--tokens=1e9"], ["--budget=1e6"], ["--budget=nan$"], ["--budget=$-1"],
     ["--budget=$1k", "--law=none"], ["--budget=$1k", "--hardware=none"],
     ["--budget=$1k", "--devices=0"], ["--budget=$1k", "--region=frnce"],
     ["--budget=$1k", "--price-book=none.yaml"], ["--budget=$1k", "--price-kind=sopt"],
     ["--budget=$1k", "--price-kind=spot", "--price=2"], ["--budget="],
     ["--budget=$1k", "--seq-len=-4"], ["--budget=$1e-9"],
     ["--law=ling_2025", "--model=olmoe_1b_7b", "--tokens=1e9"],
     ["--output=x.py", "--model=olmoe_1b_7b", "--tokens=1e9"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_flags_are_one_line(flags, capsys):
    assert cli.main(["plan", *flags]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("moejax plan: ")


def test_the_command(capsys):
    assert cli.main(["plan", "--budget=1e20FLOP", "--law=ling_2025", "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["law"] == "ling_2025" and found["plan"]["train_flops"] == pytest.approx(1e20)
    assert cli.main(["plan", "--budget=$100k"]) == 0
    out = capsys.readouterr().out
    for name, law in LAWS.items():
        assert name in out and law.facts.corpus.split(",")[0] in out
    assert "compare them only" in out and "beyond" in out and "$100,000" in out


@pytest.mark.parametrize("law", ["krajewski_2024", "ludziejewski_2025", "ling_2025_dense"])
def test_the_config_file(law, tmp_path, capsys):
    """It loads as the same model, and its plan costs the budget within 1 %."""
    path = tmp_path / "found.py"
    flags = ["--budget=$2k", f"--law={law}", f"--output={path}", "--format=json"]
    assert cli.main(["plan", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run_config.load(path, []).model == budget_plan.chosen_config(found)
    assert cli.main(["plan", f"--config={path}", "--format=json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["dollars"]["rental"] == pytest.approx(2000, rel=0.01)
    assert again["params"] == found["plan"]["params"]
    assert run_config.load(path, []).budget.max_dollars == 2000
    # It never writes over a file.
    assert cli.main(["plan", *flags]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_given_rate_and_utilisation_are_in_the_config_file():
    found = make("1e20FLOP", price=2.5, mfu=0.3, mfu_source="--mfu")
    source = budget_text.config_source(found, budget_plan.chosen_config(found))
    assert '"price": 2.5' in source and '"mfu": 0.3' in source and '"max_flops": 1e+20' in source
    assert "price" not in budget_text.config_source(make("$1k"), budget_plan.chosen_config(found))


def test_a_folder_is_no_file(tmp_path, capsys):
    assert cli.main(["plan", "--budget=$1k", f"--output={tmp_path}/no/found.py"]) == 2
    assert "--output" in capsys.readouterr().err


def test_the_flags_choose_rate_and_region(tmp_path, capsys):
    """They are in the bill, and in the config that is written."""
    book, path = tmp_path / "ours.yaml", tmp_path / "found.py"
    book.write_text(
        "h20:\n  default: reserved\n  rates:\n"
        "    reserved: {dollars_per_hour: 0.9, date: 2026-01, source: us}\n"
        "    spot: {dollars_per_hour: 0.5, date: 2026-01, source: us}\n"
    )
    flags = ["--budget=$2k", "--hardware=h20", f"--price-book={book}", "--price-kind=spot",
             "--region=france", f"--output={path}", "--format=json"]  # fmt: skip
    assert cli.main(["plan", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plan"]
    assert (plan["price"]["dollars_per_hour"], plan["region"]) == (0.5, "france")
    assert found["dollars_per_hour"]["expected"] == 0.5
    assert plan["co2_kg"] == pytest.approx(0.056 * plan["energy_kwh"])
    cost = run_config.load(path, []).cost
    assert (cost.price_book, cost.price_kind, cost.region) == (str(book), "spot", "france")
    assert cost.rate("h20").dollars_per_hour == 0.5
