"""A layer taken apart: the time of the router, of sorting, of each product and of the rest.

Each piece is a program of its own over arrays that lie ready, so the pieces of a layer add up to
more than the layer, in which XLA fuses neighbours. The products are batched ones over equally full
experts, and on a GPU the grouped ones beside them, under the load itself.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moejax.bench import timing
from moejax.bench.arrays import Normals
from moejax.bench.loads import draw_routing
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report, progress
from moejax.bench.shapes import LayerShape, layer_flops
from moejax.moe.dispatch import SortedAssignments, sort_assignments
from moejax.moe.experts import ExpertWeights, swiglu
from moejax.moe.grouped_matmul import choose_products
from moejax.moe.routers import REGISTRY, RouterInputs

ROUTERS = ("softmax_topk", "deepseek_v3")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the layer.

    Attributes:
      name: what it does.
      function: a pure function.
      arguments: its arrays.
      flops: FLOPs of its matrix products; 0 where it has none.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple
    flops: float = 0.0


def run(options: BenchOptions, shape: LayerShape, arrays: dict[str, Any], report: Report) -> None:
    """Times the pieces of one shape under its first load, in turns, into ``report.profile``."""
    load = options.loads[0]
    drawn = draw_routing(load, shape.T, shape.E, shape.K, options.seed)
    expert, gate = map(jnp.asarray, drawn)
    found = [*routers(shape, arrays["x"])]
    found += movements(shape, arrays["x"], expert, gate)
    found += products(shape, arrays["moe"], arrays["x"].dtype)
    if jax.default_backend() == "gpu":
        found += grouped_products(shape, arrays["moe"], arrays["x"], expert)
    windows, flops = {}, {}
    for piece in found:
        try:
            program = timing.compile_program(piece.function, *piece.arguments)
            call = partial(program.call, *piece.arguments)
            jax.block_until_ready(call())
        except Exception as error:
            report.fail(error, suite="moe", shape=shape.name, part=piece.name)
            continue
        windows[piece.name], flops[piece.name] = timing.window_of(call), piece.flops
    for name, times in timing.measure(windows, options.budget).items():
        report.profile.append(profile_row(shape, load, name, times, flops[name]))
    progress(f"{shape.name} {load}: {len(found)} pieces")


def profile_row(
    shape: LayerShape, load: str, piece: str, times: timing.Times, flops: float
) -> dict[str, Any]:
    """One row of the key ``profile``; ``flops_per_s`` is None for a piece without products."""
    return {
        "shape": {"name": shape.name, **shape.sizes},
        "load": load,
        "piece": piece,
        "ms": times.to_dict(),
        "flops_per_s": flops / (times.median / 1e3) if flops else None,
    }


def routers(shape: LayerShape, x) -> Iterator[Piece]:
    """Scores, choice, gates, auxiliary losses and statistics of two routers."""
    kernel = Normals(1, "float32")(shape.D, shape.E, fan_in=shape.D)
    inputs = RouterInputs(x[None], jnp.ones((1, shape.T), bool))
    for name in ROUTERS:
        kind = REGISTRY[name]
        options = kind.Options(normalize_gates=shape.K > 1)
        router = kind(options, shape.E, shape.K)
        variables = {"params": {"kernel": kernel}, "router_state": {"bias": jnp.zeros(shape.E)}}
        flops = options.counts(shape.D, shape.E, shape.K).flops_per_token * shape.T
        yield Piece(f"router {name}", router.apply, (variables, inputs), flops)


def movements(shape: LayerShape, x, expert, gate) -> Iterator[Piece]:
    """Sorting the assignments, gathering their tokens' rows, and summing the outputs of a token."""
    top_k = shape.K
    plan = jax.jit(sort_assignments, static_argnums=1)(expert, shape.E)
    rows = Normals(2, x.dtype)(shape.T * top_k, shape.D)
    gather = lambda x, plan: x[plan.order // top_k]

    def combine(rows, plan: SortedAssignments, gate):
        return jnp.einsum("tkd,tk->td", rows[plan.row], gate.astype(rows.dtype))

    yield Piece("sort", lambda expert: sort_assignments(expert, shape.E), (expert,))
    yield Piece("gather rows", gather, (x, plan))
    yield Piece("combine", combine, (rows, plan, gate))


def products(shape: LayerShape, weights: ExpertWeights, dtype) -> Iterator[Piece]:
    """The activation and the six products, each expert over the mean load, rounded up."""
    count, width, hidden = shape.E, shape.D, shape.F
    slots = math.ceil(shape.mean_load)
    normal = Normals(3, dtype)
    rows, both, act, out = (
        normal(count, slots, size) for size in (width, 2 * hidden, hidden, width)
    )
    up = weights.gate_up.reshape(count, width, 2 * hidden)
    down, flops = weights.down, 2.0 * count * slots * width * hidden
    product = lambda spec: lambda a, b: jnp.einsum(spec, a, b)
    # float32 sums, as the dispatchers keep them.
    weight_gradient = lambda a, b: jnp.einsum(
        "ecd,ecf->edf", a, b, preferred_element_type=jnp.float32
    )
    activate = lambda both: swiglu(both.reshape(count, slots, 2, hidden))
    yield Piece("gate-up product", product("ecd,edf->ecf"), (rows, up), 2 * flops)
    yield Piece("activation", activate, (both,))
    yield Piece("down product", product("ecf,efd->ecd"), (act, down), flops)
    yield Piece("down, input gradient", product("ecd,efd->ecf"), (out, down), flops)
    yield Piece("down, weight gradient", weight_gradient, (act, out), flops)
    yield Piece("gate-up, input gradient", product("ecf,edf->ecd"), (both, up), 2 * flops)
    yield Piece("gate-up, weight gradient", weight_gradient, (rows, both), 2 * flops)


def grouped_products(
    shape: LayerShape, weights: ExpertWeights, x, expert, interpret: bool = False
) -> Iterator[Piece]:
    """The six grouped products, each by the back end that the table names for it.

    Args:
      shape: the layer.
      weights: the experts.
      x: tokens (T, D), which stand for the outputs' gradient too.
      expert: chosen experts (T, K).
      interpret: interprets the kernels, on any platform.

    Raises:
      ConfigError: nothing can compute them here.
    """
    chosen = choose_products(shape, x.dtype.name, interpret=interpret)
    backends = {name: product["backend"] for name, product in chosen.describe().items()}
    plan = jax.jit(sort_assignments, static_argnums=1)(expert, shape.E)
    token, sizes = plan.order // shape.K, plan.counts
    up = weights.gate_up.reshape(shape.E, shape.D, 2 * shape.F)
    both = Normals(4, x.dtype)(shape.T * shape.K, 2 * shape.F)
    hidden, flops = both[:, : shape.F], layer_flops(shape, "forward") / 3

    def piece(name: str, leg: str, function, *arguments):
        title = f"{name.replace('_', '-')}, {leg.replace('_', ' ')}, {backends[f'{name}.{leg}']}"
        return Piece(title, function, arguments, flops * (2 if name == "gate_up" else 1))

    forward, back, outer = chosen.forward, chosen.input_gradient, chosen.weight_gradient
    yield piece("gate_up", "forward", partial(forward, "gate_up"), x, up, sizes, token)
    yield piece("down", "forward", partial(forward, "down"), hidden, weights.down, sizes)
    yield piece("down", "input_gradient", partial(back, "down"), x, weights.down, sizes, token)
    yield piece("gate_up", "input_gradient", partial(back, "gate_up"), both, up, sizes)
    weight = lambda name: lambda a, b, sizes, *sources: outer(name, a, b, sizes, sources, a.dtype)
    yield piece("gate_up", "weight_gradient", weight("gate_up"), x, both, sizes, token, None)
    yield piece("down", "weight_gradient", weight("down"), hidden, x, sizes, None, token)
