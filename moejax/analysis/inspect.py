"""``moejax inspect``: what the routers of a run do with its held-out text."""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moejax.analysis import inspect_figures, measure
from moejax.analysis.held_out import HeldOut, open_held_out
from moejax.analysis.run_reader import Say, check_steps, newest_good, read_run, restorer
from moejax.config import UserError
from moejax.output_folder import check_output_folder
from moejax.parallel import MeshConfig, make_mesh
from moejax.training import run_dir
from moejax.training.checkpoints import Checkpointer, CheckpointError
from moejax.training.manifest import write_whole
from moejax.training.prepare import use_compilation_cache
from moejax.training.restore import exact_as_auto
from moejax.training.run_config import RunConfig

RESULT, FOLDER = "inspect.json", "inspect"


def inspect(
    workdir: str,
    *,
    step: int | None = None,
    batches: int = 8,
    output: str | None = None,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Measures the routers of a run's checkpoints on its held-out text, and draws the figures.

    Args:
      workdir: the run's folder.
      step: the checkpoint to look at; None takes the newest good one. How routing came to be what
        it is at the end (saturation, flips) is measured over all checkpoints either way.
      batches: held-out batches to run, evenly spread over the text.
      output: folder for ``inspect.json`` and the figures; None is ``inspect`` in the run's folder.
      say: takes lines about what goes on.

    Returns:
      What ``inspect.json`` holds; see ``moejax.analysis.measure.measure``.

    Raises:
      UserError: no run, a dense model, no such checkpoint, text that is not the run's, or an output
        that cannot be written. Nothing is written then.
    """
    if batches <= 0:
        raise UserError(f"--batches = {batches}: must be above zero")
    path, shown = pathlib.Path(workdir), f"--workdir = {workdir!r}"
    record = read_run(path, shown)
    config = exact_as_auto(run_dir.recorded(record))
    if not config.model.layers("moe"):
        raise UserError(
            f"{shown}: the run's model is dense and has no routers; give a run with a block moe"
        )
    wanted = path / FOLDER if output is None else pathlib.Path(output)
    place = f"--output = {str(wanted)!r}"
    folder = check_output_folder(wanted, RESULT, place)
    with Checkpointer(path / run_dir.CHECKPOINTS, config.checkpoint) as checkpoints:
        steps = check_steps(checkpoints, step, shown)
        use_compilation_cache(config.data.cache_path / "xla")
        held_out = open_held_out(
            config.data, seq_len=config.train.seq_len,
            tokenizer_folder=path / run_dir.TOKENIZER, fingerprint=record["data"]["fingerprint"],
        )  # fmt: skip
        restore = restorer(config, checkpoints)
        with jax.set_mesh(make_mesh(MeshConfig())):
            result = _measure(config, held_out, restore, steps, step, batches, say)
    result = {"workdir": str(path), "fingerprint": record["fingerprint"], **result}
    _write(folder, result, place)
    return {**result, "output": str(folder), "files": sorted(p.name for p in folder.iterdir())}


def _measure(
    config: RunConfig, held_out: HeldOut, restore: Callable, steps: list[int], step: int | None,
    batches: int, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Runs all checkpoints for how routing moved, and measures the chosen one."""
    train = config.train
    text = measure.read_text(held_out, train.batch_size // train.micro_batches, batches)
    say(f"held out    {text.tokens:,} tokens in {len(text.batches)} batches")
    newest, variables = newest_good(steps, restore, say)
    final = seen = measure.run(config.model, variables, text)
    chosen = newest if step is None else step
    if chosen != newest:
        say(f"checkpoint  {chosen}")
        variables = restore(chosen)
        seen = measure.run(config.model, variables, text)
    history = measure.History(final.chosen)
    # Where no token has experts of its own there is no history to measure.
    for other in [] if final.chosen is None else [s for s in steps if s < newest]:
        try:
            if other != chosen:
                say(f"checkpoint  {other}")
            own = seen if other == chosen else measure.run(config.model, restore(other), text)
        except CheckpointError as error:
            say(f"left out: {error}")
            continue
        history.add(other, own.chosen)
    history.add(newest, final.chosen)
    say(f"measuring   checkpoint {chosen}")
    return {
        "step": chosen,
        "checkpoints": steps,
        **measure.measure(config.model, variables, seen, text, history),
    }


def _write(folder: pathlib.Path, result: Mapping[str, Any], place: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First, since it says whose folder this is.
        write_whole(folder / RESULT, json.dumps(result) + "\n")
        inspect_figures.draw(result, folder)
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written ({error.strerror}); choose another folder"
        ) from None
