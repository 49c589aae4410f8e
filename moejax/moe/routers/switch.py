"""Few experts a token, each by a rule of its own: Switch, GShard, Llama 4 and grouped experts."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import check, check_not_negative, check_positive
from moejax.moe import rowwise
from moejax.moe.routers.base import Card, RouterCounts, RouterInputs, Routing, ScaledRows
from moejax.moe.routers.losses import LossOptions, ScoredRouter
from moejax.moe.routers.top_k import TopKOptions, TopKRouter, gates


def _check_top_k(name: str, top_k: int, wanted: int) -> None:
    check(
        top_k == wanted, "moe.top_k", top_k,
        f"router {name} is defined for {wanted} only; set moe.top_k = {wanted}, or use another "
        "router",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SwitchOptions(TopKOptions):
    """Defaults are Switch's: jitter 0.01 on the router's input, balance loss 0.01."""

    name: str = "switch"
    jitter: float = 0.01
    balance_loss_weight: float = 0.01

    def check(self, num_experts: int, top_k: int) -> None:
        _check_top_k(self.name, top_k, 1)
        super().check(num_experts, top_k)


class SwitchRouter(TopKRouter):
    """The best of p = softmax(W x), with gate p: not 1, so that the gate trains the router.

    In training, the router sees x times noise from 0.99 to 1.01; the expert sees x.

    Source: Switch Transformers (arXiv 2101.03961, eq. 1 to 6; section 2.4 for the noise). Its
    capacity of 1 to 1.25 is ``moe.dispatch = 'capacity'``.
    """

    Options: ClassVar[type[SwitchOptions]] = SwitchOptions
    card: ClassVar[Card] = Card(
        "softmax, top-1, the gate is its probability; jitter in training", "Switch, 2101.03961",
        "", "one expert a token",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GShardOptions(LossOptions):
    """Defaults are GShard's; the loss's weight is that of its code in Lingvo.

    Attributes:
      keep_factor: in training the second expert is kept with probability min(1, factor · its gate).
    """

    name: str = "gshard"
    balance_loss_weight: float = 0.01
    keep_factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("router", self, "keep_factor")

    def check(self, num_experts: int, top_k: int) -> None:
        _check_top_k(self.name, top_k, 2)

    def counts(self, d_model: int, num_experts: int, top_k: int) -> RouterCounts:
        # At most 2 in training, exactly 2 in evaluation.
        return dataclasses.replace(super().counts(d_model, num_experts, top_k), measured=True)


class GShardRouter(ScoredRouter):
    """The two best of softmax(W x), gates over their sum; the second is kept by chance.

    With the gates g1 + g2 = 1, the second expert runs with probability min(1, 2 g2) in training.
    Where it does not, the first one's gate stays g1, as in the paper's algorithm. In evaluation,
    which the paper leaves open, it always runs. The losses see each token's first choice only.

    Source: GShard (arXiv 2006.16668, algorithm 1). The paper's loss is the one here over E²; the
    code multiplies that out, so that it is 1 at balance. Causal.
    """

    Options: ClassVar[type[GShardOptions]] = GShardOptions
    card: ClassVar[Card] = Card(
        "softmax, top-2 renormalised, the second kept with probability min(1, 2 g2)",
        "GShard, 2006.16668", "", "a second expert where it matters",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: GShardOptions = self.options
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        probabilities = jax.nn.softmax(logits, axis=-1)
        best = top_two(logits)
        gate = gates(probabilities, best, normalize=True)
        expert = best
        if inputs.train:
            drawn = jax.random.uniform(self.make_rng("router"), (len(logits),))
            kept = drawn < o.keep_factor * gate[:, 1]
            second = jnp.where(kept, best[:, 1], self.num_experts)
            expert = jnp.stack([best[:, 0], second], axis=-1)
        return self.decide(
            inputs, logits, probabilities, expert, gate,
            loss_expert=best[:, :1], loss_gate=gate[:, :1],
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Llama4Options(LossOptions):
    """The loss's weight is that of the released config, whose form is not published."""

    name: str = "llama4"
    balance_loss_weight: float = 0.001

    def check(self, num_experts: int, top_k: int) -> None:
        _check_top_k(self.name, top_k, 1)


