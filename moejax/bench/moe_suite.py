"""The MoE layer's speed: every dispatcher beside the dense layer of the same active FLOPs."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moejax.bench import exchanges, pieces, timing
from moejax.bench import loads as routing
from moejax.bench.arrays import Normals
from moejax.bench.options import DISPATCHERS, BenchOptions
from moejax.bench.report import Report, progress, row
from moejax.bench.shapes import PASSES, SEQUENCE, LayerShape, layer_flops
from moejax.bench.tracing import write_trace
from moejax.config import ConfigError, check
from moejax.moe.choose import choose
from moejax.moe.dispatch import dispatch, drop, expert_capacity
from moejax.moe.dispatch.grouped import grouped
from moejax.moe.experts import ExpertWeights, swiglu
from moejax.moe.grouped_matmul import BACKENDS, available_backends, only
from moejax.moe.grouped_matmul import describe as describe_products
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers import SoftmaxTopKOptions

CAPACITY_FACTOR = 1.25

# ``grouped:NAME`` is the dispatcher ``grouped`` with one back end for all of its products.
BACKEND = "grouped:"

# The reference does E / K times the work; above this it is left out unless it is asked for.
DENSE_LOOP_LIMIT = 8


def run(
    options: BenchOptions, shapes: list[LayerShape], trace: pathlib.Path, report: Report
) -> None:
    """Measures every shape, load, dispatcher and pass into the report.

    Args:
      options: what to measure.
      shapes: the layers.
      trace: folder for the profiler's traces, a folder a shape; empty unless traces are asked
        for, with ``profile`` and ``output``.
      report: what is measured.

    Raises:
      ConfigError: a dispatcher that was asked for cannot run here.
    """
    # All of them are looked at before the first is measured.
    names = {shape.name: dispatchers(shape, options.dispatch, report) for shape in shapes}
    for shape in shapes:
        choice = choose(moe_config(shape), platform=jax.default_backend(), expert_devices=1)
        report.auto[shape.name] = {"dispatch": choice.dispatch, "reason": choice.dispatch_reason}
        if "grouped" in names[shape.name]:
            kernels = report.extra.setdefault("grouped_products", {})
            kernels[shape.name] = describe_products(shape, options.dtype)
        arrays = layer_arrays(shape, options.dtype, options.seed)
        calls = _bench_shape(options, shape, names[shape.name], arrays, report)
        if options.profile:
            _take_apart(options, shape, arrays, calls, trace, report)
    for note in NOTES:
        report.note(note)


NOTES = (
    "x dense is over a dense SwiGLU of width K x F on the same tokens, medians of the same rounds",
    "balanced: all experts alike; skewed: the fullest has 4 times the mean (all tokens where that "
    "is less), the others fall off geometrically; worst: one expert gets all tokens, the other "
    "choices are balanced",
    f"capacity has {CAPACITY_FACTOR} times the mean in slots, within sequences of up to "
    f"{SEQUENCE} tokens",
)


def _take_apart(
    options: BenchOptions,
    shape: LayerShape,
    arrays: dict[str, Any],
    calls: dict[str, Callable[[], Any]],
    trace: pathlib.Path,
    report: Report,
) -> None:
    """The parts of a layer and its trace; what fails here does not lose what is measured."""
    report.profile = report.profile or []
    steps = {
        "pieces": lambda: pieces.run(options, shape, arrays, report),
        "exchanges": lambda: exchanges.run(options, shape, report),
        "trace": lambda: write_trace(trace / shape.name, calls) if options.output else None,
    }
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            report.fail(error, suite="moe", shape=shape.name, part=name)
    if not options.output:
        report.note("no profiler trace is kept: --output=DIR says where to")
    report.note(
        "pieces are programs of their own, so that they add up to more than the layer; the batched "
        "products are those of equally full experts"
    )


def moe_config(shape: LayerShape, name: str = "auto") -> MoEConfig:
    """The shape as the MoE layer's options, with a dispatcher."""
    return MoEConfig(
        num_experts=shape.E, top_k=shape.K, d_expert=shape.F, dispatch=name,
        capacity_factor=CAPACITY_FACTOR, router=SoftmaxTopKOptions(),
    )  # fmt: skip


