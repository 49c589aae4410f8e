"""The stages of DeepSeek-R1 in miniature, as blocks that the pipelines of this folder put together.

A stage's ``@NAME`` stands for the folder of an earlier stage. Questions come by rule, worked out in
``<think>`` and answered in ``<answer>``; one in five instances is held out of supervised training
and of reinforcement alike.
"""

from typing import Any

Blocks = dict[str, Any]

# Characters are tokens: no vocabulary to train, and none that hides digits in pieces.
DATA: Blocks = {"tokenizer": "bytes"}
PROMPT: Blocks = {"template": "r1_short"}


def model(width: int = 128, layers: int = 4, experts: int = 16) -> Blocks:
    """A DeepSeek-V3-style model: first layer dense, sigmoid router with a selection bias."""
    return {
        "model": {
            "vocab_size": 320, "d_model": width, "num_layers": layers, "first_k_dense": 1,
            "attention": {"num_heads": 4}, "embedding_multiplier": width**0.5,
        },
        "moe": {"num_experts": experts, "top_k": 2, "d_expert": width // 2,
                "num_shared_experts": 1},
        "router": {"name": "deepseek_v3", "bias_step": 0.01, "routed_scale": 1.0},
    }  # fmt: skip


def dense(width: int = 128, layers: int = 4) -> Blocks:
    """A dense model of the same active size: two routed experts and a shared one make 1.5 widths
    of hidden units a layer, the first layer has its own."""
    blocks = model(width, layers)["model"]
    return {"model": {**blocks, "first_k_dense": 0, "d_ff": 3 * width // 2}}


def adamw(rate: float, warmup: int) -> Blocks:
    """AdamW with a cosine decay."""
    return {"learning_rate": rate, "warmup_steps": warmup, "weight_decay": 0.01}


def pretrain(name: str, architecture: Blocks, steps: int, seed: int, data: Blocks) -> Blocks:
    """On text: the standard library's source, or what ``data`` says."""
    return {
        "name": name, "stage": "pretrain", "seed": seed, **architecture,
        "data": {**DATA, **data},
        "train": {"steps": steps, "batch_size": 32, "seq_len": 128, "log_every": 20,
                  "eval_batches": 4},
        "optim": {"optimizer": "muon", "learning_rate": 6e-3, "schedule": "wsd",
                  "warmup_steps": 20, "decay_fraction": 0.4, "final_fraction": 0.0},
        "cost": {"final": True},
    }  # fmt: skip


def pairs(name: str, task: Blocks, count: int, seed: int, text: bool = False) -> Blocks:
    """Worked answers by rule: what DeepSeek's cold start had people and models write."""
    return {
        "name": name, "seed": seed, "task": task, "prompt": PROMPT,
        "pairs": {"count": count, "text": text}, "cost": {"final": True},
    }  # fmt: skip


def held(optim: Blocks) -> Blocks:
    """The learning rate stays where it is: for a run that ends when its dollars are spent."""
    return {**optim, "final_fraction": 1.0}


def spending(blocks: Blocks, like: str, *less: str) -> Blocks:
    """A stage that trains on until it cost what ``like`` did, less what the stages ``less`` did."""
    train = {**blocks["train"], "steps": 100_000, "eval_every": 0}
    spend = {"as": like, "less": list(less)}
    return {**blocks, "train": train, "optim": held(blocks["optim"]), "spend": spend}


def sft(
    name: str, architecture: Blocks, start: str, data: str, steps: int, seed: int,
    rate: float = 1e-3, stage: str = "sft",
) -> Blocks:  # fmt: skip
    """Supervised training on answers only."""
    return {
        "name": name, "stage": stage, "seed": seed, **architecture,
        **({"start": {"run": start}} if start else {}),
        "data": {**DATA, "source": "pairs", "path": f"{data}/pairs.jsonl"},
        "train": {"steps": steps, "batch_size": 16, "seq_len": 256, "log_every": 20,
                  "eval_every": max(steps // 5, 1), "eval_batches": 4},
        "optim": adamw(rate, 20),
        "cost": {"final": True},
    }  # fmt: skip


def distil(
    name: str, architecture: Blocks, start: str, teacher: str, data: str, steps: int,
    seed: int, rate: float = 1e-3, divergence: str = "forward", hard: float = 0.0,
) -> Blocks:  # fmt: skip
    """Supervised training on pairs, towards a teacher's distributions over each next token."""
    blocks = sft(name, architecture, start, data, steps, seed, rate, "distill")
    return {**blocks, "distill": {"run": teacher, "divergence": divergence, "hard": hard}}


def prefer(
    name: str, architecture: Blocks, start: str, data: str, steps: int, seed: int,
    rate: float = 5e-5, beta: float = 0.1, chosen_weight: float = 1.0,
) -> Blocks:  # fmt: skip
    """Direct preference optimization, on a rejection stage's ``preferences.jsonl``.

    Without the cross-entropy of the right answers these become unlikely too, and few are given.
    """
    blocks = sft(name, architecture, start, data, steps, seed, rate, "preferences")
    return {
        **blocks,
        # A row holds the question twice, with both answers; a few wrong ones go on without an end.
        "data": {
            **DATA,
            "source": "preferences",
            "path": f"{data}/preferences.jsonl",
            "drop_long": True,
        },
        "preferences": {"beta": beta, "chosen_weight": chosen_weight},
    }


def reinforce(
    name: str, architecture: Blocks, start: str, task: Blocks, steps: int, seed: int,
    rate: float = 1e-4, evaluation: Blocks | None = None, rl: Blocks | None = None,
    questions: int = 32, max_tokens: int = 96, prompt: Blocks | None = None,
    prompt_tokens: int = 32,
) -> Blocks:  # fmt: skip
    """Group-relative policy optimization on right answers, from the model of ``start``.

    Clip-higher, no KL term, eight answers a question: see ``reinforcement`` in the README. A prompt
    has ``prompt_tokens`` at most.
    """
    settings = {"algorithm": "grpo", "group_size": 8, "clip_low": 0.2, "clip_high": 0.28,
                "kl_weight": 0.0, **(rl or {})}  # fmt: skip
    return {
        "name": name, "stage": "rl_train", "seed": seed, **architecture,
        "start": {"run": start}, "task": task, "prompt": prompt or PROMPT,
        "sampling": {"max_tokens": max_tokens}, "rl": settings,
        "evaluation": {"problems": 200, "samples": 4, **(evaluation or {})},
        "train": {"steps": steps, "batch_size": 8 * questions, "log_every": 5,
                  "seq_len": prompt_tokens + max_tokens},
        "optim": {**held(adamw(rate, 5)), "weight_decay": 0.0},
        "cost": {"final": True},
    }  # fmt: skip


def rejection(
    name: str, start: str, task: Blocks, questions: int, seed: int, keep: int = 1,
    samples: int = 4, max_tokens: int = 96, preferences: bool = False,
) -> Blocks:  # fmt: skip
    """The right answers of a model, as pairs; with ``preferences``, each beside a wrong one."""
    return {
        "name": name, "seed": seed, "start": {"run": start}, "task": task, "prompt": PROMPT,
        "prompt_tokens": 32, "sampling": {"max_tokens": max_tokens},
        "rejection": {"questions": questions, "samples": samples, "keep": keep,
                      "preferences": preferences},
        "cost": {"final": True},
    }  # fmt: skip


def evaluate(
    name: str, start: str, task: Blocks, evaluation: Blocks, max_tokens: int = 96
) -> Blocks:
    """Held-out problems, asked of the model of ``start``."""
    return {
        "name": name, "start": {"run": start}, "task": task, "prompt": PROMPT,
        "prompt_tokens": 32, "sampling": {"max_tokens": max_tokens}, "evaluation": evaluation,
        "cost": {"final": True},
    }  # fmt: skip
