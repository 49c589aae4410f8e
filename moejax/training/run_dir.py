"""The run directory: what a run is, written once, and what came of it."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import moejax
from moejax.config import ConfigError, UserError
from moejax.data import TextDataset, tokenizers
from moejax.parallel import together
from moejax.training import manifest
from moejax.training.manifest import write_whole
from moejax.training.run_config import STAGE_BLOCKS, RunConfig, differences, from_dict

CONFIG, SUMMARY = "config.json", "summary.json"
CHECKPOINTS, LEDGER, TOKENIZER, LOCK = "checkpoints", "ledger.jsonl", "tokenizer", ".lock"
# What a process that ended while it made the folder may have left there.
UNFINISHED = {LOCK, TOKENIZER, f"{CONFIG}.tmp"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A run's folder.

    Attributes:
      path: the folder; it need not exist yet.
      record: what ``config.json`` holds or will hold: ``config``, ``code``, ``packages``, ``data``
        and ``fingerprint``.
      resumed: whether the run was there before.
      changes: lines that tell what a resumed run finds changed: versions, code.
    """

    path: pathlib.Path
    record: dict[str, Any]
    resumed: bool
    changes: tuple[str, ...] = ()

    @contextlib.contextmanager
    def create(self, dataset: TextDataset) -> Iterator[None]:
        """Writes the folder, its ``config.json`` and the tokenizer, and holds it for this process.

        Raises:
          UserError: the folder cannot be written, or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "w")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.resumed:
                tokenizers.save(dataset.tokenizer, self.path / TOKENIZER)
            self._write(CONFIG, self.record)  # last: it is what makes the folder a run's
        except BlockingIOError:
            remedy = "another process trains in it; wait for its end, or choose another folder"
            raise UserError(f"--workdir = {str(self.path)!r}: {remedy}") from None
        except OSError as error:
            remedy = f"cannot be written ({error.strerror}); choose another folder"
            if error.errno == errno.ENOSPC:
                remedy = f"cannot be written ({error.strerror}); free some"
            raise UserError(f"--workdir = {str(self.path)!r}: {remedy}") from None
        with lock:
            yield

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is complete; None while there is something left to do."""
        try:
            summary = json.loads((self.path / SUMMARY).read_text())
            done = summary.get("status") == "completed"
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
        return summary if self.resumed and done else None

    def give_up(self, step: int, steps: Sequence[int]) -> None:
        """Notes that the run went back to a step: checkpoints of these later steps are gone.

        ``config.json`` lists it under ``given_up``. A run that was complete is so no more.

        Raises:
          OSError: it cannot be written.
        """
        entry = {"to": step, "steps": list(steps)}
        self.record["given_up"] = [*self.record.get("given_up", []), entry]
        if together.index():
            return
        self._write(CONFIG, self.record)
        done = self.finished()
        if done is not None and done["step"] > step:
            self.write_summary({**done, "status": "interrupted"})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json`` as a whole."""
        self._write(SUMMARY, summary)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_whole(self.path / name, json.dumps(content, indent=1) + "\n")


def check_workdir(workdir: str) -> pathlib.Path:
    """The folder for a run, if it can be one: a run's, an empty one, or none yet.

    Raises:
      UserError: it holds something else, is a file, or cannot be written. Nothing is written here.
    """
    path = pathlib.Path(workdir).absolute()
    shown = f"--workdir = {workdir!r}"
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{shown}: {str(nearest)!r} is a file; give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK) or _read_only(nearest):
        raise UserError(f"{shown}: {str(nearest)!r} cannot be written; choose another folder")
    held = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if held - UNFINISHED and not (path / CONFIG).is_file():
        raise UserError(
            f"{shown}: holds files, but no run's {CONFIG}; give a new or an empty folder"
        )
    for entry in path.iterdir() if path.is_dir() else ():
        # Folders may lie on another disk; a file would be written wherever its link leads.
        if entry.is_symlink() and not entry.is_dir():
            raise UserError(f"{shown}: {entry.name!r} in it is a link; put the file in its place")
    return path


def check_step(path: pathlib.Path, step: int) -> None:
    """Whether a run has a checkpoint of a step.

    Raises:
      UserError: no run, or no such checkpoint; those there are are listed.
    """
    read_record(path)
    steps = manifest.sealed(path / CHECKPOINTS)
    if step not in steps:
        there = f"there are those of steps {', '.join(map(str, steps))}"
        none = "there is none yet; leave the flag out"
        raise UserError(
            f"--resume-from = {step}: {str(path)!r} has no checkpoint of that step; "
            f"{there if steps else none}"
        )


def _read_only(folder: pathlib.Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def open_run(path: pathlib.Path, config: RunConfig, dataset: TextDataset) -> RunDirectory:
    """The run at ``path``: a new one, or the one that is there, if it is the same run.

    Raises:
      UserError: the run there has another config, where it may not change (the fields are named),
        or another corpus, or its ``config.json`` is damaged.
    """
    record = describe(config, dataset)
    if not (path / CONFIG).is_file():
        return RunDirectory(path, record, resumed=False)
    old = read_record(path)
    changed = differences(completed(old["config"]), record["config"])
    if changed:
        raise UserError(
            f"--workdir = {str(path)!r}: holds a run with another config: {'; '.join(changed)}; "
            "use that run's values, or a new --workdir"
        )
    if old["data"]["fingerprint"] != dataset.fingerprint:
        raise ConfigError(
            "data", config.data.shown,
            "the corpus is not the one that the run in --workdir began with; restore the text, "
            "or use a new --workdir",
        )  # fmt: skip
    # The record says what the run began with; what it goes on with is added, and said.
    parts = ("code", "packages", "python", "machine")
    versions = {name: record[name] for name in parts}
    segments = old.get("resumed_with", [])
    before = segments[-1] if segments else {name: old.get(name) for name in parts}
    changed = differences(before, versions)
    kept = {**old, "config": record["config"]}
    if changed:
        kept["resumed_with"] = [*segments, versions]
    lines = (f"warning: changed since the run began: {'; '.join(changed)}",) if changed else ()
    return RunDirectory(path, kept, resumed=True, changes=lines)


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the fields that moejax did not have yet, at their defaults."""
    try:
        return from_dict(config).to_dict()
    except UserError:  # written by another moejax: then the fields are compared as they are
        return config


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """What a run's ``config.json`` holds.

    Raises:
      UserError: no run there, or a damaged file.
    """
    file = path / CONFIG
    try:
        record = json.loads(file.read_text())
        record["config"], record["data"]["fingerprint"], record["fingerprint"]
    except FileNotFoundError:
        raise UserError(
            f"{str(path)!r}: no run is there (no {CONFIG}); give a run's folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{str(file)!r}: cannot be read ({error}); restore the file") from None
    return record


