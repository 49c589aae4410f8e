"""Results as aligned tables for a terminal, and the same inside Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moejax.bench.shapes import gigaflops

WIDTH = 100

PASS_NAMES = {
    "forward": "fwd",
    "forward_backward": "fwd+bwd",
    "train_step": "step",
    "prefill": "prefill",
    "decode": "decode",
    "recompute": "recompute",
    "generate": "generate",
    "speculate": "speculate",
    "input_gradient": "d input",
    "weight_gradient": "d weight",
}

Column = tuple[str, Callable[[dict[str, Any]], str]]


def _number(value: float | None, form: str = ".3g", scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)


def _rate(value: float | None) -> str:
    """Thousands of millions a second, to three digits; nothing for 0."""
    if not value:
        return ""
    return format(value / 1e9, ",.0f" if value >= 1e11 else ".3g")


def _load(row: dict[str, Any]) -> str:
    """The load's name, with the fullest expert's load over the mean."""
    ratio = row.get("max_over_mean")
    return (row["load"] or "") + ("" if ratio is None else f" {ratio:.1f}x")


def _error(tensor: str) -> Column:
    return tensor, lambda r: _number(r["errors"].get(tensor), ".1e")


def _ms(name: str) -> Column:
    return name, lambda r: _number(r["ms"][name], ".4g")


_TIMES: list[Column] = [
    ("ms", lambda r: _number(r["ms"]["median"], ".4g")),
    _ms("p10"),
    _ms("p90"),
]

_FRONT: list[Column] = [
    ("load", lambda r: _load(r)),
    ("dispatch", lambda r: r["dispatch"]),
    ("pass", lambda r: PASS_NAMES[r["pass"]]),
    *_TIMES,
    ("GFLOP/s", lambda r: _rate(r["flops_per_s"])),
]

_DENSE: Column = ("x dense", lambda r: _number(r["ratio_to_dense"], ".2f"))
_TEMP: Column = ("temp MB", lambda r: _number(r["temp_bytes"], ",.1f", 1e-6))

COLUMNS: dict[str, list[Column]] = {
    "moe": [
        *_FRONT, _DENSE, _TEMP, ("dropped", lambda r: _number(r["dropped_share"] or None, ".1%")),
    ],
    "model": [
        *_FRONT[:-1], _DENSE,
        ("tokens/s", lambda r: _number(r["tokens_per_s"], ",.0f")),
        ("MFU", lambda r: _number(r["mfu"], ".1%")),
        ("GB", lambda r: _number(r["program_bytes"], ".2f", 1e-9)),
        ("x peer", lambda r: _number(r["times_faster_than_peer"], ".2f")),
    ],
    "generate": [
        ("what", lambda r: r["dispatch"]),
        ("pass", lambda r: PASS_NAMES[r["pass"]]),
        ("batch", lambda r: str(r["batch"])),
        *_TIMES,
        ("tokens/s", lambda r: _number(r["tokens_per_s"], ",.0f")),
        ("x recompute", lambda r: _number(r["times_faster_than_recompute"], ".1f")),
        ("x peer", lambda r: _number(r["times_faster_than_peer"], ".2f")),
        ("accepted", lambda r: _number(r["accepted_share"], ".0%")),
    ],
    "routers": [
        ("router", lambda r: r["dispatch"]),
        *_TIMES,
        ("of experts", lambda r: _number(r["share_of_experts"], ".1%")),
        ("bar", lambda r: {True: "under", False: "OVER", None: ""}[r["within_bar"]]),
        _TEMP,
        ("run with", lambda r: ", ".join(r["needs"])),
    ],
    "agreement": [
        ("load", lambda r: r["load"]),
        ("dispatch", lambda r: r["dispatch"]),
        ("dtype", lambda r: r["dtype"]),
        *(_error(tensor) for tensor in ("y", "d_x", "d_gate", "d_gate_up", "d_down")),
        *(_error(tensor) for tensor in ("d_query", "d_key", "d_value")),
        ("tolerance", lambda r: format(r["tolerance"], ".0e")),
        ("padding", lambda r: "zero" if r["padding_is_zero"] else "NOT ZERO"),
    ],
    "attention": [*_FRONT[1:], _TEMP],
    "ceilings": [
        ("what", lambda r: r["shape"]["name"]),
        ("dtype", lambda r: r["dtype"]),
        *_TIMES,
        ("GFLOP/s", lambda r: _rate(r["flops_per_s"])),
        ("GB/s", lambda r: _rate(r.get("bytes_per_s"))),
    ],
    "tune": [
        ("product", lambda r: r["shape"]["name"]),
        ("dtype", lambda r: r["dtype"]),
        ("back end", lambda r: r["dispatch"]),
        ("ms", lambda r: _number(r["ms"]["median"], ".4g")),
        ("GFLOP/s", lambda r: _rate(r["flops_per_s"])),
    ],
    "profile": [
        ("piece", lambda r: r["piece"]),
        ("load", lambda r: r["load"]),
        *_TIMES,
        ("GFLOP/s", lambda r: _rate(r["flops_per_s"])),
    ],
}  # fmt: skip


def format_tables(record: dict[str, Any]) -> str:
    """A benchmark's JSON object as text of at most 100 columns: a table a shape, then the notes."""
    parts = []
    for suite in dict.fromkeys(r["suite"] for r in record["results"]):
        rows = [r for r in record["results"] if r["suite"] == suite]
        parts += _by_shape(rows, COLUMNS[suite], suite in ("ceilings", "tune"))
    if record["profile"]:
        parts += _by_shape(record["profile"], COLUMNS["profile"], False)
    parts.append("\n".join(_wrapped(closing_lines(record))))
    return "\n\n".join(part for part in parts if part)


