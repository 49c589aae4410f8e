"""Which back end computes which product: what was measured on this kind of device, by shape.

The table is a JSON file that ``tuning.tune`` writes: ``$MOEJAX_GROUPED_MATMUL_TABLE``, else
``${XDG_CACHE_HOME:-~/.cache}/moejax/grouped_matmul.json``.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from typing import Any

from moejax.config import ConfigError, UserError, build, nearest
from moejax.moe.grouped_matmul.backends import BACKENDS, Settings
from moejax.moe.grouped_matmul.shapes import Product

VARIABLE = "MOEJAX_GROUPED_MATMUL_TABLE"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """Who computes a product, and why.

    Attributes:
      backend: name of the back end.
      settings: its configuration; empty for the one it computes from the shape.
      why: the reason, with every better one that had to be passed over and its reason.
    """

    backend: str
    settings: Settings
    why: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """A back end with a configuration, and the milliseconds it took (median)."""

    backend: str
    settings: dict
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Failed:
    """A back end with a configuration that could not be measured, and the reason."""

    backend: str
    settings: dict
    reason: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured for one product on one kind of device, the fastest first."""

    device: str
    product: Product
    ranked: tuple[Measured, ...]
    failed: tuple[Failed, ...] = ()
    date: str = ""
    versions: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """All measurements.

    Attributes:
      entries: one for each kind of device and product.
      format: version of the file's layout.
      only: asked for by name, whatever was measured.
    """

    entries: tuple[Entry, ...] = ()
    format: int = FORMAT
    only: Measured | None = None

    def choose(
        self, product: Product, *, platform: str, device: str, interpret: bool = False
    ) -> Choice:
        """The fastest back end that can run, by the nearest measurement.

        Args:
          product: what is to be computed.
          platform: where, for example ``cuda``.
          device: kind of device, as JAX names it.
          interpret: whether kernels are interpreted, which only the project's own can be.

        Raises:
          ConfigError: no back end can run there, or not the one asked for by name.
        """
        obstacle = functools.partial(_obstacle, product.leg, platform, interpret)
        if self.only is not None:
            if reason := obstacle(self.only):
                raise ConfigError("moe.dispatch", "grouped", f"{self.only.backend}: {reason}")
            return Choice(self.only.backend, _settings(self.only), "asked for by name")
        passed_over = ""
        entry = self._nearest(product, device)
        for measured in entry.ranked if entry else ():
            reason = obstacle(measured)
            if not reason:
                why = f"fastest by measurement, {measured.milliseconds:.3g} ms for {entry.product}"
                return Choice(measured.backend, _settings(measured), why + passed_over)
            passed_over += f"; not {measured.backend}, the faster one: {reason}"
        default = Measured("pallas", {}, 0.0)
        if reason := obstacle(default):
            others = (f"{name}: {_reason(name, product.leg, platform)}" for name in BACKENDS)
            raise ConfigError(
                "moe.dispatch", "grouped",
                f"no back end of it runs here ({'; '.join(others)}); use 'blocks' or 'auto'",
            )  # fmt: skip
        found = "nothing measured that runs" if entry else "nothing measured like it"
        return Choice("pallas", (), f"own kernels by default: {found} on {device}{passed_over}")

    def _nearest(self, product: Product, device: str) -> Entry | None:
        near = [entry for entry in self.entries if entry.device == device]
        entry = min(near, key=lambda entry: product.distance(entry.product), default=None)
        here = entry is not None and math.isfinite(product.distance(entry.product))
        return entry if here else None


def only(backend: str, **settings: Any) -> Table:
    """A table that names one back end for everything, to measure or to test it.

    Raises:
      UserError: an unknown back end, or a configuration that it does not take.
    """
    if backend not in BACKENDS:
        hint = nearest(backend, BACKENDS)
        raise UserError(f"grouped product by {backend!r}: no such back end; {hint}")
    if reason := BACKENDS[backend].check(tuple(sorted(settings.items()))):
        raise UserError(f"grouped product by {backend!r}: {reason}")
    return Table(only=Measured(backend, settings, 0.0))


def _settings(measured: Measured) -> Settings:
    return tuple(sorted(measured.settings.items()))


def _reason(name: str, leg: str, platform: str) -> str:
    return BACKENDS[name].why_not(leg, platform)


def _obstacle(leg: str, platform: str, interpret: bool, measured: Measured) -> str:
    """Why a back end cannot compute a leg with its settings; empty if it can."""
    name = measured.backend
    if name not in BACKENDS:
        return "unknown to this version"
    if interpret:
        reason = "" if name == "pallas" else "its kernels are not interpreted"
    else:
        reason = _reason(name, leg, platform)
    return reason or BACKENDS[name].check(_settings(measured))


def table_path() -> pathlib.Path:
    """Where the user's table stands."""
    if named := os.environ.get(VARIABLE):
        return pathlib.Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "moejax" / "grouped_matmul.json"


def load_table(path: str | os.PathLike | None = None) -> Table:
    """The table in a file; an empty one where the user has none.

    Args:
      path: another file than ``table_path()``.

    Raises:
      UserError: the file is not a table, or one asked for by name is not there.
    """
    file = pathlib.Path(path) if path else table_path()
    try:
        status = file.stat()
    except OSError as error:
        if path or os.environ.get(VARIABLE):
            raise UserError(
                f"grouped-matmul table {str(file)!r}: {error.strerror}; "
                "write one with moejax bench --tune"
            ) from None
        return Table()
    return _read(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _read(file: pathlib.Path, *version: int) -> Table:
    """Reads a table once for each state that the file is in."""
    del version
    try:
        values = json.loads(file.read_text())
        table = build(Table, {k: values[k] for k in ("entries", "format")})
        if table.format != FORMAT:
            raise ValueError(f"format {table.format}, and this version reads {FORMAT}")
        for entry in table.entries:
            p = entry.product
            if min(p.experts, p.inputs, p.outputs, p.rows) < 1:
                raise ValueError(f"sizes must be above zero: {p}")
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"grouped-matmul table {str(file)!r}: cannot be read ({reason}); "
            "delete it, or write it again with moejax bench --tune"
        ) from error
    return table
