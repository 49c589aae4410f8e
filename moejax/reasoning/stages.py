"""Which kind of run a config's blocks make, and several of them in order (block ``pipeline``)."""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from moejax.config import ConfigError, UserError, check
from moejax.cost import text as cost_text
from moejax.cost.bill import NOT_RUNS
from moejax.cost.bill import summarize as read_bill
from moejax.cost.bill_text import format_ledger
from moejax.parallel import together
from moejax.reasoning import pairs_config, policy_config, policy_train, short_stages
from moejax.training import report, run_config, run_dir
from moejax.training.manifest import write_whole
from moejax.training.prepare import with_dtype
from moejax.training.train import train
from moejax.training.train_command import Stage

SUMMARY = "pipeline.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def stage_of(values: Mapping[str, Any]) -> Stage | None:
    """The kind of run that is no training on text; None for that."""
    if "pipeline" in values:
        return Stage(read_pipeline, run_pipeline, show_pipeline)
    if "rl" in values:
        return Stage(policy_config.from_dict, policy_train.train_policy, policy_train.show)
    if any(kind in values for kind in pairs_config.KINDS):
        return Stage(pairs_config.from_dict, short_stages.do_stage, short_stages.show)
    return None


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Runs in order.

    Attributes:
      stages: name and blocks of each; a text that begins with ``@NAME`` stands for the folder of
        an earlier stage.
      spends: of stages that have a block ``spend``, what they may cost: as much as the stage
        ``as``, less what the stages ``less`` cost. Having spent it, such a stage is done.
      until: the last stage to run.
    """

    stages: tuple[tuple[str, dict[str, Any]], ...]
    until: str
    spends: Mapping[str, "Spend"] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Spend:
    """What a stage may cost, by what earlier ones did: for comparisons at equal dollars."""

    like: str
    less: tuple[str, ...] = ()

    def dollars(self, cost: Mapping[str, float]) -> float:
        """The amount, by the dollars of earlier stages.

        Raises:
          UserError: nothing is left.
        """
        left = cost[self.like] - sum(cost[name] for name in self.less)
        if left <= 0:
            raise UserError(
                f"spend: nothing of the ${cost[self.like]:.4f} of {self.like!r} is left"
                + (f" after {', '.join(self.less)}; make these smaller" if self.less else "")
            )
        return left


def read_pipeline(values: Mapping[str, Any]) -> Pipeline:
    """Checks names, references and every stage's blocks.

    Raises:
      ConfigError: which stage, and what is wrong with it.
    """
    others = [name for name in values if name not in ("pipeline", "seed", "until")]
    remedy = "stands beside pipeline, whose stages have blocks of their own; move it into them"
    check(not others, others[0] if others else "", "...", remedy)
    given = values["pipeline"]
    good = isinstance(given, list | tuple) and len(given) > 0
    check(good, "pipeline", given, "must be a list of stages, each a block with a name")
    seed = values.get("seed", 0)
    whole = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**31
    check(whole, "seed", seed, "must be a whole number from 0 to below 2**31")
    stages: list[tuple[str, dict[str, Any]]] = []
    spends: dict[str, Spend] = {}
    for place, blocks in enumerate(given):
        where = f"pipeline.{place}"
        check(isinstance(blocks, Mapping), where, blocks, "must be a block of fields")
        name = blocks.get("name", "")
        well = isinstance(name, str) and _NAME.fullmatch(name) is not None
        check(well, f"{where}.name", name, "must be a folder's name of letters, digits, '_.-'")
        remedy = "is a folder of a run's own, which no bill looks into; take another name"
        check(name not in NOT_RUNS, f"{where}.name", name, remedy)
        known = [earlier for earlier, _ in stages]
        check(name not in known, f"{where}.name", name, "is an earlier stage's; names differ")
        rest = {key: value for key, value in blocks.items() if key not in ("name", "spend")}
        own = rest.get("seed", 0)
        if seed and isinstance(own, int):  # another type is refused with the stage
            rest["seed"] = own + seed
        if blocks.get("spend") is not None:
            spends[name] = _read_spend(f"{where}.spend", blocks["spend"], known)
            check(
                "train" in rest and not rest.get("budget"), f"{where}.spend", "...",
                "is for a stage with steps, in place of a budget; leave one of them out",
            )  # fmt: skip
        try:
            _configured(_resolved(rest, pathlib.Path(), known))
        except ConfigError as error:
            raise ConfigError(f"{where} ({name}): {error.field}", error.value, error.remedy) from (
                None
            )
        stages.append((name, rest))
    names = [name for name, _ in stages]
    until = values.get("until", names[-1])
    check(until in names, "until", until, f"is no stage; there are: {', '.join(names)}")
    return Pipeline(tuple(stages), until, spends)


def _read_spend(where: str, given: Any, known: list[str]) -> Spend:
    """Checks a block ``spend``; raises ConfigError."""
    good = isinstance(given, Mapping) and "as" in given and given.keys() <= {"as", "less"}
    check(good, where, given, "must be {'as': STAGE}, and maybe 'less': a list of stages")
    less = given.get("less", ())
    check(isinstance(less, list | tuple), f"{where}.less", less, "must be a list of stages")
    for name in (given["as"], *less):
        remedy = f"is no earlier stage; there are: {', '.join(known) or 'none'}"
        check(name in known, where, name, remedy)
    return Spend(given["as"], tuple(less))


def _configured(values: dict[str, Any]) -> tuple[Stage, Any]:
    """A stage's kind and config."""
    kind = stage_of(values) or Stage(run_config.from_dict, train, report.format_summary)
    return kind, kind.read(values)


