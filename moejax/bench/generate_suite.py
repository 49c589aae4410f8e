"""Decoding: prompts and tokens a second by batch, a pass over the whole row instead, and a peer."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.bench import timing
from moejax.bench.models import ModelShape, find_model
from moejax.bench.options import UNTRAINED, BenchOptions
from moejax.bench.peer import PeerProcess
from moejax.bench.report import Report, progress, row
from moejax.bench.training_step import draw_params
from moejax.cost import flops
from moejax.cost.hardware import cpu_cores
from moejax.models import ModelConfig, Transformer
from moejax.models.decode import Rules, SamplingConfig, State, advance, begin
from moejax.models.unstacked import unstack
from moejax.moe.choose import choose
from moejax.moe.routers import SoftmaxTopKOptions

# B is the largest batch, S the length of a row at the end.
SHAPES = {
    shape.name: shape
    for shape in (
        #           name               D   L  H   E  K   F    V     B    S
        ModelShape("olmoe_tiny_rows", 256, 8, 4, 32, 4, 128, 4096, 32, 512),
        ModelShape(
            "olmoe_150m_rows", 768, 12, 12, 64, 8, 384, 50304, 64, 1024, needs_gpu=True
        ),
    )
}  # fmt: skip
PEER_SCRIPT = pathlib.Path(__file__).with_name("peer_generate.py")
# A row is one part prompt and the rest completion; beside the peer, the completion is as long.
PROMPT_PARTS = 8
# Lengths of a pass over the whole row are rounded up to one of so many.
PASSES = 8


def find(name: str) -> ModelShape:
    """A shape of this suite by its name, or one that ``find_model`` knows.

    Raises:
      UserError: no such model.
    """
    return SHAPES.get(name) or find_model(name)


def config_of(shape: ModelShape, dtype: str, mtp_depth: int = 0) -> ModelConfig:
    """OLMoE, which normalises queries and keys, as the peer does."""
    router = SoftmaxTopKOptions(balance_loss_weight=0.01, z_loss_weight=0.0)
    config = shape.config(dtype, "auto", router)
    attention = dataclasses.replace(config.attention, qk_norm="all")
    return dataclasses.replace(config, attention=attention, mtp_depth=mtp_depth)


class Decoding:
    """A model's programs for a batch of random prompts, compiled from shapes.

    Attributes:
      config: the model.
      rows: prompts.
      width: tokens of a prompt.
      tokens: tokens of a completion.
    """

    def __init__(
        self, config: ModelConfig, variables: dict, rows: int, width: int, tokens: int, seed: int,
        speculate: int = 0,
    ):  # fmt: skip
        self.config, self.rows, self.width, self.tokens = config, rows, width, tokens
        prompts = draw_prompts(config, rows, width, seed)
        lengths = np.full(rows, width, np.int32)
        options = SamplingConfig(max_tokens=tokens, temperature=0.0)
        seeds = np.arange(rows, dtype=np.uint32)
        self.rules = jax.tree.map(jnp.asarray, Rules.of(options, config.vocab_size, (), seeds))
        how = dict(keep_experts=False, speculate=speculate)
        first = functools.partial(begin, config, max_tokens=tokens, **how)
        given = (variables, prompts, lengths, self.rules)
        self.prefill = timing.compile_program(first, *given)
        self._first = functools.partial(self.prefill.call, *given)
        self.state = self._first()
        further = functools.partial(advance, config, **how)
        self._layers = jax.jit(functools.partial(unstack, config))(variables)
        self._limit = jnp.int32(tokens)
        self.decode = timing.compile_program(
            further, self._layers, self.state, self.rules, self._limit
        )

    def _further(self, state: State) -> State:
        return self.decode.call(self._layers, state, self.rules, self._limit)

    def completed(self) -> State:
        """The rows at their end."""
        return self._further(self.state)

    def both(self) -> State:
        """Prompts and completions, all of it anew."""
        return self._further(self._first())

    @property
    def windows(self) -> dict[str, timing.Window]:
        """What can be timed, by pass."""
        return {
            "prefill": timing.window_of(self._first), "decode": timing.window_of(self.completed)
        }  # fmt: skip


def draw_prompts(config: ModelConfig, rows: int, width: int, seed: int) -> np.ndarray:
    """Random tokens (rows, width)."""
    draw = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, width))
    return draw.astype(np.int32)


def run(options: BenchOptions, shapes: list[ModelShape], report: Report) -> None:
    """Measures every model into the report.

    Raises:
      UserError: the peer cannot be imported.
      PeerFailed: the peer broke down.
    """
    for shape in shapes:
        config = config_of(shape, options.dtype)
        variables = {"params": draw_params(config, options.seed)}
        choice = choose(config.moe, platform=jax.default_backend(), expert_devices=1)
        report.auto[shape.name] = {
            "dispatch": choice.dispatch, "reason": choice.dispatch_reason
        }  # fmt: skip
        add = functools.partial(_add, options, shape, choice.dispatch, report)
        largest = _batches(options, shape, config, variables, add)
        _whole_rows(options, shape, config, variables, add, report)
        _against_peer(options, shape, largest, variables, add, report)
        _speculation(options, shape, add, report)
    report.note("greedy, from random prompts and fresh weights; compilation is in no time")


def _width(shape: ModelShape) -> int:
    """Tokens of a prompt."""
    return max(1, shape.S // PROMPT_PARTS)


def _add(options, shape, dispatch, report, passes, rows, tokens, times, used, **more) -> None:
    """A row of ``results``: ``tokens`` tokens of each of ``rows`` rows in a call."""
    seconds = times.median / 1e3
    report.results.append(
        row(
            suite="generate", shape={"name": shape.name, **shape.sizes}, load=UNTRAINED,
            dispatch=dispatch, passes=passes, dtype=options.dtype, times=times, flops=used,
            batch=rows, tokens_per_s=rows * tokens / seconds,
            **{
                "times_faster_than_recompute": None, "times_faster_than_peer": None,
                "accepted_share": None, **more,
            },
        )
    )  # fmt: skip
    progress(f"{shape.name} {passes} batch {rows}: {rows * tokens / seconds:,.0f} tokens/s")


def _useful(config: ModelConfig, rows: int, start: int, end: int) -> float:
    """FLOPs of ``rows`` rows' tokens from position ``start`` on."""
    mean = max(1, (start + end) // 2)
    return rows * (end - start) * flops.decode(config, mean)


def _batches(options, shape, config, variables, add) -> Decoding:
    """Prefill and decode by batch: one row, a quarter of all, and all, which is returned."""
    width = _width(shape)
    for rows in sorted({1, max(1, shape.B // 4), shape.B}):
        one = Decoding(config, variables, rows, width, width, options.seed)
        times = timing.measure(one.windows, options.budget)
        used = _useful(config, rows, 0, width)
        add("prefill", rows, width, times["prefill"], used, program=one.prefill)
        used = _useful(config, rows, width, 2 * width - 1)
        add("decode", rows, width - 1, times["decode"], used, program=one.decode)
    return one


def _whole_rows(options, shape, config, variables, add, report) -> None:
    """One row's completion by passes over the whole row, against the cache, in turns.

    The passes for the tokens of one length are equal, so each length's is timed once; a call's
    time is their sum.
    """
    width = _width(shape)
    tokens = shape.S - width
    size = max(1, shape.S // PASSES)
    # A token is made from all before it: from ``width`` to S - 1 of them.
    made = np.bincount([-(-n // size) for n in range(width, shape.S)])
    one = Decoding(config, variables, 1, width, tokens, options.seed)
    text = one.completed().tokens
    model, apart = Transformer(config), {}

    def likeliest(variables, row, at):
        hidden = model.apply(variables, row, method=Transformer.encode).hidden
        hidden = jax.lax.dynamic_slice_in_dim(hidden, at, 1, axis=1)
        return jnp.argmax(model.apply(variables, hidden, method=Transformer.logits), axis=-1)

    windows = {"decode": one.windows["decode"]}
    for number in np.flatnonzero(made).tolist():
        length = min(number * size, shape.S)
        program = timing.compile_program(likeliest, variables, text[:, :length], jnp.int32(0))
        apart[number] = program
        windows[f"{number}"] = timing.window_of(
            functools.partial(program.call, variables, text[:, :length], jnp.int32(length - 1))
        )
    every = jax.jit(
        lambda variables, rows: jnp.argmax(model.apply(variables, rows).logits, axis=-1)
    )
    best, tokens_made = np.asarray(every(variables, text))[0], np.asarray(text)[0]
    wrong = int(np.sum(best[width - 1 : -1] != tokens_made[width:]))
    if wrong:
        report.fail(
            ValueError(f"{wrong} of {tokens} tokens are not those of a whole pass"),
            suite="generate", shape=shape.name,
        )  # fmt: skip
    times = timing.measure(windows, options.budget)
    rounds = np.stack([np.array(times[f"{n}"].rounds) * made[n] for n in apart])
    whole = timing.Times(tuple(rounds.sum(axis=0).tolist()))
    used = _useful(config, 1, width, shape.S)
    # The first token is in the prefill: one token fewer than by whole passes.
    scale = timing.Times(tuple(t * tokens / (tokens - 1) for t in times["decode"].rounds))
    add("recompute", 1, tokens, whole, used)
    add("decode", 1, tokens, scale, used,
        times_faster_than_recompute=whole.ratio_by_round(scale))  # fmt: skip
    report.note(
        f"recompute: {tokens} tokens up to position {shape.S} by passes over the whole row, whose "
        f"length is rounded up to a multiple of {size}; the decode row beside it is by the "
        f"cache, and {tokens - wrong} of {tokens} tokens are the same"
    )


@contextlib.contextmanager
def _peer(options, shape, config, variables, rows, width, tokens) -> Iterator[Any]:
    """Transformers with the same weights, in a process of its own."""
    from moejax.interop import hf

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        hf.save(path, config, variables, family="olmoe", say=lambda line: None)
        settings = {
            "sizes": shape.sizes, "path": str(path), "tokens": tokens,
            "prompts": draw_prompts(config, rows, width, options.seed).tolist(),
            "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
            "dtype": options.dtype, "threads": cpu_cores(),
        }  # fmt: skip
        with PeerProcess(settings, (sys.executable, "-P", str(PEER_SCRIPT))) as peer:
            yield peer


def _against_peer(options, shape, one, variables, add, report) -> None:
    """All rows, prompt and completion, in turns with the peer."""
    if not options.against:
        return
    config, rows, width, tokens = one.config, one.rows, one.width, one.tokens
    with _peer(options, shape, config, variables, rows, width, tokens) as peer:
        said = dict(peer.description)
        theirs = np.array(said.pop("completion"))
        ours = np.asarray(one.both().tokens)[:, width:]
        said["equal_tokens"] = float(np.mean(theirs == ours))
        report.extra.setdefault("peers", {})[shape.name] = said
        windows = {"moejax": timing.window_of(one.both), "peer": peer.window("generate")}
        times = timing.measure(windows, options.budget)
    used = _useful(config, rows, 0, width + tokens)
    ratio = times["peer"].ratio_by_round(times["moejax"])
    add("generate", rows, tokens, times["moejax"], used, times_faster_than_peer=ratio)
    add("generate", rows, tokens, times["peer"], used, peer=options.against)
    report.results[-1]["dispatch"] = options.against
    report.note(
        f"{options.against} {said['versions']['transformers']}: OlmoeForCausalLM.generate, greedy, "
        f"with its KV cache, experts as {said['experts_implementation']}, the fastest of "
        f"{', '.join(said['tried_ms'])} here; {width} tokens of prompt and {tokens} more; the same "
        f"weights, {said['equal_tokens']:.1%} of the tokens equal"
    )


def _speculation(options, shape, add, report) -> None:
    """A step that drafts one token and verifies it, against a plain one."""
    width = tokens = _width(shape)
    config = config_of(shape, options.dtype, mtp_depth=1)
    variables = {"params": draw_params(config, options.seed)}
    build = functools.partial(Decoding, config, variables, 1, width, tokens, options.seed)
    plain, drafting = build(), build(speculate=1)
    windows = {"plain": plain.windows["decode"], "drafting": drafting.windows["decode"]}
    times = timing.measure(windows, options.budget)
    state = drafting.completed()
    drafted, accepted = int(state.drafted.sum()), int(state.accepted.sum())
    steps = max(drafted, 1)
    rounds = zip(times["drafting"].rounds, times["plain"].rounds, strict=True)
    cost = float(np.median([(a / steps) / (b / max(tokens - 1, 1)) for a, b in rounds]))
    used = _useful(config, 1, width, width + tokens)
    add("speculate", 1, tokens - 1, times["drafting"], used, accepted_share=accepted / steps,
        step_cost=cost)  # fmt: skip
    report.note(
        f"speculate: {accepted} of {drafted} drafts of an untrained MTP module accepted; a step "
        f"that drafts and verifies one token takes {cost:.2f} times as long as a plain one, so it "
        f"pays where more than {max(cost - 1, 0):.0%} are accepted"
    )
