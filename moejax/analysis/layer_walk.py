"""A small MoE layer with everything that happens inside it at hand: 'Anatomy of an MoE layer'."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.cost import text
from moejax.cost.counts import count
from moejax.models import AttentionConfig, ModelConfig
from moejax.models.presets import PRESETS
from moejax.moe import MoEConfig
from moejax.moe.bias_rules import sign_bias_update
from moejax.moe.diagnostics import max_violation
from moejax.moe.dispatch import drop, expert_capacity, sort_assignments
from moejax.moe.dispatch.blocks import BlockSize, block_sizes, plan_blocks
from moejax.moe.exchange.rows import carried_choices
from moejax.moe.exchange.traffic import traffic
from moejax.moe.layer import MoELayer
from moejax.moe.routers import DeepSeekV3Options, RouterInputs
from moejax.moe.routers.stats import assignment_counts
from moejax.moe.routers.top_k import gates, select

SENTENCE = "the router sends a token to few experts and the experts answer with what they know"
WORDS = tuple(SENTENCE.split())
D_MODEL, DEVICES = 32, 4
BIAS_STEP, BIAS_UPDATES = 0.01, 200
# Small enough to be drawn; ``moejax.moe.dispatch.blocks.block_sizes`` chooses in earnest.
DRAWN_BLOCKS = (BlockSize(4, 1), BlockSize(2, 1))

ROUTER = DeepSeekV3Options(num_groups=4, groups_kept=2)
CONFIG = MoEConfig(num_experts=16, top_k=4, d_expert=16, num_shared_experts=1, router=ROUTER)
# Choices that one row of the exchange carries; a token with more on one device sends another.
CARRIED = carried_choices(CONFIG.num_experts, CONFIG.top_k, DEVICES)


@dataclasses.dataclass(frozen=True)
class Walk:
    """A layer, its input, and what becomes of it; NumPy arrays throughout.

    Attributes:
      x: the layer's input, one vector a word of ``WORDS``.
      kernel: the router's matrix.
      bias: its selection bias, as ``BIAS_UPDATES`` updates by the sign rule on these tokens left
        it.
      gate_up: the experts' first matrices, gate and up.
      down: their second ones.
      logits: the router's scores before the sigmoid.
      scores: after it.
      expert: chosen experts, best first.
      gate: combine weights.
      shared: what the shared expert gives.
      y: what the layer gives.
    """

    x: Float[np.ndarray, "T D"]
    kernel: Float[np.ndarray, "D E"]
    bias: Float[np.ndarray, " E"]
    gate_up: Float[np.ndarray, "E D 2 F"]
    down: Float[np.ndarray, "E F D"]
    logits: Float[np.ndarray, "T E"]
    scores: Float[np.ndarray, "T E"]
    expert: Int[np.ndarray, "T K"]
    gate: Float[np.ndarray, "T K"]
    shared: Float[np.ndarray, "T D"]
    y: Float[np.ndarray, "T D"]


def embed(seed: int = 0) -> Float[np.ndarray, "T D"]:
    """A vector for each of ``WORDS``: its own, the same wherever it stands, and a little context.

    All share a direction, as the inputs of real layers do, which is what makes an untrained router
    prefer some experts.
    """
    rng = np.random.default_rng(seed)
    own = {word: rng.standard_normal(D_MODEL) for word in dict.fromkeys(WORDS)}
    common = 0.5 * rng.standard_normal(D_MODEL)
    context = 0.2 * rng.standard_normal((len(WORDS), D_MODEL))
    return (np.stack([own[word] for word in WORDS]) + common + context).astype(np.float32)


def walk(seed: int = 0) -> Walk:
    """Runs ``WORDS`` through a layer of ``CONFIG`` with random weights and a bias that balances.

    Args:
      seed: of the inputs and of the weights.
    """
    x = embed(seed)
    layer, inputs = MoELayer(CONFIG), RouterInputs(x[None], np.ones((1, len(x)), bool))
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(seed), inputs))
    params = jax.device_get(variables["params"])
    logits = x @ params["router"]["kernel"]
    scores = 1 / (1 + np.exp(-logits))
    bias = balanced_bias(scores)
    state = {"router": {"bias": jnp.asarray(bias)}}
    run = jax.jit(layer.apply)
    y = np.asarray(run({"params": params, "router_state": state}, inputs).y[0])
    no_experts = jax.tree.map(np.zeros_like, params["experts"])
    alone = {"params": {**params, "experts": no_experts}, "router_state": state}
    expert = choose(scores, bias)
    gate = gates(jnp.asarray(scores), expert, ROUTER.normalize_gates, ROUTER.routed_scale)
    return Walk(
        x, params["router"]["kernel"], bias, params["experts"]["gate_up"],
        params["experts"]["down"], logits, scores, np.asarray(expert), np.asarray(gate),
        np.asarray(run(alone, inputs).y[0]), y,
    )  # fmt: skip


def choose(
    scores: Float[np.ndarray, "T E"], bias: Float[np.ndarray, " E"], groups_kept: int | None = None
) -> Int[np.ndarray, "T K"]:
    """``moejax.moe.routers.top_k.select`` by ``CONFIG``, from as many groups as given."""
    kept = ROUTER.groups_kept if groups_kept is None else groups_kept
    chosen = select(
        jnp.asarray(scores), jnp.asarray(bias), CONFIG.top_k, ROUTER.num_groups, kept
    )  # fmt: skip
    return np.asarray(chosen)


def balanced_bias(scores: Float[np.ndarray, "T E"]) -> Float[np.ndarray, " E"]:
    """The selection bias after ``BIAS_UPDATES`` updates by the sign rule on the same tokens."""
    bias = jnp.zeros(CONFIG.num_experts)
    update = jax.jit(sign_bias_update)
    for _ in range(BIAS_UPDATES):
        bias = update(bias, load(choose(scores, bias)), BIAS_STEP)
    return np.asarray(bias)


def load(expert: Int[np.ndarray, "T K"]) -> Float[np.ndarray, " E"]:
    """Assignments of each expert."""
    return np.asarray(assignment_counts(jnp.asarray(expert), CONFIG.num_experts))


def load_text(w: Walk) -> str:
    """Load and MaxVio without and with the selection bias."""
    lines = []
    for name, bias in (("without bias", 0 * w.bias), ("with bias", w.bias)):
        counts = load(choose(w.scores, bias))
        numbers = " ".join(f"{int(number):2d}" for number in counts)
        lines.append(f"{name:12}  {numbers}   MaxVio {max_violation(counts):.2f}")
    return "\n".join(lines)


def token_text(w: Walk, token: int) -> str:
    """One token's experts: score, bias and gate."""
    lines = [
        f"token {token}, {WORDS[token]!r}",
        "expert  group  score    bias  score + bias   gate",
    ]
    for expert, gate in zip(w.expert[token], w.gate[token], strict=True):
        score, bias = w.scores[token, expert], w.bias[expert]
        group = expert // (CONFIG.num_experts // ROUTER.num_groups)
        lines.append(
            f"{expert:6}  {group:5}  {score:5.3f}  {bias:+6.3f}  {score + bias:12.3f}  {gate:5.3f}"
        )
    return "\n".join([*lines, f"the gates sum to {w.gate[token].sum():.2f}"])


