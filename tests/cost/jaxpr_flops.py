"""FLOPs of the matrix products in a traced program: what counts are held against."""

import math
from typing import Any

import jax
from jax.extend import core


def matmul_flops(function, *args) -> float:
    """Twice the multiply-adds of every matrix product that a function runs, loops counted out."""
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: core.Jaxpr) -> float:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(*(v.aval.shape for v in equation.invars), params["dimension_numbers"])
    assert "conv" not in name or name.startswith("convert"), name
    assert "ragged" not in name and "pallas" not in name, name
    inner = [_of(jaxpr) for jaxpr in _jaxprs(list(params.values()))]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while":
        assert not any(inner), "a loop of unknown length with products inside"
    if name == "cond":
        assert len(set(inner)) == 1, "branches that cost differently"
        return inner[0]
    return sum(inner)


def _dot(left, right, dimension_numbers) -> float:
    (contracted, _), (batch, _) = dimension_numbers
    shared = math.prod(left[i] for i in (*contracted, *batch))
    return 2.0 * math.prod(left) * math.prod(right) / shared


def _jaxprs(values: list[Any]):
    """The programs inside an equation's parameters."""
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _jaxprs(list(value))
