"""Loss curves over meshes, and the report of the first token that is routed apart."""

import dataclasses
import functools

import numpy as np
import pytest

from moejax.parallel import AXES, MeshConfig
from moejax.training import compare_meshes as lib


@functools.cache
def reference():
    return lib.Runner(MeshConfig())


def row_of(mesh):
    (row,) = lib.compare([mesh], reference())
    return row


# See experiments/launch/compare_meshes.py for a table of them all.
MESHES = lib.ALONE + lib.MIXED


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=map(lib.describe, MESHES))
def test_losses_of_20_steps_are_those_of_one_device(mesh):
    row = row_of(mesh)
    assert row["learned"] <= lib.TOLERANCE, row["apart"] or "no token was routed apart"
    assert row["replayed"] <= lib.TOLERANCE, row
    assert row["agrees"] and row["devices"] == np.prod(dataclasses.astuple(mesh))


def test_the_run_learns_and_the_record_is_of_its_own_choices():
    curve = reference().run(1e-3)
    assert curve.losses.shape == (lib.STEPS,) and curve.losses[-1] < curve.losses[0] - 0.05
    assert curve.chosen.shape == (lib.STEPS, 2, lib.ROWS * lib.LENGTH, lib.TOP_K)
    assert all(len(set(token)) == lib.TOP_K for token in curve.chosen[3, 1])
    assert len(np.unique(curve.chosen)) > lib.EXPERTS // 2


def test_a_replayed_run_makes_the_recorded_choices_and_no_others():
    # Those of another learning rate, so that its own choices would be different ones.
    own, other = reference().run(3e-3), reference().run(1e-3)
    assert lib.first_apart(own, other) is not None
    replayed = reference().run(3e-3, other.chosen)
    np.testing.assert_array_equal(replayed.chosen, other.chosen)
    assert lib.first_apart(replayed, other) is None
    assert lib.worst(reference().run(3e-3, own.chosen), own) == 0
    assert lib.worst(replayed, own) > lib.TOLERANCE


def with_choice(curve, step, layer, token, expert):
    chosen = curve.chosen.copy()
    chosen[step, layer, token, 0] = expert
    return dataclasses.replace(curve, chosen=chosen)


def test_the_first_token_that_is_routed_apart_is_named():
    tokens = lib.ROWS * lib.LENGTH
    chosen = np.tile(np.arange(lib.TOP_K), (lib.STEPS, 2, tokens, 1))
    curve = lib.Curve(np.ones(lib.STEPS), chosen)
    token = 2 * lib.LENGTH + 5  # row 2, position 5: never padding
    other = with_choice(with_choice(curve, 7, 1, token, 40), 9, 0, 0, 63)
    apart = lib.first_apart(other, curve)
    assert apart == lib.Apart(7, 1, 2, 5, (40,), (0,), 1)
    assert str(apart) == (
        "step 7, layer 1, row 2, position 5: expert 40 in place of 0 (1 tokens of that layer)"
    )
    # The same experts in another order are the same; padding is nobody's.
    turned = dataclasses.replace(curve, chosen=chosen[..., ::-1])
    assert lib.first_apart(turned, curve) is None
    padding = lib.batches(lib.STEPS)[0].segment_ids.reshape(-1) == 0
    assert padding.any()
    assert lib.first_apart(with_choice(curve, 0, 0, int(padding.argmax()), 9), curve) is None


def test_meshes_cover_every_axis_and_count_of_devices():
    sizes = {(name, getattr(mesh, name)) for mesh in lib.ALONE for name in AXES}
    assert {(name, size) for name in AXES for size in (2, 4, 8)} <= sizes
    assert all(np.prod(dataclasses.astuple(mesh)) == 8 for mesh in lib.MIXED)
    assert lib.describe(MeshConfig()) == "one device"