def closing_lines(record: dict[str, Any]) -> list[str]:
    """What is said below the tables: what ``auto`` picks, the notes, and what failed."""
    lines, picks = [], {}
    for shape, pick in record["auto"].items():
        picks.setdefault((pick["dispatch"], pick["reason"]), []).append(shape)
    for (dispatch, reason), shapes in picks.items():
        where = "for every shape here" if len(picks) == 1 else f"for {', '.join(shapes)}"
        lines.append(f"auto runs {dispatch} {where}: {reason}")
    if record.get("peak_flops"):
        peak = f"{record['peak_flops'] / 1e9:,.0f} GFLOP/s ({record['peak_source']})"
        lines.append(f"MFU is over a peak of {peak}")
    compiled = [r["compile_seconds"] for r in record["results"] if r.get("compile_seconds")]
    if compiled:
        lines.append(
            f"compiling took {min(compiled):.1f} to {max(compiled):.1f} s a program, which is in "
            "no time above; a load's factor is the fullest expert's load over the mean"
        )
    lines += record["notes"]
    for failure in record["failures"]:
        what = " ".join(str(v) for k, v in failure.items() if k != "error" and v)
        lines.append(f"failed: {what}: {failure['error']}")
    return lines


def describe_shape(shape: dict[str, Any]) -> str:
    """A shape's heading: its name and its axes."""
    axes = [f"{axis}{size}" for axis, size in shape.items() if axis != "name"]
    if shape["name"] == "-".join(axes) or shape["name"].split("-")[0] in axes:
        return " ".join(axes)
    return f"{shape['name']}: {' '.join(axes)}"


def _by_shape(rows: Sequence[dict[str, Any]], columns: list[Column], together: bool) -> list[str]:
    """One table a shape, or all shapes in one."""
    if together:
        return [format_table(rows, columns)]
    parts = []
    for name in dict.fromkeys(r["shape"]["name"] for r in rows):
        here = [r for r in rows if r["shape"]["name"] == name]
        title = describe_shape(here[0]["shape"])
        least = [r["flops_per_s"] * r["ms"]["median"] / 1e3 for r in here if r.get("pass")]
        if least:
            pass_name = PASS_NAMES[here[0]["pass"]]
            title += f" ({here[0]['dtype']}, {gigaflops(least[0])} {pass_name})"
        parts.append(f"{title}\n{format_table(here, columns)}")
    return parts


def format_table(rows: Iterable[dict[str, Any]], columns: list[Column]) -> str:
    """Aligned columns, words to the left and numbers to the right; empty columns left out."""
    cells = [[value(row) for _, value in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    lines = [[columns[i][0] for i in kept], *([line[i] for i in kept] for line in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    words = [i for i in range(len(kept)) if not any(_is_number(line[i]) for line in lines[1:])]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _is_number(text: str) -> bool:
    return text[:1].isdigit()


def _wrapped(lines: list[str]) -> list[str]:
    """Lines of at most 100 columns, continued with two spaces."""
    import textwrap

    found = []
    for line in lines:
        found += textwrap.wrap(line, WIDTH, subsequent_indent="  ")
    return found


def format_markdown(record: dict[str, Any]) -> str:
    """The results as a page: command, date, hardware, versions, seed, then the tables."""
    machine, versions = record["machine"], record["versions"]
    gpu = f"{machine['devices']} x {machine['device_kind']}, "
    gpu = "" if machine["platform"] == "cpu" else gpu
    facts = {
        "command": f"`{record['command']}`",
        "date": record["date"],
        "machine": f"{gpu}{machine['cores']} cores of {machine['cpu']}, {machine['system']}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "seed": str(record["seed"]),
        "rounds": "median, p10 and p90 over rounds; candidates of a shape in turns",
    }
    lines = [f"# Speed: suite {record['suite']}, as measured", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in facts.items()]
    return "\n".join([*lines, "", "```", format_tables(record), "```", ""])
