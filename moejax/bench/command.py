"""``moejax bench``: from flags to a report, on standard output and in a folder."""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import shlex
import shutil
import tempfile
from typing import Any

from moejax.bench import options as flags
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report, progress, row
from moejax.bench.timing import Times


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures what the flags ask for.

    Args:
      arguments: parsed flags, and ``arguments``, the words of the command line, for the record.

    Returns:
      The JSON object of ``--format=json``. If it has ``failures``, the run failed in part.

    Raises:
      UserError: a flag that cannot be; nothing is measured or written then.
    """
    options = flags.from_arguments(arguments)
    if options.against:
        leave_memory_for_a_peer()
    if options.suite in ("model", "generate"):
        leave_no_holes_in_memory()
    import jax

    from moejax.bench import machine

    platform = jax.default_backend()
    dtype = options.dtype or ("float32" if platform == "cpu" else "bfloat16")
    options = dataclasses.replace(options, dtype=dtype)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace"
        if options.tune:
            _tune(options, report)
        else:
            _run_suite(options, platform, trace, report)
        record = {
            "suite": options.suite,
            "command": shlex.join(["moejax", *arguments.arguments]),
            "date": datetime.date.today().isoformat(),
            "seed": options.seed,
            "machine": machine.describe_machine(),
            "versions": machine.versions(),
            **dataclasses.asdict(report),
        }
        record |= record.pop("extra")
        record["fingerprint"] = machine.fingerprint(options, record)
        if options.output:
            _write(options.output, record, trace)
    return record


def leave_memory_for_a_peer() -> None:
    """Keeps jax from taking most of a card's memory at once, unless the user has decided.

    jax reads the variable when it first looks for devices.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def leave_no_holes_in_memory() -> None:
    """Takes a card's memory from CUDA's own pool, unless the user has decided.

    jax's default allocator hands out addresses: after one model it has holes that the next one's
    tens of gigabytes do not fit in (seen: 36 GB refused with 53 free).
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def _run_suite(options: BenchOptions, platform: str, trace: pathlib.Path, report: Report) -> None:
    from moejax.bench import ceilings, models, shapes

    gpu = platform != "cpu"
    if options.suite == "ceilings":
        return ceilings.run_ceilings(options, report)
    if options.suite == "attention":
        return ceilings.run_attention(options, report)
    if options.suite == "agreement":
        from moejax.bench import agreement

        return agreement.run(options, report)
    if options.suite == "routers":
        from moejax.bench import routers_suite

        names = options.shapes or routers_suite.SHAPES
        return routers_suite.run(options, [shapes.find_shape(name) for name in names], report)
    if options.suite == "model":
        from moejax.bench import model_suite

        names = options.shapes or _default(models.MODELS, gpu)
        return model_suite.run(options, [models.find_model(name) for name in names], report)
    if options.suite == "generate":
        from moejax.bench import generate_suite

        names = options.shapes or _default(generate_suite.SHAPES, gpu)
        return generate_suite.run(options, [generate_suite.find(n) for n in names], report)
    from moejax.bench import moe_suite

    layers = [shapes.find_shape(name) for name in options.shapes or _default(shapes.SHAPES, gpu)]
    moe_suite.run(options, layers, trace, report)
    if options.against:
        from moejax.bench import model_suite

        whole = dataclasses.replace(options, loads=flags.DEFAULT_MODEL_LOADS, dispatch=())
        name = "olmoe_150m" if gpu else "olmoe_tiny"
        model_suite.run(whole, [models.find_model(name)], report)


def _default(known: dict[str, Any], gpu: bool) -> list[str]:
    return [name for name, shape in known.items() if gpu or not shape.needs_gpu]


def _tune(options: BenchOptions, report: Report) -> None:
    """Writes the table of the grouped kernels' back ends, for this card and these shapes.

    A row is one product (a leg of a matrix) by the fastest configuration of one back end.

    Raises:
      UserError: there is no GPU to measure, or the table cannot be written.
    """
    from moejax.bench.shapes import SHAPES, find_shape
    from moejax.moe.grouped_matmul.table import table_path
    from moejax.moe.grouped_matmul.tuning import tune

    names = options.shapes or [name for name, shape in SHAPES.items() if shape.needs_gpu]
    table = tune([find_shape(name) for name in names], report=progress, dtype=options.dtype)
    for entry in table["entries"]:
        add_tuned(entry, report)
    report.extra["tuned_table"] = str(table_path())
    report.note(f"the table of grouped products was written to {table_path()}")


def _write(folder: pathlib.Path, record: dict[str, Any], trace: pathlib.Path) -> None:
    """Writes the results, the page and the trace; each file whole or not at all.

    A disk that is full by now is one more failure in the record: what was measured is printed all
    the same.
    """
    from moejax.bench.tables import format_markdown
    from moejax.training.manifest import write_whole

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if trace.exists():
            shutil.rmtree(folder / "trace", ignore_errors=True)
            shutil.copytree(trace, folder / "trace")
        write_whole(folder / flags.RESULTS, json.dumps(record, indent=1) + "\n")
        write_whole(folder / flags.TABLE, format_markdown(record))
    except OSError as error:
        what = f"--output = {str(folder)!r}: cannot be written ({error.strerror})"
        record["failures"].append({"error": what})
        progress(f"failed: {what}")
        return
    progress(f"written to {folder}")


def add_tuned(entry: dict[str, Any], report: Report) -> None:
    """Rows of one product of a tuned table: each back end's fastest configuration."""
    product, fastest = entry["product"], {}
    for measured in entry["ranked"]:
        fastest.setdefault(measured["backend"], measured)
    matrices = product["inputs"] * product["outputs"]
    sizes = {"E": product["experts"], "A": product["inputs"], "B": product["outputs"]}
    name = " ".join([product["leg"], *(f"{a}{n}" for a, n in sizes.items()), f"M{product['rows']}"])
    for backend, measured in fastest.items():
        times = Times((measured["milliseconds"],))
        report.results.append(
            row(
                suite="tune", shape={"name": name, **sizes, "M": product["rows"]},
                load="balanced", dispatch=backend, passes=product["leg"], dtype=product["dtype"],
                times=times, flops=2.0 * product["rows"] * matrices,
                settings=measured["settings"], device=entry["device"],
            )
        )  # fmt: skip
