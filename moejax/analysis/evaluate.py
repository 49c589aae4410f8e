"""``moejax evaluate``: bits per byte of held-out text by domain, and tasks of
lm-evaluation-harness.

``evaluate.json`` holds, numbers with 5 digits::

    {"workdir", "fingerprint" (the run's), "data_fingerprint", "step",
     "batches": {"run", "of"}, "confidence": 0.95, "leaks": [warnings],
     "total": DOMAIN, "kind": "top-level folder" | "file kind" | null, "why": null | reason,
     "domains": [DOMAIN, ...],          # largest first; empty where "why" says
     "lm_eval": null | {"version", "limit", "max_length", "tasks": {NAME: {"samples",
       "few_shot", "version", "metrics": {METRIC: {"value", "stderr"}}}}}}

with DOMAIN = {"name", "documents", "tokens", "bytes", "nats_per_token", "bits_per_byte",
"interval": [low, high] | null, "unigram", "gzip"}; see ``domains.of_documents``.
"""

import json
import pathlib
import sys
from typing import Any

import jax

from moejax.analysis import domains, harness
from moejax.analysis.held_out import open_held_out
from moejax.analysis.measure import plain
from moejax.analysis.run_reader import Say, check_steps, newest_good, read_run, restorer
from moejax.config import UserError
from moejax.output_folder import check_output_folder
from moejax.parallel import MeshConfig, make_mesh
from moejax.training import prepare, run_dir
from moejax.training.checkpoints import Checkpointer
from moejax.training.manifest import write_whole
from moejax.training.restore import exact_as_auto

RESULT = "evaluate.json"


def evaluate(
    workdir: str,
    *,
    step: int | None = None,
    batches: int | None = None,
    output: str | None = None,
    lm_eval: str | None = None,
    limit: int | None = None,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Evaluates a run's checkpoint beyond its loss, on one device.

    Args:
      workdir: the run's folder.
      step: the checkpoint; None takes the newest good one.
      batches: held-out batches to run, evenly spread over the text; None runs all.
      output: folder for ``evaluate.json``, which replaces an earlier one; None is the run's.
      lm_eval: tasks of lm-evaluation-harness or YAML files, with commas between; needs the extra
        ``eval``.
      limit: samples of each such task at most; None takes all.
      say: takes lines about what goes on.

    Returns:
      What ``evaluate.json`` holds, see above, and ``output``, where it is.

    Raises:
      UserError: no run, no such checkpoint, text that is not the run's, an output that cannot be
        written, or what ``harness.load_tasks`` refuses. Nothing is written then.
    """
    path, shown = pathlib.Path(workdir), f"--workdir = {workdir!r}"
    names = _check_options(batches, lm_eval, limit)
    record = read_run(path, shown)
    config = exact_as_auto(run_dir.recorded(record))
    place = shown if output is None else f"--output = {output!r}"
    folder = path if output is None else check_output_folder(output, RESULT, place)
    with Checkpointer(path / run_dir.CHECKPOINTS, config.checkpoint) as checkpoints:
        steps = check_steps(checkpoints, step, shown)
        # Before anything is computed: a task may be misspelt, or its data out of reach.
        tasks = harness.load_tasks(names) if names else None
        prepare.use_compilation_cache(config.data.cache_path / "xla")
        held_out = open_held_out(
            config.data, seq_len=config.train.seq_len, tokenizer_folder=path / run_dir.TOKENIZER,
            fingerprint=record["data"]["fingerprint"], with_text=True,
        )  # fmt: skip
        mesh = make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            restore = restorer(config, checkpoints)
            if step is None:
                step, variables = newest_good(steps, restore, say)
            else:
                say(f"checkpoint  {step}")
                variables = restore(step)
            result = _measure(config, variables, held_out, tasks, batches, limit, say)
    moe = config.model.moe
    result = {
        "workdir": str(path),
        "fingerprint": record["fingerprint"],
        "data_fingerprint": record["data"]["fingerprint"],
        "step": step,
        "leaks": prepare.leaks(moe, prepare.choose_back_ends(config.model, mesh)),
        **plain(result),
    }
    _write(folder, result, place)
    return {**result, "output": str(folder / RESULT)}


def _check_options(batches: int | None, lm_eval: str | None, limit: int | None) -> list[str]:
    """The names of the tasks; raises UserError on options out of range."""
    for flag, value in (("--batches", batches), ("--limit", limit)):
        if value is not None and value <= 0:
            raise UserError(f"{flag} = {value}: must be above zero")
    names = [name.strip() for name in (lm_eval or "").split(",") if name.strip()]
    if lm_eval is not None and not names:
        raise UserError(f"--lm-eval = {lm_eval!r}: names no task; give TASK,TASK")
    if limit is not None and not names:
        raise UserError(f"--limit = {limit}: is of --lm-eval's tasks; name some, or leave it out")
    return names


def _measure(config, variables, held_out, tasks, batches, limit, say) -> dict[str, Any]:
    """What is computed on the current mesh."""
    train, model = config.train, config.model
    rows = train.batch_size // train.micro_batches
    documents, count = domains.run(
        model, variables, held_out, batch_size=rows, max_batches=batches, say=say
    )
    found = None
    if tasks is not None:
        say(f"lm-eval     {', '.join(tasks['tasks'])}")
        found = harness.run_tasks(
            tasks, model, variables, held_out.tokenizer, max_length=train.seq_len,
            batch_size=rows, limit=limit,
        )  # fmt: skip
    return {
        "batches": {"run": count, "of": -(-len(held_out.rows) // rows)},
        "confidence": domains.CONFIDENCE,
        **domains.by_domain(documents, held_out),
        "lm_eval": found,
    }


def _write(folder: pathlib.Path, result: dict[str, Any], place: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RESULT, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written ({error.strerror}); choose another folder with --output"
        ) from None
