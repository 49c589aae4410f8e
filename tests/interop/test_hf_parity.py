"""Against Transformers, from checkpoints that it wrote itself, and back.

Needs the extra ``parity``; the recorded reason is the only skip here. Where torch is not, the
fixtures of test_fixtures.py keep the same check alive.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.interop import hf
from moejax.interop.safetensors_io import open_checkpoint
from moejax.models import Transformer, init_cache

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
hf_models = pytest.importorskip("hf_models", reason=WHY)

# The first configuration of each family; the others are slow tests.
FIRST = [case for case in hf_models.CASES if " " not in case]
CASES = [
    pytest.param(case, marks=[] if case in FIRST else pytest.mark.slow) for case in hf_models.CASES
]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint of Transformers, its model, and what we made of it."""

    folder: object
    model: object
    config: object
    variables: object

    @functools.cached_property
    def run(self):
        return jax.jit(Transformer(self.config).apply)

    def logits(self, variables, ids, mask=None, positions=None):
        """Logits by one compiled program, whether there is padding or not."""
        as_int = lambda values: jnp.asarray(np.asarray(values), jnp.int32)
        mask = torch.ones_like(ids) if mask is None else mask
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        return self.run(variables, as_int(ids), as_int(mask), as_int(positions)).logits


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    @functools.cache
    def load(case):
        folder = tmp_path_factory.mktemp("hf") / "model"
        model = hf_models.make(case)
        model.save_pretrained(folder)
        said = []
        config, variables = hf.load(folder, say=said.append)
        # Transformers' configs say a module of multi-token prediction that its models do not have.
        assert [line for line in said if "MTP modules; they are left out" not in line] == []
        return Loaded(folder, model, config, variables)

    return load


@pytest.mark.parametrize("case", CASES)
def test_logits(case, loaded):
    one, ids = loaded(case), hf_models.tokens()
    got = one.logits(one.variables, ids)
    assert tiny.relative_error(got, hf_models.logits(one.model, ids)) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_padding_on_both_sides(case, loaded):
    one, ids = loaded(case), hf_models.tokens()
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -4:] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = one.model(
            ids * mask, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits.numpy()
    got = np.asarray(one.logits(one.variables, ids * mask, mask, positions))
    kept = mask.numpy().astype(bool)
    assert tiny.relative_error(got[kept], wanted[kept]) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_loaded_and_saved_again_is_the_same_bit_for_bit(case, loaded, tmp_path):
    one = loaded(case)
    said = []
    hf.save(tmp_path / "again", one.config, one.variables, like=one.folder, say=said.append)
    assert said == []
    config = lambda folder: json.loads((folder / "config.json").read_text())
    assert config(tmp_path / "again") == config(one.folder)
    got, wanted = open_checkpoint(tmp_path / "again"), open_checkpoint(one.folder)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].shape == wanted[name].shape
        assert got[name].read().tobytes() == wanted[name].read().tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_was_saved(case, loaded, tmp_path):
    """Without the source's config.json: the family is found, and its fields written anew."""
    one, ids = loaded(case), hf_models.tokens()
    hf.save(tmp_path / "again", one.config, one.variables)
    if case == "deepseek":  # no class in Transformers reads it
        again, variables = hf.load(tmp_path / "again")
        assert again == one.config
        tiny.assert_trees_close(variables, one.variables, 0.0)
        return
    model = hf_models.read(tmp_path / "again")
    wanted = hf_models.logits(one.model, ids)
    assert tiny.relative_error(hf_models.logits(model, ids), wanted) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST)
