"""Who can compute a grouped product, here and there."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.grouped_matmul.shapes import LEGS, Product
from moejax.moe.grouped_matmul.tiles import Tiles
from moejax.moe.grouped_matmul.tokamax_backend import TokamaxBackend

Settings = tuple[tuple[str, Any], ...]
"""A back end's configuration: sorted pairs of name and value; empty for its own choice."""


class Backend(Protocol):
    """A library of grouped products.

    ``rows`` and its like are sorted by expert, or, with a source, stand anywhere: the source names
    the row of each sorted row. What lies beyond the sum of the group sizes must not matter, and
    may come out as anything.
    """

    def why_not(self, leg: str, platform: str) -> str:
        """Why it cannot compute a leg on a platform (``cuda``, ``cpu`` ...); empty if it can."""

    def check(self, settings: Settings) -> str:
        """What is wrong with a configuration; empty if nothing is."""

    def candidates(self, product: Product) -> list[Settings]:
        """Configurations worth measuring, the default first."""

    def forward(
        self,
        rows: Float[Array, "R A"],
        weights: Float[Array, "E A B"],
        group_sizes: Int[Array, " E"],
        source: Int[Array, " M"] | None,
        settings: Settings,
        interpret: bool,
    ) -> Float[Array, "M B"]:
        """Each expert's rows times its matrix."""

    def input_gradient(
        self,
        d_out: Float[Array, "R B"],
        weights: Float[Array, "E A B"],
        group_sizes: Int[Array, " E"],
        source: Int[Array, " M"] | None,
        settings: Settings,
        interpret: bool,
    ) -> Float[Array, "M A"]:
        """Each expert's rows times the transpose of its matrix."""

    def weight_gradient(
        self,
        rows: Float[Array, "R A"],
        d_out: Float[Array, "S B"],
        group_sizes: Int[Array, " E"],
        sources: tuple[Int[Array, " M"] | None, Int[Array, " M"] | None],
        settings: Settings,
        interpret: bool,
        dtype: jnp.dtype,
    ) -> Float[Array, "E A B"]:
        """For each expert, its rows transposed times its ``d_out``, summed in FP32."""


