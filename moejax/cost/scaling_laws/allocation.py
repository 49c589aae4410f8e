"""Laws that split a budget without predicting a loss: DeepSeek LLM 2024, Ling 2025.

Both measure a model by M, its non-embedding training FLOPs per token with attention to all keys, so
that C = M D without head and embedding: M = k C^x, D = C / M.
"""

import dataclasses
import math

from moejax.config import check
from moejax.cost.scaling_laws.law import MLP_WIDTH, Design, Facts, Law, Optimum, Sizes, check_flops

_FLOPS_PER_PARAM = 6  # of a token, where attention's scores are left out


@dataclasses.dataclass(frozen=True)
class AllocationLaw(Law):
    """M = scale C^exponent.

    Attributes:
      facts: source, meaning and range.
      scale, exponent: of the optimal FLOPs per token.
      design: the feed-forward that goes with it.
    """

    facts: Facts
    scale: float
    exponent: float
    design: Design = Design()

    @property
    def designs(self) -> tuple[Design, ...]:
        """The one of its experiments."""
        return (self.design,)

    def flops_per_token(self, flops: float) -> float:
        """The optimal M of a budget."""
        return self.scale * flops**self.exponent

    def optimum(self, flops: float) -> Optimum:
        """See ``Law.optimum``. Active parameters are M / 6, attention's scores counted in."""
        check_flops(flops)
        per_token = self.flops_per_token(flops)
        active = per_token / _FLOPS_PER_PARAM
        total = active * self.total_over_active()
        return Optimum(
            flops, active, total, flops / per_token, self.design, leverage=self.leverage(flops)
        )

    def total_over_active(self) -> float:
        """Total over active non-embedding parameters, attention being 4 d² a layer."""
        design = self.design
        if not design.num_experts:
            return 1.0
        used = design.top_k + design.num_shared_experts
        held = design.num_experts + design.num_shared_experts
        ffn = 3 * design.width
        return (4 + ffn * held / used) / (4 + ffn)

    def leverage(self, flops: float) -> float | None:
        """See ``Optimum.leverage``: 1 for a dense model."""
        return 1.0

    def predict(self, sizes: Sizes, design: Design) -> None:
        """See ``Law.predict``: these predict none."""
        return None

    def misfit(self, sizes: Sizes, design: Design, flops: float) -> float:
        """See ``Law.misfit``: the distance from the optimal M, as a logarithm."""
        return abs(math.log(sizes.flops_per_token / self.flops_per_token(flops)))


@dataclasses.dataclass(frozen=True)
class LeverageLaw(AllocationLaw):
    """M of a mixture, and the efficiency leverage of its experts (equation 13).

    EL = Â^(a + d log C + gamma (log G)² + beta log G), with Â a saturating transform of the
    activation ratio (equation 10). The paper does not say to which base its logarithms are. With
    log C to base 10 and log G to base 2 its statements follow: EL over 7 at C = 1e22, A = 3.1 %,
    G = 12; the best G near 12. No other pair of bases gives both.
    """

    a: float = 1.23
    d: float = -7.61e-2
    gamma: float = 1.67e-2
    beta: float = -1.17e-1
    a_start: float = 1.63e-2
    a_max: float = 5.28e16

    def efficiency(self, activation: float, granularity: float, flops: float) -> float:
        """Training FLOPs of a dense model of equal loss over those of the mixture.

        Args:
          activation: experts that a token passes over all, shared ones counted in both; 0 to 1.
          granularity: G = 2 d_model over an expert's width.
          flops: training FLOPs, C.

        Raises:
          ConfigError: an activation ratio outside 0 to 1, or a granularity not above zero.
        """
        check(0 < activation <= 1, "activation", activation, "must be above 0 and at most 1")
        check(granularity > 0, "granularity", granularity, "must be above zero")
        start = 1 / (1 / self.a_start - 1 / self.a_max)
        ratio = 1 / (1 / (activation + start) + 1 / self.a_max)
        log = math.log2(granularity)
        power = self.a + self.d * math.log10(flops) + self.gamma * log**2 + self.beta * log
        return ratio**power

    def leverage(self, flops: float) -> float:
        """See ``Optimum.leverage``."""
        design = self.design
        used = design.top_k + design.num_shared_experts
        held = design.num_experts + design.num_shared_experts
        return self.efficiency(used / held, design.granularity, flops)


_FLOPS = "M: non-embedding training FLOPs per token, attention to all keys counted, C = M D; shown "
_FLOPS += "as M / 6 parameters"

DEEPSEEK = AllocationLaw(
    Facts(
        title="DeepSeek LLM 2024, dense",
        source="arXiv 2401.02954, equations 2 and 4, section 3.2",
        equation="M = 0.1715 C^0.5243, D = 5.8316 C^0.4757",
        parameters=_FLOPS,
        corpus="DeepSeek's own, Chinese and English",
        tokenizer="DeepSeek BPE, 102,400 tokens",
        fitted={"flops": (1e17, 3e20)},
        inverse="as published",
        reading="the paper's text; checked: M D = C, and its table 3 for what M counts",
        caveat="predicts no loss here: the paper plots it without giving its coefficients; better "
        "text shifts the split towards the model (its table 4)",
    ),
    scale=0.1715,
    exponent=0.5243,
)

LING = LeverageLaw(
    Facts(
        title="Ling 2025 (Towards Greater Leverage), MoE",
        source="arXiv 2507.17702, table 1 (allocation), equations 10 and 13 with table 2 "
        "(efficiency leverage)",
        equation="M = 0.1915 C^0.5095, D = 5.2232 C^0.4905; "
        "EL = Â^(1.23 - 0.0761 log C + 0.0167 (log G)² - 0.117 log G)",
        parameters=_FLOPS,
        corpus="Ling's own, mostly English and Chinese",
        tokenizer="Ling BPE, 126,464 tokens",
        fitted={"flops": (3e17, 3e20)},
        inverse="as published; the experts are those of its Ling-mini-beta (12 of 384 and one "
        "shared, G = 2 d_model / d_expert = 12), which its section 4 arrives at",
        reading="the paper's text; checked: M D = C, EL over 7 at 1e22 FLOP, the best G near 12",
        caveat="predicts no loss, only how many FLOPs a dense model of equal loss would take; the "
        "allocation was fitted at 4 of 64 experts and one shared, G = 2",
    ),
    scale=0.1915,
    exponent=0.5095,
    design=Design(
        width=2 * 13 / 12, num_experts=384, top_k=12, num_shared_experts=1, granularity=12.0
    ),
)

LING_DENSE = AllocationLaw(
    Facts(
        title="Ling 2025, dense baseline",
        source="arXiv 2507.17702, table 1",
        equation="M = 0.0655 C^0.5422, D = 15.2582 C^0.4578",
        parameters=_FLOPS,
        corpus=LING.facts.corpus,
        tokenizer=LING.facts.tokenizer,
        fitted=LING.facts.fitted,
        inverse="as published",
        reading="the paper's text; checked: M D = C",
        caveat="predicts no loss; the dense model to hold the one above against",
    ),
    scale=0.0655,
    exponent=0.5422,
    design=Design(MLP_WIDTH),
)
