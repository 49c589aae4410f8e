"""Every dispatcher against the reference on this machine: values and gradients, by relative error.

For machines that the tests do not see, GPUs above all: kernels are compiled for the card, and in
both types.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.bench import moe_suite
from moejax.bench.loads import LOADS, draw_routing
from moejax.bench.options import DTYPES, BenchOptions
from moejax.bench.report import Report, progress
from moejax.bench.shapes import LayerShape, find_shape
from moejax.models.attend import attend, implementation
from moejax.moe.dispatch import dispatch

# Neither tokens nor widths are multiples of a tile; with 3 empty experts, see ``_routing``.
SHAPES = ("T1000-D136-F72-E16-K4", "T512-D256-F128-E64-K8", "T300-D64-F32-E8-K1")
TENSORS = ("y", "d_x", "d_gate", "d_gate_up", "d_down")

# Largest relative error of a tensor, ||got - wanted|| / ||wanted||, wanted in float32.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def run(options: BenchOptions, report: Report) -> None:
    """Compares every dispatcher that can run here with ``dense_loop`` in float32.

    The loads are those of the benchmark, each with a seventh of the tokens as padding, whose
    outputs and gradients have to be exactly zero. A dispatcher that is further off than the
    tolerance is a failure, and so is one that does not run.

    Raises:
      ConfigError: a dispatcher that was asked for cannot run here.
    """
    for shape in map(find_shape, options.shapes or SHAPES):
        asked = options.dispatch or tuple(
            name for name in moe_suite.dispatchers(shape, (), report) if name != "dense_loop"
        )
        names = moe_suite.dispatchers(shape, asked, report)
        functions = {name: _function(name, shape) for name in (*names, "dense_loop")}
        for dtype in DTYPES:
            arrays = moe_suite.layer_arrays(shape, dtype, options.seed)
            for load in LOADS:
                _compare(options, shape, functions, dtype, load, arrays, report)
    if jax.default_backend() != "cpu":
        compare_attention(report, "auto", options.seed)
    report.note(
        "errors are ||got - wanted|| / ||wanted||; wanted is dense_loop in float32, with products "
        "of full precision, from the same rounded weights and tokens"
    )


def compare_attention(report: Report, name: str, seed: int) -> None:
    """An implementation of attention in bfloat16 against XLA's in float32: values and gradients.

    Four documents a row, so that the mask says more than causality.

    Args:
      report: takes the row, and a failure where it does not run or a tensor is further off than
        the tolerance.
      name: as in ``model.attention.implementation``.
      seed: of the operands and the documents' lengths.
    """
    rng = np.random.default_rng(seed)
    document = jnp.asarray(np.sort(rng.integers(1, 5, (2, 512))))
    ago = jnp.tril(jnp.ones((1, 512, 512), bool))
    mask = (ago & (document[:, :, None] == document[:, None]))[:, None]
    operands = [jnp.asarray(rng.normal(size=(2, 512, 4, 64)), jnp.bfloat16) for _ in range(4)]

    def run(name: str, dtype: str, mask, query, key, value, cotangent):
        narrow = [x.astype(dtype) for x in (query, key, value)]
        attention = lambda *x: attend(*x, mask, name=name)
        y, gradients = jax.vjp(attention, *narrow)
        return y, *gradients(cotangent.astype(dtype))

    compiled = jax.jit(run, static_argnums=(0, 1))
    name = implementation(name, operands[0])  # what ``auto`` comes to is what is reported
    shape = {"name": "B2-S512-H4-W64"}
    what = {"load": "documents", "dispatch": f"attention:{name}", "dtype": "bfloat16"}
    with jax.default_matmul_precision("highest"):
        wanted = compiled("xla", "float32", mask, *operands)
    try:
        got = jax.block_until_ready(compiled(name, "bfloat16", mask, *operands))
    except Exception as error:
        report.fail(error, suite="agreement", shape=shape["name"], **what)
        return
    tensors = ("y", "d_query", "d_key", "d_value")
    _judge(report, shape, what, dict(zip(tensors, zip(got, wanted, strict=True), strict=True)))


def _routing(shape: LayerShape, load: str, seed: int):
    """A load's routing, in which every seventh token is padding and 3 experts are empty."""
    expert, gate = draw_routing(load, shape.T, shape.E, shape.K, seed)
    empty = (expert > 0) & (expert <= min(3, shape.E - shape.K))
    padding = np.arange(shape.T)[:, None] % 7 == 3
    gone = empty | padding
    expert = np.where(gone, shape.E, expert).astype(np.int32)
    return jnp.asarray(expert), jnp.asarray(np.where(gone, 0, gate), jnp.float32)


def _function(name: str, shape: LayerShape) -> Callable[..., list[np.ndarray]]:
    """From arrays and routing to the tensors of ``TENSORS``, as float32 arrays of NumPy."""

    def layer(x, gate, weights, expert):
        if name == "capacity":
            # Slots for all: nothing is dropped, so that the reference is the same.
            return dispatch(name, x, expert, gate, weights, slots=shape.T), None
        return moe_suite.moe_layer(name, shape, x, expert, gate, weights)

    jitted = jax.jit(moe_suite.with_pass(layer, "forward_backward", 3))

    def run(arrays: dict[str, Any], expert, gate) -> list[np.ndarray]:
        with jax.default_matmul_precision("highest"):
            given = (arrays["cotangent"], arrays["x"], gate, arrays["moe"], expert)
            y, _, gradients = jitted(*given)
        return [np.asarray(leaf, np.float32) for leaf in (y, *jax.tree.leaves(gradients))]

    return run


def _compare(options, shape: LayerShape, functions, dtype: str, load: str, arrays, report) -> None:
    expert, gate = _routing(shape, load, options.seed)
    exact = jax.tree.map(lambda values: values.astype(jnp.float32), arrays)
    wanted = functions["dense_loop"](exact, expert, gate)
    padding = np.arange(shape.T) % 7 == 3
    for name, function in functions.items():
        if name == "dense_loop":
            continue
        what = {"load": load, "dispatch": name, "dtype": dtype}
        try:
            got = function(arrays, expert, gate)
        except Exception as error:
            report.fail(error, suite="agreement", shape=shape.name, **what)
            continue
        leaked = any(np.any(values[padding]) for values in got[:3])
        pairs = dict(zip(TENSORS, zip(got, wanted, strict=True), strict=True))
        _judge(report, {"name": shape.name, **shape.sizes}, what, pairs, leaked)


def _judge(
    report, shape: dict[str, Any], what: dict[str, str], pairs, leaked: bool = False
) -> None:
    """One row, from what was got and what was wanted of each tensor, and a failure if it is off."""
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float32))
    wide = lambda x: np.asarray(x, np.float32)
    errors = {
        tensor: float(norm(wide(got) - wide(wanted)) / max(norm(wanted), 1e-30))
        for tensor, (got, wanted) in pairs.items()
    }
    limit = TOLERANCE[what["dtype"]]
    report.results.append(
        {"suite": "agreement", **what, "shape": shape, "errors": errors, "tolerance": limit}
        | {"padding_is_zero": not leaked}
    )
    worst = max(errors, key=errors.get)
    reason = "padding is not zero" if leaked else f"{worst} is off by {errors[worst]:.1e}"
    if not errors[worst] <= limit or leaked:
        report.fail(ArithmeticError(reason), suite="agreement", shape=shape["name"], **what)
    else:
        progress(f"{shape['name']} {' '.join(what.values())}: {reason}")
