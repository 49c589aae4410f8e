"""Against Transformers, from checkpoints that it wrote itself.

Needs the extra ``parity``; the recorded reason is the only skip here. Where torch is not, the
fixtures of test_fixtures.py keep the same check alive.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

WHY = "parity needs the extra 'parity' (transformers and torch), which this environment lacks"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

import hf_models

from moejax.interop import hf
from moejax.models import Transformer


def apply(config, variables, ids, **inputs):
    return jax.jit(lambda v, t: Transformer(config).apply(v, t, **inputs))(
        variables, jnp.asarray(ids)
    )


def quiet(line):
    raise AssertionError(line)


@pytest.mark.parametrize("case", hf_models.CASES)
def test_logits(case, tmp_path):
    model = hf_models.make(case)
    model.save_pretrained(tmp_path / "hf")
    said = []
    config, variables = hf.load(tmp_path / "hf", say=said.append)
    assert [line for line in said if "MTP" not in line] == []
    ids = hf_models.tokens()
    got = apply(config, variables, hf_models.as_ours(ids)).logits
    assert tiny.relative_error(got, hf_models.logits(model, ids)) < 2e-5
