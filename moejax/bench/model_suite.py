"""A whole model's step: MoE under several loads, dense of equal active FLOPs, and a peer."""

import contextlib
import dataclasses
import functools
import gc
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping

import jax

from moejax.bench import machine, timing
from moejax.bench.loads import expert_counts
from moejax.bench.models import ModelShape, describe
from moejax.bench.options import UNTRAINED, BenchOptions
from moejax.bench.peer import PeerProcess
from moejax.bench.report import Report, progress, row
from moejax.bench.shapes import MODEL_PASSES
from moejax.bench.training_step import OPTIM, TrainingStep, draw_params
from moejax.config import ConfigError
from moejax.cost.hardware import cpu_cores
from moejax.models import ModelConfig
from moejax.moe.choose import choose
from moejax.moe.routers import (
    ForceBalancedOptions,
    RouterOptions,
    SoftmaxTopKOptions,
    TraceOptions,
)

PEER = ("transformers", UNTRAINED)

STATED = {
    UNTRAINED: "the load of a softmax router with fresh weights",
    "balanced": "router force_balanced",
    "skewed": "router trace with a fullest expert of 4 times the mean, the others falling off "
    "geometrically",
    "worst": "router trace with all tokens to one expert",
    "recorded": "router trace with the loads of --trace",
}

Key = tuple[str, str | None]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One candidate in one pass.

    Attributes:
      times: its times.
      max_over_mean: load of the fullest expert over the mean; None for a dense model.
      program: what was run; None for the peer.
      peak_bytes: most memory that the process had in use so far; None where the device does not
        tell.
    """

    times: timing.Times
    max_over_mean: float | None
    program: timing.Program | None = None
    peak_bytes: int | None = None


def run(options: BenchOptions, shapes: list[ModelShape], report: Report) -> None:
    """Measures every model into the report.

    On a CPU all candidates are measured in turns, step by step. Elsewhere each is measured by
    itself, one after another, since the memory of a card may not hold two; ``interleaved`` in a
    row says which.

    Raises:
      ConfigError: a dispatcher that was asked for cannot run here.
      UserError: the peer cannot be imported.
      PeerFailed: the peer broke down.
    """
    report.extra["peak_flops"], report.extra["peak_source"] = machine.peak(1)
    if not report.extra["peak_flops"]:
        report.note(f"there is no MFU: {report.extra['peak_source']}")
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            variants = _variants(options, shape, pathlib.Path(folder), report)
            in_turns = jax.default_backend() == "cpu"
            bench = bench_in_turns if in_turns else bench_one_by_one
            measured = bench(options, shape, variants, report)
        for passes in _passes(options):
            _add_rows(options, shape, variants, passes, measured[passes], in_turns, report)
    for load in options.loads:
        report.note(f"load {load}: {STATED[load]}")
    for shape in shapes:
        if shape.moments_dtype != "float32":
            report.note(f"{shape.name}: AdamW keeps its moments in {shape.moments_dtype}")
    report.note("dense is the same model with SwiGLU layers of width K x F: equal active FLOPs")


def _variants(
    options: BenchOptions, shape: ModelShape, folder: pathlib.Path, report: Report
) -> dict[Key, ModelConfig]:
    """Configs by (dispatcher, load), the dense model first; ``auto`` is resolved."""
    variants: dict[Key, ModelConfig] = {("dense", None): shape.dense_config(options.dtype)}
    for asked in options.dispatch or ("auto",):
        for load in options.loads:
            router = make_router(options, shape, load, folder)
            config = shape.config(options.dtype, asked, router)
            choice = choose(config.moe, platform=jax.default_backend(), expert_devices=1)
            variants[choice.dispatch, load] = config
            if asked == "auto":
                picked = {"dispatch": choice.dispatch, "reason": choice.dispatch_reason}
                report.auto[shape.name] = picked
    return variants


def make_router(
    options: BenchOptions, shape: ModelShape, load: str, folder: pathlib.Path
) -> RouterOptions:
    """The router that makes a load; the loads that ``trace`` replays are written to the folder."""
    if load == UNTRAINED:
        # OLMoE's, without the z-loss, which the peer does not have.
        return SoftmaxTopKOptions(z_loss_weight=0.0)
    if load == "balanced":
        return ForceBalancedOptions()
    if load == "recorded":
        return TraceOptions(path=options.trace)
    counts = expert_counts(load, shape.tokens, shape.E, shape.K)
    path = folder / f"{load}.json"
    path.write_text(json.dumps((counts / counts.sum()).tolist()))
    return TraceOptions(path=str(path))


@contextlib.contextmanager
def _peer(options: BenchOptions, shape: ModelShape, report: Report) -> Iterator[PeerProcess | None]:
    """The peer's process, if one was asked for, its description already in the report."""
    if not options.against:
        yield None
        return
    settings = {
        "sizes": {axis: value for axis, value in shape.sizes.items() if axis != "T"},
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "dtype": options.dtype,
        "threads": cpu_cores(),
        "seed": options.seed,
    }
    with PeerProcess(settings) as peer:
        said = peer.description
        progress(f"{shape.name}: {PEER[0]} {said['versions']['transformers']} is ready")
        moe = shape.config(options.dtype, "auto", SoftmaxTopKOptions())
        ours = describe(moe, shape.S)["params"]
        rest = said["params"] - said["query_key_norms"] - ours
        report.extra.setdefault("peers", {})[shape.name] = {
            **said, "params_here": ours, "params_unexplained": rest,
        }  # fmt: skip
        if rest:
            raise ConfigError(
                "--against", options.against,
                f"its model has {rest} parameters more than this one, query and key norms aside, "
                "so the two cannot be compared; choose another shape",
            )  # fmt: skip
        report.note(
            f"{PEER[0]} runs OlmoeForCausalLM with {said['experts_implementation']} experts and "
            f"{said['dtype']} weights; it also normalises queries and keys "
            f"({said['query_key_norms']} parameters more), and its load is its own untrained "
            "router's; here attention is masked by document, there causal only"
        )
        yield peer


