"""Programs lowered for an H100 on machines that have none: nothing is compiled, nothing runs."""

import re

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moejax.parallel import AXES


def _mesh(names):
    """One H100 along axes of these names."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    kinds = (AxisType.Auto,) * len(names)
    return AbstractMesh((1,) * len(names), names, axis_types=kinds, abstract_device=device)


H100 = _mesh(("one",))
H100_OF_MODELS = _mesh(AXES)


def lowered_for_h100(function, *shapes, mesh=H100) -> str:
    """A function's program for CUDA, as text; nothing is compiled and nothing runs."""
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def kernels(program: str) -> int:
    """Triton kernels in a lowered program."""
    return len(re.findall(r"custom_call @[\w$.]*triton", program))


def dense_products(program: str) -> int:
    """Products and ragged products left to XLA in a lowered program."""
    return len(re.findall(r"(stablehlo|chlo)\.(dot|ragged)", program))


def largest_tensor(program: str) -> int:
    """Elements of the largest array in a lowered program."""
    sizes = re.findall(r"tensor<((?:\d+x)+)[a-z]", program)
    return max(int(np.prod([int(n) for n in size.split("x")[:-1]])) for size in sizes)


def kernel_flops(function, *shapes, rows: int) -> float:
    """The most FLOPs that a function's Pallas kernels can run on an H100, whatever the load.

    Programs whose tile is empty count in full. A loop whose length depends on the load walks a
    group's rows: the groups' last steps are partly empty, one each at most.

    Args:
      function: what is traced; nothing is compiled and nothing runs.
      shapes: its arguments.
      rows: rows of all groups together.
    """
    with jax.sharding.use_abstract_mesh(H100):
        program = jax.jit(function).trace(*shapes).jaxpr.jaxpr
    total = 0.0
    for call in _equations(program, "pallas_call"):
        groups = call.outvars[0].aval.shape[0]
        each = _dot_flops(call.params["jaxpr"], rows=rows, groups=groups)
        total += each * float(np.prod(call.params["grid_mapping"].grid))
    return total


def _inner(equation):
    """The jaxprs inside an equation."""
    for value in equation.params.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _equations(jaxpr, name):
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        else:
            for inner in _inner(equation):
                yield from _equations(inner, name)


def _dot_flops(jaxpr, *, rows, groups) -> float:
    """FLOPs of the products of one program of a kernel."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += 2.0 * equation.outvars[0].aval.size * _depth(equation)
            continue
        times = equation.params.get("length", 1)
        for inner in _inner(equation):
            flops = _dot_flops(inner, rows=rows, groups=groups)
            if flops and equation.primitive.name == "while":
                (product,) = _equations(inner, "dot_general")
                times = (-(-rows // _depth(product)) + groups - 1) / groups
            total += times * flops
    return total


def _depth(product) -> int:
    """Terms of each sum of a product."""
    ((axis,), _), _ = product.params["dimension_numbers"]
    return product.invars[0].aval.shape[axis]
