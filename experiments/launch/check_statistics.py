"""Whether the verdicts of `moejax ablate` keep their promises, on made grids and on real runs.

    python experiments/launch/check_statistics.py [--grids=2000] [--seed=0] [--output=FILE]
    python experiments/launch/check_statistics.py --runs=DIR [--variant=NAME] [--output=...]

Made grids: value = variant + seed + error, of the sizes of this project's ablations. False
positives, where no variant differs: grids in which any is called better or worse; at most 5 % are
promised. Power, where one differs: how often that is found at the recommended number of seeds,
beside the promised rate. Multipliers: how often the interval holds the true one. With ``--runs``,
an ablation's folder: the seeds of one variant are dealt out to pretended variants, again and again.
"""

import argparse
import datetime
import math
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator

import numpy as np
import scipy

from moejax.analysis import multipliers
from moejax.analysis.ablation_record import read_record
from moejax.analysis.statistics import BETTER, CANNOT_TELL, Values, compare
from moejax.config import UserError

EFFECT, SD, SEED_SD = 0.05, 0.03, 0.05  # dense against MoE: the effect, and of its differences
Errors = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]

NOISE: dict[str, Errors] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "Student's t, 5 df": lambda random, shape: random.standard_t(5, shape),
}


def grid(
    random: np.random.Generator,
    variants: int,
    seeds: int,
    *,
    errors: Errors = NOISE["normal"],
    effect: float = 0.0,
    sds: dict[int, float] | None = None,
    lost: float = 0.0,
    first_seed: int = 0,
) -> dict[str, dict[int, float]]:
    """A made grid; ``v0`` is the reference.

    Args:
      random: source of all its numbers.
      variants, seeds: its size.
      errors: of the cells, in units of their standard deviation.
      effect: by which ``v1`` is better.
      sds: factors on the errors of single variants.
      lost: share of cells that failed.
      first_seed: number of the first seed.
    """
    table = SD / math.sqrt(2) * errors(random, (variants, seeds))
    for variant, factor in (sds or {}).items():
        table[variant] *= factor
    table = table + SEED_SD * random.standard_normal((1, seeds))
    table[1] -= effect
    kept = random.random((variants, seeds)) >= lost
    return {
        f"v{i}": {first_seed + s: float(table[i, s]) for s in range(seeds) if kept[i, s]}
        for i in range(variants)
    }


def any_verdict(values: Values) -> bool:
    """Whether any variant is told from the reference."""
    found = compare(values, "v0", power=None).differences.values()
    return any(difference.verdict != CANNOT_TELL for difference in found)


def false_positives(random: np.random.Generator, grids: int, **made: object) -> float:
    """Share of null grids in which any variant is told from the reference."""
    return float(np.mean([any_verdict(grid(random, **made)) for _ in range(grids)]))


def recommended(
    random: np.random.Generator, grids: int, variants: int, seeds: int, pilot_effect: float
) -> dict[str, float]:
    """Pilots that cannot tell, and fresh grids of an effect at the seeds that they recommend.

    Returns:
      ``seeds``, median recommended; ``promised`` and ``found`` rates; ``second_look``: of all
      pilots, those that tell at once or once the recommended seeds are added to them.
    """
    promised, found, counts, looks = [], [], [], []
    for _ in range(grids):
        pilot = grid(random, variants, seeds, effect=pilot_effect)
        told = any_verdict(pilot)
        first = compare(pilot, "v0", smallest_effect=EFFECT).differences["v1"]
        looks.append(told)
        if first.seeds_needed is None:
            continue
        total = seeds + first.seeds_needed
        fresh = compare(grid(random, variants, total, effect=EFFECT), "v0", power=None).differences[
            "v1"
        ]
        promised.append(first.power)
        found.append(fresh.verdict == BETTER)
        counts.append(total)
        if first.seeds_needed and not told:
            more = grid(random, variants, first.seeds_needed, effect=pilot_effect,
                        first_seed=seeds)  # fmt: skip
            looks[-1] = any_verdict({name: pilot[name] | more[name] for name in pilot})
    return {"seeds": float(np.median(counts)), "promised": float(np.mean(promised)),
            "found": float(np.mean(found)), "second_look": float(np.mean(looks))}  # fmt: skip


def made_ladder(
    random: np.random.Generator, budgets: int, luck: np.ndarray, times: float, sd: float
) -> multipliers.Ladder:
    """A ladder of L = 1.2 + 0.6 (times C)^-0.35; half the error's variance is a trunk's."""
    costs = np.geomspace(1, 2.0 ** (budgets - 1), budgets)
    own = random.standard_normal((budgets, len(luck)))
    errors = sd * math.sqrt(0.5) * (own + random.standard_normal((1, len(luck)))) + luck
    losses = 1.2 + 0.6 * (times * costs[:, None]) ** -0.35 + errors
    return {
        float(cost): {
            seed: multipliers.Point(float(loss), {"flops": float(cost)})
            for seed, loss in enumerate(row)
        }
        for cost, row in zip(costs, losses, strict=True)
    }


def coverage(
    random: np.random.Generator, pairs: int, budgets: int, seeds: int, times: float, sd: float
) -> tuple[float, float]:
    """(share of intervals that hold the true multiplier, median of their upper over lower end)."""
    held, widths = [], []
    for _ in range(pairs):
        luck = 0.01 * random.standard_normal(seeds)
        ladders = [made_ladder(random, budgets, luck, x, sd) for x in (times, 1.0)]
        found = multipliers.compare_ladders(*ladders, device="h100_sxm")["flops"]
        if found["interval"] is None:
            held.append(False)
            continue
        low, high = found["interval"]
        held.append((low is None or low <= times) and (high is None or times <= high))
        if low is not None and high is not None:
            widths.append(high / low)
    return float(np.mean(held)), float(np.median(widths))


