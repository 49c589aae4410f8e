"""Run directories and ablation folders made up without training, for the tests of reports."""

import itertools
import json
import pathlib

import ledgers
import numpy as np

from moejax.training import run_config

LAYERS, EXPERTS = 3, 8
LN2 = float(np.log(2))
VARIANTS = {
    "aux": {"router.name": "softmax_topk"},
    "bias": {"router.name": "deepseek_v3", "router.bias_step": 0.01},
    "none": {"router.name": "mixtral"},
}


def config(seed: int = 0, steps: int = 100, **router) -> dict:
    """A small run's config, resolved."""
    values = {
        "seed": seed,
        "model": {"vocab_size": 260, "d_model": 16, "num_layers": LAYERS + 1, "first_k_dense": 1,
                  "attention": {"num_heads": 2}},
        "moe": {"num_experts": EXPERTS, "top_k": 2, "d_expert": 8},
        "router": {"name": "deepseek_v3", **router},
        "data": {"source": "text", "path": "corpus", "tokenizer": "bytes"},
        "train": {"steps": steps, "batch_size": 8, "seq_len": 32, "log_every": 1},
    }  # fmt: skip
    return run_config.from_dict(values).to_dict()


def metrics(steps: int, *, seed: int = 0, better: float = 0.0, log_every: int = 1) -> bytes:
    """Lines of ``metrics.jsonl``: a loss that falls, uneven loads, biases that spread."""
    rng = np.random.default_rng(seed)
    lines = []
    spread = rng.normal(0, 1, (LAYERS, EXPERTS))
    for step in range(1, steps + 1):
        if step % log_every and step not in (1, steps):
            continue
        share = step / steps
        loss = 2.4 + 3.0 * (step + 4) ** -0.4 - better + 0.02 * rng.normal()
        load = np.exp(0.5 * (1 - share) * spread + 0.1 * rng.normal(size=spread.shape))
        load = np.round(load / load.sum(-1, keepdims=True), 4)
        violation = np.round(load.max(-1) * EXPERTS - 1, 4)
        lines.append({
            "step": step, "loss": loss, "aux_loss": 0.001, "gradient_norm": 1.0,
            "learning_rate": 1e-3, "tokens": 256 * step, "tokens_per_second": 5e3, "mfu": 0.3,
            "peak_flops": 1e11, "model_flops": 1e6 * 256 * step, "seconds": 20 + 0.1 * step,
            "dollars": 1e-5 * (200 + step), "router/max_violation": float(violation.mean()),
            "router/load_entropy": 1 - 0.1 * (1 - share), "router/dropped_share": 0.0,
            "router/unrouted_share": 0.0, "router/dead_experts": 0, "router/bias_spread": share,
            "router/max_violation_by_layer": violation.tolist(),
            "router/bias_by_layer": np.round(0.1 * share * spread, 4).tolist(),
            "router/load_by_layer": load.tolist(),
        })  # fmt: skip
        if step % max(steps // 10, 1) == 0:
            lines.append({"step": step, "val_loss": loss + 0.02, "dollars": 1e-5 * (200 + step),
                          "val_bits_per_byte": (loss + 0.02) / LN2})  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def write_run(
    folder: pathlib.Path, *, steps: int = 100, seed: int = 0, status: str = "completed",
    lines: bytes | None = None, sample: str = "def f(x):", data: dict | None = None,
    device: str = "cpu", **router,
) -> pathlib.Path:  # fmt: skip
    """A run directory without checkpoints. ``lines`` are its metrics; made up if left out."""
    lines = metrics(steps, seed=seed) if lines is None else lines
    ledgers.write(
        folder,
        ledgers.header(run_id=folder.name, final=True, hardware=device),
        ledgers.done(10.0 + seed, status=status, tokens=256 * steps, flops=2.56e8 * steps),
    )
    record = {
        "config": config(seed, steps, **router),
        "code": {"moejax": "0.1.0", "revision": "0123456789abcdef"},
        "packages": {"jax": "0.10.2", "numpy": "2.4.6"},
        "python": "3.11.7",
        "machine": "Linux x86_64",
        "data": {"fingerprint": "f" * 64, "source": "text", "licence": "CC0", "bytes": 123456}
        | (data or {}),
        "fingerprint": f"{seed:064d}",
    }
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_bytes(lines)
    checks = [json.loads(line) for line in lines.splitlines() if b'"val_loss"' in line]
    last = checks[-1] if checks else {"val_loss": None, "val_bits_per_byte": None}
    summary = {
        "status": status, "step": steps, "tokens": 256 * steps, "loss": 2.5,
        "val_loss": last["val_loss"], "val_bits_per_byte": last["val_bits_per_byte"],
        "baselines": {"unigram": 4.2, "gzip": 3.1}, "bytes_per_token": 1.0,
        "tokens_per_second": 5e3, "compile_seconds": 3.0, "mfu": 0.3, "peak_flops": 1e11,
        "peak_source": "measured", "dispatch": "blocks", "leaks": [], "dollars": 0.01,
        "failed_saves": 0, "samples": [sample], "fingerprint": record["fingerprint"],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_inspection(run: pathlib.Path, token: str = " return", domain: str = "library") -> None:
    """What ``moejax inspect`` would have left of a run, made up."""
    rng = np.random.default_rng(3)
    load = rng.dirichlet(np.full(EXPERTS, 20.0), LAYERS)
    together = rng.uniform(0, 0.3, (LAYERS, EXPERTS, EXPERTS))
    layers = list(range(1, LAYERS + 1))
    names = ("max_violation_batch", "max_violation_global", "load_entropy", "gate_entropy",
             "vocabulary_input", "vocabulary_target", "vocabulary_prediction")  # fmt: skip
    by_layer = {name: rng.uniform(0.1, 0.9, LAYERS).round(4).tolist() for name in names}
    by_layer |= {"experts_per_token": [2.0] * LAYERS, "dead_experts": [0] * LAYERS}
    by_layer["vocabulary_target"][0] = None
    tokens = [[[(token, 1.0, 9)] for _ in range(EXPERTS)] for _ in range(LAYERS)]
    result = {
        "workdir": str(run), "step": 100, "checkpoints": [50, 100], "router": "deepseek_v3",
        "num_experts": EXPERTS, "top_k": 2, "layers": layers, "tokens": 4096, "batches": 4,
        "loss": 2.5, "by_layer": by_layer, "load": load.tolist(), "gate_mass": load.tolist(),
        "coactivation": together.tolist(),
        "saturation": {"reference": 100, "steps": [50, 100],
                       "by_layer": [[0.6] * LAYERS, [1.0] * LAYERS]},
        "flip_rate": {"steps": [[50, 100]], "by_layer": [[0.5] * LAYERS]},
        "domains": {"kind": "top-level folder", "names": [domain, "tests"], "tokens": [2000, 2096],
                    "share": rng.uniform(0.1, 0.5, (LAYERS, EXPERTS, 2)).tolist()},
        "vocabulary": {"min_count": 8, "input": tokens, "target": tokens, "prediction": tokens},
        "masked_best_experts": {"masked": [0, 1, 2], "loss": [2.5, 2.6, 2.9],
                                "experts_per_token": [2.0, 2.0, 2.0]},
        "left_out": {"bias": "the router keeps no selection bias"},
    }  # fmt: skip
    (run / "inspect").mkdir()
    (run / "inspect" / "inspect.json").write_text(json.dumps(result))


def write_evaluation(run: pathlib.Path, text: str = "library", tasks: bool = True) -> dict:
    """What ``moejax evaluate`` would have left of a run, made up; ``text`` is in all its words."""
    rows = [("(all)", 40, 9000, 1.9), (text, 39, 6000, 1.8), ("tests", 1, 3000, 2.1)]
    total, *found = [
        {"name": name, "documents": documents, "tokens": tokens, "bytes": 4 * tokens,
         "nats_per_token": 2.5, "bits_per_byte": bits, "unigram": bits + 2.25, "gzip": bits + 1.125,
         "interval": None if documents == 1 else [bits - 0.0625, bits + 0.0625]}
        for name, documents, tokens, bits in rows
    ]  # fmt: skip
    scores = {
        "acc": {"value": 0.4375, "stderr": 0.03125},
        f"f1/{text}": {"value": None, "stderr": None},
    }
    harness = {
        "version": "0.4.9", "limit": 250, "max_length": 1024, "tasks": {
            f"arc_{text}": {"samples": 1250, "few_shot": 5, "version": 1.0, "metrics": scores},
            "group": {"samples": None, "few_shot": None, "version": None, "metrics": {}},
        },
    }  # fmt: skip
    record = json.loads((run / "config.json").read_text())
    result = {
        "workdir": str(run), "fingerprint": record["fingerprint"],
        "data_fingerprint": record["data"]["fingerprint"], "step": 50,
        "batches": {"run": 3, "of": 7}, "confidence": 0.95, "leaks": [f"router {text} looks ahead"],
        "total": total, "kind": f"top-level folder {text}", "why": None, "domains": found,
        "lm_eval": harness if tasks else None,
    }  # fmt: skip
    (run / "evaluate.json").write_text(json.dumps(result))
    return result


def write_ablation(
    folder: pathlib.Path, *, seeds: int = 3, steps: int = 80, names: dict | None = None,
    error: str = "step 40: loss nan", claim: str = "A bias balances without costing loss.",
    runs: bool = True,
) -> pathlib.Path:  # fmt: skip
    """An ablation's folder: four budgets, learning rates tried, and a cell that failed.

    Bias is better by 0.05 nats, none is like aux, whose rate lies at the edge of its bracket.

    Args:
      folder: where.
      seeds: of each variant.
      steps: of the largest budget.
      names: what to call the variants aux, bias and none.
      error: of the failed cell.
      claim: what is tested.
      runs: write the run directories of the largest budget, too.
    """
    names = {name: (names or {}).get(name, name) for name in VARIANTS}
    budgets = [256 * steps // part for part in (8, 4, 2, 1)]
    rows = []
    for number, (key, name) in enumerate(names.items()):
        rate = 1e-3 * (number + 1)
        tuned = [(2**i, 0.01 * i) for i in ((0, 1, 2) if key == "aux" else (-1, 0, 1))]
        for factor, worse in tuned:
            rows.append(cell(f"{key}-tune-{factor}", name, 100, budgets[-1], "tune",
                             rate * factor, 3.7 + abs(worse)))  # fmt: skip
        for budget, seed in itertools.product(budgets, range(seeds)):
            failed = key == "none" and budget == budgets[-1] and seed == seeds - 1
            loss = 2.4 + 3.0 * (budget / 256) ** -0.4 - 0.05 * (key == "bias")
            draws = ([seed], [seed, number, budget])
            shared, own = (np.random.default_rng(draw).normal() for draw in draws)
            bits = (loss + 0.01 * shared + 0.005 * own) / LN2
            kind = "trunk" if budget == budgets[-1] else "branch"
            row = cell(f"{key}-s{seed}-{budget}", name, seed, budget, kind, rate, bits)
            if failed:
                row |= {"status": "failed", "error": error, "val_bits_per_byte": None}
            rows.append(row)
            if runs and kind == "trunk":
                write_run(folder / "runs" / row["id"], steps=steps, seed=seed,
                          lines=metrics(steps, seed=seed, better=0.05 * (key == "bias")),
                          status=row["status"], name=VARIANTS[key]["router.name"])  # fmt: skip
    spec = {"name": folder.name, "reference": names["aux"], "metric": "val_bits_per_byte",
            "smallest_effect": 0.01, "seeds": list(range(seeds)),
            "variants": {names[key]: edits for key, edits in VARIANTS.items()},
            "claim": {"text": claim, "source": "arXiv 2408.15664", "direction": names["bias"]},
            "budget": {"hold": "tokens", "amounts": budgets}}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    about = {"format": 1, "spec": spec, "command": f"moejax ablate --workdir={folder.name}"}
    plan = {"cells": [], "planned": {"device_hours": 0.1, "dollars": 0.2}}
    (folder / "ablation.json").write_text(json.dumps(about))
    (folder / "plan.json").write_text(json.dumps(plan))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "results.jsonl").write_text(lines)
    return folder


def cell(name, variant, seed, budget, kind, rate, bits) -> dict:
    """A line of ``results.jsonl`` of a completed cell."""
    return {
        "id": name, "variant": variant, "seed": seed, "budget": budget, "kind": kind,
        "learning_rate": rate, "status": "completed", "error": None, "steps": budget // 256,
        "tokens": budget, "model_flops": 1e6 * budget, "train_seconds": budget / 2560,
        "device_seconds": budget / 1280, "dollars": budget * 4e-8, "device": "cpu",
        "val_loss": bits * LN2, "val_bits_per_byte": bits, "loss": bits * LN2,
        "max_violation": 0.2 + 0.01 * seed + 0.1 * len(variant),
        "max_violation_by_layer": [0.1 * (i + 1) + 0.01 * seed for i in range(LAYERS)],
        "dropped_share": 0.0, "tokens_per_second": 5e3,
        "charged": {"dollars": budget * 5e-8, "device_hours": budget / 2560 / 3600},
    }  # fmt: skip
