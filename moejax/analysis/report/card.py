"""The model card and the record: what was trained, on what text, by which code and commands."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.analysis.report.gather import RunRecord
from moejax.analysis.report.html import Html, code, details, facts, join, paragraph, table, tag
from moejax.config import to_dict
from moejax.cost import text
from moejax.cost.counts import count
from moejax.moe.moe_config import router_options
from moejax.training.run_config import RunConfig, differences

MOST_SAMPLE = 1_500  # characters of a sample that are shown


def model_card(run: RunRecord) -> Html:
    """The model, how it was trained and on what, what it reaches, and what it writes."""
    config = run.config
    return join([
        tag("h3", "Model"), facts(_model(config)),
        tag("h3", "Training"), facts(_training(config)),
        tag("h3", "Text"), facts(_data(run)),
        *_samples(run),
        tag("h3", "Use"),
        paragraph(
            "A research model, made to compare ways of training. It was not tuned to follow "
            "instructions, nor checked for what it says; its quality is "
            f"{_measured(run)} and nothing else was measured here."
        ),
    ])  # fmt: skip


def _measured(run: RunRecord) -> str:
    """What is known of a model's quality. A report on several runs does not show their tasks."""
    tasks = run.evaluation is not None and run.evaluation["lm_eval"] is not None
    return "its loss and its results in evaluate.json," if tasks else "the loss above"


def _model(config: RunConfig) -> list[tuple[str, Any]]:
    model, moe = config.model, config.model.moe
    counts = count(model, config.train.seq_len)
    params, flops = counts.params, counts.flops_per_token
    dense, routed = model.layers("dense"), model.layers("moe")
    found = [
        ("parameters", f"{text.parameters(params.total)} in total, of which a token passes "
         f"{text.parameters(params.active.no_embedding)} without embeddings, "
         f"{text.parameters(params.active.with_head)} with the head"),
        ("FLOPs a token", f"{text.si(flops.train, 'FLOP')} in training at length "
         f"{config.train.seq_len:,}"),
        ("layers", f"{routed} with experts, {dense} dense" if moe else f"{dense} dense"),
        ("width", f"{model.d_model}, vocabulary {model.vocab_size:,}"),
        ("attention", f"{model.attention.kind}, {model.attention.num_heads} heads"),
    ]  # fmt: skip
    if moe:
        shared = f", {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
        found += [
            ("experts", f"{moe.num_experts} of width {moe.d_expert}, {moe.top_k} a token{shared}"),
            ("router", join([tag("code", moe.router.name), _router_options(config)])),
        ]
    if model.mtp_depth:
        found.append(("multi-token prediction", f"{model.mtp_depth} modules"))
    found.append(("precision", f"{model.dtype}, {model.precision}"))
    return found


def _router_options(config: RunConfig) -> str:
    """The router's options that are not its defaults."""
    options = config.to_dict()["router"]
    usual = to_dict(router_options({"name": options["name"]}, own=False))
    chosen = [f"{name} {value}" for name, value in options.items() if value != usual[name]]
    return f": {', '.join(chosen)}; else its defaults" if chosen else ", its defaults"


def _training(config: RunConfig) -> list[tuple[str, Any]]:
    train, optim = config.train, config.optim
    return [
        ("steps", f"{train.steps:,} of {train.batch_size:,} rows of {train.seq_len:,} tokens, "
         f"{train.steps * train.batch_size * train.seq_len:,} positions"),
        ("optimizer", f"{optim.optimizer}, learning rate {optim.learning_rate:g}, schedule "
         f"{optim.schedule}, warm-up {optim.warmup_steps} steps"),
        ("seed", config.seed),
        ("stage", config.stage),
    ]  # fmt: skip


def _data(run: RunRecord) -> list[tuple[str, Any]]:
    """The data record of ``config.json``, whatever it holds, and the baselines on that text."""
    found: list[tuple[str, Any]] = []
    for name, value in run.record["data"].items():
        if name == "sources" and isinstance(value, Mapping):  # of a mixture, a line each
            found += [(f"source {label}", _flat(own)) for label, own in value.items()]
        elif name != "warning":
            found.append((name.replace("_", " "), _flat(value)))
    baselines = (run.summary or {}).get("baselines")
    if baselines:
        values = ", ".join(f"{name} {value:.4f}" for name, value in baselines.items())
        found.append(("held-out text by", f"{values} bits per byte"))
    found.append(("tokenizer", run.config.data.tokenizer))
    return found


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _samples(run: RunRecord) -> list[Html]:
    samples = (run.summary or {}).get("samples") or []
    if not samples:
        return []
    shown = [sample[:MOST_SAMPLE] for sample in samples[:3]]
    note = "Sampled at the end of training, unedited."
    return [tag("h3", "What it writes"), paragraph(note, class_="note"), *map(code, shown)]


