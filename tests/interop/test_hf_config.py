"""config.json to ModelConfig: published models, both rotary forms, contradictions, and back."""

import checkpoints
import pytest
from published_configs import PUBLISHED

from moejax.config import UserError
from moejax.interop.config_map import architecture, runs
from moejax.interop.hf import config_from_hf
from moejax.interop.source import abstract_variables, choose_family, parse, unboxed
from moejax.interop.tables import leaf_shapes, resolve
from moejax.models import Transformer
from moejax.models.presets import PRESETS


def strict(line):
    raise AssertionError(line)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name):
    """Two transcriptions of one release; an unknown field would be told."""
    got = architecture(config_from_hf(PUBLISHED[name], say=strict))
    assert got == architecture(PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_exported(name):
    """The fields that would be written say the same architecture when they are read."""
    family, values = choose_family(PRESETS[name], None)
    assert architecture(config_from_hf(values, say=strict)) == architecture(PRESETS[name])
    if name in PUBLISHED:
        told = PUBLISHED[name]["model_type"]
        assert family.model_type == told or told in family.also


# Tensors in the released files of R1 (V3's architecture), gpt-oss 20B and Mixtral 8x7B.
RELEASED = {"deepseek_v3": 91_991, "gpt_oss_20b": 459, "mixtral_8x7b": 995}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_every_released_tensor_has_its_place(name):
    """Copies and scales counted; of V3's matrices in blocks of FP8, of gpt-oss's in MXFP4."""
    config, family, _ = parse(PUBLISHED[name], name)
    shapes = leaf_shapes(unboxed(abstract_variables(config)))
    found = resolve(family.tables(PUBLISHED[name])[0], config, shapes, name)
    high = ("embed", "lm_head", "norm", "gate.weight", "eh_proj", "_bias")
    scaled = {"deepseek_v3": lambda n: not any(part in n for part in high),
              "gpt_oss_20b": lambda n: n.endswith(("experts.gate_up_proj", "experts.down_proj")),
              "mixtral_8x7b": lambda n: False}[name]  # fmt: skip
    names = [piece.name for piece in found.pieces]
    assert len(names) + len(found.copies) + sum(map(scaled, names)) == RELEASED[name]


def test_both_rotary_forms_are_one():
    old = {**checkpoints.DENSE, "rope_theta": 500.0,
           "rope_scaling": {"type": "linear", "factor": 4}}  # fmt: skip
    new = {k: v for k, v in checkpoints.DENSE.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    assert config_from_hf(old, say=strict) == config_from_hf(new, say=strict)
    assert config_from_hf(new).attention.rope_theta == 500.0


def test_what_a_file_leaves_out_is_the_familys_own():
    """Defaults of the classes in Transformers, and of the code released with V3."""
    without = lambda values, *names: {k: v for k, v in values.items() if k not in names}
    eps = {"llama": 1e-6, "qwen3_moe": 1e-6, "mixtral": 1e-5, "olmoe": 1e-5, "gpt_oss": 1e-5}
    for family, wanted in eps.items():
        base = {**QWEN, "num_local_experts": 4, "rope_scaling": {"rope_type": "default"}}
        config = config_from_hf(without({**base, "model_type": family}, "rms_norm_eps"), say=list)
        assert config.norm_eps == wanted, family
    values = {**checkpoints.V3, "n_routed_experts": 16}
    router = config_from_hf(without(values, "n_group", "topk_group"), say=strict).moe.router
    assert (router.num_groups, router.groups_kept) == (8, 4)
    values = {**without(values, "num_nextn_predict_layers"), "num_mtp_layers": 1}
    assert config_from_hf(values, say=strict).mtp_depth == 1


def test_gpt_oss_without_yarn_is_written_as_that():
    """Transformers' class puts YaRN where the field is null."""
    config = config_from_hf(GPT_OSS, say=strict)
    _, values = choose_family(config, "gpt_oss")
    assert values["rope_scaling"] == {"rope_type": "default"}
    assert config_from_hf(values, say=strict).attention.rope.scaling == "none"


def test_no_shared_expert_is_written_as_zero():
    """Transformers' classes take no null there."""
    config = config_from_hf({**checkpoints.V3, "n_shared_experts": None}, say=strict)
    assert choose_family(config, "deepseek_v3")[1]["n_shared_experts"] == 0


def test_fields_that_nobody_knows_are_told():
    said = []
    config_from_hf({**checkpoints.DENSE, "attn_temperature": 2.0}, say=said.append)
    assert len(said) == 1 and "attn_temperature = 2.0 is not known" in said[0]


QWEN = dict(
    checkpoints.DENSE, model_type="qwen3_moe", head_dim=4, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=6,
)  # fmt: skip
GPT_OSS = dict(
    checkpoints.DENSE, model_type="gpt_oss", head_dim=4, num_local_experts=4, num_experts_per_tok=2,
    sliding_window=3, rope_scaling={"rope_type": "default"},
)  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0}
WRONG = {
    "heads": (checkpoints.DENSE, {"num_attention_heads": 3}, "num_key_value_heads|hidden_size"),
    "kv heads": (QWEN, {"num_key_value_heads": 3}, "num_key_value_heads = 3: does not divide"),
    "width": (checkpoints.DENSE, {"hidden_size": 9}, "hidden_size = 9: is no multiple"),
    "heads that no class builds": (
        checkpoints.DENSE, {"hidden_size": 9, "head_dim": 4}, "hidden_size = 9: is no multiple",
    ),
    "wide heads": (
        dict(QWEN, model_type="olmoe"), {"head_dim": 6}, "head_dim = 6: must be .* = 4",
    ),
    "odd heads": (checkpoints.DENSE, {"hidden_size": 6}, "head_dim"),
    "top-k": (QWEN, {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: is above"),
    "groups": (checkpoints.V3, {"n_group": 3}, "n_group = 3: does not divide"),
    "groups kept": (checkpoints.V3, {"topk_group": 3}, "topk_group = 3: is above n_group"),
    "too few kept": (
        checkpoints.V3, {"n_group": 2, "num_experts_per_tok": 3}, "leaves 2 experts",
    ),
    "no factor": (checkpoints.DENSE, {"rope_scaling": {"type": "yarn"}}, "factor = None"),
    "half of YaRN": (
        checkpoints.V3, {"rope_scaling": {**YARN, "mscale": 0.7}}, "mscale = 0.7: needs",
    ),
    "unknown rotary": (
        checkpoints.DENSE, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'",
    ),
    "unknown rotary option": (
        checkpoints.DENSE, {"rope_scaling": {**YARN, "long_factor": [1]}}, "long_factor",
    ),
    "dense layers": (
        checkpoints.V3, {"first_k_dense_replace": 4}, "first_k_dense_replace = 4",
    ),
    "every other layer": (checkpoints.V3, {"moe_layer_freq": 0}, "moe_layer_freq = 0"),
    "layer types": (GPT_OSS, {"layer_types": ["full_attention"]}, "has 1 entries for"),
    "layer kinds": (GPT_OSS, {"layer_types": ["full_attention", "linear"]}, "sliding_attention"),
    "no window": (
        dict(checkpoints.DENSE, model_type="qwen3", head_dim=4),
        {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*window",
    ),
    "dense by number": (QWEN, {"mlp_only_layers": [2]}, r"mlp_only_layers = \[2\]"),
    "activation": (checkpoints.DENSE, {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu' only"),
    "another limit": (GPT_OSS, {"swiglu_limit": 6.0}, "swiglu_limit = 6.0"),
    "no rotary form": (GPT_OSS, {"rope_scaling": None}, "rope_scaling = None: has to be there"),
    "clipping": (
        dict(QWEN, model_type="olmoe"), {"clip_qkv": 8.0}, "clip_qkv = 8.0: moejax computes null",
    ),
    "two numbers of experts": (QWEN, {"num_local_experts": 8}, "num_local_experts = 8: contradi"),
    "a window of no width": (QWEN, {"use_sliding_window": True}, "needs sliding_window beside"),
    "scores": (checkpoints.V3, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    "method": (checkpoints.V3, {"topk_method": "greedy"}, "topk_method = 'greedy'"),
    "latent heads": (checkpoints.V3, {"num_key_value_heads": 1}, "num_key_value_heads = 1"),
    "width of a key": (checkpoints.V3, {"qk_head_dim": 9}, "qk_head_dim = 9"),
    "missing": (checkpoints.DENSE, {"hidden_size": None}, "hidden_size = None: has to be there"),
    "a string": (checkpoints.DENSE, {"hidden_size": "8"}, "hidden_size = '8': must be a whole"),
    "a flag": (checkpoints.DENSE, {"num_hidden_layers": True}, "num_hidden_layers = True"),
    "zero": (checkpoints.DENSE, {"vocab_size": 0}, "vocab_size = 0: must be above zero"),
    "unknown model": (checkpoints.DENSE, {"model_type": "qwen3_mo"}, "did you mean 'qwen3_moe'"),
    "no model": (checkpoints.DENSE, {"model_type": None}, "model_type = None"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_contradiction_is_one_line(name):
    base, changes, words = WRONG[name]
    with pytest.raises(UserError, match=words) as error:
        config_from_hf({**base, **changes})
    assert str(error.value).startswith("'config.json'") and "\n" not in str(error.value)


def test_layers_by_kind_become_segments():
    assert runs(["a", "b"] * 3) == ((("a", "b"), 3),)
    assert runs(["a", "b", "b", "b", "c"]) == ((("a",), 1), (("b",), 3), (("c",), 1))
    assert runs(["a", "a", "b"] * 2 + ["a"]) == ((("a", "a", "b"), 2), (("a",), 1))
    config = config_from_hf({**QWEN, "decoder_sparse_step": 2, "num_hidden_layers": 4})
    assert config.layout == ((("dense", "moe"), 2),)
    config = config_from_hf({**checkpoints.V3, "moe_layer_freq": 2, "num_hidden_layers": 6})
    assert config.layout == ((("dense",), 2), (("moe", "dense"), 2))
    assert isinstance(Transformer(config), Transformer)
