"""How fast each bias rule balances fixed, skewed scores: the rules without a model around them.

``python -m moejax.analysis.balance_rules FOLDER`` writes the figure and the table that
``experiments/results/routers`` holds.
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moejax.moe.bias_rules import BiasRule
from moejax.moe.diagnostics import max_violation
from moejax.moe.quantiles import histogram
from moejax.moe.routers.stats import assignment_counts
from moejax.moe.routers.top_k import select

TOKENS, EXPERTS, TOP_K, UPDATES = 4096, 32, 4, 1000
# Step and momentum of each rule: the published ones, a step ten times as long beside them.
RULES = {
    "none": BiasRule("none", 0.0, 0.0, 0),
    "sign": BiasRule("sign", 1e-3, 0.0, 0),
    "centred": BiasRule("centred", 1e-3, 0.0, 0),
    "sign x10": BiasRule("sign", 1e-2, 0.0, 0),
    "smebu": BiasRule("smebu", 5e-4, 0.5, 0),
    "smebu x10": BiasRule("smebu", 5e-3, 0.5, 0),
    "quantile": BiasRule("quantile", 0.0, 0.0, 0),
}


def skewed_scores(seed: int = 0) -> Float[np.ndarray, "T E"]:
    """Sigmoid scores of tokens that prefer some experts, so that MaxVio starts at about 3."""
    rng = np.random.default_rng(seed)
    preference = 1.0 * rng.standard_normal(EXPERTS)
    logits = preference + rng.standard_normal((TOKENS, EXPERTS))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


SCORES = skewed_scores()


def trajectory(rule: str, updates: int = UPDATES) -> Float[np.ndarray, " updates"]:
    """MaxVio before each update of a rule of ``RULES``, the same tokens every time."""
    chosen, every = RULES[rule], jnp.ones(TOKENS, bool)

    def step(scores, state, _):
        bias = state.get("bias", jnp.zeros(EXPERTS))
        load = assignment_counts(select(scores, bias, TOP_K), EXPERTS)
        counts = None
        if rule == "quantile":
            best = jax.lax.top_k(scores + bias[None], TOP_K + 1)[0]
            threshold = jnp.min(best, axis=-1, keepdims=True)
            counts = histogram(scores - threshold, every)
        return chosen.update(state, load, counts, TOP_K / EXPERTS), load

    # Scores are an argument: XLA would fold a constant through the sort of the top-k.
    run = jax.jit(
        lambda scores, state: jax.lax.scan(functools.partial(step, scores), state, length=updates)
    )
    return max_violation(np.asarray(run(SCORES, chosen.initial(EXPERTS))[1]))


def main(folder: str) -> None:
    """Writes ``balance_rules.svg`` and ``balance_rules.json`` to a folder."""
    # Here, so that the tests of the rules need no plotting.
    from moejax.analysis.curves import plt, save_figure

    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    lines = {rule: trajectory(rule) for rule in RULES}
    marks = (0, 1, 6, 30, 100, 300, 999)
    table = {
        rule: {str(step): round(float(values[step]), 4) for step in marks}
        for rule, values in lines.items()
    }
    (out / "balance_rules.json").write_text(json.dumps(table, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for rule, values in lines.items():
        axes.plot(np.arange(UPDATES) + 1, np.maximum(values, 1e-3), label=rule, linewidth=1)
    axes.set(
        xscale="log", yscale="log", xlabel="update", ylabel="MaxVio before it",
        title=f"bias rules on fixed scores: T {TOKENS}, E {EXPERTS}, K {TOP_K}",
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_figure(figure, out / "balance_rules.svg")


if __name__ == "__main__":
    main(sys.argv[1])
