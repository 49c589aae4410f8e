"""Measures every back end of the grouped products on this device, and writes the table."""

import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import UserError, to_dict
from moejax.moe.grouped_matmul.backends import BACKENDS, Settings, platform_and_device
from moejax.moe.grouped_matmul.shapes import Layer, LayerSizes, Product, layer_products
from moejax.moe.grouped_matmul.table import (
    Entry,
    Failed,
    Measured,
    Table,
    load_table,
    table_path,
)

# Norm of the difference to the project's own kernels over their norm.
TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}


def default_shapes() -> list[Layer]:
    """Published layers: SonicMoE's benchmark, OLMoE, Qwen3-30B-A3B, DeepSeek-V2-Lite."""
    return [
        Layer(T=16384, D=2560, F=1280, E=64, K=4),
        Layer(T=16384, D=2048, F=1024, E=64, K=8),
        Layer(T=16384, D=2048, F=768, E=128, K=8),
        Layer(T=16384, D=2048, F=1408, E=64, K=6),
    ]


def tune(
    shapes: Iterable[LayerSizes],
    *,
    path: str | os.PathLike | None = None,
    report: Callable[[str], None] = print,
    dtype: str = "bfloat16",
    interpret: bool = False,
) -> dict[str, Any]:
    """Measures the six products of each layer and adds them to the table.

    Every result is compared with that of the project's own kernels: what differs cannot win.

    Args:
      shapes: layers to measure.
      path: the table's file; the user's by default. What it holds for other products stays.
      report: takes a line of progress at a time.
      dtype: ``bfloat16`` or ``float32``.
      interpret: measures the interpreted kernels, on any machine: for tests, not for use.

    Returns:
      The table as written.

    Raises:
      UserError: there is no NVIDIA GPU here, or the file cannot be read or written.
    """
    platform, device = platform_and_device()
    if interpret:
        device = "interpreter"
    elif platform != "cuda":
        raise UserError(
            f"tuning of grouped products: it measures an NVIDIA GPU, and this is {platform}; "
            "run it on the machine that is to train"
        )
    file = pathlib.Path(path) if path else table_path()
    entries = list(load_table(file).entries) if file.exists() else []
    for layer in shapes:
        routing = _draw_routing(layer)
        for (name, _), product in layer_products(layer, dtype).items():
            report(f"{product}")
            ranked, failed = _measure(name, product, routing, platform, interpret, report)
            versions, now = _versions(), _now()
            entry = Entry(device, product, tuple(ranked), tuple(failed), now, versions)
            key = lambda e: (e.device, e.product)
            entries = [old for old in entries if key(old) != key(entry)] + [entry]
            # After each product: a run that is cut short keeps what it has.
            written = _write(file, device, entries)
    return written


def _measure(name, product, routing, platform, interpret, report):
    """Every configuration of every back end, the fastest first, and those that failed."""
    operands, sources = _draw_operands(name, product, routing)
    ranked, failed, candidates, wanted = [], [], [], None
    for backend_name, backend in BACKENDS.items():
        if interpret and backend_name != "pallas":
            continue
        if reason := "" if interpret else backend.why_not(product.leg, platform):
            failed.append(Failed(backend_name, {}, reason))
            continue
        candidates += [(backend_name, settings) for settings in backend.candidates(product)]
    arguments = operands, routing[0], sources
    compile_one = lambda candidate: _compile(*candidate, product, interpret, arguments)
    # Nothing is timed while programs compile; in a process of one thread they would take minutes.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        programs = list(pool.map(compile_one, candidates))
    for (backend_name, settings), run in zip(candidates, programs, strict=True):
        try:
            if isinstance(run, Exception):
                raise run
            out = jax.block_until_ready(run(*arguments))
            wanted = out if wanted is None else wanted
            _compare(out, wanted, product, int(np.sum(routing[0])))
            milliseconds = _time(lambda: run(*arguments))  # noqa: B023
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            failed.append(Failed(backend_name, dict(settings), reason))
            report(f"  {backend_name} {dict(settings)} failed: {reason}")
            continue
        ranked.append(Measured(backend_name, dict(settings), round(milliseconds, 6)))
    ranked.sort(key=lambda measured: measured.milliseconds)
    for best in ranked[:1]:
        rate = product.flops / best.milliseconds / 1e9
        report(f"  {best.backend} {best.settings}: {best.milliseconds:.4g} ms, {rate:.4g} TFLOP/s")
    return ranked, failed


