"""What the machine can do at best: a large matrix product, a large copy, and attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.bench import timing
from moejax.bench.arrays import Normals
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report, progress, row
from moejax.bench.shapes import PASSES, parse_sizes
from moejax.config import UserError

# Width of the square matrices, and bytes copied.
PRODUCT = {"cpu": 1024, "gpu": 8192}
COPY = {"cpu": 256 * 2**20, "gpu": 4 * 2**30}

# B rows of S positions, H heads of width W. On a GPU: about the attention of 150M, 500M and 1B
# active parameters, and a long context.
ATTENTION = {
    "cpu": ("B8-S256-H4-W64",),
    "gpu": ("B16-S2048-H12-W64", "B8-S2048-H10-W128", "B4-S2048-H16-W128", "B1-S16384-H16-W128"),
}


def run_ceilings(options: BenchOptions, report: Report) -> None:
    """Times a square product and a copy; the copy's row has ``bytes_per_s``, read and written.

    Raises:
      UserError: shapes were asked for, which this suite does not take.
    """
    if options.shapes:
        raise UserError("--shapes: --suite=ceilings has its own; leave the flag out")
    size = PRODUCT[_size_class()]
    normal = Normals(options.seed, options.dtype)
    matrices = [normal(size, size), normal(size, size)]
    product = timing.compile_program(jnp.matmul, *matrices)
    items = COPY[_size_class()] // 4
    values = jnp.arange(items, dtype=jnp.int32)
    # A plain copy may be optimised away.
    copy = timing.compile_program(lambda values: values + 1, values)
    windows = {
        "product": timing.window_of(functools.partial(product.call, *matrices)),
        "copy": timing.window_of(functools.partial(copy.call, values)),
    }
    times = timing.measure(windows, options.budget)
    shared = {"suite": "ceilings", "load": None, "passes": "forward"}
    report.results.append(
        row(
            **shared, shape={"name": f"product {size}^3", "T": size, "D": size, "F": size},
            dispatch="product", dtype=options.dtype, times=times["product"], flops=2.0 * size**3,
            program=product,
        )
    )  # fmt: skip
    report.results.append(
        row(
            **shared, shape={"name": f"copy {4 * items / 2**30:g} GiB", "T": items},
            dispatch="copy", dtype="int32", times=times["copy"], flops=0.0, program=copy,
            bytes_per_s=2 * 4 * items / (times["copy"].median / 1e3),
        )
    )  # fmt: skip


def _size_class() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def run_attention(options: BenchOptions, report: Report) -> None:
    """Times causal attention, by XLA and, on a GPU in bfloat16, by cuDNN.

    FLOPs are those of the half that causality leaves. A shape is B rows of S positions with H
    heads of width W.
    """
    platform = jax.default_backend()
    names = ["xla"]
    if platform == "gpu" and options.dtype == "bfloat16":
        names.append("cudnn")
    else:
        report.note(f"cudnn is left out: it needs a GPU and bfloat16, not {platform}")
    for text in options.shapes or ATTENTION[_size_class()]:
        sizes = parse_sizes(text, dict.fromkeys("BSHW"), ATTENTION["gpu"])
        for passes in PASSES:
            _bench_attention(options, text, sizes, passes, names, report)


def _bench_attention(options, text: str, sizes: dict[str, int], passes: str, names, report) -> None:
    shape = (sizes["B"], sizes["S"], sizes["H"], sizes["W"])
    normal = Normals(options.seed, options.dtype)
    arrays = [normal(*shape) for _ in range(4)]

    def run(name: str, query, key, value, cotangent) -> Any:
        attend = functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation=name
        )
        if passes == "forward":
            return attend(query, key, value)
        y, gradients = jax.vjp(attend, query, key, value)
        return y, gradients(cotangent)

    programs, windows = {}, {}
    for name in names:
        try:
            programs[name] = timing.compile_program(functools.partial(run, name), *arrays)
            call = functools.partial(programs[name].call, *arrays)
            jax.block_until_ready(call())
            windows[name] = timing.window_of(call)
        except Exception as error:
            report.fail(error, suite="attention", shape=text, dispatch=name, **{"pass": passes})
    forward = 2.0 * 2 * sizes["B"] * sizes["H"] * sizes["W"] * sizes["S"] ** 2 / 2
    for name, times in timing.measure(windows, options.budget).items():
        report.results.append(
            row(
                suite="attention", shape={"name": text, **sizes}, load=None, dispatch=name,
                passes=passes, dtype=options.dtype, times=times, program=programs[name],
                flops=forward * (1 if passes == "forward" else 3),
            )
        )  # fmt: skip
        progress(f"attention {text} {passes} {name}: {times.median:.3g} ms")
