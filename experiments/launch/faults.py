"""Every fault once, in real processes: what is said, what is lost, and how long it takes.

    python experiments/launch/faults.py [--only=WORD] [--output=faults.json]

Prints a table in Markdown. A fault passes if the run says what it should, goes on or ends as it
should, and the next process ends with the parameters of the run that nothing happened to, bit for
bit. ``lost`` is what was trained again: optimizer steps. Faults of disks are real ones, on file
systems of their own, and need a user who may mount them (root).

Two faults need a bad batch or a bad state, which no text makes: they are put into the compiled step
by ``--inside``, in the process that trains. Killed and stalled peers need ``moejax launch``.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import tiny_run
from kill_and_resume import same_bits

STEPS, EVERY = 300, 25
PEERS = ("a killed peer", "a stalled peer")


class Outcome(NamedTuple):
    """What came of a fault: the line that tells of it, steps trained again, seconds until the
    process had reacted, and whether all was as it should be."""

    said: str
    lost: int | None
    seconds: float
    ok: bool


class Place:
    """A work directory for one fault, and what is needed to train in it."""

    def __init__(self, folder: pathlib.Path, name: str):
        self.base, self.folder = folder, folder / name.replace(" ", "_")
        self.folder.mkdir()
        self.workdir, self.whole = self.folder / "run", folder / "whole"
        self.cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip

    def start(self, *more: str, **environment: str) -> tiny_run.Process:
        arguments = [f"--config={self.base / 'tiny.py'}", f"--workdir={self.workdir}"]
        arguments += [f"--config.train.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}"]
        return tiny_run.Process([*arguments, *more], {**self.cache, **environment})

    def wait_for_a_checkpoint(self, process: tiny_run.Process) -> None:
        """Waits for the first one that is sealed."""
        while process.popen.poll() is None and not list(self.sealed()):
            time.sleep(0.002)

    def sealed(self) -> Iterator[pathlib.Path]:
        return self.workdir.glob("checkpoints/*/manifest.json")

    def complete(self, *more: str) -> tuple[list[str], bool]:
        """Trains to the end; its lines, and whether the parameters are those of the whole run."""
        process = self.start(*more)
        status = process.end()
        return process.lines, status == 0 and same_bits(self.workdir, self.whole)["parameters"]

    def redone(self) -> int:
        from moejax.cost.bill import read

        return read(self.workdir)["redone"]["steps"]

    def part(self) -> None:
        """Half of the run, ended by a signal: two checkpoints and more."""
        process = self.start()
        process.wait_for(lambda line: line.startswith(f"step {EVERY * 3}/"))
        process.popen.send_signal(signal.SIGTERM)
        process.end()

    def newest(self) -> pathlib.Path:
        folders = [p for p in (self.workdir / "checkpoints").iterdir()]
        return max(folders, key=lambda path: int(path.name))


def line_with(lines: list[str], *words: str) -> str:
    """The first line that has the first of the words that any has, or the last one, marked."""
    for word in words:
        for line in lines:
            if word in line:
                return line.strip()
    return f"(nothing; last: {lines[-1] if lines else ''})"


def all_of(process: tiny_run.Process, **facts: bool) -> bool:
    """Whether all is as it should be, and no traceback was shown; what is not goes to standard
    error, with the last lines of the process."""
    facts["one_line"] = not any("Traceback" in line for line in process.lines)
    wrong = [name for name, fact in facts.items() if not fact]
    if wrong:
        print(f"not so: {', '.join(wrong)}", *process.lines[-60:], sep="\n  ", file=sys.stderr)
    return not wrong


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str) -> Iterator[None]:
    """A file system in memory, of a size."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


# Disks


def full_disk(place: Place) -> Outcome:
    """Full after the first checkpoint, and roomy again for the next process."""
    with small_disk(place.workdir, "40m"):
        process = place.start()
        place.wait_for_a_checkpoint(process)
        begun = time.monotonic()
        fill(place.workdir)
        status = process.end()
        seconds = time.monotonic() - begun
        goes_on = any(line.startswith(f"step {STEPS}/") for line in process.lines)
        (place.workdir / "filler").unlink()
        good = list(place.sealed())
        _, same = place.complete()
        said = line_with(process.lines, "was not saved", "cannot be written")
        ok = all_of(process, status=status == 1, goes_on=goes_on, same=same, safe=bool(good))
        return Outcome(said, place.redone(), seconds, ok)


