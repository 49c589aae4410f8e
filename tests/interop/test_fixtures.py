"""Recorded checkpoints of every family and what Transformers computed of them: parity without
torch. ``fixtures/make.py`` records them."""

import dataclasses
import json
import pathlib

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moejax.interop import hf
from moejax.interop.families import FAMILIES
from moejax.interop.safetensors_io import read_header
from moejax.models import Transformer

FOLDER = pathlib.Path(__file__).parent / "fixtures"
RECORDED = sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").is_file())


def test_every_family_is_recorded():
    assert {family.model_type for family in FAMILIES} == set(RECORDED)


@pytest.mark.parametrize("family", RECORDED)
def test_logits_are_the_recorded_ones(family):
    expected = {
        name: stored.read()
        for name, stored in read_header(FOLDER / family / "expected.safetensors").items()
    }
    config, variables = hf.load(FOLDER / family, dtype="float32", say=lambda line: None)
    if config.moe is not None:  # the dispatcher that compiles the soonest; others equal it
        moe = dataclasses.replace(config.moe, dispatch="dense_loop")
        config = dataclasses.replace(config, moe=moe)
    inputs = [jnp.asarray(expected[name]) for name in ("tokens", "valid", "positions")]
    got = np.asarray(jax.jit(Transformer(config).apply)(variables, *inputs).logits)
    valid = expected["valid"] > 0
    assert tiny.relative_error(got[valid], expected["logits"][valid]) < 2e-5


@pytest.mark.parametrize("family", RECORDED)
def test_loaded_and_saved_again_is_the_same_bit_for_bit(family, tmp_path):
    source = FOLDER / family
    config, variables = hf.load(source, say=lambda line: None)
    hf.save(tmp_path / "again", config, variables, like=source, say=lambda line: None)
    values = lambda folder: json.loads((folder / "config.json").read_text())
    assert values(tmp_path / "again") == values(source)
    got, wanted = checkpoints.tensors(tmp_path / "again"), checkpoints.tensors(source)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes(), name