class Llama4Router(ScoredRouter):
    """The best of W x; the expert computes sigmoid(its logit) · x, and its output has gate 1.

    The gate acts inside the expert's nonlinearity, which is not the same as scaling the output.

    Source: Llama 4's released code, also in Transformers (``Llama4TextMoe``). The shared expert
    there is ``moe.num_shared_experts = 1``; it sees x as it is. The code says nothing of balancing:
    the Switch-style loss here, of the sigmoids over their sum, is a choice. Causal.
    """

    Options: ClassVar[type[Llama4Options]] = Llama4Options
    card: ClassVar[Card] = Card(
        "sigmoid, top-1; the gate multiplies the expert's input", "Llama 4, its code", "",
        "loading Llama 4; beside a shared expert",
    )  # fmt: skip

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        scores = jax.nn.sigmoid(logits)
        # By the logit: sigmoids of large ones are all 1.
        expert = jnp.argmax(logits, axis=-1)[:, None]
        scale = jnp.take_along_axis(scores, expert, axis=-1).reshape(inputs.valid.shape)
        probabilities = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        return self.decide(
            inputs, logits, probabilities, expert, jnp.ones(expert.shape), rows=ScaledRows(scale)
        )


@dataclasses.dataclass(frozen=True)
class MoGEOptions(LossOptions):
    """Defaults have Pangu Pro MoE's form: one expert a group (8 of 64 experts in 8 groups).

    Attributes:
      num_groups: groups of neighbouring experts, such as those of one device, each of which gives
        moe.top_k / num_groups experts; 0 for moe.top_k groups.
      balance_loss_weight: over all tokens of a micro-batch; the paper has one of this form, whose
        weight could not be read, so this is Switch's.
    """

    name: str = "moge"
    num_groups: int = 0
    balance_loss_weight: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("router", self, "num_groups")

    def check(self, num_experts: int, top_k: int) -> None:
        groups = self.num_groups or top_k
        check(
            top_k % groups == 0, "router.num_groups", self.num_groups,
            f"does not divide moe.top_k = {top_k}, but every group gives equally many experts; "
            "choose a divisor",
        )  # fmt: skip
        check(
            num_experts % groups == 0, "router.num_groups", self.num_groups,
            f"makes {groups} groups, which does not divide moe.num_experts = {num_experts}; choose "
            "a divisor of it and of moe.top_k",
        )  # fmt: skip


class MoGERouter(ScoredRouter):
    """Softmax over all experts, then the best K / G of each of the G groups; gates as they are.

    Every token loads every group alike, so devices that hold a group each are always balanced;
    the experts of one group are not, hence the loss.

    Source: Mixture of Grouped Experts (arXiv 2505.21411, eq. 5 to 7) as reviews and the inference
    code in vLLM's Ascend plugin show it. The released weights also have a factor for each expert
    on the gates, which is left out. Causal.
    """

    Options: ClassVar[type[MoGEOptions]] = MoGEOptions
    card: ClassVar[Card] = Card(
        "softmax, then the best K / G of each of G groups", "Pangu Pro MoE, 2505.21411", "",
        "devices that are balanced whatever is learned",
    )  # fmt: skip
    replays: ClassVar[bool] = True

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        groups = self.options.num_groups or self.top_k
        logits = self.logits(inputs.x.reshape(-1, inputs.x.shape[-1]))
        probabilities = jax.nn.softmax(logits, axis=-1)
        expert = given = self.replayed(inputs)
        if given is None:
            expert = self._select(jax.lax.stop_gradient(logits), groups)
        gate = gates(probabilities, expert, False, partial=given is not None)
        return self.decide(inputs, logits, probabilities, expert, gate)

    def _select(self, logits: Float[Array, "T E"], groups: int) -> Int[Array, "T K"]:
        """The best of every group."""
        grouped = logits.reshape(len(logits), groups, -1)
        if self.top_k == groups:
            inside = jnp.argmax(grouped, axis=-1)[..., None]
        else:
            inside = rowwise.top_k(grouped, self.top_k // groups)[1]
        start = jnp.arange(groups) * grouped.shape[-1]
        return (inside + start[None, :, None]).reshape(len(logits), self.top_k)


def top_two(scores: Float[Array, "T E"]) -> Int[Array, "T 2"]:
    """Indices of the best and the second; ties go to the lower one. Not differentiable."""
    scores = jax.lax.stop_gradient(scores)
    first = jnp.argmax(scores, axis=-1)
    is_first = jnp.arange(scores.shape[-1])[None, :] == first[:, None]
    second = jnp.argmax(jnp.where(is_first, -jnp.inf, scores), axis=-1)
    return jnp.stack([first, second], axis=-1)