def fill(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


def read_only(place: Place) -> Outcome:
    """Read-only after the first checkpoint; files that are open already can still be written."""
    place.workdir.mkdir()
    process = place.start()
    place.wait_for_a_checkpoint(process)
    begun = time.monotonic()
    # A second mount of the folder over itself: the first has open files, and would stay writable.
    subprocess.run(["mount", "--bind", place.workdir, place.workdir], check=True)
    try:
        options = "remount,bind,ro"
        subprocess.run(["mount", "-o", options, place.workdir], check=True)
        status = process.end()
        seconds = time.monotonic() - begun
    finally:
        subprocess.run(["umount", "-l", place.workdir], check=True)
    goes_on = any(line.startswith(f"step {STEPS}/") for line in process.lines)
    _, same = place.complete()
    said = line_with(process.lines, "was not saved", "cannot be written")
    ok = all_of(process, status=status == 1, goes_on=goes_on, same=same)
    return Outcome(said, place.redone(), seconds, ok)


# Damaged checkpoints


def damaged(damage: Callable[[pathlib.Path], None]) -> Callable[[Place], Outcome]:
    def fault(place: Place) -> Outcome:
        place.part()
        damage(place.newest())
        begun = time.monotonic()
        lines, same = place.complete()
        said = line_with(lines, "refused")
        back = any("going back to the checkpoint of step" in line for line in lines)
        return Outcome(said, place.redone(), time.monotonic() - begun, same and back)

    return fault


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((folder / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)


def truncate(folder: pathlib.Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def flip(folder: pathlib.Path) -> None:
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    largest(folder).write_bytes(data)


# Signals and kills


def sigterm(wait: Callable[[Place, tiny_run.Process], None], **environment: str):
    def fault(place: Place) -> Outcome:
        process = place.start(**environment)
        wait(place, process)
        begun = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        status = process.end(60)
        seconds = time.monotonic() - begun
        _, same = place.complete()
        said = line_with(process.lines, "SIGTERM")
        importing = status == -signal.SIGTERM and not process.lines
        if importing:  # Python's own modules: the system ends the process, as nothing has begun
            said = "(nothing: it had not begun)"
        return Outcome(said, place.redone(), seconds, (status == 1 or importing) and same)

    return fault


def compiling(place: Place, process: tiny_run.Process) -> None:
    process.wait_for(lambda line: line.startswith("exchange "))
    time.sleep(0.5)


def saving(place: Place, process: tiny_run.Process) -> None:
    folder = place.workdir / "checkpoints" / str(EVERY)
    while process.popen.poll() is None and not folder.exists():
        time.sleep(0.001)


def killed_in_a_save(place: Place) -> Outcome:
    process = place.start()
    folder = place.workdir / "checkpoints" / str(3 * EVERY)
    while process.popen.poll() is None and not folder.exists():
        time.sleep(0.001)
    process.kill()
    sealed = (folder / "manifest.json").exists()
    begun = time.monotonic()
    lines, same = place.complete()
    said = line_with(lines, "its save did not end", "resuming at step")
    return Outcome(said, place.redone(), time.monotonic() - begun, same and not sealed)


# Bad batches


def bad_batch(kind: str, *settings: str) -> Callable[[Place], Outcome]:
    def fault(place: Place) -> Outcome:
        command = [sys.executable, __file__, f"--inside={kind}", "--"]
        command += [f"--config={place.base / 'tiny.py'}", f"--workdir={place.workdir}"]
        command += [f"--config.train.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}"]
        command += ["--config.guard.action=rewind", *(f"--config.guard.{s}" for s in settings)]
        begun = time.monotonic()
        environment = {**os.environ, **place.cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        said = line_with(done.stderr.splitlines(), "guard: ")
        summary = json.loads((place.workdir / "summary.json").read_text())
        ok = done.returncode == 0 and summary["rewinds"] == 1 and summary["skipped_batches"] == 2
        return Outcome(said, place.redone(), time.monotonic() - begun, ok)

    return fault


def train_inside(kind: str, arguments: list[str]) -> int:
    """``moejax train`` in this process, whose batch 35 is bad: its loss is NaN, or its update makes
    the next loss jump."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from moejax import cli
    from moejax.training import loop

    place, position, training = loop._place, [], []
    compiled = loop.Run.start

    def remember(batch, rows):
        if training:
            position.append(training[0].batches.position - 1)
        return place(batch, rows)

    def start(run):
        compiled(run)
        training.append(run)
        real = run.programs.train_step

        def step(state, batch, hyper):
            state, metrics = real(state, batch, hyper)
            if position[-1] != 35:
                return state, metrics
            by = jnp.nan if kind == "nan" else -2.0
            with jax.transfer_guard("allow"):
                params = jax.tree.map(lambda leaf: leaf * by, state.params)
                loss = jnp.float32(jnp.nan) if kind == "nan" else metrics.loss
            return state.replace(params=params), metrics.replace(loss=loss)

        run.programs = dataclasses.replace(run.programs, train_step=step)

    loop._place, loop.Run.start = remember, start
    return cli.main(["train", *arguments])


FAULTS: dict[str, Callable[[Place], Outcome]] = {
    "disk full": full_disk,
    "disk turns read-only": read_only,
    "checkpoint file truncated": damaged(truncate),
    "bit flipped in array data": damaged(flip),
    "shard missing": damaged(lambda folder: largest(folder).unlink()),
    "manifest missing": damaged(lambda folder: (folder / "manifest.json").unlink()),
    "SIGTERM in a compile": sigterm(compiling, JAX_ENABLE_COMPILATION_CACHE="false"),
    "SIGTERM in a save": sigterm(saving),
    "SIGTERM in a start": sigterm(lambda place, process: time.sleep(2.5)),
    "SIGKILL in a save": killed_in_a_save,
    "NaN batch": bad_batch("nan"),
    "loss spike": bad_batch("spike", "spike=8.0", "window=20"),
}


def peer(name: str) -> Outcome | None:
    """A peer of a run of two processes is killed or stopped; None where there is no launcher."""
    if importlib.util.find_spec("moejax.launch") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        place = Place(pathlib.Path(folder), "peer")
        config = tiny_run.write_config(place.folder)
        command = [sys.executable, "-m", "moejax.cli", "launch", "--processes=2",
                   "--devices-per-process=2", "--", "train", f"--config={config}",
                   f"--workdir={place.workdir}", "--config.train.steps=100000",
                   "--config.checkpoint.every_steps=50", "--config.mesh.data=0"]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (place.workdir / "checkpoints").exists():
            time.sleep(0.05)
        time.sleep(1.0)
        child = children(process.pid)[-1]
        begun = time.monotonic()
        os.kill(child, signal.SIGKILL if "killed" in name else signal.SIGSTOP)
        said = process.communicate(timeout=120)[1].splitlines()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        seconds = time.monotonic() - begun
        return Outcome(line_with(said[::-1], "process 1", "peer"), None, seconds,
                       process.returncode == 1 and seconds < 60)  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes that a process started, oldest first."""
    import psutil

    found = sorted(psutil.Process(pid).children(recursive=True), key=lambda p: p.create_time())
    return [process.pid for process in found]


def row(name: str, outcome: Outcome | None) -> str:
    if outcome is None:
        return f"| {name} | not tried: there is no `moejax launch` here | | |"
    steps = "" if outcome.lost is None else f"{outcome.lost} steps"
    failed = "" if outcome.ok else " **FAILED**"
    said = outcome.said.replace("|", "\\|")
    return f"| {name} | {said}{failed} | {steps} | {outcome.seconds:.1f} |"


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1].startswith("--inside="):
        return train_inside(sys.argv[1].partition("=")[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose name has it")
    parser.add_argument("--output", metavar="FILE.json", help="for the result, as JSON")
    options = parser.parse_args()
    results: dict[str, Outcome | None] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        tiny_run.write_config(folder)
        whole = Place(folder, "whole_run")
        whole.workdir = folder / "whole"
        if whole.start().end():
            raise SystemExit("the run that nothing happens to failed")
        print("| fault | what was said | lost | seconds |\n|---|---|---|---|", flush=True)
        for fault, try_it in FAULTS.items():
            if options.only in fault:
                place = Place(folder, fault)
                results[fault] = try_it(place)
                print(row(fault, results[fault]).replace(str(place.folder), "…"), flush=True)
                shutil.rmtree(place.folder, ignore_errors=True)
        for fault in PEERS:
            if options.only in fault:
                results[fault] = peer(fault)
                print(row(fault, results[fault]), flush=True)
    if options.output:
        content = {name: found and found._asdict() for name, found in results.items()}
        pathlib.Path(options.output).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(found is None or found.ok for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
