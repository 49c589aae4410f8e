"""What every scaling law here is made of: its facts, its inverse, and a model as it sees one."""

import abc
import dataclasses
import math
from collections.abc import Callable

from moejax.config import check

# Width of a SwiGLU over d_model that has the parameters of an MLP of two matrices, 4 d_model wide.
MLP_WIDTH = 8 / 3


@dataclasses.dataclass(frozen=True)
class Facts:
    """Where a law is from and what it speaks of.

    Attributes:
      title: authors and year.
      source: the paper, the equation and the table of its coefficients.
      equation: the formula, in plain text.
      parameters: what its N (or M) counts.
      corpus: the text that its loss is of; losses on different corpora cannot be compared.
      tokenizer: what a token is there: a loss per token depends on it, too.
      fitted: ranges of its experiments, by the names of ``Optimum``'s fields.
      inverse: how a budget is turned into a model.
      reading: where the coefficients were read, and what they were checked against.
      caveat: what it cannot say.
    """

    title: str
    source: str
    equation: str
    parameters: str
    corpus: str
    tokenizer: str
    fitted: dict[str, tuple[float, float]]
    inverse: str
    reading: str
    caveat: str = ""


@dataclasses.dataclass(frozen=True)
class Design:
    """The feed-forward part of a model whatever its width.

    Attributes:
      width: of the SwiGLU that a token runs through, over d_model.
      num_experts: routed experts, E; 0 makes a dense model.
      top_k: routed experts that a token runs through.
      num_shared_experts: experts that every token runs through.
      granularity: how fine the experts are, in the law's own definition.
    """

    width: float = MLP_WIDTH
    num_experts: int = 0
    top_k: int = 0
    num_shared_experts: int = 0
    granularity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Optimum:
    """What a law advises for a budget, in its own units and with its own count of FLOPs.

    Attributes:
      flops: the budget, as the law counts FLOPs.
      active_params: parameters that a token passes, as the law counts them.
      total_params: parameters of the model, likewise.
      tokens: training tokens.
      design: experts and granularity.
      loss: nats per token on the law's corpus; None where it predicts none.
      leverage: training FLOPs of a dense model of equal loss over these; None where unknown.
    """

    flops: float
    active_params: float
    total_params: float
    tokens: float
    design: Design
    loss: float | None = None
    leverage: float | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model of moejax trained on so many tokens, as laws count it.

    Attributes:
      active_params: parameters a token passes, without embedding, head and routers.
      total_params: parameters held, without the same.
      embedding_params: parameters of embedding and head.
      flops_per_token: training FLOPs of a token, without the head, all keys counted.
      tokens: training tokens.
      granularity: of the experts as they are, in the law's own definition.
    """

    active_params: float
    total_params: float
    embedding_params: float
    flops_per_token: float
    tokens: float
    granularity: float


class Law(abc.ABC):
    """A published scaling law that can be turned round.

    Attributes:
      facts: source, meaning and range.
      designs: feed-forward parts that it may advise.
    """

    facts: Facts
    designs: tuple[Design, ...]

    @abc.abstractmethod
    def optimum(self, flops: float) -> Optimum:
        """The model and the tokens of lowest loss for a budget, as the paper itself finds them.

        Raises:
          ConfigError: a budget that is not a finite number above zero.
        """

    @abc.abstractmethod
    def predict(self, sizes: Sizes, design: Design) -> float | None:
        """Loss of a model of moejax in nats per token; None where the law predicts none."""

    def designs_for(self, flops: float) -> tuple[Design, ...]:
        """The designs to choose from at a budget; a larger one never has fewer."""
        return self.designs

    def misfit(self, sizes: Sizes, design: Design, flops: float) -> float:
        """What a choice among models has to make small, at a budget of so many FLOPs: the loss."""
        loss = self.predict(sizes, design)
        assert loss is not None
        return loss

    def beyond(self, optimum: Optimum) -> tuple[str, ...]:
        """The fields in which an optimum lies outside the range of the law's experiments."""
        values = dataclasses.asdict(optimum) | dataclasses.asdict(optimum.design)
        return tuple(
            name
            for name, (low, high) in self.facts.fitted.items()
            if not low * 0.999 <= values[name] <= high * 1.001
        )


def check_flops(flops: float) -> None:
    """Raises ConfigError unless a budget is a finite number above zero."""
    good = math.isfinite(flops) and flops > 0
    check(good, "flops", flops, "must be a finite number above zero")


def minimize(
    function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-9
) -> float:
    """Where a function with one valley is lowest between two positive numbers.

    Golden-section search over the logarithm, to a relative ``tolerance`` of the place.
    """
    ratio = (math.sqrt(5) - 1) / 2
    left, right = math.log(low), math.log(high)
    a, b = right - ratio * (right - left), left + ratio * (right - left)
    at_a, at_b = function(math.exp(a)), function(math.exp(b))
    while right - left > tolerance:
        if at_a < at_b:
            right, b, at_b = b, a, at_a
            a = right - ratio * (right - left)
            at_a = function(math.exp(a))
        else:
            left, a, at_a = a, b, at_b
            b = left + ratio * (right - left)
            at_b = function(math.exp(b))
    return math.exp((left + right) / 2)
