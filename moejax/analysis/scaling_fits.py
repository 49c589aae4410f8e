"""Fits of loss over active size, granularity and number of experts, with the fit's error.

As approach 3 of Hoffmann et al. (arXiv 2203.15556, appendix D.3): a Huber loss of the logarithm's
residuals, from a grid of starts; the best is kept. The residual of a point left out of its fit says
how well the form predicts; the spread of these fits, a jackknife, gives standard errors.

    power_law           L = c + a / x^alpha, of any one axis
    granularity         L = c + (g / G^gamma + a) / N^alpha, at one number of tokens
    granularity_tokens  L = c + (g / G^gamma + a) / N^alpha + b / D^beta, eq. 9 of arXiv 2402.07871
    experts             L = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c,
                        eq. 6 of arXiv 2502.05172

Ê is a saturating transform of the number of experts, with coefficients of its own, e_start and
e_max; few ablations have the points to fit these too, so that they may be held.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize

from moejax.config import ConfigError, check, nearest
from moejax.cost.scaling_laws import KRAJEWSKI, LUDZIEJEWSKI

HUBER = 1e-3  # of the logarithm, as the paper
Data = Mapping[str, Float[np.ndarray, " n"]]
Coefficients = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Form:
    """An equation that may be fitted.

    Attributes:
      axes: names of what the loss depends on.
      starts: coefficient -> where the fit starts, with each axis over its geometric mean and losses
        over their mean.
      signed: coefficients that may be below zero; the others are fitted as logarithms.
      loss: (data, coefficients) -> loss.
      restore: (coefficients, means of the axes) -> coefficients of the axes as they were.
      unscaled: axes that are not divided by their mean.
    """

    axes: tuple[str, ...]
    starts: dict[str, tuple[float, ...]]
    signed: tuple[str, ...]
    loss: Callable[[Data, Coefficients], Any]
    restore: Callable[[Coefficients, Mapping[str, float]], Coefficients]
    unscaled: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fit:
    """A form fitted to points.

    Attributes:
      form: its name.
      coefficients: by name, the held ones included.
      errors: jackknife standard errors; 0 of a held one.
      points: how many.
      ranges: of each axis, within which the fit may be read.
      fit_error: root mean square of the residuals, relative to the loss.
      left_out_error: the same, each point left out of the fit that predicts it.
      constant_error: the same of a fit that is no more than the mean: a form that does not beat it
        has learnt nothing.
    """

    form: str
    coefficients: Coefficients
    errors: Coefficients
    points: int
    ranges: dict[str, tuple[float, float]]
    fit_error: float
    left_out_error: float
    constant_error: float

    def predict(self, data: Data) -> Float[np.ndarray, " n"]:
        """Losses at other points; beyond ``ranges`` it is an extrapolation."""
        return np.asarray(FORMS[self.form].loss(_by_axis(self.form, data), self.coefficients))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self) | {"ranges": {k: list(v) for k, v in self.ranges.items()}}


def fit(
    form: str,
    data: Data,
    losses: Float[np.ndarray, " n"],
    *,
    held: Mapping[str, float] | None = None,
) -> Fit:
    """Fits a form.

    Args:
      form: a name of ``FORMS``.
      data: axis -> values; ``power_law`` takes the only one, whatever its name.
      losses: means over seeds, one for each point.
      held: coefficients that are given and not fitted.

    Raises:
      ConfigError: an unknown form, axis or coefficient, values that are not above zero, fewer
        points than coefficients plus two, or an axis that has too few values.
    """
    check(form in FORMS, "form", form, nearest(form, FORMS))
    held = dict(held or {})
    losses = np.asarray(losses, float)
    data = _by_axis(form, data)
    _check(form, data, losses, held)
    best = _best(form, data, losses, held, None)
    count = len(losses)
    without = []
    for i in range(count):
        kept = np.arange(count) != i
        part = {axis: values[kept] for axis, values in data.items()}
        without.append(_best(form, part, losses[kept], held, best))
    left = [float(FORMS[form].loss(_at(data, [i]), found)[0]) for i, found in enumerate(without)]
    means = [float(np.delete(losses, i).mean()) for i in range(count)]
    relative = lambda predicted: float(np.sqrt(np.mean((np.asarray(predicted) / losses - 1) ** 2)))
    spread = lambda name: math.sqrt((count - 1) * np.var([found[name] for found in without]))
    return Fit(
        form=form,
        coefficients=best,
        errors={name: 0.0 if name in held else spread(name) for name in best},
        points=count,
        ranges={axis: (float(v.min()), float(v.max())) for axis, v in data.items()},
        fit_error=relative(FORMS[form].loss(data, best)),
        left_out_error=relative(left),
        constant_error=relative(means),
    )


def _by_axis(form: str, data: Data) -> Data:
    """Arrays under the form's own names of the axes."""
    axes = FORMS[form].axes
    if form == "power_law" and len(data) == 1:
        return {"x": np.asarray(next(iter(data.values())), float)}
    check(set(data) == set(axes), "data", sorted(data), f"{form} needs {', '.join(axes)}")
    return {axis: np.asarray(data[axis], float) for axis in axes}


