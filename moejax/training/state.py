"""What a training step carries from one step to the next, and how it lies on the mesh."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from moejax.models import ModelConfig, Transformer
from moejax.parallel import spec

Tree = Any


@struct.dataclass
class TrainState:
    """The training state; all of it goes into a checkpoint.

    Attributes:
      step: optimizer steps done.
      params: parameters, float32.
      opt_state: the optimizer's state.
      router_state: selection biases and what else routers keep; no gradient flows into it.
    """

    step: Int[Array, ""]
    params: Tree
    opt_state: Tree
    router_state: Tree


def make_init(model: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh):
    """The initializer and the shardings of its result.

    Args:
      model: the model's config.
      optimizer: its optimizer.
      mesh: where the state lies.

    Returns:
      A jitted function from a PRNG key to a ``TrainState``, already in place, and the state's
      shapes as ``jax.ShapeDtypeStruct`` with shardings.
    """

    def init(key: Array) -> Tree:
        tokens = jnp.zeros((mesh.size, 2), jnp.int32)
        variables = Transformer(model).init(key, tokens, method=Transformer.encode)
        params = nn.meta.unbox(variables["params"])
        router_state = variables.get("router_state", {})
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), router_state)

    def boxed_params(key: Array) -> Tree:
        tokens = jnp.zeros((mesh.size, 2), jnp.int32)
        return Transformer(model).init(key, tokens, method=Transformer.encode)["params"]

    key = jax.random.key(0)
    shapes = jax.eval_shape(init, key)
    partition = _param_specs(jax.eval_shape(boxed_params, key))
    replicated = lambda tree: jax.tree.map(lambda _: PartitionSpec(), tree)
    specs = TrainState(
        PartitionSpec(),
        partition,
        _like_params(shapes.opt_state, shapes.params, partition),
        replicated(shapes.router_state),
    )
    place = lambda shape, part: jax.ShapeDtypeStruct(
        shape.shape, shape.dtype, sharding=NamedSharding(mesh, part)
    )
    abstract = jax.tree.map(place, shapes, specs)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings), abstract


def _param_specs(boxed: Tree) -> Tree:
    """Partition of each parameter, by the logical names that it was declared with."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree.map(lambda box: spec(*box.names), boxed, is_leaf=is_box)


def _like_params(opt_state: Tree, params: Tree, partition: Tree) -> Tree:
    """Partition of the optimizer's state: moments lie as their parameters do, the rest is whole.

    A leaf belongs to the parameter whose path its own path ends with, if the shapes agree too.
    """
    names = lambda path: tuple(part.key for part in path if hasattr(part, "key"))
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(partition), strict=True
    )
    known = {names(path): (leaf.shape, part) for (path, leaf), part in leaves}

    def lookup(path, leaf):
        keys = names(path)
        for start in range(len(keys)):
            shape, part = known.get(keys[start:], (None, None))
            if shape == leaf.shape:
                return part
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(lookup, opt_state)