def check_runs(shape: LayerShape, name: str) -> None:
    """Raises ConfigError where a dispatcher, or one of its back ends, cannot run here."""
    platform = jax.default_backend()
    choose(moe_config(shape, name.split(":")[0]), platform=platform, expert_devices=1)
    if name.startswith(BACKEND):
        reason = available_backends(platform)[name.removeprefix(BACKEND)]
        check(not reason, "--dispatch", name, f"cannot run here: {reason}; leave it out")


def dispatchers(shape: LayerShape, asked: tuple[str, ...], report: Report) -> list[str]:
    """The dispatchers to measure: those asked for, or all that can run here.

    What is left out is noted in the report.

    Raises:
      ConfigError: one that was asked for cannot run here.
    """
    names = []
    # One grouped back end for all products, beside the best for each, where there are any.
    backends = [BACKEND + name for name in BACKENDS] if jax.default_backend() == "gpu" else []
    for name in asked or (*DISPATCHERS, *backends):
        try:
            check_runs(shape, name)
        except ConfigError as error:
            if asked:
                raise
            report.note(f"{name} is left out: {error.remedy}")
            continue
        if name == "dense_loop" and not asked and shape.E > DENSE_LOOP_LIMIT * shape.K:
            report.note(
                f"dense_loop is left out where it does more than {DENSE_LOOP_LIMIT} times the work "
                "(E / K); --dispatch=dense_loop measures it"
            )
            continue
        names.append(name)
    return names


def layer_arrays(shape: LayerShape, dtype: str, seed: int) -> dict[str, Any]:
    """Tokens, weights and the outputs' gradient, normal and scaled by fan-in.

    Returns:
      ``x`` and ``cotangent`` (T, D), ``moe`` (ExpertWeights) and ``dense``: the gate and up
      projections (D, 2 · K · F) and the down projection (K · F, D).
    """
    width, hidden, wide = shape.D, shape.F, shape.K * shape.F
    normal = Normals(seed, dtype)
    return {
        "x": normal(shape.T, width),
        "cotangent": normal(shape.T, width),
        "moe": ExpertWeights(
            normal(shape.E, width, 2, hidden, fan_in=width),
            normal(shape.E, hidden, width, fan_in=hidden),
        ),
        "dense": (normal(width, 2 * wide, fan_in=width), normal(wide, width, fan_in=wide)),
    }


def dense_layer(
    x: Float[Array, "T D"], weights: tuple[Float[Array, "D two_KF"], Float[Array, "KF D"]]
) -> Float[Array, "T D"]:
    """One SwiGLU of width K · F over the same tokens: the same active FLOPs, nothing to route."""
    gate_up, down = weights
    both = jnp.matmul(x, gate_up).reshape(len(x), 2, -1)
    return jnp.matmul(swiglu(both), down)


def moe_layer(name: str, shape: LayerShape, x, expert, gate, weights):
    """A dispatcher over given routing; with capacity, what does not fit is dropped first.

    Capacity is counted within sequences of ``shape.sequence`` tokens.

    Returns:
      The combined outputs (T, D), and how many assignments were dropped.
    """
    slots, dropped = 0, jnp.zeros((), jnp.float32)
    if name == "capacity":
        group = shape.sequence
        slots = expert_capacity(group, shape.K, shape.E, CAPACITY_FACTOR)
        expert, dropped = drop(expert, gate, num_experts=shape.E, group=group, slots=slots)
        slots *= shape.T // group
    if name.startswith(BACKEND):
        table = only(name.removeprefix(BACKEND))
        return grouped(x, expert, gate, weights, table=table), dropped
    return dispatch(name, x, expert, gate, weights, slots=slots), dropped


def with_pass(layer: Callable, passes: str, num_differentiated: int) -> Callable:
    """A layer as one function of its pass.

    Args:
      layer: returns outputs and what is not differentiated.
      passes: ``forward``, or ``forward_backward``: outputs and the gradients of the first
        ``num_differentiated`` arguments, from the outputs' gradient given first.
      num_differentiated: arguments that gradients are computed for.
    """

    def forward_backward(cotangent, *arguments):
        inputs, rest = arguments[:num_differentiated], arguments[num_differentiated:]
        run = lambda *inputs: layer(*inputs, *rest)
        y, gradients, aux = jax.vjp(run, *inputs, has_aux=True)
        return y, aux, gradients(cotangent)

    forward = lambda cotangent, *arguments: layer(*arguments)
    return {"forward": forward, "forward_backward": forward_backward}[passes]


