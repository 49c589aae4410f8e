"""Parts of config.json that several families share, and the fields of ours that they come to.

Each ``read_...`` takes the file's fields, each ``write_...`` gives them back. Losses are no part of
a checkpoint's numbers: their weights are taken where the file states them, and left else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.interop.fields import REQUIRED, Fields
from moejax.models import AttentionConfig, ModelConfig, RopeConfig
from moejax.models.model_config import Segment
from moejax.moe import MoEConfig
from moejax.moe.routers import RouterOptions


def read_rope(fields: Fields, theta: float, fraction: float = 1.0) -> tuple[float, RopeConfig]:
    """Base and options of the rotary embedding.

    Transformers 5 writes them as ``rope_parameters``; released checkpoints have ``rope_theta`` and
    ``rope_scaling``.

    Args:
      fields: the file.
      theta: the family's base where the file states none.
      fraction: the family's share of channels that turn where the file states none.
    """
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    fields.idle("rope_parameters", "rope_scaling")
    block = fields.get(name, dict, {})
    inner = Fields(block, f"{fields.where}: {name}")
    top = fields.get("rope_theta", float, theta)
    theta = inner.get("rope_theta", float, top)
    top = fields.get("partial_rotary_factor", float, fraction)
    fraction = inner.get("partial_rotary_factor", float, top)
    old = inner.get("type", str, "default")
    kind = inner.get("rope_type", str, old)
    known = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    if kind not in known:
        stated = "rope_type" if "rope_type" in block else "type"
        inner.refuse(stated, f"moejax computes {', '.join(map(repr, known))} only")
    if known[kind] == "none":
        return theta, RopeConfig(fraction=fraction)
    options: dict[str, Any] = {"factor": inner.get("factor", float), "fraction": fraction}
    if kind in ("llama3", "yarn"):
        reach = fields.values.get("max_position_embeddings")
        length = inner.get("original_max_position_embeddings", int, reach or REQUIRED)
        options["original_length"] = length
    if kind == "llama3":
        options["low_frequency_factor"] = inner.get("low_freq_factor", float)
        options["high_frequency_factor"] = inner.get("high_freq_factor", float)
    if kind == "yarn":
        options |= _read_yarn(inner)
    for unknown in inner.unknown():
        inner.refuse(unknown, "moejax knows no such option of the rotary embedding")
    return theta, RopeConfig(scaling=known[kind], **options)


def _read_yarn(inner: Fields) -> dict[str, Any]:
    """YaRN's options; cosine and sine are scaled as Transformers and DeepSeek's code both do."""
    options: dict[str, Any] = {
        "beta_fast": inner.get("beta_fast", float, 32.0),
        "beta_slow": inner.get("beta_slow", float, 1.0),
        "truncate": inner.get("truncate", bool, True),
        "mscale_all_dim": inner.get("mscale_all_dim", float, 0.0),
        "attention_factor": inner.get("attention_factor", float, 0.0),
    }
    mscale, everywhere = inner.get("mscale", float, 0.0), options["mscale_all_dim"]
    inner.check(
        bool(mscale) == bool(everywhere) or bool(options["attention_factor"])
        or (mscale == 1 and not everywhere),
        "mscale", "needs mscale_all_dim beside it, and the other way round: codes differ in what "
        "one of them means alone",
    )  # fmt: skip
    return {**options, "mscale": mscale or 1.0}


def write_rope(attention: AttentionConfig) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, as released checkpoints have them."""
    rope = attention.rope
    scaling: dict[str, Any] | None = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "none":
        scaling = None
    elif rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        scaling["low_freq_factor"] = rope.low_frequency_factor
        scaling["high_freq_factor"] = rope.high_frequency_factor
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.mscale_all_dim:
            scaling |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
        if rope.attention_factor:
            scaling["attention_factor"] = rope.attention_factor
        if not rope.truncate:
            scaling["truncate"] = False
    return {"rope_theta": attention.rope_theta, "rope_scaling": scaling}


def read_heads(fields: Fields, head_dim: int | None = None) -> dict[str, int]:
    """Numbers and width of the heads of grouped-query attention.

    Args:
      fields: the file.
      head_dim: the family's width where the file states none; None divides the model's width.
    """
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads", heads)
    fields.check(
        heads % kv_heads == 0, "num_key_value_heads",
        f"does not divide num_attention_heads = {heads}; restore the file",
    )  # fmt: skip
    found = fields.size("head_dim", head_dim)
    fields.check(
        found is not None or width % heads == 0, "hidden_size",
        f"is no multiple of num_attention_heads = {heads}, and there is no head_dim; restore the "
        "file",
    )  # fmt: skip
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": found or width // heads}


