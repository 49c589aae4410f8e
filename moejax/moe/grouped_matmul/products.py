"""The six products of an MoE layer, each computed by the back end that was chosen for it.

Beside them stands the backward pass of the activation between them.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.experts import Activation, activate, activation_gradient
from moejax.moe.grouped_matmul.backends import BACKENDS, platform_and_device
from moejax.moe.grouped_matmul.shapes import LayerSizes, layer_products
from moejax.moe.grouped_matmul.table import Choice, Table, load_table


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Who computes each product of a layer; static, and so a part of the traced program.

    In each product rows are sorted by expert or read through a source: the index of each sorted
    row. Rows beyond the sum of the group sizes count for nothing, and come out undefined.

    Attributes:
      choices: a choice for each matrix (``gate_up``, ``down``) and leg, and for the activation's
        backward pass (``swiglu``, ``backward``).
      interpret: interprets the kernels, on any platform.
    """

    choices: tuple[tuple[tuple[str, str], Choice], ...]
    interpret: bool = False

    def _chosen(self, name: str, leg: str):
        choice = dict(self.choices)[name, leg]
        return getattr(BACKENDS[choice.backend], leg), choice.settings

    def forward(
        self,
        name: str,
        rows: Float[Array, "R A"],
        weights: Float[Array, "E A B"],
        group_sizes: Int[Array, " E"],
        source: Int[Array, " M"] | None = None,
    ) -> Float[Array, "M B"]:
        """Each expert's rows times its matrix."""
        run, settings = self._chosen(name, "forward")
        return run(rows, weights, group_sizes, source, settings, self.interpret)

    def input_gradient(
        self,
        name: str,
        d_out: Float[Array, "R B"],
        weights: Float[Array, "E A B"],
        group_sizes: Int[Array, " E"],
        source: Int[Array, " M"] | None = None,
    ) -> Float[Array, "M A"]:
        """Each expert's rows times the transpose of its matrix."""
        run, settings = self._chosen(name, "input_gradient")
        return run(d_out, weights, group_sizes, source, settings, self.interpret)

    def weight_gradient(
        self,
        name: str,
        rows: Float[Array, "R A"],
        d_out: Float[Array, "S B"],
        group_sizes: Int[Array, " E"],
        sources: tuple[Int[Array, " M"] | None, Int[Array, " M"] | None],
        dtype: jnp.dtype,
    ) -> Float[Array, "E A B"]:
        """For each expert, its rows transposed times its ``d_out``, summed in FP32."""
        run, settings = self._chosen(name, "weight_gradient")
        return run(rows, d_out, group_sizes, sources, settings, self.interpret, dtype)

    def swiglu_backward(
        self,
        both: Float[Array, "M 2F"],
        d_hidden: Float[Array, "M F"],
        gate: Float[Array, " M"],
        used: Int[Array, ""],
        activation: Activation = "swiglu",
    ) -> tuple[Float[Array, "M 2F"], Float[Array, "M F"], Float[Array, " M"]]:
        """From the gradient of h = silu(a) · b, before the combine weight, all that follows.

        Arithmetic is FP32.

        Args:
          both: a and b side by side.
          d_hidden: gradient of gate · h over gate.
          gate: combine weight of each row.
          used: rows that count; those after them may hold anything, and their results are zero.
          activation: another h of a and b; see ``moejax.moe.experts.activate``.

        Returns:
          The gradient of ``both``; gate · h; and the gradient of ``gate``, in FP32.
        """
        if dict(self.choices)["swiglu", "backward"].backend == "pallas":
            from moejax.moe.grouped_matmul.swiglu_kernel import swiglu_backward

            return swiglu_backward(
                both, d_hidden, gate, used, activation=activation, interpret=self.interpret
            )
        filled = (jnp.arange(len(both)) < used)[:, None]
        wide = lambda a: a.astype(jnp.float32)
        first, gradient = wide(both).reshape(len(both), 2, -1), wide(d_hidden)
        hidden, weight = activate(activation, first), wide(gate)[:, None]
        d_both = activation_gradient(activation, first, gradient * weight).reshape(both.shape)
        narrow = lambda a: jnp.where(filled, a, 0).astype(both.dtype)
        d_gate = jnp.where(filled[:, 0], jnp.sum(gradient * hidden, axis=-1), 0)
        return narrow(d_both), narrow(hidden * weight), d_gate

    def describe(self) -> dict[str, dict[str, Any]]:
        """``backend``, ``settings`` and ``why`` of each product, as in ``gate_up.forward``."""
        return {
            f"{name}.{leg}": {
                "backend": choice.backend,
                "settings": dict(choice.settings),
                "why": choice.why,
            }
            for (name, leg), choice in self.choices
        }


def choose_products(
    layer: LayerSizes,
    dtype: str,
    *,
    table: Table | None = None,
    platform: str | None = None,
    device: str | None = None,
    interpret: bool = False,
) -> LayerPlan:
    """Chooses a back end for each product of a layer.

    Args:
      layer: sizes of the layer on one device.
      dtype: of its operands, by name.
      table: measurements; the user's by default.
      platform: where it is to run; by default what programs are traced for.
      device: kind of device, likewise.
      interpret: interprets the kernels, on any platform.

    Raises:
      ConfigError: nothing can compute it there.
      UserError: the user's table cannot be read.
    """
    here = platform_and_device()
    platform, device = platform or here[0], device or here[1]
    table = load_table() if table is None else table
    choices = {
        key: table.choose(product, platform=platform, device=device, interpret=interpret)
        for key, product in layer_products(layer, dtype).items()
    }
    if reason := "" if interpret else BACKENDS["pallas"].why_not("swiglu", platform):
        activation = Choice("xla", (), f"not the own kernel: {reason}")
    else:
        activation = Choice("pallas", (), "one pass over memory, where XLA makes three")
    choices["swiglu", "backward"] = activation
    return LayerPlan(tuple(choices.items()), interpret)


def describe(
    layer: LayerSizes,
    dtype: str,
    *,
    table: Table | None = None,
    platform: str | None = None,
    device: str | None = None,
) -> dict[str, dict[str, Any]]:
    """What computes each product of a layer, and why: for logs and summaries.

    Arguments and errors are those of ``choose_products``.

    Returns:
      ``backend``, ``settings`` and ``why`` by matrix and leg, as in ``gate_up.forward``.
    """
    plan = choose_products(layer, dtype, table=table, platform=platform, device=device)
    return plan.describe()