def deal(
    random: np.random.Generator, values: list[float], variants: int, seeds: int
) -> dict[str, dict[int, float]]:
    """Runs of one variant, dealt out to pretended variants, each run once."""
    cards = random.permutation(values)[: variants * seeds].reshape(variants, seeds)
    return {f"v{i}": dict(enumerate(map(float, row))) for i, row in enumerate(cards)}


def _percent(share: float, count: int) -> str:
    error = math.sqrt(max(share * (1 - share), 1 / count) / count)
    return f"{100 * share:.1f} ± {196 * error:.1f} %"


def null_table(random: np.random.Generator, grids: int) -> Iterator[list[str]]:
    """False positives by size and noise, and where the model is wrong."""
    yield ["variants", "seeds", "errors", "false positives"]
    for variants in (2, 4, 10):
        for seeds in (3, 5, 10):
            for name, errors in NOISE.items():
                made = {"variants": variants, "seeds": seeds, "errors": errors}
                rate = false_positives(random, grids, **made)
                yield [str(variants), str(seeds), name, _percent(rate, grids)]
    for variants, seeds in ((4, 3), (4, 5), (10, 5)):
        last = variants - 1
        wrong = {
            "10 % of cells failed": {"lost": 0.1},
            "one variant twice as noisy": {"sds": {last: 2.0}},
            "two variants diverging, 100 times": {"sds": {last: 100.0, last - 1: 100.0}},
            "the reference twice as noisy": {"sds": {0: 2.0}},
        }
        for name, more in wrong.items():
            rate = false_positives(random, grids, variants=variants, seeds=seeds, **more)
            yield [str(variants), str(seeds), name, _percent(rate, grids)]


def power_table(random: np.random.Generator, grids: int) -> Iterator[list[str]]:
    """Promised and found rates at the recommended seeds."""
    yield ["variants", "pilot's seeds", "pilot", "recommended, median", "promised", "found",
           "found / promised", "told after a second look"]  # fmt: skip
    for variants in (2, 4, 10):
        for seeds in (3, 5):
            for name, effect in (("no effect", 0.0), ("the effect", EFFECT)):
                found = recommended(random, grids, variants, seeds, effect)
                yield [str(variants), str(seeds), name, f"{found['seeds']:.0f}",
                       f"{100 * found['promised']:.1f} %", f"{100 * found['found']:.1f} %",
                       f"{found['found'] / found['promised']:.2f}",
                       f"{100 * found['second_look']:.1f} %"]  # fmt: skip


def multiplier_table(random: np.random.Generator, pairs: int) -> Iterator[list[str]]:
    """Coverage of the multipliers' 95 % intervals."""
    yield ["budgets", "seeds", "true multiplier", "error of a run", "interval holds it",
           "upper / lower end, median"]  # fmt: skip
    for budgets, seeds in ((4, 3), (4, 5), (6, 5)):
        for times in (0.7, 1.3, 2.0):
            for sd in (0.003, 0.01):
                rate, width = coverage(random, pairs, budgets, seeds, times, sd)
                yield [str(budgets), str(seeds), f"{times:g}", f"{sd:g}", _percent(rate, pairs),
                       f"{width:.2f}"]  # fmt: skip


def runs_table(random: np.random.Generator, deals: int, values: list[float]) -> Iterator[list[str]]:
    """False positives on real runs."""
    yield ["pretended variants", "seeds of each", "deals", "false positives"]
    for variants, seeds in ((2, 3), (2, 5), (3, 3), (4, 5), (5, 3), (10, 3)):
        if variants * seeds > len(values):
            continue
        hits = [any_verdict(deal(random, values, variants, seeds)) for _ in range(deals)]
        yield [str(variants), str(seeds), str(deals), _percent(float(np.mean(hits)), deals)]


def markdown(rows: Iterator[list[str]]) -> str:
    """Rows as a table, the first as its head."""
    lines = []
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], file=sys.stderr, flush=True)  # it takes minutes
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])


def main(arguments: list[str]) -> str:
    """Runs the checks that the flags ask for; returns what is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", metavar="DIR", help="an ablation's folder")
    parser.add_argument("--variant", help="of --runs; the reference by default")
    parser.add_argument("--output", type=pathlib.Path, help="a file for the tables")
    options = parser.parse_args(arguments)
    random = np.random.default_rng(options.seed)
    if options.runs:
        record = read_record(options.runs)
        variant = options.variant or record.spec["reference"]
        rows = record.completed(variant, record.amounts[-1]).values()
        values = [row[record.metric] for row in rows]
        if len(values) < 6:
            raise UserError(f"--runs: {variant!r} has {len(values)} completed runs; six are needed")
        spread = np.std(values, ddof=1)
        parts = [
            f"{len(values)} runs of {variant!r} of {record.spec['name']}, {record.metric} "
            f"{np.mean(values):.4f}, standard deviation {spread:.4f}:",
            markdown(runs_table(random, options.grids, values)),
        ]
    else:
        parts = [
            "## False positives: any variant told from the reference, none differing",
            markdown(null_table(random, options.grids)),
            "## Power at the recommended number of seeds",
            markdown(power_table(random, max(options.grids // 4, 1))),
            "## Multipliers: coverage of the 95 % interval",
            markdown(multiplier_table(random, max(options.grids // 10, 1))),
        ]
    command = f"python experiments/launch/check_statistics.py {' '.join(arguments)}".rstrip()
    stamp = (
        f"`{command}`, {datetime.date.today()}, seed {options.seed}, "
        f"{options.grids} grids a line (a quarter for power, a tenth for multipliers), "
        f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    )
    text = "\n\n".join([*parts, stamp]) + "\n"
    if options.output:
        options.output.write_text(text)
    return text


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
