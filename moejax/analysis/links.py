"""What links and routing limits do to one run's hours: figures for the export-restricted chips."""

import dataclasses

from matplotlib.figure import Figure

from moejax.analysis.figures import BLUE, GREY, RED, panel
from moejax.config import ConfigError
from moejax.cost.compare import compare, format_compare
from moejax.cost.exchange import exchange, transport
from moejax.cost.prices import purchase
from moejax.cost.prices import resolve as rate
from moejax.cost.utilisation import assumed
from moejax.models.model_config import ModelConfig
from moejax.models.presets import PRESETS

CHIPS = ("h800_sxm", "h100_sxm", "h20")
EXPERT_DEVICES, TOKENS, LENGTH = 64, 14.8e12, 4096


def table(overlap: float | None = None) -> str:
    """V3's pre-training on H800, H100 and H20: ``moejax plan --compare`` of it."""
    model = PRESETS["deepseek_v3"]
    found = compare(
        model, hardware=CHIPS, prices={chip: _rate(chip) for chip in CHIPS},
        purchases={chip: purchase(chip) for chip in CHIPS}, tokens=TOKENS, seq_len=LENGTH,
        devices=2048, used=assumed(CHIPS[0], model, LENGTH),
        how=transport("deepseek_v3", overlap), expert_devices=EXPERT_DEVICES,
    )  # fmt: skip
    return format_compare(found)


def _rate(chip):
    try:
        return rate(chip)
    except ConfigError:  # nobody lists one
        return None


def without_limit(model: ModelConfig) -> ModelConfig:
    """The model with routers that choose among all experts."""
    router = dataclasses.replace(model.moe.router, num_groups=1, groups_kept=1)
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=router))


def variants() -> list[tuple[str, str, float, float]]:
    """Ways to exchange V3's tokens on 64 devices: name, chip, seconds within and between nodes."""
    limited = PRESETS["deepseek_v3"]
    own = transport("deepseek_v3")
    bf16 = dataclasses.replace(own, dispatch_bytes=2)
    cases = [
        ("as V3: 4 nodes, FP8", limited, own),
        ("8 nodes", without_limit(limited), own),
        ("8 nodes, BF16", without_limit(limited), bf16),
        ("8 nodes, BF16, a copy a device", without_limit(limited),
         dataclasses.replace(bf16, by_node=False)),
    ]  # fmt: skip
    found = []
    for name, model, how in cases:
        for chip in CHIPS[:2]:
            sent = exchange(
                model, hardware=chip, expert_devices=EXPERT_DEVICES, how=how, compute_seconds=1.0
            )
            seconds = sent["seconds_per_token"]
            found.append((name, chip, seconds["scale_up"], seconds["scale_out"]))
    return found


def plot_variants() -> Figure:
    """Microseconds of a device for each token, on both links, beside the computation's."""
    figure, (axes,) = panel(8.4, 3.4)
    rows = variants()
    names = list(dict.fromkeys(name for name, *_ in rows))
    for number, chip in enumerate(CHIPS[:2]):
        places = [place + 0.4 * number for place in range(len(names))]
        mine = [row for row in rows if row[1] == chip]
        fast, far = ([1e6 * row[column] for row in mine] for column in (2, 3))
        axes.barh(places, fast, height=0.18, color=(BLUE, GREY)[number], label=f"{chip}, NVLink")
        axes.barh([p + 0.18 for p in places], far, height=0.18, color=(BLUE, GREY)[number],
                  alpha=0.45, label=f"{chip}, network")  # fmt: skip
    used = assumed("h800_sxm", PRESETS["deepseek_v3"], LENGTH)
    axes.axvline(1e6 * 260.64e9 / (989.4e12 * used.mfu), color=RED, linewidth=1)
    axes.set_yticks([place + 0.3 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("µs of a device for each token; red: computation")
    axes.legend(frameon=False, fontsize=8)
    return figure
