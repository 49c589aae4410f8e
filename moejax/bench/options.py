"""The flags of ``moejax bench``, checked before anything is measured or written."""

import argparse
import dataclasses
import importlib.util
import pathlib

from moejax.bench.loads import LOADS
from moejax.bench.shapes import MODEL_PASSES, PASSES
from moejax.bench.timing import Budget
from moejax.config import ConfigError, UserError, nearest
from moejax.output_folder import check_output_folder

SUITES = ("moe", "model", "generate", "routers", "agreement", "attention", "ceilings")
# What these measure does not depend on how tokens fall on experts, or fixes it.
WITHOUT_LOADS = ("generate", "routers", "attention", "ceilings")
DISPATCHERS = ("dense_loop", "capacity", "blocks", "grouped")
PEERS = ("transformers",)
SUITE_PASSES = {"moe": PASSES, "model": MODEL_PASSES}
DTYPES = ("float32", "bfloat16")
# Loads of whole models: a fresh softmax router's, and what routers for measuring are told.
UNTRAINED = "untrained"
MODEL_LOADS = (UNTRAINED, *LOADS, "recorded")
DEFAULT_MODEL_LOADS = (UNTRAINED, "balanced", "skewed")
RESULTS, TABLE = "results.json", "README.md"


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
      suite: one of ``SUITES``.
      shapes: names of shapes, or shapes spelled out; empty for the platform's own.
      loads: how the tokens fall on the experts: ``LOADS``, for models ``MODEL_LOADS``.
      trace: file with loads to replay, for the load ``recorded``.
      dispatch: dispatchers; empty for all that can run here (suite model: ``auto``).
      routers: routers, for the suite of that name; empty for all of them.
      passes: what to time, of ``SUITE_PASSES``; empty for all of the suite's.
      dtype: compute type; empty for the platform's own.
      budget: how long to measure each candidate.
      seed: of tokens, weights and routing.
      profile: also time the parts of a layer, and write a profiler trace.
      against: a peer to compare with; empty for none.
      tune: write the table of kernels, and measure nothing else.
      output: folder for the results; None writes nothing.
    """

    suite: str = "moe"
    shapes: tuple[str, ...] = ()
    loads: tuple[str, ...] = LOADS
    trace: str = ""
    dispatch: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    dtype: str = ""
    budget: Budget = Budget()
    seed: int = 0
    profile: bool = False
    against: str = ""
    tune: bool = False
    output: pathlib.Path | None = None


def from_arguments(arguments: argparse.Namespace) -> BenchOptions:
    """Options from the command line.

    Raises:
      UserError: an unknown name, with the nearest known one, or a value that cannot be.
    """
    _known("--suite", arguments.suite, SUITES)
    layers = arguments.suite in ("moe", "agreement")
    dispatchers = layer_dispatchers() if layers else (*DISPATCHERS, "auto")
    loads = _names("--loads", arguments.loads, LOADS if layers else MODEL_LOADS)
    options = BenchOptions(
        suite=arguments.suite,
        shapes=_names("--shapes", arguments.shapes, None),
        loads=loads or (LOADS if layers else DEFAULT_MODEL_LOADS),
        trace=arguments.trace or "",
        dispatch=_names("--dispatch", arguments.dispatch, dispatchers),
        routers=_routers(arguments),
        passes=_passes(arguments),
        dtype=_known("--dtype", arguments.dtype, DTYPES) if arguments.dtype else "",
        budget=_budget(arguments),
        seed=arguments.seed,
        profile=arguments.profile,
        against=_known("--against", arguments.against, PEERS) if arguments.against else "",
        tune=arguments.tune,
        output=_output(arguments.output) if arguments.output else None,
    )
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed = {options.seed}: must be from 0 to below 2**32")
    if ("recorded" in options.loads) != bool(options.trace):
        raise UserError(
            f"--trace = {options.trace!r}: goes with --suite=model --loads=recorded; give both"
        )
    for flag in ("loads", "dispatch"):
        if getattr(arguments, flag) and options.suite in WITHOUT_LOADS:
            raise UserError(f"--{flag}: --suite={options.suite} has none; leave the flag out")
    if options.suite == "agreement" and arguments.loads:
        raise UserError("--loads: --suite=agreement takes all of them; leave the flag out")
    if options.tune and (options.suite != "moe" or options.profile or options.against):
        raise UserError("--tune: goes with --shapes, --dtype and --output only; run it by itself")
    if options.profile and options.suite != "moe":
        raise UserError(f"--profile: takes --suite=moe apart; --suite={options.suite} has no parts")
    if options.against and options.suite not in ("moe", "model", "generate"):
        raise UserError(
            f"--against = {options.against!r}: goes with --suite=moe, model or generate"
        )
    if options.against:
        check_peer_installed()
    return options


def layer_dispatchers() -> tuple[str, ...]:
    """The dispatchers of a layer, and those with one grouped back end for all products."""
    from moejax.moe.grouped_matmul import BACKENDS

    return (*DISPATCHERS, *(f"grouped:{name}" for name in BACKENDS))


def _routers(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Routers by name, or by the path of a user's own class.

    Raises:
      UserError: no such router, or another suite than that of the routers.
    """
    from moejax.moe.routers import find

    names = _names("--routers", arguments.routers, None)
    if names and arguments.suite != "routers":
        raise UserError("--routers: goes with --suite=routers")
    for name in names:
        try:
            find(name)
        except ConfigError as error:
            raise UserError(f"--routers = {name!r}: {error.remedy}") from error
    return names


def _passes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Passes by name.

    Raises:
      UserError: a suite that has no passes to choose from, or not this one.
    """
    if arguments.passes and arguments.suite not in SUITE_PASSES:
        raise UserError(f"--passes: --suite={arguments.suite} times all of its own; leave it out")
    return _names("--passes", arguments.passes, SUITE_PASSES.get(arguments.suite))


def check_peer_installed() -> None:
    """Raises UserError where Transformers or PyTorch is missing."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--against = 'transformers': the package {package} is not installed; "
                "install the extra: pip install 'moejax[parity]'"
            )


def _known(flag: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise UserError(f"{flag} = {name!r}: unknown; {nearest(name, known)}")
    return name


def _names(flag: str, text: str | None, known: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names between commas, each once, in their order; checked where all of them are known."""
    if text is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise UserError(f"{flag} = {text!r}: has an empty name; write NAME,NAME")
    return tuple(_known(flag, name, known) for name in names) if known else names


def _budget(arguments: argparse.Namespace) -> Budget:
    seconds, rounds = arguments.seconds, arguments.repeats
    if seconds is not None and not 0 < seconds < 3600:
        raise UserError(f"--seconds = {seconds}: must be above 0 and below 3600")
    if rounds is not None and not 0 < rounds <= 10_000:
        raise UserError(f"--repeats = {rounds}: must be from 1 to 10000")
    if seconds is not None and rounds is not None:
        raise UserError(f"--repeats = {rounds}: goes by rounds, --seconds by time; give one")
    return Budget(Budget.seconds if seconds is None else seconds, rounds or 0)


def _output(folder: str) -> pathlib.Path:
    return check_output_folder(folder, RESULTS, f"--output = {folder!r}")
