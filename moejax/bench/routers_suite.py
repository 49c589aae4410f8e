"""Every router's speed, forward and backward, beside the experts that it routes to.

A router is measured by itself: scores, choice, gates, losses, statistics and all their gradients.
What it costs is told as a share of the expert block's time at the same shape, in the same run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.bench import moe_suite, timing
from moejax.bench.arrays import Normals
from moejax.bench.loads import draw_routing
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report, progress, row
from moejax.bench.shapes import LayerShape, layer_flops
from moejax.config import ConfigError, UserError
from moejax.moe.choose import choose
from moejax.moe.dispatch import dispatch
from moejax.moe.experts import ExpertWeights
from moejax.moe.routers import REGISTRY, ExpertProbe, Router, RouterInputs, RouterOptions, find

SHAPES = ("T8192-D1024-F512-E64-K8", "T8192-D1024-F512-E256-K8")

# Rounds of the expert block, which takes seconds on a CPU, unless --repeats says otherwise.
EXPERT_ROUNDS = 3

# What a token-choice router that scores by one matrix may cost, as a share of the expert block.
BAR = 0.05

NOTES = (
    "forward and backward of the router alone, in training: scores, choice, gates, losses, "
    "statistics; of experts: its median over that of the expert block",
    f"the bar is {BAR:.0%}, for routers that choose for each token by one matrix and do not look "
    "into the experts",
)


@dataclasses.dataclass
class Candidate:
    """A router to measure.

    Attributes:
      name: its name.
      router: the router, with the experts a token that it can have.
      needs: what it is run with beside the shape, for people.
      barred: whether the bar holds for it; known once it is traced.
    """

    name: str
    router: Router
    needs: list[str]
    barred: bool = True

    @property
    def options(self) -> RouterOptions:
        return self.router.options


def run(options: BenchOptions, shapes: list[LayerShape], report: Report) -> None:
    """Measures every router, and the expert block, at every shape into the report.

    Args:
      options: what to measure; ``routers`` names the routers, or is empty for all of them.
      shapes: the layers.
      report: what is measured.

    Raises:
      UserError: a router that was asked for cannot run at one of the shapes.
    """
    found = {shape.name: candidates(options, shape, report) for shape in shapes}
    for shape in shapes:
        _bench_shape(options, shape, found[shape.name], report)
    for note in NOTES:
        report.note(note)


def candidates(options: BenchOptions, shape: LayerShape, report: Report) -> list[Candidate]:
    """The routers to measure at a shape; what is left out of all of them is noted.

    Raises:
      UserError: one that was asked for cannot run.
    """
    kept = []
    for name in options.routers or REGISTRY:
        try:
            kept.append(candidate(name, shape))
        except ConfigError as error:
            if options.routers:
                raise UserError(f"--routers = {name!r}: {error}") from error
            report.note(f"{name} is left out: {error}")
    return kept


def candidate(name: str, shape: LayerShape) -> Candidate:
    """A router of a name with its default options, changed where the shape does not allow them.

    Raises:
      ConfigError: the shape allows it with no number of experts a token.
    """
    kind, needs = find(name), []
    options = kind.Options(name=name)
    for changed in _renormalised_or_not(options):
        for top_k in dict.fromkeys((shape.K, min(2, shape.K), 1)):
            try:
                changed.check(shape.E, top_k)
            except ConfigError as error:
                refused = error
                continue
            if top_k != shape.K:
                needs.append(f"K {top_k}")
            if changed != options:
                needs.append("gates as they are")
            if changed.needs_gate_rank:
                needs.append(f"gate_rank {gate_rank(shape)}")
            if changed.leaks:
                needs.append("leaks")
            return Candidate(name, kind(changed, shape.E, top_k), needs)
    raise refused


def _renormalised_or_not(options: RouterOptions) -> list[RouterOptions]:
    """The options, and without renormalised gates where they have them: for one expert a token."""
    if not getattr(options, "normalize_gates", False):
        return [options]
    return [options, dataclasses.replace(options, normalize_gates=False)]


def gate_rank(shape: LayerShape) -> int:
    """Rank of the experts' gate projection, for routers that look at it."""
    return max(1, shape.F // 4)


def _bench_shape(
    options: BenchOptions, shape: LayerShape, found: list[Candidate], report: Report
) -> None:
    arrays = moe_suite.layer_arrays(dataclasses.replace(shape, K=1), options.dtype, options.seed)
    describe = {
        "suite": "routers", "shape": {"name": shape.name, **shape.sizes}, "load": "balanced",
        "passes": "forward_backward", "dtype": options.dtype,
    }  # fmt: skip
    experts = _bench_experts(options, shape, arrays, describe, report)
    windows, programs = {}, {}
    for one in found:
        try:
            program, arguments = _program(one, shape, arrays)
            call = functools.partial(program.call, *arguments)
            jax.block_until_ready(call())
        except Exception as error:
            report.fail(error, suite="routers", shape=shape.name, router=one.name)
            continue
        windows[one.name], programs[one.name] = timing.window_of(call), program
    times = timing.measure(windows, options.budget)
    for one in found:
        if one.name not in times:
            continue
        measured = times[one.name]
        share = measured.median / experts.median if experts else None
        counts = one.options.counts(shape.D, shape.E, one.router.top_k)
        report.results.append(
            row(
                **describe, dispatch=one.name, times=measured, program=programs[one.name],
                flops=3 * counts.flops_per_token * shape.T, in_turns=False,
                top_k=one.router.top_k, needs=one.needs, share_of_experts=share,
                within_bar=share <= BAR if one.barred and share is not None else None,
            )
        )  # fmt: skip
        told = "" if share is None else f", {share:.1%} of the experts"
        progress(f"{shape.name} router {one.name}: {measured.median:.3g} ms{told}")


def _bench_experts(
    options: BenchOptions, shape: LayerShape, arrays: dict[str, Any], describe, report: Report
) -> timing.Times | None:
    """Times the expert block under balanced loads; None where it cannot run."""
    choice = choose(moe_suite.moe_config(shape), platform=jax.default_backend(), expert_devices=1)
    name = choice.dispatch
    report.auto[shape.name] = {"dispatch": name, "reason": choice.dispatch_reason}
    layer = lambda x, gate, weights, expert: moe_suite.moe_layer(
        name, shape, x, expert, gate, weights
    )
    drawn = draw_routing("balanced", shape.T, shape.E, shape.K, options.seed)
    expert, gate = map(jnp.asarray, drawn)
    arguments = (arrays["cotangent"], arrays["x"], gate, arrays["moe"], expert)
    try:
        function = moe_suite.with_pass(layer, "forward_backward", 3)
        program = timing.compile_program(function, *arguments)
        window = timing.window_of(functools.partial(program.call, *arguments))
        budget = timing.Budget(rounds=options.budget.rounds or EXPERT_ROUNDS)
        (times,) = timing.measure({name: window}, budget).values()
    except Exception as error:
        report.fail(error, suite="routers", shape=shape.name, router="the expert block")
        return None
    report.results.append(
        row(
            **describe, dispatch=f"experts ({name})", times=times, program=program,
            flops=layer_flops(shape, "forward_backward"), in_turns=False, top_k=shape.K, needs=[],
            share_of_experts=1.0, within_bar=None,
        )
    )  # fmt: skip
    progress(f"{shape.name} experts ({name}): {times.median:.3g} ms")
    return times


def _program(
    one: Candidate, shape: LayerShape, arrays: dict[str, Any]
) -> tuple[timing.Program, tuple]:
    """The compiled router with its gradients, and its arguments."""
    router, rows = one.router, shape.T // shape.sequence
    normal = Normals(1, "float32")
    grid = jnp.arange(shape.T, dtype=jnp.int32).reshape(rows, -1)
    x = arrays["x"].reshape(rows, -1, shape.D)
    logits = None
    if one.options.carries_logits:
        logits = normal(*grid.shape, one.options.num_choices(shape.E))
    inputs = RouterInputs(
        x, jnp.ones(grid.shape, bool), grid * 7919 % 50_000, grid % grid.shape[1],
        jnp.ones_like(grid), logits, jnp.zeros((), jnp.int32), train=True,
    )  # fmt: skip
    low_rank = None
    if one.options.needs_gate_rank:
        low_rank = normal(shape.E, shape.D, gate_rank(shape), fan_in=shape.D)
    decide = _decision(router, used := set())
    variables = draw_variables(router, inputs, arrays["moe"], low_rank)
    params, state = variables.pop("params", {}), variables
    key = jax.random.key(0)
    shapes = jax.eval_shape(decide, params, x, inputs, state, arrays["moe"], low_rank, key)[0]
    cotangents = [normal(*leaf.shape).astype(leaf.dtype) for leaf in shapes]
    one.barred = not one.options.leaks and not used and _matrices(params) == 1
    if used:
        one.needs.append("runs experts" if "run" in used else "reads experts")

    def function(params, x, cotangents, *rest):
        run = lambda params, x: decide(params, x, *rest)
        outputs, back, aux = jax.vjp(run, params, x, has_aux=True)
        return outputs, aux, back(cotangents)

    arguments = (params, x, cotangents, inputs, state, arrays["moe"], low_rank, key)
    return timing.compile_program(function, *arguments), arguments


class _Probe:
    """An ``ExpertProbe`` that notes in ``used`` what is looked at."""

    def __init__(self, used: set[str], weights: ExpertWeights, low_rank: Array | None):
        run = lambda rows, expert, gate: dispatch(
            "blocks", rows.reshape(-1, rows.shape[-1]), expert, gate, weights, slots=0
        ).reshape(rows.shape)
        self._used, self._probe = used, ExpertProbe(weights, low_rank, run)

    def __getattr__(self, name: str) -> Any:
        self._used.add(name)
        return getattr(self._probe, name)


def _decision(router: Router, used: set[str]) -> Callable:
    """A router as a function: what is differentiable of its decision, and the rest of it."""

    def decide(params, x, inputs, state, weights, low_rank, key):
        inputs = inputs.replace(x=x, experts=_Probe(used, weights, low_rank))
        routing = router.apply({"params": params, **state}, inputs, rngs={"router": key})
        leaves = jax.tree.leaves((routing.gate, routing.rows, routing.bypass))
        real = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return [*real, routing.aux_loss], (routing.expert, routing.rows, routing.stats)

    return decide


def draw_variables(
    router: Router, inputs: RouterInputs, weights: ExpertWeights, low_rank: Array | None
) -> dict[str, Any]:
    """Random parameters, drawn in NumPy, and an empty state."""
    inputs = inputs.replace(experts=_Probe(set(), weights, low_rank))
    keys = {"params": jax.random.key(0), "router": jax.random.key(1)}
    shapes = nn.meta.unbox(dict(jax.eval_shape(lambda: router.init(keys, inputs))))
    normal = Normals(2, "float32")
    draw = lambda leaf: normal(*leaf.shape, fan_in=max(1, math.prod(leaf.shape[:-1])))
    empty = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    return {
        name: jax.tree.map(draw if name == "params" else empty, tree)
        for name, tree in shapes.items()
    }


def _matrices(params: Any) -> int:
    """How many of the parameters are matrices of two sizes above one."""
    return sum(leaf.ndim == 2 and min(leaf.shape) > 1 for leaf in jax.tree.leaves(params))
