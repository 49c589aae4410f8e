"""Peak memory of ``load`` and ``save`` on a checkpoint above 1 GB, in a process of its own."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from moejax.interop import hf
from moejax.interop.safetensors_io import ShardWriter
from moejax.interop.source import abstract_variables, unboxed
from moejax.interop.tables import leaf_shapes, resolve

# Mixtral's form: 1.1 GB in BF16, 85 % of it in two leaves of experts.
VALUES = dict(
    model_type="mixtral", vocab_size=32000, hidden_size=1024, num_hidden_layers=4,
    num_attention_heads=16, num_key_value_heads=4, intermediate_size=4096, num_local_experts=10,
    num_experts_per_tok=2, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip

CHILD = """
import json, sys
import jax
from moejax.interop import hf

def memory(name):
    # Not getrusage: its peak is that of the process that started this one, if that was larger.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

jax.block_until_ready(jax.numpy.zeros(8))
start = memory("VmRSS")
config, variables = hf.load(sys.argv[1])
loaded = memory("VmHWM") - start
hf.save(sys.argv[2], config, variables, like=sys.argv[1])
saved = memory("VmHWM") - start
print(json.dumps({"load": loaded, "save": saved}))
"""


def write(folder: pathlib.Path) -> int:
    """Random bits of BF16 in shards of 300 MB; returns the bytes of all tensors."""
    from moejax.interop.families import BY_TYPE
    from moejax.interop.quantized import BF16

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(VALUES))
    config = hf.config_from_hf(VALUES)
    table = BY_TYPE["mixtral"].tables(VALUES)[0]
    shapes = leaf_shapes(unboxed(abstract_variables(config)))
    pieces = resolve(table, config, shapes, "mixtral").pieces
    writer = ShardWriter(folder, [(p.name, BF16, p.stored_shape) for p in pieces], 300_000_000)
    rng, total = np.random.default_rng(0), 0
    for piece in pieces:
        bits = rng.integers(0, 2**15, piece.stored_shape, np.uint16)
        writer.write(piece.name, bits.view(BF16))
        total += bits.nbytes
    writer.finish()
    writer.close()
    return total


@pytest.mark.slow
def test_peak_memory_is_at_most_1_3_times_the_checkpoint(tmp_path):
    total = write(tmp_path / "hf")
    assert total > 1_000_000_000
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "hf"), str(tmp_path / "again")],
        capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parents[2],
        env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    peak = json.loads(child.stdout)
    print({name: value / total for name, value in peak.items()})
    assert peak["load"] <= 1.3 * total
    # Saving holds one leaf's tensor at a time beside what was loaded.
    assert peak["save"] <= 1.3 * total
