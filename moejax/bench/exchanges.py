"""The layer with its experts spread over this machine's devices, by each exchange."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moejax.bench import timing
from moejax.bench.options import BenchOptions
from moejax.bench.report import Report, progress
from moejax.bench.shapes import LayerShape, layer_flops
from moejax.config import ConfigError
from moejax.moe.choose import choose
from moejax.moe.layer import MoELayer
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers import RouterInputs, SoftmaxTopKOptions
from moejax.parallel import MeshConfig, axis_rules, make_mesh, sharding

EXCHANGES = ("none", "all_to_all", "ragged_all_to_all")


def run(options: BenchOptions, shape: LayerShape, report: Report) -> None:
    """Times the whole layer, router included, forward and backward, into ``report.profile``.

    The router is a freshly drawn one, so that loads are near balance. On a CPU the devices are
    virtual and share its cores: differences between exchanges are extra work, not latency.
    """
    devices = expert_devices(shape, jax.device_count())
    if devices == 1:
        report.note(f"{shape.name}: no exchange is timed, since there is one device to be had")
        return
    mesh, windows = make_mesh(MeshConfig(expert=devices)), {}
    with jax.set_mesh(mesh):
        for exchange in EXCHANGES:
            name = f"layer, expert={devices}, {exchange}"
            try:
                windows[name] = timing.window_of(_layer_call(shape, exchange, mesh, options))
            except ConfigError as error:
                report.note(f"exchange {exchange} is left out: {error.remedy}")
        measured = timing.measure(windows, options.budget)
    for name, times in measured.items():
        flops = layer_flops(shape, "forward_backward")
        report.profile.append(
            {
                "shape": {"name": shape.name, **shape.sizes},
                "load": "router",
                "piece": name,
                "ms": times.to_dict(),
                "flops_per_s": flops / (times.median / 1e3),
            }
        )
    progress(f"{shape.name}: {len(measured)} exchanges over {devices} devices")


def expert_devices(shape: LayerShape, devices: int) -> int:
    """The most devices that divide both the experts and the tokens."""
    fits = lambda n: shape.E % n == 0 and shape.T % n == 0
    return max(n for n in range(1, devices + 1) if fits(n))


def _layer_call(shape: LayerShape, exchange: str, mesh: Mesh, options: BenchOptions) -> Any:
    """The compiled layer, forward and backward, over arrays in their places."""
    config = MoEConfig(
        num_experts=shape.E, top_k=shape.K, d_expert=shape.F, exchange=exchange,
        router=SoftmaxTopKOptions(normalize_gates=shape.K > 1),
    )  # fmt: skip
    devices = mesh.shape["expert"]
    choose(config, platform=jax.default_backend(), expert_devices=devices)
    rows = max(devices, shape.T // shape.sequence)
    rows = rows if shape.T % rows == 0 and rows % devices == 0 else devices
    layer = MoELayer(config)
    place = lambda values, *names: jax.device_put(values, sharding(mesh, *names))
    rng = np.random.default_rng(options.seed)
    draw = lambda sizes: rng.standard_normal(sizes, dtype=np.float32).astype(options.dtype)
    x = place(draw((rows, shape.T // rows, shape.D)), "batch", "length", "embed_act")
    cotangent = place(draw(x.shape), "batch", "length", "embed_act")
    valid = place(np.ones(x.shape[:2], bool), "batch", "length")
    boxed = jax.eval_shape(layer.init, jax.random.key(0), RouterInputs(x, valid))["params"]
    fill = lambda box: place(
        0.02 * rng.standard_normal(box.value.shape, dtype=np.float32), *box.names
    )
    params = jax.tree.map(fill, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))

    def forward_backward(params, x, valid, cotangent):
        with axis_rules():

            def run(params, x):
                out = layer.apply({"params": params}, RouterInputs(x, valid))
                return (out.y, out.aux_loss), out.stats

            (y, aux_loss), gradients, _ = jax.vjp(run, params, x, has_aux=True)
            return y, gradients((cotangent, jnp.ones_like(aux_loss)))

    program = timing.compile_program(forward_backward, params, x, valid, cotangent)
    return functools.partial(program.call, params, x, valid, cotangent)
