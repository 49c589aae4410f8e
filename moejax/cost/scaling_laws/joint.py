"""Dense models and coarse mixtures in one law: Ludziejewski et al. 2025 (arXiv 2502.05172).

Equation 6: L(N, D, E) = a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê) + c, with
N the active parameters, embedding and head included, and Ê a saturating transform of the number of
experts (equation 4). One expert a token, each as wide as a dense model's feed-forward.
"""

import dataclasses
import math

from moejax.config import check
from moejax.cost.scaling_laws.chinchilla import PowerLaw
from moejax.cost.scaling_laws.law import Design, Facts, Law, Optimum, Sizes, check_flops

EXPERTS = (1, 2, 4, 8, 16, 32)  # as in its tables 1 and 4; E = 1 is dense
FFN_WIDTH = 3.0  # SwiGLU of width 3 d_model, section 5.1
VOCABULARY = 50_257
WIDTH_OVER_LAYERS = 64  # appendix A.3


@dataclasses.dataclass(frozen=True)
class JointLaw(Law):
    """Equation 6.

    Attributes:
      facts: source, meaning and range.
      a, alpha, delta, gamma, b, beta, omega, zeta, e_start, e_max, c: coefficients, table 3.
    """

    facts: Facts
    a: float
    alpha: float
    delta: float
    gamma: float
    b: float
    beta: float
    omega: float
    zeta: float
    e_start: float
    e_max: float
    c: float

    @property
    def designs(self) -> tuple[Design, ...]:
        """One of E experts; dense at E = 1."""
        return tuple(_design(experts) for experts in EXPERTS)

    def at(self, experts: float) -> PowerLaw:
        """The power law that is left at one number of experts (table 4).

        Raises:
          ConfigError: fewer than one expert.
        """
        check(experts >= 1, "num_experts", experts, "must be at least 1")
        start = 1 / (1 / self.e_start - 1 / self.e_max)
        log = math.log(1 / (1 / (experts - 1 + start) + 1 / self.e_max))
        return PowerLaw(
            a=self.a * math.exp(self.delta * log),
            alpha=-(self.alpha + self.gamma * log),
            b=self.b * math.exp(self.omega * log),
            beta=-(self.beta + self.zeta * log),
            c=self.c,
        )

    def optimum_at(self, flops: float, experts: int) -> Optimum:
        """Equation 7: the optimum of a budget at one number of experts."""
        law = self.at(experts)
        active, tokens = law.split(flops)
        return Optimum(
            flops, active, total_params(active, experts), tokens, _design(experts),
            law.loss(active, tokens),
        )  # fmt: skip

    def optimum(self, flops: float) -> Optimum:
        """See ``Law.optimum``: the best number of experts, at whatever memory it takes."""
        check_flops(flops)
        found = (self.optimum_at(flops, experts) for experts in EXPERTS)
        return min(found, key=lambda optimum: optimum.loss)

    def predict(self, sizes: Sizes, design: Design) -> float:
        """See ``Law.predict``."""
        active = sizes.active_params + sizes.embedding_params
        return self.at(max(1, design.num_experts)).loss(active, sizes.tokens)


def total_params(active_params: float, experts: float) -> float:
    """Total parameters of a model with so many active ones (equations 9 and 10)."""
    low, high = 1.0, 1e7
    for _ in range(200):  # the width: active = 2 d V + 13 d³ / 64 grows with it
        width = math.sqrt(low * high)
        active = 2 * width * VOCABULARY + 13 * width**3 / WIDTH_OVER_LAYERS
        low, high = (width, high) if active < active_params else (low, width)
    return active_params + 9 * (experts - 1) * width**3 / WIDTH_OVER_LAYERS


def _design(experts: int) -> Design:
    return Design(FFN_WIDTH, experts, 1) if experts > 1 else Design(FFN_WIDTH)


LUDZIEJEWSKI = JointLaw(
    Facts(
        title="Ludziejewski et al. 2025, joint law, 1 to 32 experts",
        source="arXiv 2502.05172, equations 4 and 6, table 3; optimum by equation 7",
        equation="L = 35.91 Ê^-0.2285 N^(-0.1889 + 0.0098 ln Ê) "
        "+ 35.98 Ê^0.5529 D^(-0.1775 - 0.0259 ln Ê) + 1.3637",
        parameters="N: active parameters, embedding and head included",
        corpus="FineWeb-Edu",
        tokenizer="GPT-2, 50,257 tokens",
        fitted={
            "active_params": (79e6, 2.7e9),
            "total_params": (79e6, 5.0e9),
            "tokens": (0.5e9, 80e9),
            "num_experts": (0, 32),
        },
        inverse="closed form at each number of experts, with C = 6 N D; d_model = 64 layers",
        reading="the paper's text; checked against its tables 1 and 4",
        caveat="more experts are always better in it, so that it advises the most it was fitted "
        "with; it prices neither routing nor memory, and its experts are not fine-grained",
    ),
    a=35.91, alpha=-0.1889, delta=-0.2285, gamma=0.0098, b=35.98, beta=-0.1775, omega=0.5529,
    zeta=-0.0259, e_start=2.0732, e_max=290.4521, c=1.3637,
)  # fmt: skip
