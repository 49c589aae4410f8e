"""The composed router: score, selection, gates, losses and bias rule are separate choices.

Most published routers are this one with other options; ``published`` names them.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import check, check_not_negative, check_positive
from moejax.moe import balance, rowwise
from moejax.moe.bias_rules import BiasRule, BiasRuleName
from moejax.moe.quantiles import histogram
from moejax.moe.routers.base import Card, RouterInputs, Routing
from moejax.moe.routers.losses import Losses, LossOptions, ScoredRouter

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
GroupScore = Literal["top2", "max"]


@dataclasses.dataclass(frozen=True)
class TopKOptions(LossOptions):
    """Options of the composed router.

    Attributes:
      score: from logits to scores: ``softmax`` over the experts, ``sigmoid`` of each (V3), or
        ``sqrt_softplus``, the root of log(1 + e^logit).
      logit_bias: a learned bias on the logits (gpt-oss).
      jitter: in training, x is multiplied for the router by noise from 1 - jitter to 1 + jitter.
      num_groups: groups of neighbouring experts, such as those of one device.
      groups_kept: groups that a token may choose its experts from.
      group_score: of a group: the sum of its two best (V3) or its best (V2).
      normalize_gates: divide the chosen scores by their sum. With ``softmax`` this is the same as
        a softmax over the chosen logits (Mixtral).
      routed_scale: factor on the gates.
      bias_rule: what moves the selection bias, which is added to the scores for choosing only;
        ``none`` keeps none. See ``moejax.moe.bias_rules``.
      bias_step: size of the bias's step; 0 freezes it. 0.001 needs 300 to 1,000 steps to balance;
        shorter runs want more.
      bias_momentum: share of the past that ``smebu`` and ``quantile`` keep.
      bias_stop_step: optimizer steps after which the bias stays; 0 means never.
      device_loss_weight: balance between groups, as between devices (V2).
      communication_loss_weight: balance of what groups receive (V2).
    """

    name: str = "top_k"
    score: Score = "softmax"
    logit_bias: bool = False
    jitter: float = 0.0
    num_groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = "top2"
    normalize_gates: bool = False
    routed_scale: float = 1.0
    bias_rule: BiasRuleName = "none"
    bias_step: float = 1e-3
    bias_momentum: float = 0.5
    bias_stop_step: int = 0
    device_loss_weight: float = 0.0
    communication_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("router", self, "num_groups", "groups_kept", "routed_scale")
        check_not_negative("router", self, "jitter")
        check(
            self.groups_kept <= self.num_groups, "router.groups_kept", self.groups_kept,
            f"is above router.num_groups = {self.num_groups}; keep at most that many",
        )  # fmt: skip
        self.rule.check()

    @property
    def rule(self) -> BiasRule:
        """The bias rule with its constants."""
        return BiasRule(self.bias_rule, self.bias_step, self.bias_momentum, self.bias_stop_step)

    def check(self, num_experts: int, top_k: int) -> None:
        check(
            not (self.normalize_gates and top_k == 1), "router.normalize_gates", True,
            "with moe.top_k = 1 makes every gate the same, so the router learns nothing from the "
            "loss; set it to False or raise moe.top_k",
        )  # fmt: skip
        check(
            num_experts % self.num_groups == 0, "router.num_groups", self.num_groups,
            f"does not divide moe.num_experts = {num_experts}; choose a divisor",
        )  # fmt: skip
        size = num_experts // self.num_groups
        check(
            self.num_groups == 1 or size >= 2 or self.group_score == "max",
            "router.num_groups", self.num_groups,
            "leaves one expert a group, but a group is scored by its two best; use fewer groups",
        )  # fmt: skip
        reachable = self.groups_kept * size
        check(
            top_k <= reachable, "router.groups_kept", self.groups_kept,
            f"leaves {reachable} experts, fewer than moe.top_k = {top_k}; keep more groups",
        )  # fmt: skip
        check(
            self.bias_rule != "quantile" or top_k < num_experts, "router.bias_rule", "quantile",
            "needs moe.top_k below moe.num_experts; choose fewer experts a token or another rule",
        )  # fmt: skip
        check(
            self.bias_rule != "longcat" or self.num_choices(num_experts) > num_experts,
            "router.bias_rule", "longcat",
            "steers how many experts with matrices a token gets, so it needs some without; use "
            "router.name = 'longcat', or another rule",
        )  # fmt: skip

    def counts(self, d_model: int, num_experts: int, top_k: int):
        counted = super().counts(d_model, num_experts, top_k)
        bias = self.num_choices(num_experts) if self.logit_bias else 0
        return dataclasses.replace(counted, params=counted.params + bias)


class TopKRouter(ScoredRouter):
    """Top-k of scores plus selection bias inside the best groups; gates from the scores alone.

    The bias only selects: gates do not depend on it and it gets no gradient. After each optimizer
    step it moves by the load of that step's batch, so it knows earlier batches only. Causal.
    """

    Options: ClassVar[type[TopKOptions]] = TopKOptions
    card: ClassVar[Card] = Card(
        "top-k of softmax, sigmoid or √softplus scores, every choice its own option",
        "composed of those above",
        "selection bias, by rule",
        "an ablation that changes one choice at a time",
    )
    replays: ClassVar[bool] = True

    @nn.compact
    def __call__(self, inputs: RouterInputs) -> Routing:
        o: TopKOptions = self.options
        logits = self.scored_logits(inputs)
        scores = score(o.score, logits)
        bias = self.bias(logits.shape[-1])
        expert = given = self.replayed(inputs)
        if given is None:
            expert = select(scores, bias, self.top_k, o.num_groups, o.groups_kept, o.group_score)
        gate = gates(scores, expert, o.normalize_gates, o.routed_scale, partial=given is not None)
        probabilities = normalized(o.score, scores)
        return self.decide(
            inputs, logits, probabilities, expert, gate,
            self.group_losses(inputs, expert, probabilities),
            stats=self.bias_stats(inputs, scores, bias),
        )  # fmt: skip

    def scored_logits(self, inputs: RouterInputs) -> Float[Array, "T N"]:
        """Logits of all tokens, with what the options add to them."""
        o: TopKOptions = self.options
        x = inputs.x.reshape(-1, inputs.x.shape[-1]).astype(jnp.float32)
        if o.jitter and inputs.train:
            noise = jax.random.uniform(
                self.make_rng("router"), x.shape, minval=1 - o.jitter, maxval=1 + o.jitter
            )
            x = x * noise
        logits = self.logits(x)
        if o.logit_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("router_expert",))
            logits = logits + self.param("logit_bias", init, logits.shape[-1:], jnp.float32)[None]
        return logits

    def bias(self, choices: int) -> Float[Array, " N"]:
        """The selection bias; zeros without a rule.

        ``router_state`` is a collection of its own: read here, written by the training step only.
        """
        state = {
            name: self.variable("router_state", name, lambda value=value: value).value
            for name, value in self.options.rule.initial(choices).items()
        }
        return state.get("bias", jnp.zeros(choices, jnp.float32))

    def group_losses(
        self, inputs: RouterInputs, expert: Int[Array, "T K"], probabilities: Float[Array, "T N"]
    ) -> Losses:
        """DeepSeek-V2's balance between devices and of communication, by row."""
        o: TopKOptions = self.options
        found: Losses = {}
        rows = lambda values: values.reshape(*inputs.valid.shape, -1)
        expert, probabilities = rows(expert), rows(probabilities)
        mean = lambda values: balance.mean_of_rows(values, inputs.valid)
        if o.device_loss_weight:
            fractions = balance.load_fractions(expert, inputs.valid, probabilities.shape[-1])
            average = balance.mean_probabilities(probabilities, inputs.valid)
            value = balance.group_balance_loss(fractions, average, o.num_groups)
            found["device"] = (o.device_loss_weight, mean(value))
        if o.communication_loss_weight:
            value = balance.communication_loss(
                expert, probabilities, inputs.valid, o.num_groups, o.groups_kept
            )
            found["communication"] = (o.communication_loss_weight, mean(value))
        return found

    def bias_stats(
        self, inputs: RouterInputs, scores: Float[Array, "T N"], bias: Float[Array, " N"]
    ) -> dict[str, Array]:
        """What the bias rule needs beside the load."""
        if self.options.bias_rule != "quantile":
            return {}
        biased = scores + bias[None, :]
        # The least of them, not a slice: that makes XLA on CPUs sort every row.
        threshold = jnp.min(rowwise.top_k(biased, self.top_k + 1)[0], axis=-1, keepdims=True)
        return {"score_histogram": histogram(scores - threshold, inputs.valid.reshape(-1))}

    def update(self, state: dict[str, Array], stats: dict[str, Array]) -> dict[str, Array]:
        share = self.top_k / self.num_experts
        return self.options.rule.update(state, stats["load"], stats.get("score_histogram"), share)