def _program(name: str, shape: LayerShape, passes: str, arrays: dict[str, Any], routes):
    """The compiled layer, and a function from a load to its arguments."""
    if name == "dense":
        layer = lambda x, weights: (dense_layer(x, weights), jnp.zeros(()))
        arguments = lambda load: (arrays["cotangent"], arrays["x"], arrays["dense"])
        function = with_pass(layer, passes, 2)
    else:
        layer = lambda x, gate, weights, expert: moe_layer(name, shape, x, expert, gate, weights)
        function = with_pass(layer, passes, 3)

        def arguments(load):
            expert, gate = routes[load]
            return (arrays["cotangent"], arrays["x"], gate, arrays["moe"], expert)

    program = timing.compile_program(function, *arguments(next(iter(routes))))
    return program, arguments


def _bench_shape(
    options: BenchOptions,
    shape: LayerShape,
    names: list[str],
    arrays: dict[str, Any],
    report: Report,
) -> dict[str, Callable[[], Any]]:
    """Measures one shape; returns its forward-backward programs, bound to the first load."""
    calls: dict[str, Callable[[], Any]] = {}
    drawn = {
        load: routing.draw_routing(load, shape.T, shape.E, shape.K, options.seed)
        for load in options.loads
    }
    routes = {load: tuple(map(jnp.asarray, route)) for load, route in drawn.items()}
    # One pass's programs at a time: a big layer's may hold much of a card's memory.
    for passes in options.passes or PASSES:
        built = timing.compile_side_by_side(
            {
                name: functools.partial(_program, name, shape, passes, arrays, routes)
                for name in ("dense", *names)
            }
        )
        programs = {}
        for name, program in built.items():
            if isinstance(program, Exception):
                _fail(report, program, shape, "every load", name, passes)
            else:
                programs[name] = program
        for load in options.loads:
            # The reference takes the same time whatever the load: once is enough.
            first = load == options.loads[0]
            here = {n: p for n, p in programs.items() if first or n != "dense_loop"}
            counts = np.bincount(drawn[load][0].reshape(-1), minlength=shape.E)
            describe = {
                "suite": "moe",
                "shape": {"name": shape.name, **shape.sizes},
                "load": load,
                "passes": passes,
                "dtype": options.dtype,
                "flops": layer_flops(shape, passes),
            }
            ran = _bench_load(options, here, describe, routing.max_over_mean(counts), report)
            if first:
                calls = ran
    if "dense_loop" in names and len(options.loads) > 1:
        report.note(f"dense_loop's time does not depend on the load: {options.loads[0]} only")
    return calls


def _bench_load(
    options: BenchOptions, programs, describe: dict[str, Any], fullest: float, report: Report
) -> dict[str, Callable[[], Any]]:
    """One round-robin: the dense layer and every dispatcher, at one shape, load and pass.

    Returns:
      The programs that ran, bound to their arguments.
    """
    load, calls, dropped = describe["load"], {}, {}
    for name, (program, arguments) in programs.items():
        call = functools.partial(program.call, *arguments(load))
        try:
            dropped[name] = float(jax.block_until_ready(call())[1])
        except Exception as error:
            _fail(report, error, describe["shape"], load, name, describe["passes"])
            continue
        calls[name] = call
    windows = {name: timing.window_of(call) for name, call in calls.items()}
    times = timing.measure(windows, options.budget)
    assignments = describe["shape"]["T"] * describe["shape"]["K"]
    for name, measured in times.items():
        report.results.append(
            row(
                **describe,
                dispatch=name,
                times=measured,
                dense=times.get("dense"),
                program=programs[name][0],
                max_over_mean=fullest,
                dropped_share=dropped[name] / assignments,
            )
        )
    shown = ", ".join(f"{name} {t.median:.3g}" for name, t in times.items())
    progress(f"{describe['shape']['name']} {load} {describe['passes']} ms: {shown}")
    return calls


def _fail(report: Report, error: Exception, shape, load: str, name: str, passes: str) -> None:
    named = {"name": shape.name, **shape.sizes} if isinstance(shape, LayerShape) else shape
    what = {"shape": named["name"], "load": load, "dispatch": name, "pass": passes}
    report.fail(error, suite="moe", **what)
