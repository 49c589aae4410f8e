"""Llama 3.1 8B, 70B and 405B: GPU-hours and emissions of the model card, FLOPs of the paper."""

from moejax.cost.counts import count
from moejax.cost.published.figures import Bill, Figure, hours, implied_mfu, train_flops
from moejax.models.presets import PRESETS

PAPER, CARD = "arXiv 2407.21783", "model card"
TOKENS, LENGTH = 15.6e12, 8192
KILOWATTS = 0.7  # of a GPU, as the card counts
KG_PER_KWH = 0.41  # not in the card: what its figures for the 8B come to
# Size: parameters, GPU-hours and tonnes of CO2 (location-based) of the card.
SIZES = {"8b": (8e9, 1.46e6, 420), "70b": (70e9, 7.0e6, 2040), "405b": (405e9, 30.84e6, 8930)}


def bill() -> Bill:
    """The bill of the three models; nobody publishes dollars."""
    figures = [figure for size in SIZES for figure in _size(size)]
    return Bill(
        "llama3_1",
        "Llama 3.1, 8B, 70B and 405B, dense",
        (PAPER, "Llama 3.1's model card"),
        ("15.6T tokens (of the 405B; about 15T of all)", "H100 SXM at 700 W",
         "405B: 16,384 GPUs at 41 % (table 4), most tokens in rows of 8,192"),
        (*figures, *_largest()),
    )  # fmt: skip


def _size(size: str) -> list[Figure]:
    params, taken, tonnes = SIZES[size]
    model, name = PRESETS[f"llama3_1_{size}"], size.upper()
    flops = TOKENS * train_flops(model, LENGTH)
    why = "the card rounds, and does not say the grid's factor; 0.41 kg/kWh is the 8B's own"
    return [
        Figure(f"parameters, {name}", "", params, count(model, 1).params.total, "derived",
               "counted from its config", PAPER),
        Figure(f"emissions, {name}", "t CO2", tonnes, taken * KILOWATTS * KG_PER_KWH / 1e3,
               "echoed", f"{taken / 1e6:.4g}M hours x 700 W x 0.41 kg/kWh", CARD, 0.01, why),
        Figure(f"utilisation, {name}", "%", None, 100 * implied_mfu(flops, "h100_sxm", taken),
               "implied", "causal FLOPs over the card's hours of the peak", "counted"),
    ]  # fmt: skip


def _largest() -> list[Figure]:
    model, taken = PRESETS["llama3_1_405b"], SIZES["405b"][1]
    named = TOKENS * train_flops(model, LENGTH, "6N")
    causal = TOKENS * train_flops(model, LENGTH)
    return [
        Figure("training FLOPs, 405B", "FLOP", 3.8e25, named, "derived",
               "6 x 405.85B x 15.6T", f"{PAPER}, section 3.2"),
        Figure("pre-training, 405B", "GPU-hours", taken, hours(causal, "h100_sxm", 0.41), "derived",
               "causal FLOPs over 41 % of the peak", CARD, 0.01,
               "the card counts all hours of training: long-context stages at 38 %, under 10 % of "
               "downtime (section 3.3.4), perhaps post-training"),
        Figure("utilisation by 6N, 405B", "%", None, 100 * implied_mfu(named, "h100_sxm", taken),
               "implied", "3.8e25 FLOP over the card's hours of the peak", "counted"),
    ]  # fmt: skip
