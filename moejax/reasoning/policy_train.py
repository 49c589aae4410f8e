"""From the config of a run of reinforcement learning to its finished folder."""

import math
import pathlib
from typing import Any

from moejax.config import check
from moejax.cost import text
from moejax.cost.bill import summarize as read_bill
from moejax.cost.bill_text import format_ledger
from moejax.reasoning.policy_config import PolicyConfig
from moejax.reasoning.policy_run import PolicyRun
from moejax.reasoning.policy_setup import plan_policy, prepare_policy
from moejax.reasoning.stage_run import Opened, run_stage
from moejax.training import prepare, run_dir
from moejax.training.start import recorded_in


def train_policy(
    config: PolicyConfig,
    workdir: str,
    *,
    bill_process: bool = False,
    resume_from: int | None = None,
) -> dict[str, Any]:
    """Trains a policy by reinforcement, or goes on with the run that ``workdir`` holds.

    Args:
      config: the run.
      workdir: its folder.
      bill_process: charge the time since this process began as start-up.
      resume_from: refused: a run goes on from its newest checkpoint.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UserError: a config or folder that cannot be used; nothing has been written then.
      RunFailed: the run stopped on an error; its last good checkpoint stands.
    """
    check(
        resume_from is None, "--resume-from", resume_from,
        "is for runs on text; reinforcement goes on from its newest checkpoint: leave it out",
    )  # fmt: skip

    def opened(path: pathlib.Path) -> Opened:
        setup = prepare_policy(config)
        directory = run_dir.open_run(path, setup.config, setup.asked)
        directory = recorded_in(directory, setup.start)
        make = lambda ledger, stop: PolicyRun(setup, directory, ledger, stop)
        run = setup.config.run
        return Opened(
            directory, setup.asked, run, setup.billing, setup.mesh, make, summarize,
            plan_policy(setup),
        )  # fmt: skip

    return run_stage(opened, workdir, bill_process)


def summarize(run: PolicyRun, status: str) -> dict[str, Any]:
    """The outcome of a run, JSON-ready, whatever it came to."""
    ledger, setup, choice = run.ledger, run.setup, run.setup.choice
    seconds = ledger.seconds
    busy = seconds["rollout"] + seconds["train"]
    told = run.evaluations
    steps = sorted(map(int, told))
    return {
        "status": status,
        "step": run.step,
        "tokens": run.tokens,
        "loss": run.loss if math.isfinite(run.loss) else None,
        "val_loss": None,
        "val_bits_per_byte": None,
        "baselines": None,
        "rollout": run.rates,
        "before": told[str(steps[0])] if steps else None,
        "after": told[str(steps[-1])] if steps else None,
        "tokens_per_second": ledger.tokens / busy if busy else 0.0,
        "compile_seconds": seconds["compile"],
        "seconds": seconds,
        "reward_seconds": run.roller.reward_seconds,
        "mfu": ledger.mfu,
        "peak_flops": setup.billing.peak_flops,
        "peak_source": setup.billing.peak_source,
        "dispatch": choice and choice.dispatch,
        "dispatch_reason": choice and choice.dispatch_reason,
        "exchange": choice and choice.exchange,
        "leaks": prepare.leaks(setup.config.run.model.moe, choice),
        "dollars": ledger.total_dollars,
        "model_flops": ledger.total_flops,
        "rollout_flops": ledger.rollout_flops,
        "failed_saves": run.failed_saves,
        "samples": [entry["said"] for entry in told[str(steps[-1])]["shown"]] if steps else [],
        "fingerprint": run.directory.record["fingerprint"],
        "data_fingerprint": setup.asked.fingerprint,
    }


def show(summary: dict[str, Any], workdir: str) -> str:
    """The results and the bill, as text for people."""
    lines = [f"\nrun {summary['status']} after {summary['step']} rollouts"]
    for name in ("before", "after"):
        found = summary[name]
        if found is None:
            continue
        rate = found["pass_at"]["1"]
        low, high = rate["interval"]
        lines.append(
            f"  {name:<16}pass@1 {rate['mean']:.3f} ({low:.3f} to {high:.3f}) on "
            f"{found['problems']} held-out problems, {found['samples']} answers each, after step "
            f"{found['step']}"
        )
    seconds = summary["seconds"]
    busy = max(seconds["rollout"] + seconds["train"], 1e-9)
    reward = summary["reward_seconds"]
    shares = (seconds["rollout"] - reward, reward, seconds["train"])
    lines.append("  time of a step  " + ", ".join(
        f"{name} {text.percent(value / busy)}"
        for name, value in zip(("rollouts", "rewards", "updates"), shares, strict=True)
    ))  # fmt: skip
    lines += ["\nthe bill", format_ledger(read_bill([workdir]))]
    for said in summary["samples"][:2]:
        lines += ["\nan answer", said]
    return "\n".join(lines)
