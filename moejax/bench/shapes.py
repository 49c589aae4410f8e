"""Shapes of MoE layers by name, or spelled out, and the FLOPs that a layer needs at least."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from moejax.config import UserError, check_positive, nearest

# Of a layer, and of a whole model.
PASSES = ("forward", "forward_backward")
MODEL_PASSES = ("forward_backward", "train_step")

# The longest sequence that a shape's tokens are cut into: capacity drops within a sequence.
SEQUENCE = 2048


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """An MoE layer and its batch.

    Attributes:
      name: short name, or the shape spelled out.
      T: tokens.
      D: width of the model.
      F: hidden width of one expert.
      E: experts.
      K: experts that a token runs through.
      needs_gpu: whether it is left out by default where there is no GPU.
    """

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    needs_gpu: bool = False

    def __post_init__(self) -> None:
        check_positive("--shapes", self, "T", "D", "F", "E", "K")
        if self.K > self.E:
            raise UserError(f"--shapes = {self.name!r}: K is above E; choose at most E")

    @property
    def sizes(self) -> dict[str, int]:
        """T, D, F, E and K."""
        return {axis: getattr(self, axis) for axis in "TDFEK"}

    @property
    def sequence(self) -> int:
        """Tokens of a sequence: 2,048 where that divides T, else all of them."""
        return SEQUENCE if self.T % SEQUENCE == 0 else self.T

    @property
    def mean_load(self) -> float:
        """Assignments of an expert on average."""
        return self.T * self.K / self.E


def layer_flops(shape: LayerShape, passes: str) -> float:
    """Useful FLOPs: three products of D · F for each of the T · K assignments.

    A multiply-add is two, and the backward pass costs twice the forward: every product has a
    gradient for its input and one for its weights. Router, sorting, activation and combining are
    not counted, so that a dense layer of width K · F has the same count.

    Args:
      shape: the layer.
      passes: ``forward``, or ``forward_backward`` for both.
    """
    forward = 2.0 * 3 * shape.T * shape.K * shape.D * shape.F
    return forward * {"forward": 1, "forward_backward": 3}[passes]


SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        #           name               T      D     F     E    K
        LayerShape("fine_e8", 8192, 256, 128, 8, 4),
        LayerShape("fine_e32", 8192, 256, 128, 32, 4),
        LayerShape("fine_e128", 8192, 256, 128, 128, 4),
        LayerShape("olmoe_tiny", 2048, 256, 128, 32, 4),
        LayerShape("coarse_e16", 4096, 512, 512, 16, 2),
        LayerShape("fine_e256", 4096, 256, 64, 256, 8),
        LayerShape("switch_e64", 4096, 256, 512, 64, 1),
        # SonicMoE (arXiv 2512.14080), and one layer of three published models.
        LayerShape("sonicmoe", 16384, 2560, 1280, 64, 4, needs_gpu=True),
        LayerShape("olmoe", 16384, 2048, 1024, 64, 8, needs_gpu=True),
        LayerShape("qwen3_30b", 16384, 2048, 768, 128, 8, needs_gpu=True),
        LayerShape("deepseek_v2_lite", 16384, 2048, 1408, 64, 6, needs_gpu=True),
    )
}


def find_shape(name: str) -> LayerShape:
    """A shape by its name, or spelled out as ``T64-D16-F8-E4-K2``.

    Raises:
      UserError: neither a known name nor a shape.
    """
    if name in SHAPES:
        return SHAPES[name]
    return LayerShape(name, **parse_sizes(name, dict.fromkeys("TDFEK"), SHAPES))


def parse_sizes(
    text: str, axes: Mapping[str, int | None], known: Mapping[str, Any]
) -> dict[str, int]:
    """Sizes spelled out, such as ``T64-D16-F8-E4-K2``, in any order.

    Args:
      text: what the user wrote.
      axes: the letters that there are, and the default of those that may be left out.
      known: names that the user may have meant instead.

    Raises:
      UserError: not of this form, an unknown letter, or one that is missing or there twice.
    """
    parts = [re.fullmatch(r"([A-Z])(\d{1,9})", part) for part in text.split("-")]
    form = "-".join(f"{axis}{2 ** max(7 - i, 1)}" for i, axis in enumerate(axes))
    if not all(parts):
        hint = nearest(text, known)
        raise UserError(f"--shapes = {text!r}: no such shape; {hint}, or spell one out as {form}")
    sizes = {part[1]: int(part[2]) for part in parts}
    missing = [axis for axis, default in axes.items() if default is None and axis not in sizes]
    unknown = [axis for axis in sizes if axis not in axes]
    if missing or unknown or len(sizes) < len(parts):
        raise UserError(f"--shapes = {text!r}: write each of {', '.join(axes)} once, as in {form}")
    return {axis: sizes.get(axis, default) for axis, default in axes.items()}


def gigaflops(flops: float) -> str:
    """FLOPs for people: ``25.8 GFLOP``."""
    unit = min(4, max(0, int(math.log10(max(flops, 1.0)) // 3)))
    return f"{flops / 1000**unit:.3g} {['', 'k', 'M', 'G', 'T'][unit]}FLOP"
