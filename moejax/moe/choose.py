"""Which dispatcher and which exchange run: ``auto`` resolved, with the reason in words."""

import dataclasses

import jax

from moejax.config import ConfigError
from moejax.moe.moe_config import MoEConfig

# CUDA and ROCm both call themselves "gpu" as devices; programs lowered elsewhere name one.
GPU = ("gpu", "cuda", "rocm")
RAGGED = (*GPU, "tpu")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
      dispatch: how a device computes its tokens; never ``auto``.
      dispatch_reason: why that one.
      exchange: how tokens reach experts on other devices; never ``auto``.
      exchange_reason: why that one.
    """

    dispatch: str
    dispatch_reason: str
    exchange: str
    exchange_reason: str


def choose(config: MoEConfig, *, platform: str, expert_devices: int) -> Choice:
    """Resolves ``auto`` in ``moe.dispatch`` and ``moe.exchange``.

    Args:
      config: options of the MoE layer.
      platform: where the program is to run, as JAX calls it: cpu, gpu (cuda, rocm), tpu.
      expert_devices: size of the mesh's ``expert`` axis.

    Raises:
      ConfigError: a back end that was asked for by name cannot run there.
    """
    return Choice(*_dispatch(config, platform), *_exchange(config, platform, expert_devices))


def choose_here(config: MoEConfig) -> Choice:
    """As ``choose``, for the current mesh (``jax.set_mesh``), or the default device without one.

    An abstract mesh that names a device counts as that device, so that a program can be lowered
    for a GPU on a machine that has none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return choose(config, platform=jax.default_backend(), expert_devices=1)
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return choose(config, platform=platform, expert_devices=mesh.shape["expert"])


def _dispatch(config: MoEConfig, platform: str) -> tuple[str, str]:
    if config.dispatch == "auto":
        if platform in GPU:
            return "grouped", "chosen by auto: drops nothing, grouped products on the GPU"
        return "blocks", "chosen by auto: drops nothing, runs anywhere"
    if config.dispatch == "grouped" and platform not in GPU:
        raise ConfigError(
            "moe.dispatch", "grouped",
            f"its kernels need a GPU, and this is {platform}; use 'blocks' or 'auto'",
        )  # fmt: skip
    return config.dispatch, "config"


def _exchange(config: MoEConfig, platform: str, expert_devices: int) -> tuple[str, str]:
    if config.exchange == "ragged_all_to_all" and platform not in RAGGED:
        raise ConfigError(
            "moe.exchange", "ragged_all_to_all",
            f"XLA does not implement it on {platform}; use 'all_to_all' or 'auto'",
        )  # fmt: skip
    if expert_devices == 1:
        asked = "chosen by auto" if config.exchange == "auto" else f"instead of {config.exchange}"
        return "none", "config" if config.exchange == "none" else f"{asked}: mesh.expert is 1"
    if config.exchange != "auto":
        return config.exchange, "config"
    if platform in RAGGED:
        return "ragged_all_to_all", "chosen by auto: sends filled rows only"
    return "all_to_all", f"chosen by auto: runs anywhere, and on {platform} nothing sends less"
