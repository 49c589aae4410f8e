"""All routers by name, in the order of the README's table; and routers of a user's own."""

import sys

from moejax.config import ConfigError, check, import_module, nearest
from moejax.moe.routers import (
    adaptive,
    assignment,
    autonomy,
    cosine,
    default_vector,
    depth,
    dselect,
    expert_choice,
    fixed,
    noisy,
    published,
    remoe,
    soft_moe,
    sparsemixer,
    switch,
    zero_experts,
)
from moejax.moe.routers.base import Router
from moejax.moe.routers.force_balanced import ForceBalancedRouter
from moejax.moe.routers.top_k import TopKRouter
from moejax.moe.routers.trace import TraceRouter

_ROUTERS: tuple[type[Router], ...] = (
    # One matrix, fixed K.
    published.SoftmaxTopKRouter,
    published.MixtralRouter,
    published.GptOssRouter,
    published.DeepSeekMoERouter,
    published.DeepSeekV2Router,
    published.DeepSeekV3Router,
    published.DeepSeekV4Router,
    published.KimiK2Router,
    published.LossFreeRouter,
    published.CentredBiasRouter,
    published.SmebuRouter,
    published.QuantileBalancingRouter,
    published.GlobalBatchRouter,
    published.ErnieRouter,
    published.SimBalRouter,
    published.ExpertCouplingRouter,
    TopKRouter,
    noisy.NoisyTopKRouter,
    noisy.VMoERouter,
    switch.SwitchRouter,
    switch.GShardRouter,
    switch.Llama4Router,
    switch.MoGERouter,
    sparsemixer.SparseMixerRouter,
    cosine.XMoERouter,
    # As many experts as a token needs, or experts without matrices.
    adaptive.TopPRouter,
    adaptive.DynMoERouter,
    remoe.ReMoERouter,
    dselect.DSelectKRouter,
    expert_choice.ExpertThresholdRouter,
    zero_experts.MoEPlusPlusRouter,
    zero_experts.LongCatRouter,
    # By what the experts do.
    autonomy.AutonomyRouter,
    default_vector.DefaultVectorRouter,
    # Without learning.
    fixed.HashRouter,
    fixed.RandomRouter,
    # By competition among tokens, which leaks.
    expert_choice.ExpertChoiceRouter,
    assignment.BaseLayersRouter,
    assignment.SBaseRouter,
    soft_moe.SoftMoERouter,
    depth.MixtureOfDepthsRouter,
    # For measuring.
    ForceBalancedRouter,
    TraceRouter,
)

REGISTRY: dict[str, type[Router]] = {router.Options().name: router for router in _ROUTERS}


def find(name: str, *, own: bool = True) -> type[Router]:
    """The router of a name in ``REGISTRY``, or of a dotted path to a user's own class.

    Args:
      name: such as ``deepseek_v3`` or ``my_routers.NearestRouter``; a module is looked up on the
        Python path and in the working directory.
      own: the user's own config says the name. A name in the record of a run, which may be from
        anywhere, is not looked up in the working directory: the run's folder may lie there.

    Raises:
      ConfigError: no such router, with the nearest known one; or a path that leads to none.
    """
    field = "router.name"
    if isinstance(name, str) and name in REGISTRY:
        return REGISTRY[name]
    dotted = isinstance(name, str) and "." in name
    hint = nearest(name, REGISTRY)
    check(dotted, field, name, f"no such router; {hint}, or give a path such as my_module.MyRouter")
    module, _, attribute = name.rpartition(".")
    # Some of its modules do things when they are imported, and none has a router.
    check(
        module.partition(".")[0] not in sys.stdlib_module_names, field, name,
        "is of Python's standard library, which has no routers; give the path of your own class",
    )  # fmt: skip
    try:
        found = getattr(import_module(module, here=own), attribute, None)
    except Exception as error:  # the user's own file may raise anything
        raise ConfigError(
            field, name, f"importing {module} raised {type(error).__name__}: {error}; mend it, or "
            "put its folder on the Python path"
        ) from error  # fmt: skip
    good = isinstance(found, type) and issubclass(found, Router)
    check(
        good, field, name,
        f"{module} has no Router class {attribute}; give the path of a subclass of "
        "moejax.moe.routers.Router",
    )  # fmt: skip
    return found