def check_divides(fields: Fields, own_width: bool = True) -> None:
    """Refuses heads that the family's class in Transformers does not build.

    Args:
      fields: the file.
      own_width: the class takes a ``head_dim`` that is another one than width over heads.
    """
    heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
    fields.check(
        width % heads == 0, "hidden_size",
        f"is no multiple of num_attention_heads = {heads}, as Transformers' class asks for",
    )  # fmt: skip
    found = fields.size("head_dim", None)
    fields.check(
        own_width or found in (None, width // heads), "head_dim",
        f"must be hidden_size / num_attention_heads = {width // heads}, as in Transformers' class",
    )  # fmt: skip


def write_heads(config: ModelConfig) -> dict[str, int]:
    """The same fields back."""
    attention = config.attention
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": config.head_dim,
    }


def read_model(
    fields: Fields,
    attention: AttentionConfig,
    *,
    moe: MoEConfig | None = None,
    dense: list[bool] | None = None,
    windows: list[bool] | None = None,
    norm_eps: float = 1e-6,
    **changes: Any,
) -> ModelConfig:
    """The whole config, from what all families state alike.

    Args:
      fields: the file.
      attention: options of attention.
      moe: options of the MoE layers, if there are any.
      dense: whether each layer is dense; None means all are, or none are with ``moe``.
      windows: whether each layer's attention has a window; None means none has.
      norm_eps: the family's epsilon of RMSNorm where the file states none.
      **changes: further fields of ModelConfig.
    """
    fields.only("hidden_act", "silu")
    fields.idle("intermediate_size")  # stated even where every layer is an MoE layer
    count = fields.size("num_hidden_layers")
    dense = [moe is None] * count if dense is None else dense
    if all(dense):
        moe = None
    kinds = ["dense" if is_dense else "moe" for is_dense in dense]
    for i, window in enumerate(windows or []):
        kinds[i] += "_window" * window
    first = next((i for i, is_dense in enumerate(dense) if not is_dense), 0)
    simple = not any(windows or []) and (moe is None or not any(dense[first:]))
    return ModelConfig(
        vocab_size=fields.size("vocab_size"),
        d_model=fields.size("hidden_size"),
        num_layers=count,
        d_ff=fields.size("intermediate_size") if any(dense) else 0,
        first_k_dense=first if simple else 0,
        segments=() if simple else runs(kinds),
        attention=attention,
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        norm_eps=fields.get("rms_norm_eps", float, norm_eps),
        moe=moe,
        **changes,
    )


