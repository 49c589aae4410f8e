"""The ablation configs: they load, say what they test, and hold equal what they claim to."""

import functools
import importlib.util
import pathlib
import re

import pytest

from moejax.ablation import spec as specs
from moejax.cost.counts import count
from moejax.moe.routers import REGISTRY

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "ablations"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if path.stem != "base"}
# A token costs the same in all of their variants, within 1 %.
EQUAL_FLOPS_A_TOKEN = {
    "dense_vs_moe", "shared_experts", "capacity_vs_dropless", "adamw_vs_muon", "low_precision",
    "loss_free_bias", "balance_strategy", "upcycled_vs_scratch",
}  # fmt: skip
# Equal data, where the claim is one about data; their docstrings say what FLOPs that takes.
EQUAL_TOKENS_ONLY = {"mtp", "base_seeds"}


def flops_a_token(config):
    return count(config.model, config.train.seq_len).flops_per_token.train


def tokens_a_step(config):
    return config.train.batch_size * config.train.seq_len


@functools.cache
def load(name):
    return specs.load(str(FILES[name]))


@functools.cache
def runs(name):
    """Every variant's run."""
    return {variant: load(name).run_config(variant) for variant in load(name).variants}


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    found = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    loaded_module = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded_module)
    return loaded_module


def test_every_ablation_is_there():
    assert FILES.keys() == {
        "router_shootout", "balance_strategy", "dense_vs_moe", "granularity", "expert_count",
        "shared_experts", "capacity_vs_dropless", "top_k", "first_k_dense", "upcycled_vs_scratch",
        "mtp", "mla_vs_gqa", "adamw_vs_muon", "low_precision", "fine_grained_shared",
        "loss_free_bias", "base_seeds",
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_config_says_what_it_tests(name):
    spec, text = load(name), FILES[name].read_text()
    doc = text.split('"""')[1]
    command = f"moejax ablate --config=experiments/ablations/{name}.py"
    assert spec.name == name and command in doc
    assert f"--workdir=runs/{name}" in doc
    for needed in ("arXiv", "What it can show:", "What it cannot:", "Hardware: 2 CPU cores, about"):
        assert needed in doc, needed
    assert spec.claim.text and "arXiv" in spec.claim.source and spec.claim.numbers
    assert len(spec.seeds) == (20 if name == "base_seeds" else 5) and spec.smallest_effect > 0


@pytest.mark.parametrize("name", FILES)
def test_what_is_held_equal_is_equal(name):
    """Whole steps come within 1 % of every budget, and a token costs the same where it should."""
    spec, budget = load(name), load(name).budget
    each = {variant: flops_a_token(config) for variant, config in runs(name).items()}
    for variant, config in runs(name).items():
        cost = tokens_a_step(config) * (each[variant] if budget.hold == "flops" else 1)
        for amount in budget.amounts:
            assert round(amount / cost) * cost == pytest.approx(amount, rel=0.01), variant
    spread = max(each.values()) / min(each.values()) - 1
    if name in EQUAL_FLOPS_A_TOKEN:
        assert spread < 0.01
    elif name in EQUAL_TOKENS_ONLY:
        assert budget.hold == "tokens"
    else:
        assert budget.hold == "flops"
    assert spec.metric == "val_bits_per_byte"


def test_mla_costs_what_multi_head_attention_does():
    found = runs("mla_vs_gqa")
    assert flops_a_token(found["mla"]) == pytest.approx(flops_a_token(found["mha"]), rel=0.01)
    cached = {v: count(c.model, 128).kv_cache_bytes_per_token // 8 for v, c in found.items()}
    # Two bytes, four layers.
    assert cached == {"mha": 128, "gqa": 64, "mqa": 32, "mla": 24}


def test_sizes_that_docstrings_name():
    moe = count(runs("dense_vs_moe")["moe"].model, 128)
    dense = count(runs("dense_vs_moe")["dense"].model, 128)
    assert (moe.params.total, moe.params.active.with_head) == (770_624, 236_096)
    assert moe.flops_per_token.train == dense.flops_per_token.train
    assert moe.params.total / dense.params.total == pytest.approx(3.3, abs=0.05)
    more = lambda name, a, b: flops_a_token(runs(name)[a]) / flops_a_token(runs(name)[b]) - 1
    assert more("mtp", "mtp", "next_token") == pytest.approx(0.47, abs=0.005)
    assert more("top_k", "k8", "k1") == pytest.approx(0.61, abs=0.005)
    assert more("expert_count", "e64", "e4") == pytest.approx(0.044, abs=0.001)
    assert more("mla_vs_gqa", "mha", "gqa") == pytest.approx(0.065, abs=0.001)
    assert more("mla_vs_gqa", "mha", "mqa") == pytest.approx(0.101, abs=0.001)
    assert more("router_shootout", "autonomy", "softmax_topk") == pytest.approx(0.174, abs=0.001)


@pytest.mark.parametrize("name", ["granularity", "fine_grained_shared", "shared_experts"])
def test_total_and_active_widths_stay(name):
    """Experts times width, held and active, with shared ones; routers differ."""
    total, active = set(), set()
    for config in runs(name).values():
        moe = config.model.moe
        total.add((moe.num_experts + moe.num_shared_experts) * moe.d_expert)
        active.add((moe.top_k + moe.num_shared_experts) * moe.d_expert)
    assert len(total) == len(active) == 1


@pytest.mark.parametrize("name", ["loss_free_bias", "balance_strategy"])
def test_balancing_changes_nothing_but_the_balancing(name):
    forms = {
        (c.model.moe.router.score, c.model.moe.router.normalize_gates, c.optim.learning_rate)
        for c in runs(name).values()
    }
    assert len(forms) == 1
    balancers = [
        (r.bias_rule, r.balance_loss_weight, r.sequence_loss_weight, r.global_loss_weight,
         r.z_loss_weight, c.train.micro_batches)
        for c in runs(name).values() for r in [c.model.moe.router]
    ]  # fmt: skip
    assert len(set(balancers)) == len(balancers)


def test_no_router_is_forgotten(monkeypatch):
    """Every router of the registry has a variant, or leaks, or only measures."""
    shootout = module("router_shootout", monkeypatch)
    leaking = {name for name, router in REGISTRY.items() if router.Options.leaks}
    assert set(shootout.LEAKING) == leaking
    assert set(shootout.MEASURING) == {"force_balanced", "trace"}
    found = runs("router_shootout")
    assert found.keys() == REGISTRY.keys() - leaking - set(shootout.MEASURING)
    for name, config in found.items():
        assert config.model.moe.router.name == name
        assert not config.model.moe.allow_leak


def test_measured_routers_are_named():
    """Those whose experts per token are known only after the run are listed in the docstring."""
    doc = FILES["router_shootout"].read_text().split('"""')[1]
    listed = re.search(r"- Of (.*?) a token's", doc, re.DOTALL)[1]
    measured = {
        name for name, config in runs("router_shootout").items()
        if config.model.moe.router.counts(64, 16, config.model.moe.top_k).measured
    }  # fmt: skip
    assert set(re.findall(r"``(\w+)``", listed)) == measured
