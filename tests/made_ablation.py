"""Made ablations: folders as `moejax ablate` leaves them, with results of known truth."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def write_ablation(
    folder: pathlib.Path,
    results: Sequence[Mapping[str, Any]],
    *,
    variants: Sequence[str],
    seeds: Sequence[int],
    amounts: Sequence[float],
    reference: str | None = None,
    claim: Mapping[str, Any] | None = None,
    smallest_effect: float | None = None,
    **about: Any,
) -> pathlib.Path:
    """Writes the three files of an ablation's record; ``results`` are its cells that ended."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "name": "made", "base": {}, "variants": {name: {"router.name": name} for name in variants},
        "reference": reference or variants[0], "seeds": list(seeds),
        "budget": {"hold": "tokens", "amounts": list(amounts)}, "tuning": None,
        "metric": "val_bits_per_byte", "smallest_effect": smallest_effect, "claim": claim,
    }  # fmt: skip
    (folder / "ablation.json").write_text(json.dumps({"spec": spec, **about}))
    plan = {"cells": [], "planned": {"device_hours": 2.0, "dollars": 1.0}}
    (folder / "plan.json").write_text(json.dumps(plan))
    lines = "".join(json.dumps(row) + "\n" for row in results)
    (folder / "results.jsonl").write_text(lines)
    return folder


def cell(variant: str, seed: int, budget: float, value: float | None, **more: Any) -> dict:
    """One line of ``results.jsonl``; ``value`` None makes a failed cell."""
    failed = value is None
    return {
        "id": f"{variant}-seed{seed}-{budget:g}", "variant": variant, "seed": seed,
        "budget": budget, "kind": "final", "learning_rate": 1e-3,
        "status": "failed" if failed else "completed",
        "error": "the loss is not finite" if failed else None, "steps": 10,
        "tokens": budget, "model_flops": 1e6 * budget, "train_seconds": budget / 1e3,
        "device_seconds": budget / 1e3, "dollars": budget / 1e6, "device": "cpu",
        "val_bits_per_byte": value, "val_loss": value, "loss": value, "max_violation": None,
        "max_violation_by_layer": None, "dropped_share": None, "tokens_per_second": 1e3,
        "charged": {"dollars": budget / 5e5, "device_hours": budget / 3.6e6},
    } | more  # fmt: skip


def made_grid(
    means: Mapping[str, float], seeds: Sequence[int], budget: float = 1e6, sd: float = 0.01,
    seed_sd: float = 0.05, rng: int = 0, cost: Callable[[str], dict] = lambda _: {},
) -> list[dict]:  # fmt: skip
    """Cells of a grid with one budget: variant + seed + error."""
    generator = np.random.default_rng(rng)
    luck = {seed: seed_sd * generator.standard_normal() for seed in seeds}
    return [
        cell(name, seed, budget, mean + luck[seed] + sd * generator.standard_normal(), **cost(name))
        for name, mean in means.items()
        for seed in seeds
    ]
