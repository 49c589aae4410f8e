"""Grouped products by tokamax, a kernel library of its own: its Triton, Mosaic and XLA versions.

Tested with tokamax 0.0.12, 0.0.14 and 0.0.17. It reads no rows through an index, so that they are
gathered before.
"""

import functools
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.grouped_matmul.shapes import Product

# What contracts with what; the last of these sums over the rows of each group.
_BY_MATRIX = (([1], [1]), [0], [0])
_BY_TRANSPOSE = (([1], [2]), [0], [0])
_BY_ROWS = (([0], [0]), [0], [])


@functools.cache
def _load() -> tuple[dict[str, Any], str]:
    """tokamax's implementations by name, and why there are none."""
    if importlib.util.find_spec("tokamax") is None:
        return {}, "tokamax is not installed; pip install 'moejax[gpu-kernels]'"
    try:
        from absl import flags
        from tokamax._src.ops.ragged_dot.api import IMPLEMENTATIONS

        if not flags.FLAGS.is_parsed():
            # tokamax would parse the command line, and stop at every flag that is not its own.
            flags.FLAGS(sys.argv[:1])
    except Exception as error:
        return {}, f"tokamax cannot be imported: {type(error).__name__}: {error}"
    return dict(IMPLEMENTATIONS), ""


class TokamaxBackend:
    """One of tokamax's implementations; see ``backends.Backend``.

    Attributes:
      implementation: ``triton``, ``mosaic`` or ``xla``.
    """

    def __init__(self, implementation: str):
        self.implementation = implementation

    @property
    def _key(self) -> str:
        return {"mosaic": "mosaic_gpu"}.get(self.implementation, self.implementation)

    def why_not(self, leg: str, platform: str) -> str:
        """See ``Backend``."""
        if platform != "cuda":
            return f"measured for NVIDIA GPUs, and this is {platform}"
        known, reason = _load()
        if reason:
            return reason
        if self._key not in known:
            return f"this tokamax has no {self.implementation} version that can be imported here"
        if leg == "weight_gradient" and type(known[self._key]).__name__.startswith("PallasTriton"):
            # Up to 0.0.14 its last step starts a block before an empty group's first row.
            return "this tokamax reads the neighbours' rows for an expert that has none"
        return ""

    def _op(self, settings):
        op = _load()[0][self._key]
        changes = {"config": op.config_cls(**dict(settings))} if settings else {}
        if hasattr(op, "bypass_device_check"):
            # Asked for by name, also where a program is lowered for another machine.
            changes["bypass_device_check"] = True
        return op.replace(**changes) if changes else op

    def check(self, settings) -> str:
        """See ``Backend``."""
        known, reason = _load()
        if reason or self._key not in known or not settings:
            return ""  # ``why_not`` says so where it matters.
        try:
            self._op(settings)
        except Exception as error:
            return " ".join(str(error).split())
        return ""

    def candidates(self, product: Product) -> list:
        """See ``Backend``. The empty one is tokamax's own: its shipped table, else a guess."""
        del product
        triton = [
            dict(block_m=m, block_n=n, block_k=k, split_k=1, num_warps=w, num_stages=s)
            for m, n, k, w, s in (
                (128, 128, 64, 4, 3), (128, 128, 32, 4, 4), (128, 256, 64, 8, 3),
                (64, 128, 64, 4, 4),
            )
        ]  # fmt: skip
        mosaic = [
            dict(
                block_m=m, block_n=64, block_k=k, num_stages=stages, split_k=1,
                persistent=persistent, grid_minor_dim=1, grid_tile_width=8,
            )
            for m, k, stages, persistent in (
                (128, 128, 4, True), (128, 128, 2, False), (128, 64, 4, True), (64, 128, 4, True),
            )
        ]  # fmt: skip
        more = {"triton": triton, "mosaic": mosaic, "xla": []}[self.implementation]
        return [(), *(tuple(sorted(one.items())) for one in more)]

    def _run(self, left, right, group_sizes, numbers, settings, dtype):
        dims, ragged, groups = numbers
        wide = left.dtype == jnp.float32
        return self._op(settings)(
            left,
            right,
            group_sizes=group_sizes,
            ragged_dot_dimension_numbers=jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(dims, ([], [])),
                lhs_ragged_dimensions=ragged,
                rhs_group_dimensions=groups,
            ),
            precision=jax.lax.Precision.HIGHEST if wide else None,
            preferred_element_type=dtype,
        )

    def forward(self, rows, weights, group_sizes, source, settings, interpret):
        """See ``Backend``."""
        del interpret  # Tests interpret tokamax's kernels from outside.
        rows = _take(rows, source)
        return self._run(rows, weights, group_sizes, _BY_MATRIX, settings, rows.dtype)

    def input_gradient(self, d_out, weights, group_sizes, source, settings, interpret):
        """See ``Backend``."""
        del interpret
        d_out = _take(d_out, source)
        return self._run(d_out, weights, group_sizes, _BY_TRANSPOSE, settings, d_out.dtype)

    def weight_gradient(self, rows, d_out, group_sizes, sources, settings, interpret, dtype):
        """See ``Backend``."""
        del interpret
        rows, d_out = map(_take, (rows, d_out), sources)
        return self._run(rows, d_out, group_sizes, _BY_ROWS, settings, dtype)


def _take(rows, source):
    return rows if source is None else rows[source]