def test_gradients(case, loaded, tmp_path):
    """They are stored as weights are, so that one table maps both."""
    one, ids = loaded(case), hf_models.tokens()
    model = hf_models.make(case)
    gradients = hf_models.gradients(model, ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients.get(name, torch.zeros_like(parameter)))
    model.save_pretrained(tmp_path / "gradients")
    _, wanted = hf.load(tmp_path / "gradients", say=lambda line: None)

    def objective(params, tokens):
        out = Transformer(one.config).apply({**one.variables, "params": params}, tokens)
        chances = jax.nn.log_softmax(out.logits[:, :-1], axis=-1)
        return -jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1))

    got = jax.jit(jax.grad(objective))(one.variables["params"], jnp.asarray(ids.numpy(), jnp.int32))
    tiny.assert_trees_close(got, wanted["params"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST)
def test_cached_decoding_is_the_full_pass(case, loaded):
    one, ids = loaded(case), hf_models.tokens()
    whole = one.logits(one.variables, ids)
    ids = jnp.asarray(ids.numpy(), jnp.int32)
    step = jax.jit(
        lambda tokens, cache: Transformer(one.config).apply(one.variables, tokens, cache=cache)
    )
    cache, parts = init_cache(one.config, len(ids), ids.shape[1]), []
    for part in (ids[:, :6], *jnp.split(ids[:, 6:], ids.shape[1] - 6, axis=1)):
        out = step(part, cache)
        cache = out.cache
        parts.append(out.logits)
    assert tiny.relative_error(jnp.concatenate(parts, axis=1), whole) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "glm4_moe"])
def test_experts_in_one_tensor(case, loaded, tmp_path):
    """Transformers 5 can also write experts as it holds them in memory; such files come back so."""
    one = loaded(case)
    one.model.save_pretrained(tmp_path / "fused", save_original_format=False)
    config, variables = hf.load(tmp_path / "fused", say=lambda line: None)
    assert config == one.config
    tiny.assert_trees_close(variables, one.variables, 0.0)
    hf.save(tmp_path / "again", config, variables, like=tmp_path / "fused")
    got, wanted = open_checkpoint(tmp_path / "again"), open_checkpoint(tmp_path / "fused")
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].read().tobytes() == wanted[name].read().tobytes(), name


@pytest.mark.slow
def test_bfloat16_is_kept_and_computes(loaded, tmp_path):
    one, ids = loaded("deepseek_v3"), hf_models.tokens()
    hf_models.make("deepseek_v3").to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    _, variables = hf.load(tmp_path / "bf16", say=lambda line: None)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(variables["params"])}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    # In float32 the same numbers give the same logits: nothing is rounded on the way.
    _, wide = hf.load(tmp_path / "bf16", dtype="float32", say=lambda line: None)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    narrow, wanted = one.logits(variables, ids), one.logits(wide, ids)
    assert tiny.relative_error(narrow, wanted) < 2e-5
    model = hf_models.read(tmp_path / "bf16")
    assert tiny.relative_error(wanted, hf_models.logits(model, ids)) < 2e-5


OURS = {
    "llama": tiny.dense_config(),
    "qwen2": tiny.dense_config(attention=tiny.AttentionConfig(num_heads=4, bias="qkv")),
    "olmoe": tiny.moe_config(
        "softmax_topk", moe={"num_shared_experts": 0}, first_k_dense=0,
        attention=tiny.AttentionConfig(num_heads=4, qk_norm="all"),
    ),
    "mixtral": tiny.moe_config("mixtral", moe={"num_shared_experts": 0}, first_k_dense=0),
    "qwen3_moe": tiny.moe_config(
        "top_k", moe={"num_shared_experts": 0},
        attention=tiny.AttentionConfig(num_heads=4, qk_norm="head"),
    ),
    "glm4_moe": tiny.moe_config(),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", OURS)
def test_a_model_made_here_runs_in_transformers(family, tmp_path):
    config, ids = OURS[family], hf_models.tokens() % tiny.VOCAB
    variables = tiny.variables(config)
    hf.save(tmp_path / "hf", config, variables)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == family
    wanted = hf_models.logits(hf_models.read(tmp_path / "hf"), ids)
    got = tiny.forward(config)(variables, jnp.asarray(ids.numpy(), jnp.int32)).logits
    assert tiny.relative_error(got, wanted) < 2e-5
