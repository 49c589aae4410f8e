"""The composed router as published models and papers set it. Every option can still be changed.

Groups are left at one, since they have to divide the user's experts; each docstring says what the
model has.
"""

import dataclasses
from typing import ClassVar

from moejax.moe.bias_rules import BiasRuleName
from moejax.moe.routers.base import Card
from moejax.moe.routers.top_k import GroupScore, Score, TopKOptions, TopKRouter


@dataclasses.dataclass(frozen=True)
class SoftmaxTopKOptions(TopKOptions):
    """Defaults are OLMoE's: softmax then top-k, not renormalised, both losses."""

    name: str = "softmax_topk"
    balance_loss_weight: float = 0.01
    z_loss_weight: float = 1e-3


class SoftmaxTopKRouter(TopKRouter):
    """Top-k of p = softmax(W x); gate = p of the chosen, renormalised or not. Stateless.

    Sources: OLMoE (arXiv 2409.02060, eq. 2 and section 2), Switch Transformers (arXiv 2101.03961,
    eq. 4), ST-MoE (arXiv 2202.08906, eq. 5).
    """

    Options: ClassVar = SoftmaxTopKOptions
    card: ClassVar = Card(
        "softmax, then top-k; gates are the probabilities", "OLMoE, 2409.02060", "",
        "the plain baseline",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MixtralOptions(TopKOptions):
    """Defaults are Mixtral's: renormalised, balance loss 0.02 (its config)."""

    name: str = "mixtral"
    normalize_gates: bool = True
    balance_loss_weight: float = 0.02


class MixtralRouter(TopKRouter):
    """Top-k, then a softmax over the chosen logits, which is softmax, top-k and renormalising.

    Source: Mixtral (arXiv 2401.04088, section 2.1). Qwen3-MoE's has the same form.
    """

    Options: ClassVar = MixtralOptions
    card: ClassVar = Card(
        "top-k, then softmax over the chosen", "Mixtral, 2401.04088", "",
        "gates that sum to 1; Qwen3-MoE's form too",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GptOssOptions(TopKOptions):
    """Defaults are gpt-oss's form; how it was balanced is not published, so no loss is set."""

    name: str = "gpt_oss"
    logit_bias: bool = True
    normalize_gates: bool = True


class GptOssRouter(TopKRouter):
    """Top-k of W x + b with a learned b, then a softmax over the chosen.

    Source: gpt-oss model card (arXiv 2508.10925) and its released code.
    """

    Options: ClassVar = GptOssOptions
    card: ClassVar = Card(
        "biased logits, top-k, softmax over the chosen", "gpt-oss, 2508.10925", "",
        "loading gpt-oss; set a balance loss to train",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeepSeekMoEOptions(TopKOptions):
    """Defaults are DeepSeekMoE-2B's: expert-level balance loss 0.01 (16B: 0.001)."""

    name: str = "deepseek_moe"
    sequence_loss_weight: float = 0.01


class DeepSeekMoERouter(TopKRouter):
    """Softmax, top-k of many fine experts beside shared ones (``moe.num_shared_experts``).

    An m times finer model has mE - K_s routed experts of width F / m, of which mK - K_s are
    chosen, and K_s shared ones: the same active parameters.

    Source: DeepSeekMoE (arXiv 2401.06066, eq. 9 to 14); the released code takes the loss by
    sequence.
    """

    Options: ClassVar = DeepSeekMoEOptions
    card: ClassVar = Card(
        "softmax, then top-k of fine experts, beside shared ones", "DeepSeekMoE, 2401.06066", "",
        "fine-grained experts with a balance loss",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeepSeekV2Options(TopKOptions):
    """Defaults are V2's but for the groups (V2: 8 devices, 3 kept): its three losses, scale 16."""

    name: str = "deepseek_v2"
    group_score: GroupScore = "max"
    routed_scale: float = 16.0
    sequence_loss_weight: float = 0.003
    device_loss_weight: float = 0.05
    communication_loss_weight: float = 0.02


class DeepSeekV2Router(TopKRouter):
    """Softmax; top-k inside the groups with the best expert each; three balance losses.

    Source: DeepSeek-V2 (arXiv 2405.04434, section 2.2, eq. 20 to 31); scale from its config. All
    three losses are taken by sequence, as in its code; the paper does not say over which tokens.
    """

    Options: ClassVar = DeepSeekV2Options
    card: ClassVar = Card(
        "softmax, top-k inside the groups of the best experts", "DeepSeek-V2, 2405.04434", "",
        "few devices a token, balanced by losses",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeepSeekV3Options(TopKOptions):
    """Defaults are V3's but for the groups (V3: 8, 4 kept)."""

    name: str = "deepseek_v3"
    score: Score = "sigmoid"
    normalize_gates: bool = True
    routed_scale: float = 2.5
    bias_rule: BiasRuleName = "sign"
    sequence_loss_weight: float = 1e-4


class DeepSeekV3Router(TopKRouter):
    """Top-k of s + b inside the best groups, where s = sigmoid(W x); gate = scale · s / sum s.

    Source: DeepSeek-V3 (arXiv 2412.19437, eq. 13 to 20, and section 4.2 for the values); the
    group score, the sum of a group's two best, is from its released code.
    """

    Options: ClassVar = DeepSeekV3Options
    card: ClassVar = Card(
        "sigmoid plus selection bias, top-k inside the best groups, gates renormalised",
        "DeepSeek-V3, 2412.19437", "selection bias", "the default",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeepSeekV4Options(DeepSeekV3Options):
    """V3's options with square-root-softplus scores; the scale is that of Transformers' class."""

    name: str = "deepseek_v4"
    score: Score = "sqrt_softplus"
    routed_scale: float = 1.5


class DeepSeekV4Router(DeepSeekV3Router):
    """As ``deepseek_v3``, without groups, with s = sqrt(softplus(W x)).

    V4's first layers route by ``hash``. Source: the model's code in Transformers.
    """

    Options: ClassVar = DeepSeekV4Options
    card: ClassVar = Card(
        "√softplus plus selection bias, gates renormalised", "DeepSeek-V4, its code",
        "selection bias", "scores without saturation",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KimiK2Options(DeepSeekV3Options):
    """Defaults are Kimi-K2's: V3's, one group, scale 2.827 (384 experts, 8 chosen, 1 shared)."""

    name: str = "kimi_k2"
    routed_scale: float = 2.827


class KimiK2Router(DeepSeekV3Router):
    """V3's router with one group. Source: Kimi K2 (arXiv 2507.20534) and its released config."""

    Options: ClassVar = KimiK2Options
    card: ClassVar = Card(
        "as deepseek_v3, one group, scale 2.827", "Kimi K2, 2507.20534", "selection bias",
        "Kimi-K2 and its kin",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LossFreeOptions(TopKOptions):
    """Defaults are the paper's: sigmoid gates as they are, sign rule 0.001, no loss."""

    name: str = "loss_free"
    score: Score = "sigmoid"
    bias_rule: BiasRuleName = "sign"


class LossFreeRouter(TopKRouter):
    """Top-k of sigmoid(W x) + b; gates are the scores. Balanced by the bias alone.

    Source: Auxiliary-loss-free load balancing (arXiv 2408.15664, section 3).
    """

    Options: ClassVar = LossFreeOptions
    card: ClassVar = Card(
        "sigmoid plus selection bias, no loss", "loss-free balancing, 2408.15664",
        "selection bias", "the bias rule by itself",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CentredBiasOptions(DeepSeekV3Options):
    """Defaults are Ling 2.0's but for the groups (8, 4 kept): V3's with a centred update."""

    name: str = "centred_bias"
    bias_rule: BiasRuleName = "centred"


class CentredBiasRouter(DeepSeekV3Router):
    """V3's router whose bias keeps its sum.

    Sources: Ling 2.0 (arXiv 2510.22115), Moonlight (arXiv 2502.16982), and torchtitan's code.
    """

    Options: ClassVar = CentredBiasOptions
    card: ClassVar = Card(
        "as deepseek_v3, the bias's update centred", "Ling 2.0, 2510.22115", "selection bias",
        "a bias that cannot drift",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SmebuOptions(DeepSeekV3Options):
    """Defaults are Trinity's rule: lambda 5e-4, momentum 0.5."""

    name: str = "smebu"
    bias_rule: BiasRuleName = "smebu"
    bias_step: float = 5e-4


class SmebuRouter(DeepSeekV3Router):
    """V3's router with soft-clamped momentum updates of the bias (Trinity, arXiv 2602.17004)."""

    Options: ClassVar = SmebuOptions
    card: ClassVar = Card(
        "as deepseek_v3, the bias moved by a soft clamp with momentum", "Trinity, 2602.17004",
        "selection bias, momentum", "a bias that comes to rest",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QuantileBalancingOptions(TopKOptions):
    """Sigmoid scores and the quantile rule, which has no step size."""

    name: str = "quantile"
    score: Score = "sigmoid"
    normalize_gates: bool = True
    bias_rule: BiasRuleName = "quantile"


class QuantileBalancingRouter(TopKRouter):
    """Top-k of s - beta with beta at the quantile that balances the batch before.

    alpha_t is the (K+1)-th largest of s_t - beta, beta_j the (TK/E + 1)-th largest of s_j - alpha:
    the dual of the balanced assignment, one alternating step a batch. Quantiles are taken from
    histograms that add up over devices and micro-batches (``moejax.moe.quantiles``).
    """

    Options: ClassVar = QuantileBalancingOptions
    card: ClassVar = Card(
        "sigmoid less the quantile that balances", "quantile balancing", "selection bias",
        "balance in a few steps, no step size",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GlobalBatchOptions(TopKOptions):
    """Defaults: renormalised softmax gates and the balance loss over the whole batch."""

    name: str = "global_batch"
    normalize_gates: bool = True
    global_loss_weight: float = 0.01


class GlobalBatchRouter(TopKRouter):
    """Softmax top-k with the balance loss of the load of all devices and micro-batches.

    The load of the micro-batches before is added up, so that the last one sees the whole batch's
    and the first its own only, as in the paper's buffer.

    Source: Demons in the detail (arXiv 2501.11873, eq. 3 and section 3.1).
    """

    Options: ClassVar = GlobalBatchOptions
    card: ClassVar = Card(
        "softmax top-k, balanced over the global batch", "2501.11873",
        "load of the step so far", "experts that specialise by domain",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ErnieOptions(DeepSeekV3Options):
    """V3's router with ERNIE 4.5's orthogonality loss at 0.01, beside its softmax scores."""

    name: str = "ernie"
    score: Score = "softmax"
    routed_scale: float = 1.0
    orthogonal_loss_weight: float = 0.01


class ErnieRouter(DeepSeekV3Router):
    """Softmax plus selection bias, gates renormalised; columns of the router kept orthogonal.

    Source: ERNIE 4.5 technical report (its router orthogonalization loss) and the model's code in
    Transformers for score, bias and gates. Its loss goes by kind of expert; here there is one kind.
    """

    Options: ClassVar = ErnieOptions
    card: ClassVar = Card(
        "softmax plus selection bias; orthogonal router columns", "ERNIE 4.5, its report",
        "selection bias", "experts that differ",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SimBalOptions(TopKOptions):
    """Defaults: renormalised softmax gates and SimBal's loss at 0.1, no balance loss."""

    name: str = "simbal"
    normalize_gates: bool = True
    similarity_loss_weight: float = 0.1


class SimBalRouter(TopKRouter):
    """Softmax top-k whose matrix is kept near orthonormal, so that like tokens meet like experts.

    Source: SimBal (arXiv 2506.14038).
    """

    Options: ClassVar = SimBalOptions
    card: ClassVar = Card(
        "softmax top-k; the router's Gram matrix near 1", "SimBal, 2506.14038", "",
        "balance that keeps likeness",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ExpertCouplingOptions(TopKOptions):
    """Defaults: OLMoE's router with the coupling loss at its paper's weight and alpha, 1."""

    name: str = "expert_coupling"
    balance_loss_weight: float = 0.01
    z_loss_weight: float = 1e-3
    coupling_loss_weight: float = 1.0


class ExpertCouplingRouter(TopKRouter):
    """Softmax top-k; every expert shall answer its own router column the loudest.

    Source: expert-router coupling loss (arXiv 2512.23447): see ``moejax.moe.coupling``.
    """

    Options: ClassVar = ExpertCouplingOptions
    card: ClassVar = Card(
        "softmax top-k; experts answer their own router column the loudest", "ERC, 2512.23447", "",
        "a router that knows its experts",
    )  # fmt: skip