def _at(data: Data, rows: list[int]) -> Data:
    return {axis: values[rows] for axis, values in data.items()}


def _check(form: str, data: Data, losses: np.ndarray, held: Mapping[str, float]) -> None:
    names = FORMS[form].starts
    for name in held:
        check(name in names, "held", name, nearest(name, names))
    for axis, values in {**data, "losses": losses}.items():
        good = bool(np.all(np.isfinite(values)) and np.all(values > 0))
        check(good, axis, values.tolist(), "must be numbers above zero")
        check(len(values) == len(losses), axis, len(values), f"has {len(losses)} losses")
    free = len(names) - len(held)
    check(len(losses) >= free + 2, "points", len(losses), f"{form} has {free} coefficients to fit; "
          f"give at least {free + 2} points, or hold some")  # fmt: skip
    for axis, values in data.items():
        if len(np.unique(values)) < 3:
            raise ConfigError(
                axis, sorted(set(values.tolist())), f"{form} needs three or more values of it"
            )


def _best(
    form: str, data: Data, losses: np.ndarray, held: Mapping[str, float], near: Coefficients | None
) -> Coefficients:
    """The best of the fits from all starts; from one known coefficients are near to, if given."""
    chosen = FORMS[form]
    units = {
        axis: 1.0 if axis in chosen.unscaled else float(np.exp(np.log(values).mean()))
        for axis, values in data.items()
    }
    level = float(losses.mean())
    names = [name for name in chosen.starts if name not in held]

    def coefficients(vector: np.ndarray) -> Coefficients:
        """As they are, from those of axes over their mean, which are all of about one size."""
        found = {n: float(x) if n in chosen.signed else math.exp(x)
                 for n, x in zip(names, vector, strict=True)}  # fmt: skip
        ordered = {name: held[name] if name in held else found[name] for name in chosen.starts}
        return _levelled(chosen.restore(ordered, units), level) | held

    def residuals(vector: np.ndarray) -> np.ndarray:
        try:
            with np.errstate(all="ignore"):
                predicted = np.asarray(chosen.loss(data, coefficients(vector)), float)
                found = np.log(predicted) - np.log(losses)
        except OverflowError:  # a step of the search too far
            return np.full(len(losses), _FAR)
        return np.nan_to_num(found, nan=_FAR, posinf=_FAR, neginf=-_FAR)

    if near is None:
        grid = itertools.product(*(chosen.starts[name] for name in names))
        starts = [_vector(chosen, names, dict(zip(names, p, strict=True))) for p in grid]
    else:
        inverse = {axis: 1 / unit for axis, unit in units.items()}
        starts = [_vector(chosen, names, chosen.restore(_levelled(near, 1 / level), inverse))]
    search = lambda start, loss, scale: optimize.least_squares(
        residuals, start, x_scale="jac", max_nfev=100, loss=loss, f_scale=scale
    )
    # Far from the optimum all residuals are large, and the final scale is too flat to lead there;
    # but one bad point may lead squares astray. So both ways are begun, and the best go on.
    wide = 30 * HUBER
    by_squares = [search(start, "linear", 1.0).x for start in starts] if near is None else []
    ways = [*starts, *by_squares]
    best = sorted((search(x, "huber", wide) for x in ways), key=lambda result: result.cost)
    best = best[:_REFINED]
    for scale in (5 * HUBER, HUBER):
        best = [search(result.x, "huber", scale) for result in best]
    return coefficients(min(best, key=lambda result: result.cost).x)