def _resolved(value: Any, folder: pathlib.Path, known: list[str]) -> Any:
    """Blocks with ``@NAME/...`` as paths in the pipeline's folder.

    Raises:
      ConfigError: no earlier stage of that name.
    """
    if isinstance(value, Mapping):
        return {key: _resolved(each, folder, known) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(each, folder, known) for each in value]
    if isinstance(value, str) and value.startswith("@"):
        name, _, rest = value[1:].partition("/")
        remedy = f"names no earlier stage; there are: {', '.join(known) or 'none'}"
        check(name in known, "reference", value, remedy)
        return str(folder / name / rest)
    return value


def run_pipeline(
    pipeline: Pipeline,
    workdir: str,
    *,
    bill_process: bool = False,
    resume_from: int | None = None,
) -> dict[str, Any]:
    """Runs the stages that are not complete, each in its own folder of ``workdir``.

    Args:
      pipeline: the stages.
      workdir: the folder.
      bill_process: the first stage that runs is charged the process's start.
      resume_from: refused.

    Returns:
      ``status``, ``stages`` (of each its name, its summary, and the seconds of all its processes by
      phase), ``dollars`` and ``by_stage``; also written to ``pipeline.json``. A stage that did not
      complete ends it; what was known of later ones is kept.

    Raises:
      UserError, RunFailed: of a stage.
    """
    if resume_from is not None:
        raise UserError(f"--resume-from = {resume_from}: is for one run; leave it out")
    # Not jax.process_count(), which looks for devices before the host has the threads they need.
    check(
        together.count() == 1, "processes", together.count(),
        "a pipeline runs in one process, of as many devices as it has; start one",
    )  # fmt: skip
    folder = pathlib.Path(workdir).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir = {workdir!r}: is a file; give a folder")
    strangers = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    strangers -= {SUMMARY, *(name for name, _ in pipeline.stages)}
    if strangers:
        raise UserError(
            f"--workdir = {workdir!r}: holds {sorted(strangers)[0]!r}, which is no stage's; give a "
            "new or an empty folder"
        )
    done: list[dict[str, Any]] = []
    status = "failed"
    try:
        status = _run_stages(pipeline, folder, bill_process, done)
    finally:
        if done:
            result = _result(pipeline, folder, status, done)
            write_whole(folder / SUMMARY, json.dumps(result, indent=1) + "\n")
    return result


