"""Ablation configs: what is refused, in one line, before anything is written."""

import pytest
from ablations import ablate, write_ablation

from moejax.ablation import spec
from moejax.config import ConfigError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_ablation(tmp_path_factory.mktemp("config"))


# Setting, and what the one line has to say.
BAD = {
    "misspelt key": ("variants.bias.moe.top_kk=3", ["variants.bias: moe.top_kk", "'top_k'"]),
    "misspelt block": ("variants.bias.modle.d_model=3", ["modle", "did you mean 'model'?"]),
    "value out of range": ("variants.bias.moe.top_k=9", ["variants.bias", "moe.num_experts = 4"]),
    "seed of a variant": ("variants.bias.seed=3", ["variants.bias.seed = 3", "same in all"]),
    "steps of a variant": ("variants.bias.train.steps=3", ["variants.bias.train.steps", "base"]),
    "price of a variant": ("variants.bias.cost.price=1.0", ["variants.bias.cost.price"]),
    "one seed": ("seeds=[3]", ["seeds = [3]", "needs two seeds"]),
    "a seed twice": ("seeds=[3,3]", ["seeds = [3, 3]", "twice"]),
    "tuning on the grid's seeds": (
        "tuning={'factors':[0.5,1.0],'seeds':[7,1]}", ["tuning.seeds = [1]", "choose others"],
    ),
    "tuning of another field": (
        "tuning={'factors':[1.0],'seeds':[7],'field':'optim.beta1'}", ["tuning.field", "beta1"],
    ),
    "tuning too dear": (
        "tuning={'factors':[0.5,1.0],'seeds':[7],'amount':1536.0}", ["tuning.amount", "max_share"],
    ),
    "unknown reference": ("reference=axu", ["reference = 'axu'", "did you mean 'aux'?"]),
    "claimed variant": (
        "claim={'text':'x','direction':'biass'}", ["claim.direction = 'biass'", "not a variant"],
    ),
    "unknown field": ("seed=3", ["seed = 3", "did you mean 'seeds'?"]),
    "unknown unit": ("budget.hold=flop", ["budget.hold = 'flop'", "did you mean 'flops'?"]),
    "a step above the budget": (
        "budget.amounts=[100]", ["budget.amounts[0]", "one step of 'bias'"],
    ),
    "whole steps too far off": ("budget.amounts=[1400]", ["budget.amounts[0]", "-8.7 %", "equal"]),
    "falling amounts": ("budget.amounts=[3072,1536]", ["budget.amounts", "rise"]),
    "a ladder of cosines": (
        ["budget.amounts=[2560,5120]", "base.optim.schedule=cosine"],
        ["optim.schedule = 'cosine'", "no stable part", "use 'wsd'"],
    ),
    "a ladder inside the warm-up": (
        ["budget.amounts=[2560,5120]", "base.optim.warmup_steps=12"],
        ["optim.warmup_steps = 12", "a run of 10 steps ends before"],
    ),
    "a limit of the runs": ("base.budget.max_hours=1.0", ["base.budget", "short of the others"]),
    "seconds without need": ("budget.seconds_per_step={'bias':1.0,'aux':1.0}", ["leave it out"]),
    "seconds of one variant": (
        ["budget.hold=dollars", "budget.seconds_per_step={'bias':1.0}"], ["lacks aux"],
    ),
    "seconds of no ablation": (
        ["budget.hold=dollars", "budget.seconds_per_step=/no/such"], ["plan.json", "/no/such"],
    ),
    "losses in different tokens": (
        ["metric=val_loss", "variants.bias.data.tokenizer=bpe",
         "variants.bias.data.bpe_vocab_size=300", "variants.bias.model.vocab_size=300"],
        ["metric = 'val_loss'", "val_bits_per_byte"],
    ),
    "another held-out text": (
        "variants.bias.data.validation_fraction=0.2", ["variants.bias: data", "same held-out text"],
    ),
    "a variant that cannot run here": (
        "variants.bias.moe.dispatch=grouped", ["variants.bias", "kernels need a GPU"],
    ),
    "too many processes": ("--processes=999", ["--processes = 999", "cores"]),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_is_one_line_and_writes_nothing(config, tmp_path, capsys, settings, words):
    settings = [settings] if isinstance(settings, str) else settings
    flags = [f if f.startswith("--") else f"--config.{f}" for f in settings]
    assert ablate(config, tmp_path / "ablation", *flags) == 2
    said = capsys.readouterr()
    line = said.err.strip()
    assert "\n" not in line and said.out == ""
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


def test_a_whole_block_is_replaced_or_dropped_and_a_field_is_set(config):
    found = spec.load(str(config), ["variants.dense={'moe': None}", "variants.aux.moe.top_k=1"])
    assert found.run_config("dense").model.moe is None
    aux = found.run_config("aux").model.moe
    assert aux.top_k == 1 and aux.num_experts == 4
    assert aux.router.name == "softmax_topk"  # nothing of base's router is left
    assert found.run_config("bias").model.moe.top_k == 2
    assert found.base["moe"]["top_k"] == 2


def test_an_ablation_survives_its_record(config):
    found = spec.load(str(config), ["tuning={'factors': [0.5, 1], 'seeds': [7]}"])
    assert spec.from_dict(found.to_dict()) == found
    assert spec.differences(found.to_dict(), found.to_dict()) == []


def test_differences_are_named_and_conclusions_may_change(config):
    before = spec.load(str(config)).to_dict()
    after = spec.load(
        str(config), ["seeds=[0,2]", "variants.aux.moe.top_k=1", "smallest_effect=0.1"]
    ).to_dict()
    lines = spec.differences(before, after)
    assert lines == ["seeds ([0, 1] -> [0, 2])", "variants.aux.moe.top_k (None -> 1)"]


def test_a_config_without_two_variants_is_refused():
    values = {"name": "x", "base": {}, "variants": {"a": {}}, "reference": "a", "seeds": [0, 1],
              "budget": {"hold": "tokens", "amounts": [1.0]}}  # fmt: skip
    with pytest.raises(ConfigError, match="two or more variants"):
        spec.from_dict(values)
