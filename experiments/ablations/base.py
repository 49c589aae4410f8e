"""What the ablations of this folder share: the run that their variants are edits of, and its size.

A DeepSeek-V3-style MoE of 0.77M parameters, 0.24M of them active with the head, on the source of
Python's standard library: four layers, the first one dense; a layer of 32 fine experts of which a
token takes three, beside one shared expert; sigmoid scores with a selection bias and no balance
loss. All ablations but those that say otherwise train it for 300 steps of 2,048 tokens.

Chosen for what small runs can show:

- BPE, not bytes: over bytes a hash of the token routes better than a learned router, an effect of
  under-training that says nothing about larger models.
- The bias moves by 0.01 a step, ten times V3's 0.001, which needs 300 to 1,000 steps to balance.
- Warm-up, stable, decay: ladders of budgets then share a trunk.
- Held out are 200,000 bytes, the same for every variant and seed, all of them read at the end.
- The width of the dense layers is spelled out, so that no edit of the experts changes it.

It is a run of its own, too: ``moejax train --config=experiments/ablations/base.py --workdir=DIR``.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from moejax.cost.counts import count
from moejax.training import run_config

STEPS = 300
SEEDS = (0, 1, 2, 3, 4)
# Tuning runs are of STEPS steps, whatever the budgets: the best learning rate falls with the length
# of a run. After 75 steps 0.032 is better than 0.016, after 300 it is worse by 0.03 bits per byte.
# The share leaves room for a bracket that grows by one factor.
TUNING = {
    "field": "optim.learning_rate",
    "factors": [0.5, 1.0, 2.0],
    "seeds": [100],
    "max_share": 0.8,
}
# In bits per byte; differences below it do not matter here.
SMALLEST_EFFECT = 0.005


def get_config() -> ml_collections.ConfigDict:
    """The base run's config; every field can be changed with --config.FIELD=VALUE."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "stage": "ablation",
            "model": {
                "vocab_size": 1024,
                "d_model": 64,
                "d_ff": 128,
                "num_layers": 4,
                "first_k_dense": 1,
                "attention": {"num_heads": 2},
                "embedding_multiplier": 8.0,
            },
            "moe": {"num_experts": 32, "top_k": 3, "d_expert": 32, "num_shared_experts": 1},
            "router": {
                "name": "deepseek_v3",
                "bias_step": 0.01,
                "routed_scale": 1.0,
                "sequence_loss_weight": 0.0,
            },
            "data": {
                "source": "stdlib",
                "tokenizer": "bpe",
                "bpe_vocab_size": 1024,
                "max_validation_bytes": 200_000,
            },
            "train": {"steps": STEPS, "batch_size": 16, "seq_len": 128, "log_every": 10},
            "optim": {
                "optimizer": "adamw",
                "learning_rate": 1.6e-2,
                "schedule": "wsd",
                "warmup_steps": 20,
                "decay_fraction": 0.4,
                "final_fraction": 0.0,
            },
        }
    )


def ablation(
    name: str,
    *,
    variants: Mapping[str, Mapping[str, Any]],
    reference: str,
    hold: str,
    claim: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    steps: tuple[int, ...] = (STEPS,),
    tuning: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An ablation's config: see ``moejax.ablation.spec.AblationSpec`` for the fields.

    Args:
      name: of the ablation.
      variants: name -> dotted edits of the base.
      reference: the variant that the others are compared with.
      hold: ``tokens`` or ``flops``.
      claim: the published claim.
      base: edits of ``get_config`` that all variants have.
      steps: sizes of the budgets, as steps of the base with these edits; several make a ladder.
      tuning: how learning rates are found; None leaves all variants at the base's.
    """
    run = edited(base or {})
    return {
        "name": name,
        "base": run,
        "variants": {variant: dict(edits) for variant, edits in variants.items()},
        "reference": reference,
        "seeds": list(SEEDS),
        "budget": {"hold": hold, "amounts": [amount(run, hold, n) for n in steps]},
        "tuning": None if tuning is None else {**tuning, "amount": amount(run, hold, STEPS)},
        "metric": "val_bits_per_byte",
        "smallest_effect": SMALLEST_EFFECT,
        "claim": dict(claim),
    }


def edited(edits: Mapping[str, Any]) -> dict[str, Any]:
    """The base run's blocks with dotted edits; the name of a block replaces the whole block."""
    run = get_config().to_dict()
    for field, value in edits.items():
        *blocks, last = field.split(".")
        target = run
        for block in blocks:
            target = target[block]
        target[last] = dict(value) if isinstance(value, Mapping) else value
    return run


def amount(run: Mapping[str, Any], hold: str, steps: int) -> float:
    """What so many steps of a run come to, in tokens or in model FLOPs of training."""
    config = run_config.from_dict(run)
    tokens = steps * config.train.batch_size * config.train.seq_len
    if hold == "tokens":
        return tokens
    return tokens * count(config.model, config.train.seq_len).flops_per_token.train