def _run_stages(
    pipeline: Pipeline, folder: pathlib.Path, bill_process: bool, done: list[dict[str, Any]]
) -> str:
    """Runs stages up to ``until``, adds each to ``done``, and returns the pipeline's status."""
    last = [name for name, _ in pipeline.stages].index(pipeline.until)
    for place, (name, blocks) in enumerate(pipeline.stages[: last + 1]):
        known = [earlier for earlier, _ in pipeline.stages[:place]]
        print(f"\nstage {place + 1} of {len(pipeline.stages)}: {name}", file=sys.stderr, flush=True)
        summary, spend = None, pipeline.spends.get(name)
        if spend is not None:
            cost = {entry["name"]: entry["summary"]["dollars"] for entry in done}
            blocks = {**blocks, "budget": {"max_dollars": spend.dollars(cost)}}
        kind, config = _configured(_resolved(blocks, folder, known))
        if spend is not None:
            summary = _spent(folder / name, config)
        if summary is None:
            before = _ledger_size(folder / name)
            summary = kind.train(config, str(folder / name), bill_process=bill_process)
            bill_process = bill_process and _ledger_size(folder / name) == before
        if spend is not None and summary["status"] == "completed":
            print(f"warning: {name} did all of its steps before it cost what it may; give it more "
                  "(train.steps)", file=sys.stderr, flush=True)  # fmt: skip
        done.append({"name": name, "summary": summary})
        if summary["status"] != "completed" and not (spend and summary["status"] == "budget"):
            return summary["status"]
    return "completed"


def _ledger_size(folder: pathlib.Path) -> int:
    """Bytes of a stage's ledger, which grow where a process works on it."""
    path = folder / run_dir.LEDGER
    return path.stat().st_size if path.is_file() else 0


def _result(
    pipeline: Pipeline, folder: pathlib.Path, status: str, done: list[dict[str, Any]]
) -> dict[str, Any]:
    """What ``pipeline.json`` holds; of stages after the last one, what was known of them before."""
    names = [entry["name"] for entry in done]
    try:
        before = json.loads((folder / SUMMARY).read_text())["stages"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is written anew
        before = []
    order = [name for name, _ in pipeline.stages]
    later = [entry for entry in before if entry["name"] in order and entry["name"] not in names]
    stages = [{**entry, "seconds": _seconds(folder, entry)} for entry in done] + later
    bill = read_bill([str(folder)])
    return {
        "status": status, "step": len(done), "stages": stages,
        "dollars": bill["total"]["all_in"]["dollars"], "by_stage": bill["total"]["by_stage"],
    }  # fmt: skip


def _seconds(folder: pathlib.Path, entry: dict[str, Any]) -> dict[str, float]:
    """Seconds by phase of all processes that worked on a stage; a summary has the last one's."""
    runs = read_bill([str(folder / entry["name"])])["runs"]
    return runs[0]["seconds"] if runs else entry["summary"]["seconds"]


def _spent(folder: pathlib.Path, config: Any) -> dict[str, Any] | None:
    """The summary of a stage of this config that has spent what it may; None for any other."""
    try:
        summary = json.loads((folder / run_dir.SUMMARY).read_text())
        recorded = run_dir.read_record(folder)["config"]
    except (OSError, ValueError, UserError):
        return None
    if isinstance(config, policy_config.PolicyConfig):
        config = dataclasses.replace(config, run=with_dtype(config.run))
    else:
        recorded, config = run_dir.completed(recorded), with_dtype(config)
    same = not run_config.differences(recorded, config.to_dict())
    return summary if same and summary.get("status") == "budget" else None


def show_pipeline(result: Mapping[str, Any], workdir: str) -> str:
    """What each stage came to, and the bill in the shape of DeepSeek's table of stages."""
    lines = [f"\npipeline {result['status']}: {result['step']} stages"]
    width = 2 + max(len(entry["name"]) for entry in result["stages"])
    for entry in result["stages"]:
        found, rates = entry["summary"], []
        for key, prefix in (("before", "pass@1 "), ("after", "-> ")):
            if found.get(key):
                rates.append(f"{prefix}{found[key]['pass_at']['1']['mean']:.3f}")
        if "pass_at" in found:
            rates.append(f"pass@1 {found['pass_at']['1']['mean']:.3f}")
        if found.get("val_loss"):
            rates.append(f"held-out loss {found['val_loss']:.4f}")
        if "pairs" in found:
            rates.append(f"{found['pairs']} pairs")
        seconds = sum(entry["seconds"].values())
        lines.append(
            f"  {entry['name']:<{width}}{found['status']:<12}{cost_text.duration(seconds):>9}  "
            f"{cost_text.dollars(found['dollars']):>9}  {' '.join(rates)}"
        )
    return "\n".join([*lines, "\nthe bill", format_ledger(read_bill([workdir]))])
