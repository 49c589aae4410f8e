"""Everything a run needs before its first step; nothing here writes to the run directory."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import optax

from moejax.config import ConfigError, check
from moejax.cost import counts, hardware, prices, utilisation
from moejax.cost.memory import Layout, Placement
from moejax.cost.plan import make_plan
from moejax.data import DataConfig, TextDataset, cache, open_dataset
from moejax.models import ModelConfig
from moejax.models.layers import compute_dtype
from moejax.moe import MoEConfig
from moejax.moe.choose import Choice, choose
from moejax.moe.dispatch.capacity import LEAKING_POLICIES
from moejax.moe.exchange import local_sizes
from moejax.parallel import MeshConfig, check_fits, make_mesh
from moejax.parallel.host_threads import enough_threads
from moejax.parallel.layout import remedies
from moejax.training import data_account
from moejax.training.optimizers import OptimConfig, learning_rate, make_optimizer, state_bytes
from moejax.training.run_config import RunConfig
from moejax.training.schedules import LearningRate

MUON_BYTES = 4  # one FP32 moment of a matrix


@dataclasses.dataclass(frozen=True)
class Billing:
    """What a run is charged by.

    Attributes:
      hardware: name of the chip.
      devices: devices billed; on a CPU, cores.
      price: the rate of one device.
      peak_flops: FLOP/s of all devices together.
      peak_source: where the peak is from.
      flops_per_token: training FLOPs of a token, by the experts that it is expected to run through.
      assignment_flops: training FLOPs of a token in one routed expert, where a router's tokens run
        through as many as they like; 0 where the expected number is exact.
      assignments_per_token: what ``flops_per_token`` expects of all MoE layers together.
    """

    hardware: str
    devices: int
    price: prices.Price
    peak_flops: float
    peak_source: str
    flops_per_token: float
    assignment_flops: float = 0.0
    assignments_per_token: float = 0.0

    def model_flops(self, tokens: int, assignments: float) -> float:
        """Training FLOPs of tokens that really ran through so many experts, all layers added."""
        more = assignments - tokens * self.assignments_per_token
        return tokens * self.flops_per_token + self.assignment_flops * more


@dataclasses.dataclass(frozen=True)
class Setup:
    """A validated run: its config, mesh, text, optimizer, bill, and what ``auto`` came to.

    ``frozen`` is the config of the second model that its objective looks at, if there is one.
    """

    config: RunConfig
    mesh: jax.sharding.Mesh
    choice: Choice | None
    products: dict[str, dict] | None
    dataset: TextDataset
    optimizer: optax.GradientTransformation
    schedule: LearningRate
    billing: Billing
    frozen: ModelConfig | None = None


def use_compilation_cache(folder: pathlib.Path) -> None:
    """Keeps compiled programs in a folder, unless a cache is set already."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def prepare(config: RunConfig) -> Setup:
    """Checks a config against devices and text, and opens the text.

    Raises:
      ConfigError: devices, mesh, batch, corpus or tokenizer do not fit the config.
    """
    use_compilation_cache(config.data.cache_path / "xla")
    train = config.train
    mesh = make_mesh(config.mesh)
    check(
        jax.process_count() == 1 or mesh.size == jax.device_count(), "mesh",
        dataclasses.asdict(config.mesh),
        f"has {mesh.size} of the {jax.device_count()} devices of {jax.process_count()} processes, "
        "and each has to take part; mesh.data = 0 takes all devices that are left",
    )  # fmt: skip
    part = train.batch_size // train.micro_batches
    check_fits(tuple(mesh.shape.values()), config.model, part, train.seq_len)
    choice = choose_back_ends(config.model, mesh)
    with jax.set_mesh(mesh):
        products = grouped_products(config.model, choice, part, train.seq_len)
    config = with_dtype(config)
    frozen = second_model(config)
    if frozen is not None:
        _check_second(config, frozen, mesh)
    billing = make_billing(config, mesh, frozen)
    with _one_at_a_time(config.data):
        dataset = open_dataset(
            config.data, seq_len=train.seq_len, vocab_size=config.model.vocab_size
        )
    rows = len(dataset.train)
    check(
        rows >= train.batch_size, "train.batch_size", train.batch_size,
        f"is above the {rows} rows that the corpus fills; use a smaller batch, shorter rows or "
        "more text",
    )  # fmt: skip
    attention = config.model.attention.implementation
    check(
        attention != "cudnn" or mesh.devices.flat[0].platform == "gpu",
        "model.attention.implementation", attention, "needs a GPU, and there is none; use 'auto'",
    )  # fmt: skip
    schedule = learning_rate(config.optim, train.steps)
    optimizer = make_optimizer(config.optim, train.steps)
    return Setup(config, mesh, choice, products, dataset, optimizer, schedule, billing, frozen)


