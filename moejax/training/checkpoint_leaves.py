"""What a checkpoint's manifest says of the state: name, dtype and shape of every leaf."""

from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from moejax.training.manifest import CheckpointError


def describe(state: PyTree, abstract: bool = False) -> list[list[str]]:
    """Name, dtype and shape of every leaf, JSON-ready.

    Args:
      state: jax arrays, or with ``abstract`` their ``jax.ShapeDtypeStruct``.
      abstract: leaves need not be arrays.

    Raises:
      TypeError: a leaf is not a jax array.
    """
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not abstract and not isinstance(leaf, jax.Array):
            raise TypeError(f"state leaf {name} is a {type(leaf).__name__}, not a jax array")
        rows.append([name, str(leaf.dtype), "x".join(map(str, leaf.shape)) or "scalar"])
    return rows


def check_same_leaves(leaves: Sequence[Sequence[str]], abstract_state: PyTree, step: int) -> None:
    """Compares a manifest's leaves with the state that they are to become.

    Args:
      leaves: from ``describe``, by way of the manifest.
      abstract_state: shapes and dtypes.
      step: of the checkpoint, for the error.

    Raises:
      CheckpointError: they differ; the first leaf that does is named.
    """
    saved = {name: tuple(rest) for name, *rest in leaves}
    wanted = {name: tuple(rest) for name, *rest in describe(abstract_state, abstract=True)}
    for name in [*wanted, *saved]:
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"checkpoint of step {step} is of another model: {name} is "
                f"{_shown(saved.get(name))} in the checkpoint and {_shown(wanted.get(name))} "
                "here; use the config that it was saved with"
            )


def _shown(leaf: tuple[str, ...] | None) -> str:
    return "absent" if leaf is None else " ".join(leaf)
