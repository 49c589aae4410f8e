"""Mutated configs through validation, tracing and training: a clear error or a valid plan.

    python experiments/launch/fuzz_configs.py --validate=2000 --trace=200 --train=40 --seed=0

Each example is a real config of ``experiments/`` with one to four changes, see
``config_mutations.py``. It has to come to one of two ends within a time limit: it is **valid**, or
it is **refused** in one line that names a field of the config. Anything else is a failure: a
traceback, a hang, a plan with a figure that is not finite or below zero, a message that names no
field; and, once a config was found valid, a program that cannot be traced or trained.

- validated: ``moejax plan`` of the config as it is, and, where that is valid, all the checks that a
  run makes before it writes anything (its text is replaced by a small one);
- traced: shapes of the initial state and of one optimizer step, without compiling, of tiny models;
- trained: ``moejax train`` for one or two steps; a run that stops on a loss that is not finite, and
  says so, counts as refused.

Prints a table and one JSON object; a failure is kept as a config file in ``--keep``, to be given to
``moejax plan`` or ``moejax train``.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import config_mutations as mutations

SECONDS = {"validate": 20, "trace": 60, "train": 150}
VALID, REFUSED = "valid", "refused"


class Failure(Exception):
    """What may not happen: the text says what did."""


class Hang(BaseException):
    """An example took longer than its time limit; no ``except Exception`` on the way hides it."""


@dataclasses.dataclass
class Count:
    """What came of the examples of one level; ``failures`` are their texts and config files."""

    tried: int = 0
    valid: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    fields: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)


def source(config: Any) -> str:
    """A config file that returns these nested dictionaries."""
    return (
        "from math import inf, nan\n\nimport ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({_literal(config)})\n"
    )


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    # An integer of more digits than Python prints can be written in hexadecimal.
    return hex(value) if type(value) is int and abs(value) > 10**100 else repr(value)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Hang where the block takes longer; in the main thread only."""

    def end(*_: Any) -> None:
        raise Hang(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Fuzzer:
    """Runs examples in a folder of its own.

    Args:
      folder: for the corpus, config files and runs.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.corpus = folder / "corpus"
        self.corpus.mkdir(parents=True, exist_ok=True)
        for i in range(12):
            (self.corpus / f"{i}.txt").write_text(f"text number {i} of a small corpus\n" * 40)
        self._known = mutations.known_paths()

    # Drawing

    def draw(self, level: str, rng: random.Random) -> dict[str, Any]:
        """A mutated config for a level."""
        config = mutations.real_config(rng)
        small = level != "validate"
        if small or rng.random() < 0.5:
            config = mutations.tiny(config, str(self.corpus))
        hostile = {"validate": 0.4, "trace": 0.05, "train": 0.05}[level]
        config = mutations.mutate(config, rng, hostile=hostile, small=small)
        return _shortened(config, str(self.corpus)) if small else config

    # Running

    def run(self, level: str, config: dict[str, Any]) -> str:
        """VALID, or the field that was refused; raises Failure for anything else."""
        file = self.folder / f"{level}.py"
        file.write_text(source(config), encoding="utf-8")
        check = {"validate": self._validate, "trace": self._trace, "train": self._train}[level]
        try:
            with within(SECONDS[level]):
                return check(file, config)
        except (Failure, KeyboardInterrupt):
            raise
        except BaseException as error:
            lines = traceback.format_exception(error)
            raise Failure("".join(lines[-6:]).strip()) from error

    def _validate(self, file: pathlib.Path, config: dict[str, Any]) -> str:
        from moejax.config import UserError
        from moejax.training import run_config
        from moejax.training.prepare import plan_run, prepare

        status, out, err = _command("plan", f"--config={file}", "--format=json")
        if status == 2:
            return self._field_of(err, config)
        _expect(status == 0, f"exit status {status}: {err}")
        check_plan(json.loads(out, parse_constant=_not_finite))
        found = run_config.load(str(file), [])
        found = dataclasses.replace(found, data=self._small(found.data))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                setup = prepare(found)
                check_plan(json.loads(json.dumps(plan_run(setup)), parse_constant=_not_finite))
        except UserError as error:  # a valid plan, for devices or a text that are not here
            self._field_of(f"moejax train: {error}\n", config)
        return VALID

    def _small(self, data: Any) -> Any:
        """The block ``data`` with a small text in place of the built-in corpus."""
        small = lambda source: (
            dataclasses.replace(source, source="text", path=str(self.corpus))
            if source.source == "stdlib" else source
        )  # fmt: skip
        if data.mixture:
            return dataclasses.replace(data, mixture=tuple(map(small, data.mixture)))
        return small(data)

    def _trace(self, file: pathlib.Path, config: dict[str, Any]) -> str:
        import jax

        from moejax.config import UserError
        from moejax.training import run_config
        from moejax.training.prepare import prepare
        from moejax.training.state import make_init
        from moejax.training.step import Batch, make_train_step

        try:
            setup = prepare(run_config.load(str(file), []))
        except UserError as error:
            return self._field_of(f"moejax train: {error}\n", config)
        found, train = setup.config, setup.config.train
        parts = train.micro_batches
        rows = jax.ShapeDtypeStruct((parts, train.batch_size // parts, train.seq_len), "int32")
        with jax.set_mesh(setup.mesh):
            _, state = make_init(found.model, setup.optimizer, setup.mesh)
            step = make_train_step(
                found.model, setup.optimizer, setup.schedule, found.seed, train.mtp_schedule
            )
            after, metrics = jax.eval_shape(step, state, Batch(rows, rows, rows, rows))
        shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
        _expect(shapes(after) == shapes(state), "a step changes the state's shapes")
        _expect(metrics.loss.shape == (), f"the loss has shape {metrics.loss.shape}")
        return VALID

    def _train(self, file: pathlib.Path, config: dict[str, Any]) -> str:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            run = pathlib.Path(folder) / "run"
            status, out, err = _command(
                "train", f"--config={file}", f"--workdir={run}", "--format=json"
            )
            last = err.strip().splitlines()[-1:] or [""]
            if status == 2:
                _expect(not run.exists(), "a refused config left a folder")
                return self._field_of(last[0] + "\n", config)
            if status == 1:
                said = re.search(r"the run failed: (.*not finite.*)", last[0])
                _expect(said is not None, f"exit status 1: {last[0]}")
                return "loss not finite"
            _expect(status == 0, f"exit status {status}: {last[0]}")
            summary = json.loads(out)
            _expect(math.isfinite(summary["loss"]), f"loss {summary['loss']}")
            _expect(summary["status"] == "completed" or summary["status"].startswith("budget"),
                    f"status {summary['status']}")  # fmt: skip
        return VALID

    def _field_of(self, said: str, config: dict[str, Any]) -> str:
        """The field that a refusal names, once it is found to be one line that names one."""
        _expect("Traceback" not in said, said)
        _expect(said.endswith("\n") and said.count("\n") == 1, f"not one line: {said!r}")
        _expect(said[:-1].isprintable(), f"control characters: {said!r}")
        _expect(len(said) < 1500, f"{len(said)} characters: {said[:300]!r}")
        named = re.match(r"moejax \w+: (.*?) = ", said)
        _expect(named is not None, f"names no field: {said!r}")
        field = re.sub(r"\[\d+\]", "", named.group(1)).strip()
        cut = field.removesuffix("…")  # a long name is cut
        known = (
            field in self._known
            or field == "--config"
            or any(
                path == field or (cut != field and path.startswith(cut)) for path in _paths(config)
            )
        )
        _expect(known, f"{field!r} is no field of the config: {said!r}")
        return field


def _command(*arguments: str) -> tuple[int, str, str]:
    """A moejax command in this process: exit status, standard output, standard error."""
    from moejax import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(arguments))
    return status, out.getvalue(), err.getvalue()


def _shortened(config: dict[str, Any], corpus: str) -> dict[str, Any]:
    """Two steps at most, of the small corpus, so that an example takes seconds."""
    train, data = config.get("train"), config.get("data")
    if isinstance(train, dict) and isinstance(train.get("steps"), int) and train["steps"] > 2:
        train["steps"] = 2
    if not isinstance(data, dict):
        return config
    mixture = data.get("mixture")
    sources = mixture if isinstance(mixture, list) and mixture else [data]
    for source in sources:
        if isinstance(source, dict) and source.get("source", "stdlib") == "stdlib":
            source |= {"source": "text", "path": corpus}
    if sources is mixture:  # the sources stand in it, and nowhere else
        for name in ("source", "path", "name", "text_field", "download"):
            data.pop(name, None)
    return config


def check_plan(plan: Any, where: str = "plan") -> None:
    """Raises Failure for a figure that is not finite or below zero."""
    if isinstance(plan, dict):
        for name, value in plan.items():
            check_plan(value, f"{where}.{name}")
    elif isinstance(plan, list):
        for value in plan:
            check_plan(value, where)
    elif isinstance(plan, (int, float)) and not isinstance(plan, bool):
        _expect(math.isfinite(plan) and plan >= 0, f"nonsense in the plan: {where} = {plan}")


def _not_finite(text: str) -> None:
    raise Failure(f"nonsense in the plan: {text}")


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise Failure(what)


def _paths(config: Any, prefix: str = "") -> set[str]:
    """The dotted paths that a config itself has, as an error shows them, known or not."""
    from moejax.config import visible

    found = set()
    for name, value in config.items() if isinstance(config, dict) else ():
        found.add(visible(f"{prefix}{name}").replace("\n", " ").strip())
        for part in value if isinstance(value, (list, tuple)) else (value,):
            found |= _paths(part, f"{prefix}{name}.")
    return found


def fuzz(
    level: str, count: int, seed: int, folder: pathlib.Path, keep: pathlib.Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> Count:  # fmt: skip
    """Tries configs until there are as many as wanted.

    Args:
      level: ``validate``, ``trace`` or ``train``.
      count: configs validated, or, of the other levels, valid ones traced or trained.
      seed: of the draw; example ``i`` of a seed is the same whatever was tried before it.
      folder: for what examples write.
      keep: folder for the configs of failures.
      say: takes a line about each failure.
    """
    import jax

    fuzzer, result, started = Fuzzer(folder), Count(), time.monotonic()
    done = lambda: result.tried if level == "validate" else result.valid + len(result.failures)
    while done() < count:
        number = result.tried
        config = fuzzer.draw(level, random.Random(f"{level} {seed} {number}"))
        began = time.monotonic()
        result.tried += 1
        try:
            field = fuzzer.run(level, config)
            if field == VALID:
                result.valid += 1
            else:
                result.refused += 1
                result.fields[field] += 1
        except Failure as failure:
            name = f"{level}_{seed}_{number}.py"
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / name).write_text(source(config), encoding="utf-8")
            result.failures.append({"example": name, "what": str(failure)})
            say(f"{name}: {failure}")
        seconds = time.monotonic() - began
        result.slowest = max(result.slowest, seconds)
        if level != "validate":
            if not result.tried % (25 if level == "trace" else 5):
                jax.clear_caches()  # or compiled programs would fill the memory
            say(f"{level} {number}: {seconds:.1f} s")
    result.seconds = time.monotonic() - started
    return result


def table(results: dict[str, Count]) -> str:
    """The counts as Markdown."""
    lines = ["| level | tried | valid | refused, naming a field | failures | seconds | slowest |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for level, c in results.items():
        lines.append(f"| {level} | {c.tried:,} | {c.valid:,} | {c.refused:,} | {len(c.failures)} | "
                     f"{c.seconds:.0f} | {c.slowest:.1f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Runs the levels; exit status 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for level in SECONDS:
        parser.add_argument(f"--{level}", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=pathlib.Path, default=pathlib.Path("fuzz_failures"))
    options = parser.parse_args()
    # Programs run for two steps only: they need not be fast.
    flags = (
        os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )  # fmt: skip
    os.environ |= {"XLA_FLAGS": " ".join(flags).strip(), "JAX_PLATFORMS": "cpu"}
    keep, results = options.keep.absolute(), {}
    say = lambda line: print(line, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # Relative paths that are drawn, and caches, stay in the folder.
        os.chdir(folder)
        os.environ["MOEJAX_CACHE"] = f"{folder}/cache"
        for level in SECONDS:
            count = getattr(options, level)
            if count:
                results[level] = fuzz(level, count, options.seed, pathlib.Path(folder), keep, say)
    print(table(results), file=sys.stderr)
    print(json.dumps({"seed": options.seed} | {
        level: vars(c) for level, c in results.items()
    }))  # fmt: skip
    return 1 if any(c.failures for c in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