def _compile(backend_name: str, settings: Settings, product: Product, interpret: bool, arguments):
    """One product as a program of operands, group sizes and sources, or why there is none."""
    backend = BACKENDS[backend_name]

    def run(operands, group_sizes, sources):
        left, right = operands
        if product.leg == "weight_gradient":
            return backend.weight_gradient(
                left, right, group_sizes, sources, settings, interpret, left.dtype
            )
        leg = getattr(backend, product.leg)
        return leg(left, right, group_sizes, sources[0], settings, interpret)

    try:
        return jax.jit(run).lower(*arguments).compile()
    except Exception as error:
        return error


def _draw_routing(layer: LayerSizes):
    """Rows of each expert and the token of each sorted row, as balanced as chance makes them."""
    rng = np.random.default_rng(0)
    expert = np.argsort(rng.random((layer.T, layer.E), np.float32), axis=1)[:, : layer.K]
    order = np.argsort(expert.reshape(-1), kind="stable")
    sizes = np.bincount(expert.reshape(-1), minlength=layer.E)
    return jnp.asarray(sizes, jnp.int32), jnp.asarray(order // layer.K, jnp.int32), layer.T


def _draw_operands(name: str, product: Product, routing):
    """Random operands of a product, and through which index each is read."""
    _, token, tokens = routing
    keys = jax.random.split(jax.random.key(0))
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.dtype(product.dtype))
    # Of a weight gradient, gate_up's reads the tokens and down's their outputs' gradients.
    first = product.gathered and not (product.leg == "weight_gradient" and name == "down")
    sources = (token if first else None, token if product.gathered and not first else None)
    height = [product.rows if source is None else tokens for source in sources]
    if product.leg == "weight_gradient":
        left = draw(keys[0], height[0], product.inputs)
        return (left, draw(keys[1], height[1], product.outputs)), sources
    width = product.inputs if product.leg == "forward" else product.outputs
    weights = draw(keys[1], product.experts, product.inputs, product.outputs)
    return (draw(keys[0], height[0], width), weights), sources


def _compare(got, wanted, product: Product, rows: int) -> None:
    """Raises ValueError where a result differs; rows of no group do not count."""
    if product.leg != "weight_gradient":
        got, wanted = got[:rows], wanted[:rows]
    norm = lambda a: float(jnp.sqrt(jnp.sum(jnp.square(a.astype(jnp.float32)))))
    error = norm(got.astype(jnp.float32) - wanted.astype(jnp.float32)) / norm(wanted)
    if not error <= TOLERANCE[product.dtype]:
        raise ValueError(f"the result differs from the own kernels': relative error {error:.2g}")


def _time(call: Callable[[], Any], windows: int = 5, seconds: float = 0.02) -> float:
    """Median milliseconds of a call, in windows of many calls; waits at their ends only."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = int(min(50, max(1, seconds / (time.perf_counter() - start))))
    times = []
    for _ in range(windows):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("moejax", "jax", "jaxlib", "tokamax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write(file: pathlib.Path, device: str, entries: list[Entry]) -> dict[str, Any]:
    """Writes the table whole or not at all, and returns it."""
    table = Table(tuple(entries))
    record = {"written": _now(), "device": device, "versions": _versions()}
    record |= {"format": table.format, "entries": to_dict(table.entries)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump(record, new, indent=1)
        os.replace(new.name, file)
    except OSError as error:
        raise UserError(
            f"grouped-matmul table {str(file)!r}: cannot be written ({error.strerror}); "
            "choose another file"
        ) from None
    return record
