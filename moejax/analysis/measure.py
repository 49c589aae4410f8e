"""A run's routers, measured: checkpoints are run over held-out text and ``routing`` is applied."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moejax.analysis import held_out as held_out_lib
from moejax.analysis import probe, routing
from moejax.analysis.held_out import HeldOut
from moejax.models import ModelConfig
from moejax.models.model_config import is_moe
from moejax.moe.diagnostics import stack_bias, stack_layers

# Tokens on which the outputs of all experts are compared, occurrences that a token id needs to be
# called an expert's, how many such ids are listed of each, and tokens that a domain needs.
SAMPLE, MIN_COUNT, MOST_SPECIFIC, MIN_DOMAIN = 64, 8, 6, 64
VIEWS = ("input", "target", "prediction")


@dataclasses.dataclass(frozen=True)
class Text:
    """Held-out batches, and of their tokens without padding, end to end, what routing is set
    against.

    Attributes:
      batches: as models take them.
      documents: of each token.
      sample: numbers of some tokens of the first batch, padding counted.
      held_out: where they are from.
    """

    batches: list[dict[str, Int[np.ndarray, "B S"]]]
    documents: Int[np.ndarray, " T"]
    sample: Int[np.ndarray, " n"]
    held_out: HeldOut

    @property
    def tokens(self) -> int:
        return len(self.documents)

    def ids(self, name: str) -> Int[np.ndarray, " T"]:
        """Ids of the ``tokens`` or the ``targets``."""
        return np.concatenate([batch[name][batch["segment_ids"] > 0] for batch in self.batches])


def read_text(held_out: HeldOut, batch_size: int, max_batches: int) -> Text:
    """Reads the batches that all checkpoints are run over."""
    found = list(
        held_out_lib.batches(held_out.rows, batch_size=batch_size, max_batches=max_batches)
    )
    documents = np.concatenate([batch.pop("documents").reshape(-1) for batch in found])
    real = np.flatnonzero(found[0]["segment_ids"].reshape(-1))
    # Always SAMPLE of them, so that the program does not depend on the text.
    sample = real[np.linspace(0, len(real) - 1, SAMPLE).astype(int)]
    return Text(found, documents[documents >= 0], sample, held_out)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A checkpoint's run over the text.

    Attributes:
      loss: cross-entropy, nats per target.
      loads: of each batch.
      stats: sums over all batches of what routers report.
      chosen: which tokens run through which experts, padding left out; None where rows are mixtures
        of tokens.
      prediction: the likeliest next token.
      sample: the MoE layers' inputs at ``Text.sample``.
    """

    loss: float
    loads: Float[np.ndarray, "batches L E"]
    stats: dict[str, Float[np.ndarray, "L ..."]]
    chosen: Bool[np.ndarray, "L T E"] | None
    prediction: Int[np.ndarray, " T"]
    sample: Float[np.ndarray, "L n D"]


def run(config: ModelConfig, variables: dict[str, Any], text: Text, masked: int = 0) -> Seen:
    """Runs a model over the text, with each token's ``masked`` best experts out of reach."""
    nll, targets, stats, chosen, prediction, sample = [], [], [], [], [], None
    for batch in text.batches:
        out = jax.device_get(probe.observe(config, variables, batch, text.sample, masked))
        real = batch["segment_ids"] > 0
        nll.append(float(out.nll))
        targets.append(float(out.targets))
        stats.append(stack_layers(out.router_stats))
        layers = stack_layers(out.layers)
        sample = layers["sample"] if sample is None else sample
        prediction.append(out.prediction[real])
        if "chosen" in layers:
            chosen.append(layers["chosen"][:, real.reshape(-1)])
    return Seen(
        routing.masked_loss(nll, targets),
        np.stack([part["load"] for part in stats]),
        {name: np.sum([part[name] for part in stats], axis=0) for name in stats[0]},
        np.concatenate(chosen, axis=1) if chosen else None,
        np.concatenate(prediction),
        sample,
    )


class History:
    """How routing moved over a run's checkpoints, which are added from the oldest on."""

    def __init__(self, final: Bool[np.ndarray, "L T E"] | None):
        self._final, self._before = final, None
        self.steps: list[int] = []
        self.saturation: list[np.ndarray] = []
        self.flips: list[np.ndarray] = []

    def add(self, step: int, chosen: Bool[np.ndarray, "L T E"] | None) -> None:
        """Takes the next checkpoint's routing of the same tokens."""
        if chosen is None:
            return
        self.steps.append(step)
        self.saturation.append(routing.saturation(chosen, self._final))
        if self._before is not None:
            self.flips.append(routing.flip_rate(self._before, chosen))
        self._before = chosen


