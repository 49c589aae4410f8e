"""tokamax's grouped products: what they compute, and which of them may run.

tokamax is an extra; what needs it is left out where it is not installed.
"""

import functools
import importlib.util
import logging
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from grouped_reference import by_rows, by_weights
from hopper import lowered_for_h100

from moejax.moe.grouped_matmul import LEGS, available_backends, tokamax_backend
from moejax.moe.grouped_matmul.backends import BACKENDS

installed = importlib.util.find_spec("tokamax") is not None
needs_tokamax = pytest.mark.skipif(not installed, reason="the extra gpu-kernels is not installed")

ROWS, GROUPS, WIDTH = 64, 4, 64
SIZES = (0, 20, 1, 30)


def inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    token = jnp.asarray(rng.integers(0, ROWS, ROWS), jnp.int32)
    return draw(ROWS, WIDTH), draw(ROWS, WIDTH), draw(GROUPS, WIDTH, WIDTH), token


def run(backend, leg, settings=()):
    """A leg as a function of rows, of weights or more rows, of sizes and of a source."""

    def call(left, right, sizes, token):
        if leg == "weight_gradient":
            sources = (token, None)
            return backend.weight_gradient(left, right, sizes, sources, settings, False, left.dtype)
        return getattr(backend, leg)(left, right, sizes, token, settings, False)

    return call


def test_without_it_the_reason_says_what_to_install(monkeypatch):
    find = lambda name: None if name == "tokamax" else mock.DEFAULT
    monkeypatch.setattr(importlib.util, "find_spec", find)
    tokamax_backend._load.cache_clear()
    try:
        reasons = available_backends("cuda")
        assert reasons["pallas"] == ""
        for name in ("tokamax_triton", "tokamax_mosaic", "tokamax_xla"):
            assert "pip install 'moejax[gpu-kernels]'" in reasons[name]
    finally:
        tokamax_backend._load.cache_clear()


def test_it_runs_on_no_other_platform():
    for name, reason in available_backends("tpu").items():
        assert "this is tpu" in reason, name


@needs_tokamax
def test_it_leaves_the_command_line_alone(monkeypatch):
    from absl import flags

    monkeypatch.setattr(sys, "argv", ["moejax", "--config.train.steps=3"])
    flags.FLAGS.unparse_flags()
    tokamax_backend._load.cache_clear()
    program = run(BACKENDS["tokamax_xla"], "forward")
    rows, _, weights, token = inputs()
    jax.eval_shape(program, rows, weights, jnp.asarray(SIZES, jnp.int32), token)
    assert flags.FLAGS.is_parsed()


@needs_tokamax
@pytest.mark.parametrize("leg", LEGS)
def test_every_leg_has_the_right_axes(leg):
    """Through XLA's own ragged product, which runs anywhere, if slowly."""
    rows, gradients, weights, token = inputs()
    used, sizes = sum(SIZES), jnp.asarray(SIZES, jnp.int32)
    chosen = np.asarray(rows)[np.asarray(token)]
    second, wanted = {
        "forward": (weights, lambda: by_weights(chosen, weights, SIZES)),
        "input_gradient": (weights, lambda: by_weights(chosen, np.swapaxes(weights, 1, 2), SIZES)),
        "weight_gradient": (gradients, lambda: by_rows(chosen, gradients, SIZES)),
    }[leg]
    out = jax.jit(run(BACKENDS["tokamax_xla"], leg))(rows, second, sizes, token)
    out = out if leg == "weight_gradient" else out[:used]
    assert tiny.relative_error(out, wanted()) < 1e-6


@pytest.fixture
def hopper(monkeypatch):
    """tokamax asks the device what it is before it lowers; here it is told."""
    from tokamax._src import gpu_utils

    for name in ("is_sm90", "has_triton_support", "has_mosaic_gpu_support"):
        monkeypatch.setattr(gpu_utils, name, lambda *_: True)
    logging.disable(logging.WARNING)  # It warns of every shape that it has no settings for.
    yield
    logging.disable(logging.NOTSET)


@needs_tokamax
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("name", ["tokamax_triton", "tokamax_mosaic"])
def test_its_kernels_lower_for_cuda(name, leg, hopper):
    backend = BACKENDS[name]
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.bfloat16)
    index = lambda size: jax.ShapeDtypeStruct((size,), jnp.int32)
    second = shape(1024, 256) if leg == "weight_gradient" else shape(8, 256, 256)
    arguments = shape(1024, 256), second, index(8), index(1024)
    if reason := backend.why_not(leg, "cuda"):
        if "version that can be imported" in reason:
            pytest.skip(reason)
        assert (name, leg) == ("tokamax_triton", "weight_gradient")
        return
    # Its own settings, and the first of those that tuning tries without asking for a device.
    for settings in (backend.candidates(None)[0], backend.candidates(None)[2]):
        program = lowered_for_h100(run(backend, leg, settings), *arguments)
        assert ("triton" if name == "tokamax_triton" else "mosaic_gpu") in program


@needs_tokamax
def test_the_weight_gradient_that_is_left_out_is_wrong_for_empty_groups():
    import jax.experimental.pallas as pl

    known, _ = tokamax_backend._load()
    kind = type(known.get("triton")).__name__
    if not kind.startswith("PallasTriton"):
        pytest.skip(f"this tokamax has no Triton kernel in Pallas, but {kind}")
    backend = BACKENDS["tokamax_triton"]
    assert "an expert that has none" in backend.why_not("weight_gradient", "cuda")
    rows, gradients, _, token = inputs()
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    from tokamax._src import gpu_utils

    with (
        mock.patch.object(pl, "pallas_call", interpreted),
        mock.patch.object(gpu_utils, "has_triton_support", lambda *_: True),
    ):
        call = jax.jit(run(backend, "weight_gradient"))
        out = call(rows, gradients, jnp.asarray(SIZES, jnp.int32), token)
    assert not np.all(np.asarray(out[0]) == 0)


@needs_tokamax
def test_settings_it_does_not_take_are_refused():
    backend = BACKENDS["tokamax_mosaic"]
    assert "block_m" in backend.check((("block_m", 3),))