def recorded(record: Mapping[str, Any]) -> RunConfig:
    """The config in a run's record, which may be from anywhere: a folder that was downloaded.

    It runs no code, loads none and reaches no network: a router of one's own is looked up on the
    Python path alone, compiled programs are those of the user's own cache, and no corpus is
    downloaded.

    Raises:
      ConfigError: see ``run_config.from_dict``.
    """
    blocks = {k: v for k, v in record["config"].items() if k not in STAGE_BLOCKS}
    config = from_dict(blocks, own=False)
    data = dataclasses.replace(config.data, cache_dir="", download=False)
    return dataclasses.replace(config, data=data)


def describe(config: RunConfig, dataset: TextDataset) -> dict[str, Any]:
    """What a run is: its resolved config, the code, the packages and the text, and a fingerprint.

    Two runs with one fingerprint compute the same thing: it covers the config but for the fields
    that a resumed run may change, the corpus, the code's revision and the versions.
    """
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    code = {"moejax": moejax.__version__, "revision": _revision()}
    record = {
        "config": config.to_dict(),
        "code": code,
        "packages": packages,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "data": {"fingerprint": dataset.fingerprint, **dataset.provenance},
    }
    return {**record, "fingerprint": fingerprint(record)}


def fingerprint(record: Mapping[str, Any]) -> str:
    """The fingerprint of a run by what ``describe`` says of it."""
    parts = [
        differences({}, record["config"]), record["packages"], record["code"],
        record["data"]["fingerprint"], record["python"],
    ]  # fmt: skip
    for block in ("start", "distill"):
        if block in record:
            parts.append([record[block][name] for name in ("fingerprint", "step")])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _revision() -> str | None:
    """The git revision of this code, ``+`` where it was edited; None for an installed copy."""
    folder = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10
    )
    try:
        tracked = git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        head = git("rev-parse", "HEAD")
        state = git("status", "--porcelain", "--", str(folder.parent))
    except (OSError, subprocess.SubprocessError):
        return None
    if tracked.returncode or head.returncode:
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "")