AGAIN = '''"""The same run again, from the record of the first."""
import json
import ml_collections

def get_config():
    with open({path!r}) as file:
        return ml_collections.ConfigDict(json.load(file)["config"])
'''


def again(path: Any) -> str:
    """A config file that repeats a run from its ``config.json``."""
    return AGAIN.format(path=str(path))


def reproduction(runs: Sequence[RunRecord], commands: Sequence[str]) -> Html:
    """Commands, versions and fingerprints.

    Args:
      runs: of the report.
      commands: that make the results again, in order.
    """
    one = runs[0] if len(runs) == 1 else None
    parts = [code("\n".join(commands))]
    if one is not None:
        path = one.path.resolve() / "config.json"
        parts += [
            paragraph("where again.py is"), code(again(path)),
            paragraph(
                "On the same machine, versions and text the result is the same to the last bit."
            ),
        ]  # fmt: skip
    parts.append(_versions(runs))
    if one is not None:
        folded = json.dumps(one.record["config"], indent=1)
        parts.append(tag("div", details("The whole config, resolved", code(folded)), class_="raw"))
    return join(parts)


def run_commands(run: RunRecord) -> list[str]:
    """The commands of one run: train, look into it, evaluate it, make this report."""
    place = shlex.quote(str(run.path))
    looked = [] if run.inspection is None else [f"moejax inspect --workdir={place}"]
    if run.evaluation is not None:
        looked.append(f"moejax evaluate --workdir={place}{_flags(run.evaluation)}")
    return [
        "moejax train --config=again.py --workdir=NEW",
        *looked,
        f"moejax report {place}",
    ]


def _flags(evaluation: Mapping[str, Any]) -> str:
    """What an evaluation was asked for. The record does not say by which files or groups its tasks
    were named."""
    batches, tasks = evaluation["batches"], evaluation["lm_eval"]
    flags = [f"--step={evaluation['step']}"]
    if batches["run"] != batches["of"]:
        flags.append(f"--batches={batches['run']}")
    if tasks is not None:
        flags.append("--lm-eval=TASKS")
        if tasks["limit"] is not None:
            flags.append(f"--limit={tasks['limit']}")
    return "".join(f" {flag}" for flag in flags)


def _versions(runs: Sequence[RunRecord]) -> Html:
    """One column where all runs agree; else the values that there are, with their number."""
    rows: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for name, value in _of_run(run).items():
            rows.setdefault(name, {}).setdefault(value, []).append(run.name)
    cells = []
    for name, values in rows.items():
        one = next(iter(values)) if len(values) == 1 else None
        if name == "fingerprint of the run" and len(runs) > 1:
            continue
        several = "; ".join(f"{value} ({len(names)} runs)" for value, names in values.items())
        cells.append((name, tag("code", several if one is None else one)))
    made = [facts(cells)]
    if len(runs) > 1:
        fingerprints = [
            (run.name, run.config.seed, tag("code", run.record["fingerprint"][:16]), run.path)
            for run in runs
        ]
        listed = table(["run", "seed", "fingerprint", "folder"], fingerprints,
                       label="Runs and their fingerprints", text_columns=(0, 2, 3))  # fmt: skip
        made.append(details(f"Fingerprints of {len(runs)} runs", listed))
    return join(made)


def _of_run(run: RunRecord) -> dict[str, str]:
    record = run.record
    return {
        "code": f"moejax {record.get('code', {}).get('moejax', 'unknown')}",
        "revision": str(record.get("code", {}).get("revision") or "an installed copy"),
        "packages": ", ".join(f"{n} {v}" for n, v in record.get("packages", {}).items()),
        "Python": str(record.get("python", "unknown")),
        "machine": str(record.get("machine", "unknown")),
        "fingerprint of the text": str(record["data"]["fingerprint"]),
        "fingerprint of the run": str(record["fingerprint"]),
    }


def edits(config: RunConfig, other: RunConfig) -> list[str]:
    """How one config differs from another, apart from the seed and what a run may change."""
    found = differences(config.to_dict(), other.to_dict())
    return [line for line in found if not line.startswith("seed (")]
