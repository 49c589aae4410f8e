"""What identifies a grouped product: its leg and its sizes."""

import dataclasses
import math
from typing import NamedTuple, Protocol

LEGS = ("forward", "input_gradient", "weight_gradient")


@dataclasses.dataclass(frozen=True)
class Product:
    """One leg of the product of sorted rows (M, A) with a matrix an expert (E, A, B).

    ``forward`` is (M, A) -> (M, B), ``input_gradient`` (M, B) -> (M, A) by the transposes, and
    ``weight_gradient`` (M, A), (M, B) -> (E, A, B), the sum over each expert's rows.

    Attributes:
      leg: one of ``LEGS``.
      dtype: of the operands, by name.
      experts: E.
      inputs: A.
      outputs: B.
      rows: M.
      gathered: whether an operand is read from the tokens through an index.
    """

    leg: str
    dtype: str
    experts: int
    inputs: int
    outputs: int
    rows: int
    gathered: bool = False

    def distance(self, other: "Product") -> float:
        """How far apart the sizes are: the sum of the logarithms (base 2) of their ratios.

        Infinite between different legs, types and ways to read.
        """
        same = lambda p: (p.leg, p.dtype, p.gathered)
        if same(self) != same(other):
            return math.inf
        sizes = lambda p: (p.experts, p.inputs, p.outputs, p.rows)
        pairs = zip(sizes(self), sizes(other), strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    @property
    def flops(self) -> int:
        """2 · M · A · B: every leg multiplies each row with one matrix."""
        return 2 * self.rows * self.inputs * self.outputs

    def __str__(self) -> str:
        sizes = f"E={self.experts} A={self.inputs} B={self.outputs} M={self.rows}"
        return f"{self.leg} {sizes} {self.dtype}{' gathered' if self.gathered else ''}"


class LayerSizes(Protocol):
    """Sizes of an MoE layer: T tokens, model width D, expert width F, E experts, K a token."""

    T: int
    D: int
    F: int
    E: int
    K: int


class Layer(NamedTuple):
    """``LayerSizes`` as a value."""

    T: int
    D: int
    F: int
    E: int
    K: int


# Where tokens are read through an index, so that no copies of them are written: their own rows
# enter the first product and its weight gradient, their outputs' gradients the second's.
GATHERED = {
    ("gate_up", "forward"),
    ("gate_up", "weight_gradient"),
    ("down", "input_gradient"),
    ("down", "weight_gradient"),
}


def layer_products(layer: LayerSizes, dtype: str) -> dict[tuple[str, str], Product]:
    """The six products of an MoE layer, by matrix (``gate_up``, ``down``) and leg."""
    sizes = {"gate_up": (layer.D, 2 * layer.F), "down": (layer.F, layer.D)}
    return {
        (name, leg): Product(
            leg, dtype, layer.E, *sides, layer.T * layer.K, (name, leg) in GATHERED
        )
        for name, sides in sizes.items()
        for leg in LEGS
    }