def padding_text() -> str:
    """Rows that ``blocks`` multiplies over those that it must, at a few batch sizes."""
    rng = np.random.default_rng(0)
    lines = ["tokens  blocks of   assignments  rows multiplied  empty"]
    for tokens in (64, 512, 4096, 32768):
        scores = rng.standard_normal((tokens, CONFIG.num_experts)).astype(np.float32)
        expert = jax.lax.top_k(jnp.asarray(scores), CONFIG.top_k)[1]
        sizes = block_sizes(expert.size, CONFIG.num_experts)
        plan = plan_blocks(expert, CONFIG.num_experts, sizes)
        rows = sum(
            int(group.used) * size.rows for group, size in zip(plan.blocks, sizes, strict=True)
        )
        names = ", ".join(str(size.rows) for size in sizes)
        empty = 1 - expert.size / rows
        lines.append(f"{tokens:6}  {names:9}  {expert.size:12,}  {rows:15,}  {empty:5.1%}")
    return "\n".join(lines)


def one_layer() -> ModelConfig:
    """A model of this one MoE layer, for counting."""
    return ModelConfig(
        vocab_size=256, d_model=D_MODEL, num_layers=1, moe=CONFIG,
        attention=AttentionConfig(num_heads=2),
    )  # fmt: skip