def default_tiles(product: Product) -> Tiles:
    """A cut that suits a product without measuring.

    Tiles of 128 by 256 and 8 warps were the fastest on an H100 in the last tuning of each product
    with the experts' matrices, those of 128 by 128 and 4 warps in half of the weights' gradients
    (experiments/results/speed/h100.md). Cards with less shared memory get the smaller ones.
    """
    fits = lambda size, most: min(most, max(16, 1 << (size - 1).bit_length()))
    share = -(-product.rows // product.experts)
    wide = product.dtype != "float32"
    most = 128 if wide else 64
    if product.leg == "weight_gradient":
        sides = fits(product.inputs, most), fits(product.outputs, most), fits(share, 64)
    elif product.leg == "forward":
        sides = fits(share, most), fits(product.outputs, most), fits(product.inputs, 64)
    else:
        sides = fits(share, most), fits(product.inputs, most), fits(product.outputs, 64)
    rows, columns, depth = sides
    large = wide and (rows, columns) == (most, most) and product.leg != "weight_gradient"
    if large and _worth_it(product, rows, 2 * columns) and _holds_large_tiles():
        return Tiles(rows, 2 * columns, depth, warps=8, stages=3)
    return Tiles(rows, columns, depth if wide else min(depth, 32), warps=4, stages=3)


class PallasBackend:
    """The project's own Triton kernels, written in Pallas: nothing but jax is needed."""

    def why_not(self, leg: str, platform: str) -> str:
        """See ``Backend``."""
        del leg
        if platform != "cuda":
            return f"its Triton kernels need an NVIDIA GPU, and this is {platform}"
        try:
            from moejax.moe.grouped_matmul import pallas_kernels  # noqa: F401
        except ImportError as error:
            return f"this jax ({jax.__version__}) has no Triton in Pallas: {error}"
        return ""

    def check(self, settings: Settings) -> str:
        """See ``Backend``."""
        known = {field.name: field.default for field in dataclasses.fields(Tiles)}
        for name, value in settings:
            if name not in known:
                return f"{name}: no such setting; known: {', '.join(known)}"
            if type(value) is not int or value < 1:
                return f"{name} = {value!r}: must be a whole number above zero"
            sized = name in ("rows", "columns", "depth")
            if (sized and value < 16) or (name not in ("stages", "width") and value & (value - 1)):
                return f"{name} = {value!r}: must be a power of two{' from 16 on' * sized}"
        return ""

    def candidates(self, product: Product) -> list[Settings]:
        """See ``Backend``."""
        default = default_tiles(product)
        cuts = [default]
        if product.dtype != "float32":
            cuts += [
                dataclasses.replace(default, warps=8, stages=4),
                dataclasses.replace(default, depth=32, stages=4),
            ]
            cuts += [
                Tiles(rows, columns, 64, warps=8, stages=stages, width=width)
                for rows, columns, stages, width in (
                    (128, 256, 3, 8), (128, 256, 4, 8), (128, 256, 3, 16), (128, 256, 3, 4),
                    (256, 128, 3, 8), (256, 128, 4, 8), (64, 256, 3, 8), (64, 128, 3, 8),
                )
                if _worth_it(product, rows, columns)
            ]  # fmt: skip
        return [tuple(sorted(dataclasses.asdict(cut).items())) for cut in dict.fromkeys(cuts)]

    def forward(self, rows, weights, group_sizes, source, settings, interpret):
        """See ``Backend``."""
        return self._by_weights("forward", rows, weights, group_sizes, source, settings, interpret)

    def input_gradient(self, d_out, weights, group_sizes, source, settings, interpret):
        """See ``Backend``."""
        return self._by_weights(
            "input_gradient", d_out, weights, group_sizes, source, settings, interpret
        )

    def _by_weights(self, leg, rows, weights, group_sizes, source, settings, interpret):
        from moejax.moe.grouped_matmul.pallas_kernels import rows_by_weights

        count = len(rows) if source is None else len(source)
        product = Product(leg, rows.dtype.name, *weights.shape, count)
        tiles = dataclasses.replace(default_tiles(product), **dict(settings))
        return rows_by_weights(
            rows, weights, group_sizes, source, tiles,
            transposed=leg == "input_gradient", interpret=interpret,
        )  # fmt: skip

    def weight_gradient(self, rows, d_out, group_sizes, sources, settings, interpret, dtype):
        """See ``Backend``."""
        from moejax.moe.grouped_matmul.pallas_kernels import rows_by_rows

        count = next((len(s) for s in sources if s is not None), len(rows))
        sizes = len(group_sizes), rows.shape[1], d_out.shape[1], count
        product = Product("weight_gradient", rows.dtype.name, *sizes)
        tiles = dataclasses.replace(default_tiles(product), **dict(settings))
        return rows_by_rows(
            rows, d_out, group_sizes, *sources, tiles, dtype=dtype, interpret=interpret
        )


def _holds_large_tiles() -> bool:
    """Whether this card has the 144 KiB of shared memory that three stages of 128 by 256 take.

    Those of compute capability 7, 8.6, 8.9 and 12 have 99 KiB or less. Where there is no card,
    programs are lowered for another machine, or interpreted.
    """
    if jax.default_backend() != "gpu":
        return True
    major, _, minor = jax.devices()[0].compute_capability.partition(".")
    return major in ("9", "10") or (major, minor) == ("8", "0")


def _worth_it(product: Product, rows: int, columns: int) -> bool:
    """Whether tiles of this size are mostly filled."""
    share = product.rows / product.experts
    sides = {
        "forward": (share, product.outputs),
        "input_gradient": (share, product.inputs),
        "weight_gradient": (product.inputs, product.outputs),
    }[product.leg]
    return sides[0] >= rows / 2 and sides[1] >= columns


BACKENDS: Mapping[str, Backend] = {
    "pallas": PallasBackend(),
    "tokamax_triton": TokamaxBackend("triton"),
    "tokamax_mosaic": TokamaxBackend("mosaic"),
    "tokamax_xla": TokamaxBackend("xla"),
}


def platform_and_device() -> tuple[str, str]:
    """Platform (``cuda``, ``cpu`` ...) and kind of the device that programs are traced for.

    That is what the current mesh names, an abstract one as well; without one, the default device.
    """
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None:
        platform, kind = named.platform, named.device_kind
    else:
        device = jax.devices()[0]
        platform, kind = device.platform, device.device_kind
    # A device calls itself gpu whoever made it.
    maker = "rocm" if kind.startswith(("AMD", "gfx")) else "cuda"
    return (maker if platform == "gpu" else platform), kind


def available_backends(platform: str) -> dict[str, str]:
    """Every back end's name with the reason why no leg of it runs there; empty if one does.

    Args:
      platform: ``cuda``, ``cpu`` and so on; ``gpu`` counts as ``cuda``.
    """
    platform = "cuda" if platform == "gpu" else platform
    reasons = {}
    for name, backend in BACKENDS.items():
        legs = [backend.why_not(leg, platform) for leg in LEGS]
        reasons[name] = "" if "" in legs else legs[0]
    return reasons
