"""Dropless on GPUs: rows sorted by expert, and grouped products over them.

The backward pass is written by hand. It saves the first product and the plan and recomputes the
activation; it reads tokens and gradients through an index where the kernels can, never goes
through the sort, and adds nothing by scattering: a token's K rows are gathered and summed in FP32.
Nothing has more rows than there are assignments, whatever the load.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.dispatch.biases import add_down_bias
from moejax.moe.dispatch.held import Held
from moejax.moe.dispatch.sorting import SortedAssignments, sort_assignments
from moejax.moe.experts import ExpertWeights, activate
from moejax.moe.grouped_matmul import Layer, LayerPlan, Table, choose_products


def grouped(
    x: Float[Array, "T D"],
    expert: Int[Array, "T K"],
    gate: Float[Array, "T K"],
    weights: ExpertWeights,
    *,
    interpret: bool = False,
    table: Table | None = None,
) -> Float[Array, "T D"]:
    """Runs every assignment through its expert by grouped products.

    Args:
      x: token vectors.
      expert: chosen experts; indices of E and above are computed by nobody here.
      gate: combine weights.
      weights: the experts.
      interpret: interprets the kernels, on any platform and slowly.
      table: which back end computes which product; the user's table by default.

    Returns:
      The combined outputs, summed in FP32.

    Raises:
      ConfigError: no kernels run here.
      UserError: the user's table cannot be read.
    """
    num_experts, width, _, hidden = weights.gate_up.shape
    layer = Layer(len(x), width, hidden, num_experts, expert.shape[1])
    products = choose_products(layer, x.dtype.name, table=table, interpret=interpret)
    plan = sort_assignments(expert, num_experts)
    y = _grouped(x, gate, weights.replace(down_bias=None), plan, products)
    return add_down_bias(y, expert, gate, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped(x, gate, weights, plan, products: LayerPlan):
    return _forward(x, gate, weights, plan, products)[0]


def _flat(weights: ExpertWeights) -> Float[Array, "E D 2F"]:
    """Gate and up side by side, as one matrix an expert."""
    return weights.gate_up.reshape(*weights.gate_up.shape[:2], -1)


def _owner(rows: int, plan: SortedAssignments) -> Int[Array, " M"]:
    """Expert of each sorted row; E where it is nobody's."""
    ends = (plan.starts + plan.counts)[None, :]
    return jnp.sum(jnp.arange(rows, dtype=ends.dtype)[:, None] >= ends, axis=1)


def _add_bias(rows: Float[Array, "M 2F"], weights: ExpertWeights, plan: SortedAssignments):
    """The first product with each row's bias, if there are biases; nobody's rows hold anything."""
    if weights.gate_up_bias is None:
        return rows
    bias = weights.gate_up_bias.reshape(weights.num_experts, -1)
    owner = jnp.minimum(_owner(len(rows), plan), len(bias) - 1)
    return rows + bias.at[owner].get(mode="promise_in_bounds")


def _bias_gradient(d_rows: Float[Array, "M 2F"], weights: ExpertWeights, plan: SortedAssignments):
    """Each expert's sum of rows, as a product with ones, for nothing is added by index here.

    It costs 2 E / 9 D of the experts' own work. Nobody's rows have to be zeros.
    """
    if weights.gate_up_bias is None:
        return None
    mine = jax.nn.one_hot(_owner(len(d_rows), plan), weights.num_experts, dtype=d_rows.dtype)
    total = jnp.matmul(mine.T, d_rows, preferred_element_type=jnp.float32)
    return total.reshape(weights.gate_up_bias.shape).astype(weights.gate_up_bias.dtype)


def _combine(rows: Float[Array, "M D"], plan: SortedAssignments, gate=None) -> Float[Array, "T D"]:
    """Sums, for each token, its K rows, weighted by the gates if there are any, in FP32."""
    used = jnp.sum(plan.counts)
    total = jnp.zeros((len(plan.row), rows.shape[1]), jnp.float32)
    # One gather a choice, which XLA fuses with the sum; a single one of (T, K, D) would be
    # written to memory.
    for k in range(plan.row.shape[1]):
        row = plan.row[:, k]
        here = (row < used)[:, None]
        each = rows.at[row].get(mode="promise_in_bounds").astype(jnp.float32)
        if gate is not None:
            each *= gate[:, k, None].astype(jnp.float32)
        total += jnp.where(here, each, 0)
    return total.astype(rows.dtype)


def _forward(x, gate, weights, plan, products):
    token, held = plan.order // gate.shape[1], Held(weights.precision)
    both = products.forward("gate_up", held.rows(x), _flat(weights), plan.counts, token)
    both = _add_bias(both, weights, plan)
    # In FP32, which is never written; what belongs to no expert here may hold anything.
    hidden = activate(weights.activation, both.astype(jnp.float32).reshape(len(both), 2, -1))
    filled = jnp.arange(len(both)) < jnp.sum(plan.counts)
    hidden = held.rows(jnp.where(filled[:, None], hidden, 0).astype(x.dtype))
    # The backward pass works in the memory of the saved product, so that it must come later.
    both, hidden = jax.lax.optimization_barrier((both, hidden))
    out = products.forward("down", hidden, weights.down, plan.counts)
    return _combine(out, plan, gate), (x, gate, weights, plan, both)


def _backward(products, saved, d_y):
    x, gate, weights, plan, both = saved
    token, held = plan.order // gate.shape[1], Held(weights.precision)
    weight = gate.reshape(-1).at[plan.order].get(mode="promise_in_bounds")
    # Before the gate's factor: its product with the activations is the gate's own gradient.
    d_hidden = products.input_gradient("down", held.rows(d_y), weights.down, plan.counts, token)
    d_both, hidden, d_weight = products.swiglu_backward(
        both, d_hidden, weight, jnp.sum(plan.counts), weights.activation
    )
    d_rows = products.input_gradient("gate_up", held.rows(d_both, 2), _flat(weights), plan.counts)

    def weight_gradient(name, left, right, like):
        """Of two pairs of rows and their source."""
        (left, first), (right, second) = (held.sorted(rows, plan, at) for rows, at in (left, right))
        return products.weight_gradient(name, left, right, plan.counts, (first, second), like.dtype)

    d_gate_up = weight_gradient("gate_up", (held.rows(x), token), (d_both, None), weights.gate_up)
    d_down = weight_gradient("down", (held.rows(hidden), None), (d_y, token), weights.down)
    d_gate = d_weight.at[plan.row].get(mode="promise_in_bounds").astype(gate.dtype)
    d_weights = weights.replace(
        gate_up=d_gate_up.reshape(weights.gate_up.shape), down=d_down,
        gate_up_bias=_bias_gradient(d_both, weights, plan),
    )  # fmt: skip
    return _combine(d_rows, plan), d_gate, d_weights, None


_grouped.defvjp(_forward, _backward)