def measure(
    config: ModelConfig, variables: dict[str, Any], seen: Seen, text: Text, history: History
) -> dict[str, Any]:
    """Everything about one checkpoint, JSON-ready: numbers to 5 digits, None for not a number.

    Args:
      config: the model's config.
      variables: the checkpoint's parameters and router state.
      seen: its run over the text.
      text: the held-out text.
      history: of all checkpoints.

    Returns:
      ``router``, ``num_experts``, ``top_k``, ``layers`` (numbers of the MoE layers in the model,
      MTP modules' after the others), ``tokens``, ``batches`` and ``loss`` (nats per target);
      ``by_layer``, lists by measure; ``load`` and ``gate_mass`` (shares by layer and expert);
      ``coactivation`` (layer, expert, expert); ``saturation``, ``flip_rate``, ``domains``,
      ``vocabulary`` and ``masked_best_experts``, each None where it cannot be measured, and
      ``left_out``, the reasons.
    """
    moe, left_out = config.moe, {}
    by_layer = load_measures(seen)
    by_layer |= _parameter_measures(config, variables, seen, text, left_out)
    result = {
        "router": moe.router.name,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "layers": moe_layers(config),
        "tokens": text.tokens,
        "batches": len(text.batches),
        "loss": seen.loss,
        "by_layer": by_layer,
        "load": routing.shares(seen.stats["load"]),
        "gate_mass": routing.shares(seen.stats["gate_mass"]),
        "saturation": _saturation(history, left_out),
        "flip_rate": _flips(history, left_out),
        "domains": _domains(seen, text, left_out),
        **_by_token(seen, text, by_layer, left_out),
        "masked_best_experts": _masked(config, variables, seen, text, left_out),
        "left_out": left_out,
    }
    return plain(result)


def moe_layers(config: ModelConfig) -> list[int]:
    """Numbers of the MoE layers among all layers, from 0; MTP modules' follow the model's."""
    kinds = [kind for part, repeats in config.layout for kind in part * repeats]
    kinds += [config.mtp_kind] * config.mtp_depth
    return [i for i, kind in enumerate(kinds) if is_moe(kind)]


def load_measures(seen: Seen) -> dict[str, Any]:
    """The measures by layer that summed statistics give."""
    stats, load = seen.stats, seen.stats["load"]
    tokens = np.maximum(stats["tokens"], 1)
    names = {
        "experts_per_token": "assignments", "unrouted_share": "unrouted",
        "gate_entropy": "entropy", "top1_margin": "top1_margin",
        "squared_logsumexp": "squared_logsumexp",
        **{name: name for name in sorted(stats) if name.startswith("loss_")},
    }  # fmt: skip
    return {
        "max_violation_batch": routing.max_violation_batch(seen.loads),
        "max_violation_global": routing.max_violation_global(seen.loads),
        "load_variation": routing.load_variation(load),
        "load_entropy": routing.load_entropy(load),
        "load_gini": routing.load_gini(load),
        "dead_experts": routing.dead_experts(load),
        "dropped_share": routing.dropped_share(stats["dropped"], stats["assignments"]),
        **{name: stats[source] / tokens for name, source in names.items()},
    }


def _parameter_measures(config, variables, seen, text, left_out) -> dict[str, Any]:
    """Bias, gradient norms and the likeness of experts, by layer."""
    found: dict[str, Any] = {}
    bias = stack_bias(jax.device_get(variables["router_state"]))
    if bias is None:
        left_out["bias"] = "the router keeps no selection bias"
    else:
        measures = routing.bias_measures(bias)
        found |= {"bias_mean": measures.mean, "bias_spread": measures.spread}
    for name, weights in (("", (1.0, 0.0)), ("_auxiliary", (0.0, 1.0))):
        batch = text.batches[0]
        grads = probe.router_gradients(config, variables, batch, jnp.array(weights))
        if not grads:
            left_out["router_gradient_norm"] = "the router has no parameters"
            break
        found[f"router_gradient_norm{name}"] = _norms(jax.device_get(grads))
    found["output_redundancy"] = _redundancy(config, variables["params"], seen.sample)
    return found


def _norms(gradients: dict[tuple[str, ...], np.ndarray]) -> Float[np.ndarray, " L"]:
    norms: dict[str, dict[str, Any]] = {}
    for segment, layer in sorted({path[:2] for path in gradients}):
        own = [leaf for path, leaf in gradients.items() if path[:2] == (segment, layer)]
        norms.setdefault(segment, {})[layer] = {"norm": routing.gradient_norm(own)}
    return stack_layers(norms)["norm"]


