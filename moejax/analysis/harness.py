"""Tasks of lm-evaluation-harness on a moejax model. The extra ``eval`` is imported when it is asked
for."""

import contextlib
import difflib
import functools
import logging
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moejax.config import UserError
from moejax.data.tokenizers import Tokenizer
from moejax.models import ModelConfig

# Draws of the harness's own bootstrap, for metrics that are no mean over samples.
BOOTSTRAP = 1000
# The harness's own seed of the examples in a prompt.
FEW_SHOT_SEED = 1234


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Finds tasks and reads their data.

    Args:
      names: of tasks, groups or tags of the harness, or files NAME.yaml with a task of one's own.

    Returns:
      What the harness's ``TaskManager.load`` does.

    Raises:
      UserError: the extra is not installed, a task that there is not, one that runs code that a
        model wrote or needs pictures, or data that cannot be had.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            f"--lm-eval: needs lm-evaluation-harness ({error}); install the extra: "
            "pip install 'moejax[eval]'"
        ) from None
    with _quiet(), _no_warnings():
        manager = _manager()
        for name in names:
            _check_name(name, manager.all_tasks, lm_eval.__version__)
        loaded = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            for part, found in _load(manager, name).items():
                loaded[part] |= found
    for name, task in loaded["tasks"].items():
        for sign, what in (("UNSAFE_CODE", "runs code that the model writes"),
                           ("MULTIMODAL", "needs a model that sees or hears")):  # fmt: skip
            if getattr(task, sign, False):
                raise UserError(f"--lm-eval = {name!r}: {what}; choose another task")
        # What simple_evaluate does for tasks that do not say.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


@functools.cache
def _manager() -> Any:
    """The harness's index of its tasks, which are thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_name(name: str, known: Sequence[str], version: str) -> None:
    if name in known:
        return
    if name.endswith((".yaml", ".yml")):
        if not pathlib.Path(name).is_file():
            raise UserError(f"--lm-eval = {name!r}: no such file; give a task's YAML file")
        return
    # There are thousands of names, so they are never listed here.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else "'lm-eval ls tasks' lists what there is"
    raise UserError(
        f"--lm-eval = {name!r}: no such task in lm-eval {version}, nor a .yaml file; {hint}"
    )


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except Exception as error:  # tasks are code of many hands, and data comes by several libraries
        first = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"--lm-eval = {name!r}: the task cannot be loaded ({type(error).__name__}: {first}); "
            "most tasks download their data: run it where there is a network, once, and the data "
            "stays in the cache of Hugging Face's datasets"
        ) from None


def run_tasks(
    loaded: dict[str, Any],
    config: ModelConfig,
    variables: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs tasks on a model, on the current mesh.

    Args:
      loaded: from ``load_tasks``.
      config: the model's config.
      variables: its parameters and router state.
      tokenizer: the one it was trained with.
      max_length: positions of a row.
      batch_size: rows at once.
      limit: samples of each task at most, the first ones.

    Returns:
      ``version`` of the harness, ``limit``, ``max_length`` and ``tasks``: by name, groups included,
      ``samples``, ``few_shot``, ``version`` and ``metrics``, by name ``value`` and ``stderr`` (None
      where there is none). A metric after a filter is called ``METRIC/FILTER``.

    Raises:
      UserError: a task asks for something that ``HarnessModel`` does not do.
    """
    import lm_eval
    from lm_eval.evaluator import evaluate

    from moejax.analysis.harness_model import HarnessModel

    model = HarnessModel(config, variables, tokenizer, max_length=max_length, batch_size=batch_size)
    with _quiet():
        found = evaluate(
            lm=model, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
        )
    tasks = {}
    for name, values in found["results"].items():
        samples = found.get("n-samples", {}).get(name, {})
        tasks[name] = {
            "samples": samples.get("effective", values.get("sample_len")),
            "few_shot": found.get("n-shot", {}).get(name),
            "version": found.get("versions", {}).get(name),
            "metrics": _metrics(values),
        }
    return {
        "version": lm_eval.__version__, "limit": limit, "max_length": max_length, "tasks": tasks,
    }  # fmt: skip


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """``acc,none`` and ``acc_stderr,none`` of the harness, together."""
    number = lambda value: float(value) if isinstance(value, (int, float)) else None
    metrics = {}
    for key, value in values.items():
        name, comma, kept = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        shown = name if kept == "none" else f"{name}/{kept}"
        stderr = number(values.get(f"{name}_stderr,{kept}"))
        metrics[shown] = {"value": number(value), "stderr": stderr}
    return metrics


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """While tasks are loaded: what a task's file leaves to defaults, and each try of a download."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard output is for the result alone, whatever tasks print."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