_FAR = 1e3
_REFINED = 3  # starts that go on to the final scale
_LEVELS = ("a", "b", "c", "g")  # coefficients that are losses


def _levelled(found: Coefficients, level: float) -> Coefficients:
    return {name: value * level if name in _LEVELS else value for name, value in found.items()}


def _vector(form: Form, names: list[str], values: Coefficients) -> list[float]:
    return [values[n] if n in form.signed else math.log(max(values[n], 1e-12)) for n in names]


def _power_loss(data: Data, of: Coefficients) -> Any:
    return of["c"] + of["a"] / data["x"] ** of["alpha"]


def _fine_loss(data: Data, of: Coefficients) -> Any:
    law = dataclasses.replace(KRAJEWSKI, **{"b": 0.0, "beta": 0.0} | of)
    return law.loss(data["total_params"], data.get("tokens", 1.0), data["granularity"])


def _experts_loss(data: Data, of: Coefficients) -> Any:
    law = dataclasses.replace(LUDZIEJEWSKI, **of)
    found = np.empty(len(data["num_experts"]))
    for experts in np.unique(data["num_experts"]):
        rows = data["num_experts"] == experts
        found[rows] = law.at(experts).loss(data["active_params"][rows], data["tokens"][rows])
    return found


def _restore_power(of: Coefficients, units: Mapping[str, float]) -> Coefficients:
    return of | {"a": of["a"] * units["x"] ** of["alpha"]}


def _restore_fine(of: Coefficients, units: Mapping[str, float]) -> Coefficients:
    size = units["total_params"] ** of["alpha"]
    found = of | {"a": of["a"] * size, "g": of["g"] * size}
    return found | ({"b": of["b"] * units["tokens"] ** of["beta"]} if "b" in of else {})


def _restore_experts(of: Coefficients, units: Mapping[str, float]) -> Coefficients:
    # a Ê^delta (N / N0)^(alpha + gamma ln Ê) = a N0^-alpha Ê^(delta - gamma ln N0) N^(...)
    size, tokens = math.log(units["active_params"]), math.log(units["tokens"])
    return of | {
        "a": of["a"] * math.exp(-of["alpha"] * size), "delta": of["delta"] - of["gamma"] * size,
        "b": of["b"] * math.exp(-of["beta"] * tokens), "omega": of["omega"] - of["zeta"] * tokens,
    }  # fmt: skip


_FINE_STARTS = {"a": (0.3,), "alpha": (0.1, 0.4), "g": (0.05,), "gamma": (0.5, 1.0),
                "c": (0.3, 0.7)}  # fmt: skip

FORMS: dict[str, Form] = {
    "power_law": Form(
        ("x",),
        {"a": (0.1, 0.4), "alpha": (0.1, 0.3, 1.0), "c": (0.3, 0.6, 0.9)},
        (), _power_loss, _restore_power,
    ),
    "granularity": Form(
        ("total_params", "granularity"), _FINE_STARTS, (), _fine_loss, _restore_fine,
        ("granularity",),
    ),
    "granularity_tokens": Form(
        ("total_params", "granularity", "tokens"),
        _FINE_STARTS | {"b": (0.2,), "beta": (0.1, 0.4)},
        (), _fine_loss, _restore_fine, ("granularity",),
    ),
    "experts": Form(
        ("active_params", "num_experts", "tokens"),
        {"a": (0.4,), "alpha": (-0.2, -0.4), "delta": (-0.1,), "gamma": (0.0,), "b": (0.2,),
         "beta": (-0.2, -0.4), "omega": (0.0,), "zeta": (0.0,), "e_start": (2.0,),
         "e_max": (300.0,), "c": (0.4,)},
        ("alpha", "delta", "gamma", "beta", "omega", "zeta"), _experts_loss, _restore_experts,
        ("num_experts",),
    ),
}  # fmt: skip
