"""Kills a run with SIGKILL again and again, resumes it every time, and counts what was lost.

    python experiments/launch/kill_and_resume.py --kills=100 --output=kills.json

A tiny run is trained once without interruption. Then it is trained again, in as many processes as
it takes, each killed at a random moment: while it starts (Python, the devices, the text), compiles
(a third of the times without the compilation cache), trains a step, saves, or validates; the places
are drawn in turn, the moments within them by ``--seed``. Where a kill really hit is read off what
the process had said and left behind. At the end

* the parameters must be those of the uninterrupted run, bit for bit, and so must the losses;
* every second that the processes lived must be in the ledger, but for at most a second a kill.

Exit status 1 if one of them is not so. The ledger opens once a config is valid, so that a run's
very first process is never killed before that: until then there is no run that it could be part of.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import random
import statistics
import sys
import tempfile
import time

import tiny_run

PLACES = ("startup", "compile", "step", "save", "validation")
EVAL_EVERY, SAVE_EVERY = 20, 12
FLUSH_SECONDS = 1.0
COLD_SECONDS = 15.0  # kills come in the first so many of a compilation without the cache


def settings(steps: int) -> list[str]:
    return [
        f"--config.train.steps={steps}", f"--config.train.eval_every={EVAL_EVERY}",
        "--config.train.eval_batches=0", f"--config.checkpoint.every_steps={SAVE_EVERY}",
    ]  # fmt: skip


class Victim:
    """One process of the run, to be killed in a place."""

    def __init__(self, arguments: list[str], workdir: pathlib.Path, environment: dict[str, str]):
        self.workdir, self.before = workdir, set(_unsealed(workdir))
        self.process = tiny_run.Process(arguments, environment)

    def kill_in(
        self, place: str, rng: random.Random, typical: dict[str, float], cold: bool
    ) -> float | None:
        """Waits for the place and kills; seconds that it lived, None where it ended before."""
        process = self.process
        if place == "startup":
            pause = rng.uniform(0.0, typical["startup"])
        elif place == "compile":
            process.wait_for(_announced)
            pause = rng.uniform(0.0, typical["cold" if cold else "compile"])
        elif place == "step":
            process.wait_for(_trains)
            pause = rng.uniform(0.0, 0.5)
        elif place == "validation":
            process.wait_for(lambda line: _trains(line) and _step(line) % EVAL_EVERY == 0)
            pause = rng.uniform(0.0, typical["validation"])
        else:
            while process.popen.poll() is None and not set(_unsealed(self.workdir)) - self.before:
                time.sleep(0.001)
            pause = rng.uniform(0.0, 0.15)
        time.sleep(pause)
        if process.popen.poll() is not None:
            process.end()
            return None
        return process.kill()

    def hit(self) -> str:
        """Where the kill hit, by what there is."""
        lines = self.process.lines
        if not any(map(_announced, lines)):
            return "startup"
        if not any(line.startswith("resuming") or _trains(line) for line in lines):
            return "compile"
        if set(_unsealed(self.workdir)) - self.before:
            return "save"
        last = next((line for line in reversed(lines) if "step" in line), "")
        validating = _trains(last) and _step(last) % EVAL_EVERY == 0
        return "validation" if validating else "step"


def _announced(line: str) -> bool:
    return line.startswith("exchange ")


def _trains(line: str) -> bool:
    return line.startswith("step ") and "loss" in line


def _step(line: str) -> int:
    return int(line.split()[1].partition("/")[0])


def _unsealed(workdir: pathlib.Path) -> list[str]:
    with contextlib.suppress(OSError):
        folders = [e for e in os.scandir(workdir / "checkpoints") if e.is_dir()]
        return [e.name for e in folders if not os.path.exists(f"{e.path}/manifest.json")]
    return []


def places(count: int, rng: random.Random) -> list[str]:
    """Where the kills are to hit, each place as often as any other, in random order."""
    found = [PLACES[i % len(PLACES)] for i in range(count)]
    rng.shuffle(found)
    return found


def measure(lines: list[str], workdir: pathlib.Path) -> dict[str, float]:
    """Seconds that the uninterrupted run took for each place."""
    from moejax.cost.bill import read

    seconds = read(workdir)["seconds"]
    validations = sum("validation after" in line for line in lines)
    return {
        "startup": seconds["startup"], "compile": seconds["compile"],
        "validation": seconds["eval"] / max(validations, 1),
    }  # fmt: skip


def same_bits(got: pathlib.Path, wanted: pathlib.Path) -> dict[str, bool]:
    """Whether two runs came to the same parameters and logged the same losses."""
    import jax
    import numpy as np

    from moejax.training import restore
    from moejax.training.metrics import read_metrics

    leaves = [jax.tree.leaves(restore.load(path)[1]) for path in (got, wanted)]
    losses = lambda path: [(r["step"], r["loss"]) for r in read_metrics(path) if "loss" in r]
    bits = lambda leaf: np.asarray(leaf).tobytes()
    equal = [bits(a) == bits(b) for a, b in zip(*leaves, strict=True)]
    return {"parameters": all(equal), "losses": losses(got) == losses(wanted)}


def charged(workdir: pathlib.Path) -> dict[int, float]:
    """Seconds in the ledger by process id."""
    from moejax.cost.segments import segments

    parts = segments(workdir / "ledger.jsonl")
    return {part.header["pid"]: sum(part.seconds.values()) for part in parts}


def kill_and_resume(
    kills: int, seed: int, folder: pathlib.Path, steps: int, minutes: float, say
) -> dict:
    """The whole count; see the module."""
    rng, begun = random.Random(seed), time.monotonic()
    config = tiny_run.write_config(folder)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    cold = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = lambda workdir: [f"--config={config}", f"--workdir={workdir}", *settings(steps)]
    whole, typical = folder / "whole", {}
    for workdir in (whole, folder / "warm"):  # the second one finds the compilation cache filled
        process = tiny_run.Process(command(workdir), cache)
        if process.end(900):
            raise SystemExit("\n".join(process.lines[-20:]))
        before, typical = typical, measure(process.lines, workdir)
    typical["cold"] = min(before["compile"], COLD_SECONDS)
    say(f"uninterrupted: {time.monotonic() - begun:.1f} s, {typical}")
    waiting, entries, runs, failures = places(kills, rng), [], [], []
    while waiting:
        workdir, own, alone = folder / f"killed_{len(runs)}", [], True
        while True:  # one run, to its end
            place = waiting[0] if waiting else None
            if place == "startup" and alone:
                place = next((p for p in waiting if p != "startup"), None)
            environment = cold if place == "compile" and rng.random() < 1 / 3 else cache
            if time.monotonic() - begun > 60 * minutes:
                place, waiting = None, []
            victim = Victim(command(workdir), workdir, environment)
            lived = victim.kill_in(place, rng, typical, environment is cold) if place else None
            if lived is None:
                status = victim.process.end(600)
                if status:
                    failures.append(victim.process.lines[-5:])
                if not status or len(failures) > 5:
                    break
                continue
            waiting.remove(place)
            alone = alone and not (workdir / "ledger.jsonl").exists()
            entry = {"asked": place, "hit": victim.hit(), "lived": lived,
                     "pid": victim.process.popen.pid, "run": len(runs)}  # fmt: skip
            own.append(entry)
            say(f"kill {len(entries) + len(own)}: in {entry['hit']}, after {lived:.2f} s")
        if len(failures) > 5:
            break
        seconds = charged(workdir)
        for entry in own:
            entry["lost"] = entry["lived"] - seconds.get(entry["pid"], 0.0)
        entries += own
        runs.append(same_bits(workdir, whole))
        say(f"run {len(runs)}: {len(own)} kills; {runs[-1]}")
    result = {
        "kills": len(entries), "seed": seed, "steps": steps, "runs": runs, "failures": failures,
        "typical_seconds": typical, "by_place": by_place(entries),
        "most_lost": max((e["lost"] for e in entries), default=0.0),
        "total": total(entries), "seconds": time.monotonic() - begun, "machine": machine(),
        "each": entries,
    }  # fmt: skip
    equal = all(all(run.values()) for run in runs)
    bounded = all(entry["lost"] <= FLUSH_SECONDS for entry in entries)
    result["ok"] = equal and bounded and not failures and len(entries) == kills
    return result


def by_place(entries: list[dict]) -> dict[str, dict]:
    found = {}
    for place in PLACES:
        lost = [entry["lost"] for entry in entries if entry["hit"] == place]
        if lost:
            found[place] = {
                "kills": len(lost),
                "lost_median": statistics.median(lost),
                "lost_most": max(lost),
            }
    return found


def total(entries: list[dict]) -> dict[str, float]:
    """Seconds that the killed processes lived, and those of them that are in the ledger."""
    lived, lost = (sum(entry[name] for entry in entries) for name in ("lived", "lost"))
    return {"lived": lived, "charged": lived - lost, "lost": lost}


def machine() -> dict[str, str | int | None]:
    import jax

    return {"python": platform.python_version(), "jax": jax.__version__, "cpus": os.cpu_count()}


def table(result: dict) -> str:
    lines = ["killed in    kills   seconds not charged: median, most"]
    for place, entry in result["by_place"].items():
        lines.append(
            f"{place:<12} {entry['kills']:>5}   {entry['lost_median']:.2f}   "
            f"{entry['lost_most']:.2f}"
        )
    runs, sums = result["runs"], result["total"]
    equal = sum(all(run.values()) for run in runs)
    lines.append(
        f"{result['kills']} kills over {len(runs)} runs: {equal} of {len(runs)} ended with the "
        f"bits of the uninterrupted run; {len(result['failures'])} resumes failed"
    )
    lines.append(
        f"lived {sums['lived']:.1f} s, charged {sums['charged']:.1f} s, most lost by one kill "
        f"{result['most_lost']:.2f} s; {'passed' if result['ok'] else 'FAILED'}"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the run; by the number of kills if left out")
    parser.add_argument("--minutes", type=float, default=60.0, help="no more kills after these")
    parser.add_argument("--output", metavar="FILE.json", help="for the result, as JSON")
    options = parser.parse_args()
    say = lambda line: print(line, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        steps = options.steps or min(60 + 20 * options.kills, 900)
        result = kill_and_resume(
            options.kills, options.seed, pathlib.Path(folder), steps, options.minutes, say
        )
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
