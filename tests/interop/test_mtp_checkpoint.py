"""Modules of multi-token prediction in checkpoints: names, copies, and what Transformers makes."""

import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.config import UserError
from moejax.interop import hf
from moejax.models import Transformer

LAST = "model.layers.3."


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3") / "hf"
    return folder, checkpoints.write(folder, checkpoints.V3)


def test_the_names_of_the_released_checkpoint(v3):
    folder, _ = v3
    names = {n.removeprefix(LAST) for n in checkpoints.tensors(folder) if n.startswith(LAST)}
    around = {"embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight",
              "shared_head.norm.weight", "shared_head.head.weight"}  # fmt: skip
    inside = {n.replace("model.layers.2.", "") for n in checkpoints.tensors(folder)
              if n.startswith("model.layers.2.")}  # fmt: skip
    assert names == around | inside
    assert "mlp.gate.e_score_correction_bias" in inside


def test_loaded_and_saved_again_with_its_copies(v3, tmp_path):
    folder, variables = v3
    config, again = hf.load(folder)
    tiny.assert_trees_close(again, variables, 0.0)
    hf.save(tmp_path / "again", config, again, like=folder)
    got, wanted = checkpoints.tensors(tmp_path / "again"), checkpoints.tensors(folder)
    assert got.keys() == wanted.keys()
    assert all(got[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_a_checkpoint_without_copies_stays_without(v3, tmp_path):
    folder, variables = v3
    found = checkpoints.tensors(folder)
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        del found[LAST + name]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(checkpoints.V3))
    checkpoints.write_file(bare / "model.safetensors", found)
    config, again = hf.load(bare)
    tiny.assert_trees_close(again, variables, 0.0)
    hf.save(tmp_path / "again", config, again, like=bare)
    assert checkpoints.tensors(tmp_path / "again").keys() == found.keys()


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_differs_is_named(name, v3, tmp_path):
    folder, _ = v3
    found = checkpoints.tensors(folder)
    found[LAST + name][0, 0] += 1
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.V3))
    checkpoints.write_file(tmp_path / "model.safetensors", found)
    with pytest.raises(UserError, match=f"{LAST}{name} differs from.*num_nextn_predict_layers = 0"):
        hf.load(tmp_path)


def test_a_config_may_leave_the_modules_out(v3, tmp_path):
    """As the usual conversions of V3 to BF16 do: no layer of the main model is lost by it."""
    folder, variables = v3
    found = checkpoints.tensors(folder)
    found[LAST + "embed_tokens.weight"][0, 0] += 1  # as after fine-tuning without the modules
    checkpoints.write_file(tmp_path / "model.safetensors", found)
    values, said = {**checkpoints.V3, "num_nextn_predict_layers": 0}, []
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, again = hf.load(tmp_path, say=said.append)
    assert config.mtp_depth == 0 and len(said) == 1 and LAST in said[0]
    main = {k: v for k, v in variables["params"].items() if not k.startswith("mtp_")}
    tiny.assert_trees_close(again["params"], main, 0.0)
    hf.save(tmp_path / "again", config, again, like=tmp_path)
    kept = checkpoints.tensors(tmp_path / "again")
    assert kept.keys() == {n for n in found if not n.startswith(LAST)}
    # One layer fewer than the files hold is still a mistake.
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"model\.layers\.2\..* is unexpected"):
        hf.load(tmp_path)


def test_half_a_module_is_missing_tensors(v3, tmp_path):
    folder, _ = v3
    found = checkpoints.tensors(folder)
    del found[LAST + "enorm.weight"]
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.V3))
    checkpoints.write_file(tmp_path / "model.safetensors", found)
    with pytest.raises(UserError, match=f"{LAST}enorm.weight is missing"):
        hf.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_transformers_runs_the_module_that_was_saved(family, tmp_path, monkeypatch):
    why = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    layers = pytest.importorskip("transformers.modeling_layers", reason=why)
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this version of transformers has no MtpModel")
    import hf_models

    values = checkpoints.V3
    if family == "glm4_moe":
        names = ("scoring_func", "topk_method", "moe_layer_freq", "q_lora_rank", "kv_lora_rank",
                 "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip
        values = {k: v for k, v in values.items() if k not in names}
        values |= {"model_type": family, "use_qk_norm": True, "head_dim": 8}
    variables = checkpoints.write(tmp_path / "hf", values)
    config = hf.config_from_hf(values)
    hf.save(tmp_path / "again", config, variables)
    # Transformers finds the modules by the released models' numbers of layers.
    kind = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe"}[family] + "ForCausalLM"
    monkeypatch.setattr(
        getattr(transformers, kind), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"]
    )
    main = hf_models.read(tmp_path / "again")
    modules = layers.MtpModel.from_pretrained(main)
    text = np.random.default_rng(0).integers(0, checkpoints.VOCAB, (2, 10))
    ids = torch.tensor(text)
    with torch.no_grad():
        hidden = main.model(ids[:, :9], use_cache=False).last_hidden_state
        positions = torch.arange(9)[None] + 1
        ahead = modules.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
        wanted = main.lm_head(ahead).numpy()[:, :-1]
    tokens = jnp.asarray(text, jnp.int32)
    run = jax.jit(lambda v: Transformer(config).apply(
        v, tokens[:, :9], tokens[:, 1:], method=Transformer.encode_ahead))  # fmt: skip
    _, got = run(variables)
    got = got.hidden[0, :, :-1] @ variables["params"]["head"]
    assert tiny.relative_error(got, wanted) < 2e-5