def flops_text() -> str:
    """Parameters and forward FLOPs of a token: of this layer, and of all layers of DeepSeek-V3."""
    rows = [["", "held", "a token passes", "FLOP a token, forward"]]
    for name, model in (("this layer", one_layer()), ("DeepSeek-V3", PRESETS["deepseek_v3"])):
        found = count(model, 4096)
        for part in ("router", "routed_experts", "shared_experts"):
            numbers = (
                found.params.by_component[part],
                found.params.active_by_component[part],
                found.flops_per_token.by_component[part],
            )
            title = f"{name}, {part.replace('_', ' ')}"
            rows.append([title, *(text.parameters(number) for number in numbers)])
    return text.columns(rows)


def kept(w: Walk, factor: float, bias: Float[np.ndarray, " E"]) -> Int[np.ndarray, "T K"]:
    """The choices that find a slot at a capacity factor, in ``position`` order; E where none."""
    expert = choose(w.scores, bias)
    tokens = len(expert)
    slots = expert_capacity(tokens, CONFIG.top_k, CONFIG.num_experts, factor)
    left, _ = drop(
        jnp.asarray(expert), jnp.asarray(w.gate), num_experts=CONFIG.num_experts, group=tokens,
        slots=slots,
    )  # fmt: skip
    return np.asarray(left)


def dropped_share(w: Walk, factor: float, bias: Float[np.ndarray, " E"]) -> float:
    """Share of the assignments that find no slot."""
    return float(np.mean(kept(w, factor, bias) == CONFIG.num_experts))


def sent(w: Walk, groups_kept: int) -> dict[str, float]:
    """What ``moejax.moe.exchange`` would move over ``DEVICES`` devices, two a machine.

    Args:
      w: the layer.
      groups_kept: groups, that is devices, that a token may choose its experts from.

    Returns:
      The sums of ``traffic``: devices and machines reached, rows that leave a device.
    """
    expert = choose(w.scores, w.bias, groups_kept)
    sums = traffic(
        jnp.asarray(expert), CONFIG.num_experts, devices=DEVICES, devices_per_node=2, parts=DEVICES
    )
    return {name: float(value) for name, value in sums.items()}


def exchange_text(w: Walk) -> str:
    """The exchange's bill, for each limit on the groups of a token."""
    lines = ["groups kept  devices a token  machines a token  rows sent  bytes sent"]
    for groups in range(1, ROUTER.num_groups + 1):
        sums = sent(w, groups)
        # There and back, in float32 as this layer computes.
        moved = 2 * sums["rows_sent"] * D_MODEL * 4
        lines.append(
            f"{groups:11}  {sums['devices_touched'] / len(w.x):15.2f}"
            f"  {sums['nodes_touched'] / len(w.x):16.2f}  {sums['rows_sent']:9.0f}  {moved:10,.0f}"
        )
    return "\n".join(lines)


def sorted_rows(w: Walk) -> Int[np.ndarray, " M"]:
    """The assignment (t · K + k) of each row after sorting by expert."""
    return np.asarray(sort_assignments(jnp.asarray(w.expert), CONFIG.num_experts).order)
