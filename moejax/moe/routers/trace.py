"""A router for measuring speed under recorded loads, such as a trained router's."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import ConfigError, check, check_not_negative
from moejax.moe.routers.base import Card, RouterInputs, RouterOptions
from moejax.moe.routers.force_balanced import MeasuringRouter

# The measure of a run's metrics.jsonl that holds the loads (``moejax.moe.diagnostics``).
MEASURE = "router/load_by_layer"
# Recorded shares have four digits; so far above the largest possible share is still rounding.
ROUNDING = 0.02


@dataclasses.dataclass(frozen=True)
class TraceOptions(RouterOptions):
    """Options of the replaying router.

    Attributes:
      path: where the loads are: a run's ``metrics.jsonl``; or a ``.json`` or ``.npy`` file with the
        experts' shares, or counts, of one layer (E,) or of several (L, E). Read once a process.
      step: the step of ``metrics.jsonl`` to take; 0 is the last one with loads, which another run
        of the same config may find moved on if that file is still growing.
      layer: the only recorded layer (MoE layers, from 0) to replay, in every layer of this model;
        -1 replays all of them, layer by layer (see ``TraceRouter``).
    """

    name: str = "trace"
    path: str = ""
    step: int = 0
    layer: int = -1

    def __post_init__(self) -> None:
        check_not_negative("router", self, "step")
        check(self.layer >= -1, "router.layer", self.layer, "is no layer; count from 0, or set -1")

    def check(self, num_experts: int, top_k: int) -> None:
        self.shares(num_experts, top_k)

    def shares(self, num_experts: int, top_k: int) -> Float[np.ndarray, "L E"]:
        """The shares of all assignments to replay, one row a recorded layer; rows sum to 1.

        Raises:
          ConfigError: a file that cannot be read, or whose loads this model cannot have.
        """
        loads = read_loads(self.path, self.step)
        field, experts = "router.path", loads.shape[1]
        check(
            experts == num_experts, field, self.path,
            f"holds loads of {experts} experts, but moe.num_experts is {num_experts}; "
            "give loads of as many experts",
        )  # fmt: skip
        good = np.isfinite(loads).all() and loads.min() >= 0 and loads.sum(axis=1).min() > 0
        check(
            good, field, self.path,
            "has a load below zero or not finite, or a layer without any; give another record",
        )  # fmt: skip
        check(
            self.layer < len(loads), "router.layer", self.layer,
            f"is not among the {len(loads)} layers of {self.path}; count from 0",
        )  # fmt: skip
        shares = loads / loads.sum(axis=1, keepdims=True)
        limit = 1 / top_k
        check(
            shares.max() <= limit * (1 + ROUNDING), field, self.path,
            f"gives an expert {shares.max():.4f} of all assignments, but with moe.top_k = {top_k} "
            f"it can get {limit:.4f} at most, once a token; record with at least that top_k",
        )  # fmt: skip
        # What rounding put above the limit goes to the experts that have room.
        capped = np.minimum(shares, limit)
        room = limit - capped
        excess = 1 - capped.sum(axis=1, keepdims=True)
        shares = capped + excess * room / np.maximum(room.sum(axis=1, keepdims=True), 1e-30)
        return shares if self.layer < 0 else shares[self.layer : self.layer + 1]


class TraceRouter(MeasuringRouter):
    """Gives each expert its recorded share of the batch's assignments, rounded to whole ones.

    MoE layer l of the model replays layer l mod L of the recorded ones, or all of them the one
    that ``router.layer`` names. Without state.
    """

    Options: ClassVar[type[RouterOptions]] = TraceOptions
    card: ClassVar[Card] = Card(
        "recorded loads, replayed", "", "", "measuring speed under a trained router's loads"
    )

    def assignments(self, inputs: RouterInputs, tokens: Int[Array, ""]) -> Int[Array, " E"]:
        shares = jnp.asarray(self.options.shares(self.num_experts, self.top_k), jnp.float32)
        layer = 0 if inputs.layer is None else inputs.layer % len(shares)
        return round_loads(shares[layer], tokens, self.top_k)


def round_loads(shares: Float[Array, " E"], tokens: Int[Array, ""], top_k: int) -> Int[Array, " E"]:
    """Whole assignments by the method of the largest remainder, none above ``tokens``.

    Sums to K · ``tokens`` exactly. Each is within one of its exact value up to some 10⁶
    assignments; beyond, float32 adds a relative error of 10⁻⁶.

    Args:
      shares: shares of all assignments, at most 1 / K, that sum to 1.
      tokens: valid tokens, which the program need not know beforehand.
      top_k: K.
    """
    total = tokens * top_k
    # Slightly too little, so that rounding in float32 cannot give out more than there is.
    wanted = shares * (1 - 1e-6) * total
    whole = jnp.minimum(jnp.floor(wanted).astype(jnp.int32), tokens)
    turn = jnp.argsort(whole - wanted, stable=True)
    room = (tokens - whole)[turn]
    one_each = _give(total - jnp.sum(whole), jnp.minimum(room, 1))
    left = total - jnp.sum(whole) - jnp.sum(one_each)
    rest = _give(left, jnp.minimum(room - one_each, left))
    return whole.at[turn].add(one_each + rest, unique_indices=True)


def _give(amount: Int[Array, ""], room: Int[Array, " E"]) -> Int[Array, " E"]:
    """Gives the amount to whoever comes first, up to the room of each."""
    return jnp.clip(amount - (jnp.cumsum(room) - room), 0, room)


@functools.cache
def read_loads(path: str, step: int) -> Float[np.ndarray, "L E"]:
    """Recorded loads, one row a layer, as the file has them; read once a process.

    Args:
      path: a ``metrics.jsonl``, ``.json`` or ``.npy`` file; see ``TraceOptions``.
      step: for ``metrics.jsonl``: the step, or 0 for the last one with loads.

    Raises:
      ConfigError: no such file, no loads in it, or none of that step.
    """
    field = "router.path"
    check(bool(path), field, path, "names no loads; give a run's metrics.jsonl, a .json or .npy")
    file = pathlib.Path(path)
    kind = file.suffix
    check(
        kind in (".jsonl", ".json", ".npy"), field, path,
        "is none of metrics.jsonl, .json and .npy; give the loads as one of them",
    )  # fmt: skip
    check(
        kind == ".jsonl" or step == 0, "router.step", step,
        "picks a step of a metrics.jsonl, which router.path is not; leave it 0",
    )  # fmt: skip
    try:
        if kind == ".npy":
            values = np.load(file, allow_pickle=False)
        elif kind == ".json":
            values = json.loads(file.read_text())
        else:
            values = _loads_of_run(file.read_text().splitlines(), path, step)
        loads = np.asarray(values, np.float64)
    except OSError as error:
        raise ConfigError(
            field, path, f"cannot be read ({error.strerror or error}); give another file"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        remedy = f"holds no table of loads ({error!r}); give numbers, a row of E a layer"
        raise ConfigError(field, path, remedy) from error
    good = loads.ndim in (1, 2) and loads.size > 0
    check(good, field, path, f"has shape {loads.shape}; give loads of shape (E,) or (L, E)")
    loads = np.atleast_2d(loads)
    loads.setflags(write=False)
    return loads


def _loads_of_run(lines: list[str], path: str, step: int) -> Any:
    """The loads of one step of a ``metrics.jsonl``; a torn last line is left out."""
    found = {}
    for number, line in enumerate(lines):
        if MEASURE not in line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number + 1 < len(lines):
                raise
            continue
        found[row["step"]] = row[MEASURE]
    check(bool(found), "router.path", path, f"holds no {MEASURE}; give the metrics of an MoE run")
    steps = f"{min(found)} to {max(found)}"
    check(
        not step or step in found, "router.step", step,
        f"is not among the {len(found)} steps ({steps}) that {path} has loads of; 0 is the last",
    )  # fmt: skip
    return found[step or max(found)]
