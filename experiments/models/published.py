"""What the files of this folder share: a published model's preset as a config, with its recipe.

Each file is one published model: tokens, hardware and bill as published, its recipe as far as the
config can say it, and what ``moejax plan --config=FILE`` makes of it. Where a file does not name a
utilisation, the plan takes the first published one of its chip and kind of model; where a recipe or
a number of devices is not published, the file says that it is assumed. The texts are not published:
name your own with --config.data.source, --config.data.path and --config.data.tokenizer before
training.
"""

from typing import Any

import ml_collections

from moejax.config import to_dict
from moejax.models.presets import PRESETS

# Memory over speed, as such sizes want it: every layer is recomputed, and logits exist in parts.
MEMORY = {"remat": "full", "loss_chunk": 512}


def published(
    name: str,
    *,
    tokens: float,
    hardware: str,
    mesh: dict[str, int],
    batch_size: int = 1024,
    seq_len: int = 4096,
    micro_batches: int = 1,
    train: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    cost: dict[str, Any] | None = None,
) -> ml_collections.ConfigDict:
    """The config of a published run.

    Args:
      name: of the preset.
      tokens: of pre-training; the steps follow from them.
      hardware: the chip's name.
      mesh: the block ``mesh``.
      batch_size: rows of a step.
      seq_len: positions of a row.
      micro_batches: parts of a step.
      train, optim, router, cost: further fields of these blocks.

    Returns:
      What ``get_config()`` returns.
    """
    model = to_dict(PRESETS[name]) | MEMORY
    moe = model.pop("moe")
    blocks = {
        "seed": 0,
        "stage": "pretrain",
        "model": model,
        "train": {
            "steps": round(tokens / (batch_size * seq_len)),
            "batch_size": batch_size,
            "seq_len": seq_len,
            "micro_batches": micro_batches,
        }
        | (train or {}),
        "optim": {"weight_decay": 0.1, "clip_norm": 1.0} | (optim or {}),
        "mesh": mesh,
        "cost": {"hardware": hardware} | (cost or {}),
    }
    if moe is not None:
        blocks["router"] = moe.pop("router") | (router or {})
        blocks["moe"] = moe
    return ml_collections.ConfigDict(blocks)