def write_model(config: ModelConfig) -> dict[str, Any]:
    """The fields of ``read_model`` back."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.dense_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std or 0.02,
        "use_cache": True,
    }


def read_layer_types(fields: Fields) -> list[bool] | None:
    """Whether each layer is ``sliding_attention``, where the file lists its layers."""
    kinds = fields.get("layer_types", list, None)
    if kinds is None:
        return None
    count = fields.size("num_hidden_layers")
    fields.check(
        len(kinds) == count, "layer_types",
        f"has {len(kinds)} entries for num_hidden_layers = {count}; restore the file",
    )  # fmt: skip
    known = ("full_attention", "sliding_attention")
    fields.check(
        all(kind in known for kind in kinds), "layer_types",
        f"moejax computes {' and '.join(known)} only",
    )  # fmt: skip
    return [kind == "sliding_attention" for kind in kinds]


def layer_kinds(config: ModelConfig) -> list[str]:
    """Kind of every layer, first to last."""
    return kinds_of(config.layout)


def kinds_of(layout: Sequence[Segment]) -> list[str]:
    """Segments as a list of layers, first to last; ``runs`` is the way back."""
    return [kind for kinds, repeats in layout for kind in kinds * repeats]


def runs(kinds: Sequence[str]) -> tuple[tuple[tuple[str, ...], int], ...]:
    """A list of layers as segments: at each point the pattern whose repeats cover the most.

    Args:
      kinds: kind of every layer, first to last.
    """
    found, start = [], 0
    while start < len(kinds):
        best = (1, 1)  # length of the pattern, repeats
        for length in range(1, (len(kinds) - start) // 2 + 1):
            pattern, repeats = kinds[start : start + length], 1
            while kinds[start + repeats * length : start + (repeats + 1) * length] == pattern:
                repeats += 1
            if repeats > 1 and repeats * length > best[0] * best[1]:
                best = (length, repeats)
        found.append((tuple(kinds[start : start + best[0]]), best[1]))
        start += best[0] * best[1]
    return tuple(found)


def read_top_k(fields: Fields, experts_name: str, *more_names: str) -> tuple[int, int]:
    """Experts and experts a token; the names are several for one number."""
    names = [n for n in (experts_name, *more_names) if fields.values.get(n) is not None]
    experts, top_k = fields.size((names or [experts_name])[0]), fields.size("num_experts_per_tok")
    for name in names[1:]:
        fields.check(
            fields.size(name) == experts, name,
            f"contradicts {names[0]} = {experts}; restore the file",
        )  # fmt: skip
    fields.check(
        top_k <= experts, "num_experts_per_tok",
        f"is above the number of experts, {experts}; restore the file",
    )  # fmt: skip
    return experts, top_k


def read_weight(fields: Fields, name: str) -> dict[str, float]:
    """The balance loss's weight, where the file states one. Transformers' value is K times ours."""
    weight = fields.get(name, float, None)
    return {} if weight is None else {"balance_loss_weight": weight}


@dataclasses.dataclass(frozen=True)
class RouterForm:
    """What of a router decides a forward pass."""

    score: str
    logit_bias: bool
    groups: tuple[int, int, str]
    normalize: bool
    scale: float
    selection_bias: bool


def router_form(router: RouterOptions) -> RouterForm | str:
    """A composed router's form, or the name of a router that checkpoints do not know."""
    from moejax.moe.routers import TopKOptions, TopKRouter, find

    kind = find(router.name)
    plain = isinstance(router, TopKOptions) and kind.__call__ is TopKRouter.__call__
    if not plain or router.num_choices(4) != 4:
        return router.name
    kept = (router.num_groups, router.groups_kept, router.group_score)
    return RouterForm(
        router.score, router.logit_bias,
        kept if router.groups_kept < router.num_groups else (1, 1, ""),
        router.normalize_gates, router.routed_scale, router.bias_rule != "none",
    )  # fmt: skip


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a model computes, defaults resolved, for comparing models."""
    attention = dataclasses.asdict(config.attention) | {"num_kv_heads": config.attention.kv_heads}
    del attention["implementation"], attention["rope"]
    attention["head_dim"] = config.head_dim
    if config.attention.kind == "gqa":
        del attention["latent_norm_eps"]
    if not config.layers("window"):
        attention["window"] = 0
    attention |= {f"rope.{k}": v for k, v in _rope(config).items()}
    kinds = layer_kinds(config)
    moe = config.moe if any("moe" in kind for kind in kinds) else None
    found = {
        "vocab_size": config.vocab_size, "d_model": config.d_model, "layers": tuple(kinds),
        "d_ff": config.dense_width if any("dense" in kind for kind in kinds) else 0,
        "tie_embeddings": config.tie_embeddings, "norm_eps": config.norm_eps,
        "embedding_multiplier": config.embedding_multiplier, "mtp_depth": config.mtp_depth,
        **{f"attention.{name}": value for name, value in attention.items()},
    }  # fmt: skip
    if moe is not None:
        names = ("num_experts", "top_k", "d_expert", "num_shared_experts", "latent_dim",
                 "gate_rank", "activation", "expert_bias", "shared_gate")  # fmt: skip
        found |= {f"moe.{name}": getattr(moe, name) for name in names}
        found["router"] = router_form(moe.router)
    return found


def _rope(config: ModelConfig) -> dict[str, Any]:
    """The rotary embedding's options that count under its scaling."""
    rope, names = config.attention.rope, ["scaling"]
    if config.attention.kind == "gqa":
        names.append("fraction")
    if rope.scaling != "none":
        names.append("factor")
    if rope.scaling in ("llama3", "yarn"):
        names.append("original_length")
    if rope.scaling == "llama3":
        names += ["low_frequency_factor", "high_frequency_factor"]
    if rope.scaling == "yarn":
        names += ["beta_fast", "beta_slow", "truncate", "cos_sin_factor"]
        names += ["softmax_factor"] if config.attention.kind == "mla" else []
    return {name: getattr(rope, name) for name in names}