def _passes(options: BenchOptions) -> tuple[str, ...]:
    return options.passes or MODEL_PASSES


def _compile(
    options: BenchOptions, shape: ModelShape, variants: Mapping[Key, ModelConfig], report: Report
) -> dict[Key, TrainingStep]:
    """Every variant's programs, compiled side by side; one that fails is recorded as such."""

    optim = dataclasses.replace(OPTIM, moments_dtype=shape.moments_dtype)

    def build(config: ModelConfig) -> TrainingStep:
        step = TrainingStep(config, shape.B, shape.S, options.seed, optim)
        for passes in _passes(options):
            step.compile(passes)
        return step

    built = timing.compile_side_by_side(
        {key: functools.partial(build, config) for key, config in variants.items()}
    )
    for key, step in built.items():
        if isinstance(step, Exception):
            _fail(report, step, shape, key)
    return {key: step for key, step in built.items() if isinstance(step, TrainingStep)}


def _fail(report: Report, error: Exception, shape: ModelShape, key: Key) -> None:
    what = {"shape": shape.name, "load": key[1], "dispatch": key[0]}
    report.fail(error, suite="model", **what)


def bench_in_turns(
    options: BenchOptions, shape: ModelShape, variants: Mapping[Key, ModelConfig], report: Report
) -> dict[str, dict[Key, Measured]]:
    """Times by pass and candidate; a round is one step of each."""
    measured: dict[str, dict[Key, Measured]] = {}
    steps = _compile(options, shape, variants, report)
    for key, step in steps.items():
        step.place(draw_params(variants[key], options.seed))
    with _peer(options, shape, report) as peer:
        for passes in _passes(options):
            windows = {key: step.window(passes) for key, step in steps.items()}
            if peer:
                windows[PEER] = peer.window(passes)
            times = timing.measure(windows, options.budget)
            measured[passes] = {
                key: _measured(times[key], step, passes) for key, step in steps.items()
            }
            if peer:
                fullest = peer.description["max_over_mean"]
                measured[passes][PEER] = Measured(times[PEER], fullest)
            shown = ", ".join(f"{key[0]} {key[1] or ''} {t.median:.4g}" for key, t in times.items())
            progress(f"{shape.name} {passes} ms: {shown}")
    return measured


def bench_one_by_one(
    options: BenchOptions, shape: ModelShape, variants: Mapping[Key, ModelConfig], report: Report
) -> dict[str, dict[Key, Measured]]:
    """As ``bench_in_turns``, with one candidate's state in memory at a time; the peer first.

    A candidate that fails, for want of memory say, is recorded as such.
    """
    measured: dict[str, dict[Key, Measured]] = {passes: {} for passes in _passes(options)}
    with _peer(options, shape, report) as peer:
        for passes in _passes(options) if peer else ():
            times = timing.measure({PEER: peer.window(passes)}, options.budget)[PEER]
            measured[passes][PEER] = Measured(times, peer.description["max_over_mean"])
            progress(f"{shape.name} {PEER[0]} {passes}: {times.median:.4g} ms")
    steps = _compile(options, shape, variants, report)
    while steps:
        key, step = next(iter(steps.items()))
        try:
            step.place(draw_params(step.config, options.seed))
            for passes in _passes(options):
                times = timing.measure({key: step.window(passes)}, options.budget)[key]
                measured[passes][key] = _measured(times, step, passes)
                progress(
                    f"{shape.name} {' '.join(filter(None, key))} {passes}: {times.median:.4g} ms"
                )
        except Exception as error:
            _fail(report, error, shape, key)
        # This model's state has to be gone before the next one's is drawn.
        del steps[key], step
        gc.collect()
    return measured


def _measured(times: timing.Times, step: TrainingStep, passes: str) -> Measured:
    stats = jax.local_devices()[0].memory_stats() or {}
    return Measured(
        times, step.max_over_mean(), step.programs[passes], stats.get("peak_bytes_in_use")
    )


def _add_rows(
    options: BenchOptions,
    shape: ModelShape,
    variants: Mapping[Key, ModelConfig],
    passes: str,
    measured: Mapping[Key, Measured],
    in_turns: bool,
    report: Report,
) -> None:
    """Rows of ``results``: the shared keys, then those of a model."""
    moe = shape.config(options.dtype, "auto", SoftmaxTopKOptions())
    dense, peer = measured.get(("dense", None)), measured.get(PEER)
    for (dispatch, load), one in measured.items():
        facts = describe(variants.get((dispatch, load), moe), shape.S)
        flops = facts["train_flops_per_token"] * shape.tokens
        seconds, peak = one.times.median / 1e3, report.extra["peak_flops"]
        report.results.append(
            row(
                suite="model", shape={"name": shape.name, **shape.sizes}, load=load,
                dispatch=dispatch, passes=passes, dtype=options.dtype, times=one.times,
                flops=flops, dense=dense.times if dense else None, program=one.program,
                in_turns=in_turns, max_over_mean=one.max_over_mean,
                tokens_per_s=shape.tokens / seconds,
                mfu=flops / seconds / peak if peak else None,
                program_bytes=one.program.total_bytes if one.program else None,
                peak_bytes_in_use=one.peak_bytes,
                times_faster_than_peer=peer.times.median / one.times.median if peer else None,
                **facts,
            )
        )  # fmt: skip
