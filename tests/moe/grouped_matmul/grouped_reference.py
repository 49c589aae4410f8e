"""Grouped products in NumPy, in float64."""

import numpy as np


def slices(sizes):
    """Rows of each group, one after another."""
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def by_weights(rows, weights, sizes):
    """Each group's rows times its matrix in float64; rows of no group are left out."""
    rows, weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    return np.concatenate([rows[s] @ w for s, w in zip(slices(sizes), weights, strict=True)])


def by_rows(left, right, sizes):
    """Each group's sum of outer products in float64."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    return np.stack([left[s].T @ right[s] for s in slices(sizes)])
