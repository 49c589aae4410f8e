"""Meshes and shardings."""

from moejax.parallel.mesh import (
    AXES,
    RULES,
    MeshConfig,
    axis_rules,
    check_fits,
    make_mesh,
    sharding,
    spec,
)

__all__ = [
    "AXES",
    "RULES",
    "MeshConfig",
    "axis_rules",
    "check_fits",
    "make_mesh",
    "sharding",
    "spec",
]
