"""From a law's advice to a model of moejax: shapes by plain rules, and a choice among them.

Of every width on a ladder a model is made for each of a law's designs, its FLOPs are counted by
``moejax.cost.counts``, and the tokens are what the budget leaves. The law then says which is best,
with the model's own parameters in its formula. So routing, attention, the head and all roundings
are in the bill, and a larger budget can only do better: the candidates stay the same and each gets
more tokens.
"""

import dataclasses
import functools

from moejax.config import ConfigError
from moejax.cost import counts
from moejax.cost.budget import FLAG, Budget
from moejax.cost.scaling_laws.law import MLP_WIDTH, Design, Law, Sizes
from moejax.models.attention_config import AttentionConfig
from moejax.models.model_config import ModelConfig
from moejax.moe.moe_config import MoEConfig
from moejax.moe.routers import DeepSeekV3Options
from moejax.moe.routers.switch import SwitchOptions

# Published mixtures have 43 (Qwen3-30B) to 128 (Mixtral) channels a layer; V2-Lite and V2 76, 85.
ASPECT_RATIO = 80
MIN_LAYERS = 4
HEAD_DIM, SMALL_HEAD_DIM, SMALL_WIDTH = 128, 64, 1024
MULTIPLE = 64  # of an expert's width; a dense layer's is a multiple of twice that
LOSS_CHUNK = 512
VOCABULARY = 50_304  # GPT-2's 50,257 in whole multiples of 128, as OLMoE has it
WIDTHS = (
    *range(128, 1024, 64), *range(1024, 4096, 128), *range(4096, 16384, 256),
    *range(16384, 65537, 1024),
)  # fmt: skip

# Below so many tokens for each parameter of the smallest model, no law here says anything.
LEAST_TOKENS_PER_PARAM = 10


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model and what a token of it costs.

    Attributes:
      config: the model.
      design: the law's design that it was made by.
      counted: its parameters and FLOPs.
      sizes: itself as laws see it, trained on one token.
    """

    config: ModelConfig
    design: Design
    counted: counts.Counts
    sizes: Sizes

    def trained(self, flops: float) -> Sizes:
        """Itself as laws see it, trained for so many FLOPs."""
        return dataclasses.replace(self.sizes, tokens=flops / self.counted.flops_per_token.train)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that a law likes best at a budget.

    Attributes:
      candidate: the model.
      tokens: training tokens that the budget pays for.
      loss: nats per token on the law's corpus; None where it predicts none.
    """

    candidate: Candidate
    tokens: float
    loss: float | None


def build(design: Design, d_model: int) -> ModelConfig | None:
    """A model of one width: layers by the aspect ratio, full multi-head attention, SwiGLU.

    It recomputes layers in the backward pass and takes the loss in chunks, so that it needs little
    memory for activations; neither is in its FLOPs.

    Returns:
      None where an expert would be narrower than three quarters of the least width, 64, so that
      rounding would make it another design.
    """
    head_dim = HEAD_DIM if d_model >= SMALL_WIDTH else SMALL_HEAD_DIM
    dense_width = max(1, round(design.width * d_model / (2 * MULTIPLE))) * 2 * MULTIPLE
    moe = None
    if design.num_experts:
        used = design.top_k + design.num_shared_experts
        width = design.width * d_model / used
        if width < 0.75 * MULTIPLE:
            return None
        moe = MoEConfig(
            num_experts=design.num_experts,
            top_k=design.top_k,
            d_expert=max(1, round(width / MULTIPLE)) * MULTIPLE,
            num_shared_experts=design.num_shared_experts,
            # One renormalised gate would be 1 and leave the router without a gradient.
            router=SwitchOptions() if design.top_k == 1 else DeepSeekV3Options(),
        )
    return ModelConfig(
        vocab_size=VOCABULARY,
        d_model=d_model,
        num_layers=max(MIN_LAYERS, round(d_model / ASPECT_RATIO)),
        d_ff=0 if moe else dense_width,
        attention=AttentionConfig(num_heads=d_model // head_dim, head_dim=head_dim),
        tie_embeddings=False,
        remat="full",
        loss_chunk=LOSS_CHUNK,
        moe=moe,
    )


def sizes_of(config: ModelConfig, design: Design, counted: counts.Counts) -> Sizes:
    """A model as scaling laws see it, trained on one token."""
    held, used = counted.params.by_component, counted.params.active_by_component
    outside = ("embedding", "head", "router")
    flops = counted.flops_per_token
    head = counts.TRAIN_OVER_FORWARD * flops.by_component["head"]
    granularity = design.granularity
    if config.moe is not None:
        # What rounding made of it: both definitions divide by the width of an expert.
        exact = design.width * config.d_model / (design.top_k + design.num_shared_experts)
        granularity *= exact / config.moe.d_expert
    return Sizes(
        active_params=sum(n for name, n in used.items() if name not in outside),
        total_params=sum(n for name, n in held.items() if name not in outside),
        embedding_params=held["embedding"] + held["head"],
        flops_per_token=flops.train_full_attention - head,
        tokens=1.0,
        granularity=granularity,
    )


@functools.cache
def candidates(designs: tuple[Design, ...], seq_len: int) -> tuple[Candidate, ...]:
    """Every design at every width of the ladder, narrow ones first."""
    found = []
    for d_model in WIDTHS:
        for design in designs:
            config = build(design, d_model)
            if config is not None:
                counted = counts.count(config, seq_len)
                found.append(Candidate(config, design, counted, sizes_of(config, design, counted)))
    return tuple(found)


def smallest(seq_len: int) -> tuple[Candidate, float]:
    """The smallest dense model here, and the FLOPs below which no law can advise."""
    (first, *_) = candidates((Design(MLP_WIDTH),), seq_len)
    tokens = LEAST_TOKENS_PER_PARAM * first.sizes.active_params
    return first, tokens * first.counted.flops_per_token.train


def choose(law: Law, flops: float, seq_len: int, budget: Budget) -> Choice:
    """The model that a law likes best for so many FLOPs.

    Args:
      law: the law.
      flops: training FLOPs, all of which the tokens use up.
      seq_len: positions of a sequence.
      budget: for messages.

    Raises:
      ConfigError: a budget for which the best would be larger than any model here.
    """
    best = min(
        candidates(law.designs_for(flops), seq_len),
        key=lambda found: law.misfit(found.trained(flops), found.design, flops),
    )
    if best.config.d_model == WIDTHS[-1]:
        raise ConfigError(
            FLAG, budget.text,
            f"would buy more than the widest model here, d_model {WIDTHS[-1]}; give less",
        )  # fmt: skip
    sizes = best.trained(flops)
    return Choice(best, sizes.tokens, law.predict(sizes, best.design))