def with_dtype(config: RunConfig) -> RunConfig:
    """The config as it is recorded: with the type that its model computes in here, not ``auto``."""
    enough_threads()  # the type looks for devices
    dtype = compute_dtype(config.model.dtype).name
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def second_model(config: RunConfig) -> ModelConfig | None:
    """The model that a run's objective looks at, with back ends that run anywhere; or None.

    Raises:
      ConfigError: the teacher's run cannot be read.
    """
    if config.looks_at is None:
        return None
    if config.looks_at == "start":  # the run's own model
        return config.model
    from moejax.training.restore import exact_as_auto  # they build upon this module
    from moejax.training.start import read_other

    _, _, other = read_other("distill", config.distill.run)
    model = exact_as_auto(other).model
    attention = model.attention
    if attention.implementation == "cudnn":
        attention = dataclasses.replace(attention, implementation="auto")
    dtype = compute_dtype(model.dtype).name
    return dataclasses.replace(model, attention=attention, dtype=dtype, mtp_depth=0)


def _check_second(config: RunConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError where a second model does not fit the mesh, or cannot run here."""
    train = config.train
    try:
        shape = tuple(mesh.shape.values())
        check_fits(shape, model, train.batch_size // train.micro_batches, train.seq_len)
        choose_back_ends(model, mesh)
    except ConfigError as error:
        block = config.looks_at
        shown = getattr(config, block).run
        raise ConfigError(f"{block}.run", shown, f"its model does not fit: {error}") from None


def _one_at_a_time(data: DataConfig) -> contextlib.AbstractContextManager[None]:
    """Where several processes of a machine would train the same tokenizer, the first one does."""
    cached = data.source != "shards" and data.tokenizer != "bytes"
    if jax.process_count() == 1 or not cached:
        return contextlib.nullcontext()
    return cache.alone(data.cache_path, "dataset")


def choose_back_ends(model: ModelConfig, mesh: jax.sharding.Mesh) -> Choice | None:
    """How tokens are dispatched and exchanged on a mesh; None for a dense model.

    Raises:
      ConfigError: a back end that the config names cannot run on these devices.
    """
    if model.moe is None:
        return None
    platform = mesh.devices.flat[0].platform
    return choose(model.moe, platform=platform, expert_devices=mesh.shape["expert"])


def grouped_products(
    model: ModelConfig, choice: Choice | None, rows: int, seq_len: int
) -> dict[str, dict] | None:
    """Which kernels compute each product of an MoE layer, on the current mesh.

    Args:
      model: the model's config.
      choice: what runs; only ``grouped`` has kernels to choose from.
      rows: rows of a micro-batch.
      seq_len: positions of a row.

    Returns:
      ``backend``, ``settings`` and ``why`` by matrix and leg; None for other dispatchers.

    Raises:
      ConfigError: no kernels run here.
    """
    if choice is None or choice.dispatch != "grouped":
        return None
    # Here, so that the kernels' libraries load where they are used only.
    from moejax.moe.grouped_matmul import Layer, describe

    moe = model.moe
    tokens, experts, choices = local_sizes(
        choice.exchange, rows, seq_len, moe.num_experts, moe.top_k, moe.exchange_factor
    )
    width = moe.d_expert // jax.sharding.get_abstract_mesh().shape["tensor"]
    layer = Layer(tokens, moe.latent_dim or model.d_model, width, experts, choices)
    # What FP8 holds is multiplied in float32.
    dtype = "float32" if model.precision == "fp8" else compute_dtype(model.dtype).name
    return describe(layer, dtype)


def make_billing(
    config: RunConfig, mesh: jax.sharding.Mesh, frozen: ModelConfig | None = None
) -> Billing:
    """Devices, rate and peak of a run on this machine, a second model's forward pass included."""
    device = mesh.devices.flat[0]
    name = config.cost.hardware
    if name == "auto":
        name = hardware.detect(device.platform, device.device_kind)
    # Virtual CPU devices share the host's cores, and cores are what is billed.
    devices = hardware.cpu_cores() if name == "cpu" else mesh.size
    peak, source = hardware.peak_flops(name, devices)
    counted = counts.count(config.model, config.train.seq_len)
    price = config.cost.rate(name)
    flops = counted.flops_per_token.train + forward_flops(frozen, config.train.seq_len)
    moe = config.model.moe
    if moe is None:
        return Billing(name, devices, price, peak, source, flops)
    router = moe.router.counts(config.model.d_model, moe.num_experts, moe.top_k)
    if not router.measured:
        return Billing(name, devices, price, peak, source, flops)
    expected = counts.routed_layers(config.model) * router.expected_experts
    each = counts.assignment_flops(config.model)
    return Billing(name, devices, price, peak, source, flops, each, expected)


def forward_flops(model: ModelConfig | None, seq_len: int) -> float:
    """FLOPs of a token in a model that is only run; 0 without one."""
    return 0.0 if model is None else counts.count(model, seq_len).flops_per_token.forward


def plan_run(setup: Setup) -> dict:
    """The bill before the run: see ``moejax.cost.plan.make_plan``."""
    config = setup.config
    placement = placement_of(config, layout_of(config.mesh, setup.mesh.size))
    tokens = planned_tokens(setup)
    return plan_of(config, setup.billing, placement, tokens=tokens, second=setup.frozen)


def plan_of(config: RunConfig, billing: Billing, placement: Placement, **work: Any) -> dict:
    """A plan by a run's own rate, peak and mesh, with what to change where it does not fit.

    Args:
      config: the run.
      billing: what it is charged by.
      placement: what one device has of a step.
      work: what else ``make_plan`` takes: ``tokens``, and a second model or more FLOPs.
    """
    cost = config.cost
    found = make_plan(
        config.model,
        seq_len=config.train.seq_len,
        hardware=billing.hardware,
        devices=billing.devices,
        price=billing.price,
        used=utilisation.given(cost.mfu, "config") if cost.mfu else None,
        region=cost.region,
        pue=cost.pue,
        dollars_per_kwh=cost.dollars_per_kwh,
        purchase=cost.purchase(billing.hardware),
        peak_flops=billing.peak_flops,
        peak_source=billing.peak_source,
        placement=placement,
        **work,
    )
    return with_remedies(found, config.model, placement)


def layout_of(mesh: MeshConfig, devices: int | None = None) -> Layout:
    """A mesh's sizes as ``moejax.cost`` has them; ``data`` is filled in from the devices."""
    rest = mesh.fsdp * mesh.expert * mesh.context * mesh.tensor
    copies = mesh.data or max(1, (devices or 1) // rest)
    return Layout(copies, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor)


def placement_of(config: RunConfig, layout: Layout) -> Placement:
    """What one device has of a run's step."""
    train = config.train
    rows = train.batch_size // train.micro_batches // layout.rows
    state = optimizer_bytes(config.optim, config.model)
    return Placement(layout, max(1, rows), train.micro_batches, state)


def optimizer_bytes(optim: OptimConfig, model: ModelConfig) -> float:
    """Bytes of optimizer state for each parameter: AdamW's moments, or Muon's one in float32."""
    adam = state_bytes(optim)
    if optim.optimizer == "adamw":
        return adam
    params = counts.count(model, 1).params
    parts = params.by_component
    others = sum(parts[name] for name in ("embedding", "head", "router", "norms"))
    return MUON_BYTES + (adam - MUON_BYTES) * others / (params.total + params.mtp)


def with_remedies(plan: dict, model: ModelConfig, placement: Placement) -> dict:
    """A plan by a config's own mesh, with what to change where it does not fit (``remedies``)."""
    plan["layout"].setdefault("source", "config")
    plan["remedies"] = []
    if plan["memory_fits"] is False:
        plan["remedies"] = remedies(
            model, hardware=plan["hardware"], seq_len=plan["seq_len"], placement=placement
        )
    return plan


def planned_tokens(setup: Setup) -> float:
    """Tokens that the whole run will train on, padding left out."""
    train = setup.config.train
    return train.steps * train.batch_size * setup.dataset.train.tokens_per_row


def epochs_line(setup: Setup) -> str:
    """How often the run goes through the text, each source's too; warns above four times."""
    train = setup.config.train
    return "\n".join(data_account.lines_before(setup.dataset, train.steps * train.batch_size))


def back_end_lines(
    moe: MoEConfig | None, choice: Choice | None, products: dict[str, dict] | None = None
) -> list[str]:
    """What computes the experts and carries the tokens, why, and a warning of what leaks."""
    if moe is None or choice is None:
        return []
    lines = [
        f"dispatch    {choice.dispatch} ({choice.dispatch_reason})",
        f"exchange    {choice.exchange} ({choice.exchange_reason})",
    ]
    for name, product in (products or {}).items():
        lines.append(f"  {name:<26}{product['backend']} ({product['why']})")
    return lines + [f"warning: {text}" for text in leaks(moe, choice)]


def precision_lines(model: ModelConfig) -> list[str]:
    """How low-precision products are computed; nothing where they are ``native``."""
    if model.precision == "native":
        return []
    return [
        "precision   fp8: DeepSeek-V3's recipe simulated in float32 (attention's projections, "
        "dense layers, experts); no product runs on FP8 hardware"
    ]


def leaks(moe: MoEConfig | None, choice: Choice | None) -> list[str]:
    """What of a config lets a token's output depend on later ones, in words; empty for nothing."""
    if moe is None or choice is None:
        return []
    found = []
    if moe.router.leaks:
        held_out = "which has no causal form, and neither is that of held-out text"
        if not moe.router.leaks_in_evaluation:
            held_out = "held-out text is routed by its causal form"
        found.append(
            f"router {moe.router.name} lets later tokens change earlier ones; the training loss is "
            f"not a language model's; {held_out}"
        )
    if choice.dispatch == "capacity" and moe.drop_policy in LEAKING_POLICIES:
        found.append(
            f"moe.drop_policy = {moe.drop_policy!r} lets later tokens displace earlier "
            "ones; this loss is not a language model's"
        )
    return found
