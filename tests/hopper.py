"""Programs lowered for an H100 on machines that have none: nothing is compiled, nothing runs."""

import re

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

H100 = AbstractMesh(
    (1,),
    ("one",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"),
)


def lowered_for_h100(function, *shapes) -> str:
    """A function's program for CUDA, as text; nothing is compiled and nothing runs."""
    with jax.sharding.use_abstract_mesh(H100):
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