def _redundancy(config, params, sample) -> list[float]:
    """Of each MoE layer; the experts' outputs are computed layer by layer."""
    layers = []
    parts = [(f"segment_{i}", *segment) for i, segment in enumerate(config.layout)]
    parts += [(f"mtp_{k}_layer", (config.mtp_kind,), 1) for k in range(config.mtp_depth)]
    for part, kinds, repeats in parts:
        moe = [f"layer_{j}" for j, kind in enumerate(kinds) if is_moe(kind)]
        layers += [
            jax.tree.map(lambda leaf, n=n: leaf[n], params[part][name]["moe"])
            for n in range(repeats) for name in moe
        ]  # fmt: skip
    outputs = (probe.expert_outputs(config, p, x) for p, x in zip(layers, sample, strict=True))
    return [routing.output_redundancy(np.asarray(output)) for output in outputs]


def _saturation(history: History, left_out: dict[str, str]) -> dict[str, Any] | None:
    if not _moved(history, "saturation", left_out):
        return None
    return {
        "reference": history.steps[-1], "steps": history.steps, "by_layer": history.saturation,
    }  # fmt: skip


def _flips(history: History, left_out: dict[str, str]) -> dict[str, Any] | None:
    if not _moved(history, "flip_rate", left_out):
        return None
    pairs = list(zip(history.steps, history.steps[1:], strict=False))
    return {"steps": pairs, "by_layer": history.flips}


def _moved(history: History, name: str, left_out: dict[str, str]) -> bool:
    if len(history.steps) == 1:
        left_out[name] = (
            "the run has one good checkpoint; set checkpoint.every_steps and checkpoint.keep_newest"
        )
    elif not history.steps:
        left_out[name] = MIXED
    return len(history.steps) > 1


MIXED = "the experts' rows are mixtures of tokens, so no token has experts of its own"


def _domains(seen: Seen, text: Text, left_out: dict[str, str]) -> dict[str, Any] | None:
    domains = text.held_out.domains
    if seen.chosen is None or domains is None:
        left_out["domains"] = MIXED if seen.chosen is None else text.held_out.why
        return None
    of_token = domains.of_document[text.documents]
    counts = np.bincount(of_token, minlength=len(domains.names))
    present = np.flatnonzero(counts >= MIN_DOMAIN)
    if len(present) < 2:
        left_out["domains"] = (
            f"fewer than two domains have {MIN_DOMAIN} tokens in the batches; raise --batches"
        )
        return None
    share = [
        routing.domain_specialisation(chosen, of_token, len(domains.names))[:, present]
        for chosen in seen.chosen
    ]
    return {
        "kind": domains.kind,
        "names": [domains.names[i] for i in present],
        "tokens": counts[present],
        "share": share,
    }


def _by_token(seen: Seen, text: Text, by_layer: dict, left_out: dict[str, str]) -> dict[str, Any]:
    """Co-activation, and what token ids tell of the experts."""
    if seen.chosen is None:
        left_out |= {"coactivation": MIXED, "vocabulary": MIXED}
        return {"coactivation": None, "vocabulary": None}
    count = float(np.mean(by_layer["experts_per_token"]))
    ids = {"input": text.ids("tokens"), "target": text.ids("targets")}
    ids["prediction"] = seen.prediction
    vocabulary: dict[str, Any] = {view: [] for view in VIEWS}
    for view in VIEWS:
        settled = []
        for chosen in seen.chosen:
            found = routing.token_shares(chosen, ids[view])
            settled.append(routing.vocabulary_specialisation(found, count, MIN_COUNT))
            experts = routing.most_specific(found, MOST_SPECIFIC, MIN_COUNT)
            vocabulary[view].append([
                [(_token_text(text, i), share, times) for i, share, times in expert]
                for expert in experts
            ])  # fmt: skip
        by_layer[f"vocabulary_{view}"] = settled
    return {
        "coactivation": [routing.coactivation(chosen) for chosen in seen.chosen],
        "vocabulary": {"min_count": MIN_COUNT, **vocabulary},
    }


def _token_text(text: Text, token: int) -> str:
    tokenizer = text.held_out.tokenizer
    if token == tokenizer.separator:
        return "<separator>"
    written = tokenizer.decode([token])
    return written if written and "\ufffd" not in written else f"<{token}>"


def _masked(config, variables, seen, text, left_out) -> dict[str, Any] | None:
    """The loss with each token's best experts masked, in powers of two up to what leaves K."""
    moe = config.moe
    if seen.chosen is None or not probe.can_mask(config, variables, text.batches[0]):
        left_out["masked_best_experts"] = (
            "the router does not score by logits that can be masked token by token"
        )
        return None
    spare = moe.num_experts - moe.top_k
    numbers = [2**i for i in range(spare.bit_length()) if 2**i <= spare]
    runs = [seen, *(run(config, variables, text, number) for number in numbers)]
    return {
        "masked": [0, *numbers],
        "loss": [one.loss for one in runs],
        "experts_per_token": [one.chosen.sum(-1).mean() for one in runs],
    }


def plain(value: Any) -> Any:
    """JSON-ready: arrays as lists, numbers to 5 significant digits, None for not a number."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