def score(name: Score, logits: Float[Array, "T N"]) -> Float[Array, "T N"]:
    """Scores from logits: see ``TopKOptions.score``."""
    if name == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if name == "sigmoid":
        return jax.nn.sigmoid(logits)
    return jnp.sqrt(jax.nn.softplus(logits))


def normalized(name: Score, scores: Float[Array, "T N"]) -> Float[Array, "T N"]:
    """Scores that sum to 1 over the choices."""
    if name == "softmax":
        return scores
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)


def select(
    scores: Float[Array, "T E"],
    bias: Float[Array, " E"],
    top_k: int,
    num_groups: int = 1,
    groups_kept: int = 1,
    group_score: GroupScore = "top2",
) -> Int[Array, "T K"]:
    """Indices of the top-k of scores + bias inside each token's best groups.

    A group's score is the sum of the two best biased scores in it, or the best one. With all
    groups kept this is plain top-k. Ties go to the lower index. Not differentiable.
    """
    biased = jax.lax.stop_gradient(scores + bias[None, :])
    if groups_kept < num_groups:
        grouped = biased.reshape(len(biased), num_groups, -1)
        if group_score == "max":
            of_group = jnp.max(grouped, axis=-1)
        else:
            of_group = jnp.sum(rowwise.top_k(grouped, 2)[0], axis=-1)
        best = rowwise.top_k(of_group, groups_kept)[1]
        kept = jnp.any(jax.nn.one_hot(best, num_groups, dtype=bool), axis=1)
        biased = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(biased.shape)
    return rowwise.top_k(biased, top_k)[1]


def gates(
    scores: Float[Array, "T E"],
    expert: Int[Array, "T K"],
    normalize: bool,
    scale: float = 1.0,
    *,
    partial: bool = False,
) -> Float[Array, "T K"]:
    """Scores of the chosen, divided by their sum if asked, times a factor.

    With ``partial``, choices of E and above are none: their gate is 0, in the sum as well.
    """
    if partial:
        none, expert = expert >= scores.shape[-1], jnp.minimum(expert, scores.shape[-1] - 1)
    gate = jnp.take_along_axis(scores, expert, axis=-1)
    if partial:
        gate = jnp.where(none, 0.0, gate)
    if normalize:
        gate = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-20)
    return gate * scale if scale != 1.0 else gate
