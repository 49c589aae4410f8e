"""What a reader has to know before believing a report, a line each."""

from collections.abc import Sequence

from moejax.analysis.report import money
from moejax.analysis.report.gather import Ablation, RunRecord, Subject

DROPPED, DEAD_SHARE = 0.01, 0.05  # from which they are worth a warning
MOST_NAMED = 4


def warnings(subject: Subject) -> list[str]:
    """All warnings of a report, gravest first; alike ones of several runs are one line."""
    found: list[str] = []
    if subject.ablation is not None:
        found += _of_ablation(subject.ablation)
    found += _of_runs(subject)
    if subject.bill is not None:
        found += [f"Not in the bill: {message}" for message in subject.bill["unreadable"]]
        if not money.on_accelerator(subject.bill):
            found.append(money.CPU)
    return found + [f"{note[:1].upper()}{note[1:]}" for note in subject.notes]


def _of_ablation(ablation: Ablation) -> list[str]:
    found = []
    for name, variant in ablation.analysis["variants"].items():
        rate = variant.get("learning_rate") or {}
        if rate.get("at_edge"):
            found.append(
                f"The best learning rate of {name} ({rate['chosen']:g}) lies at the edge of what "
                "was tried: a better one may lie beyond."
            )
    unfinished = ablation.analysis.get("missing") or []
    if unfinished:
        found.append(
            f"The grid is not complete: {_count(len(unfinished), 'cell')} have not ended yet."
        )
    failed = ablation.analysis["failed"]
    if failed:
        names = ", ".join(str(cell["id"]) for cell in failed[:MOST_NAMED])
        found.append(
            f"{_count(len(failed), 'cell')} failed ({names}{_more(failed)}); their cost is in the "
            "bill and their errors are listed below."
        )
    if ablation.missing:
        names = ", ".join(ablation.missing[:MOST_NAMED])
        found.append(
            f"The run directories of {_count(len(ablation.missing), 'completed cell')} are not in "
            f"the folder ({names}{_more(ablation.missing)}): they are in the tables, not in the "
            "curves."
        )
    return found


def _of_runs(subject: Subject) -> list[str]:
    runs = subject.runs
    by_line: dict[str, list[str]] = {}
    for run in runs:
        # Of an ablation the cells say how they ended.
        ended = [] if subject.kind == "ablation" else _ending(run)
        # Of several runs no evaluation is shown.
        evaluated = _of_evaluation(run) if subject.kind == "run" else []
        for line in ended + _of_run(run) + evaluated:
            by_line.setdefault(line, []).append(run.name)
    if subject.kind == "run":
        return list(by_line)
    return [
        f"{line} ({', '.join(names[:MOST_NAMED])}{_more(names)})" if len(names) < len(runs)
        else f"{line} (all runs)"
        for line, names in by_line.items()
    ]  # fmt: skip


def _ending(run: RunRecord) -> list[str]:
    summary = run.summary
    status = "running, or was killed" if summary is None else summary["status"]
    found = [] if status == "completed" else [f"The run is not complete: {status}."]
    if run.divergence is not None:
        step, why = run.divergence.get("step"), run.divergence.get("why", "it was not finite")
        found.append(f"The loss was bad at step {step}: {why}.")
    if summary is not None and summary.get("rewinds"):
        found.append(
            f"The run went back {summary['rewinds']} times from a bad loss, and left out "
            f"{summary['skipped_batches']} batches."
        )
    return found


def _of_run(run: RunRecord) -> list[str]:
    found = []
    summary, moe = run.summary, run.config.model.moe
    # A run without a summary still says what its config lets leak.
    if summary is not None:
        found += [f"Leak: {text}." for text in summary.get("leaks", [])]
    elif moe is not None and moe.router.leaks:
        found.append(f"Leak: router {moe.router.name} lets later tokens change earlier ones.")
    if "warning" in run.record["data"]:
        found.append(f"Text: {run.record['data']['warning']}.")
    if summary is not None and summary.get("failed_saves"):
        found.append("Checkpoints could not be saved.")
    if run.record.get("resumed_with"):
        found.append("The run went on with other versions than it began with.")
    revision = run.record.get("code", {}).get("revision") or ""
    if revision.endswith("+"):
        found.append("The code was edited after its recorded revision.")
    return found + _of_routers(run)


def _of_evaluation(run: RunRecord) -> list[str]:
    if run.evaluation is None:
        return []
    found = [f"Leak: {text}." for text in run.evaluation["leaks"]]
    if run.evaluation["fingerprint"] != run.record["fingerprint"]:
        found.append("The evaluation is of another run: moejax evaluate makes it anew.")
    return found


def _of_routers(run: RunRecord) -> list[str]:
    last = run.curves.rows[-1] if run.curves.rows else {}
    found = []
    dropped = last.get("router/dropped_share") or 0.0
    if dropped >= DROPPED:
        found.append(f"{dropped:.1%} of the assignments were dropped at the last step.")
    moe = run.config.model.moe
    if moe is not None:
        experts = moe.num_experts * max(run.config.model.layers("moe"), 1)
        dead = last.get("router/dead_experts") or 0
        if dead >= DEAD_SHARE * experts:
            found.append(f"{dead} of {experts} experts were dead at the last step.")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _more(named: Sequence) -> str:
    return f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
