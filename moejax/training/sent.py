"""What a training step sends between devices, in lines for the user."""

from typing import Any

import jax
from jax.sharding import Mesh

from moejax.cost.plan_text import collective_lines
from moejax.models import ModelConfig
from moejax.parallel.axis_warnings import axis_warnings, facts_of
from moejax.parallel.collectives import Collective, collectives_on, summed
from moejax.parallel.mesh import cuts


def sends(
    program: str, model: ModelConfig, mesh: Mesh, state: Any, rows: jax.ShapeDtypeStruct
) -> tuple[list[Collective], list[str]]:
    """The collectives of a compiled step, and warnings of mesh axes that waste.

    Args:
      program: ``compiled.as_text()``.
      model: the model's config.
      mesh: where it runs.
      state: shapes of the training state, with shardings.
      rows: shape of the token ids, (micro-batches, B, S), with its sharding.
    """
    found = collectives_on(program, mesh)
    fsdp = [size for axis, _, size in cuts(model) if axis == "fsdp" and size]
    facts = facts_of(state, rows, mesh, fsdp_cuts=fsdp)
    return found, axis_warnings(found, facts)


def sent_lines(found: list[Collective], warnings: list[str]) -> list[str]:
    """What a step sends, most bytes first, and the warnings."""
    lines = collective_lines(summed(found))
    heads = ["sends       ", *[" " * 12] * (len(lines) - 1)]
    sent = [head + line for head, line in zip(heads, lines, strict=True)] if lines else []
    return sent + [f"warning: {text}" for text in warnings]
