"""Reads a book of prices from YAML, and says in one line what is wrong with one.

The form, and what each field means: the head of ``prices.yaml``.
"""

import dataclasses
import datetime
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from moejax.config import ConfigError, UserError, build, check, nearest
from moejax.cost.hardware import CHIPS

KINDS = ("on_demand", "reserved", "spot", "specialised_cloud", "owned", "assumed", "user")


@dataclasses.dataclass(frozen=True)
class Price:
    """A rate.

    Attributes:
      dollars_per_hour: US dollars of one device for one hour.
      kind: one of ``KINDS``; ``assumed`` is a report's own, ``user`` a number in a config.
      source: who says so.
      date: when, as YYYY-MM-DD or as much of it as is known.
      low, high: the range that the source gives; None where it gives one figure.
      book: the file that the rate is from, ``moejax`` for the packaged one; None for a number in
        a config.
    """

    dollars_per_hour: float
    kind: str
    source: str
    date: str
    low: float | None = None
    high: float | None = None
    book: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Purchase:
    """What one device costs to buy: US dollars, and the rest as in ``Price``.

    Some sources price the bare module and some its share of a server; ``source`` says which.
    """

    dollars: float
    source: str
    date: str
    low: float | None = None
    high: float | None = None
    book: str | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a book says of one chip: the default kind, rates by kind, the purchase price."""

    default: str | None = None
    rates: Mapping[str, Price] = dataclasses.field(default_factory=dict)
    purchase: Purchase | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Figure:
    """The fields of a figure in a file, but for its dollars."""

    date: str
    source: str
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rate(_Figure):
    dollars_per_hour: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Purchase(_Figure):
    dollars: float


def read_book(path: str | os.PathLike, name: str | None = None) -> dict[str, Entry]:
    """The entries of a book of prices, by chip.

    Args:
      path: a YAML file.
      name: what to call it in ``Price.book``; None takes the path.

    Raises:
      ConfigError: a field that cannot be used, with the file's name: no such chip, kind or field, a
        missing one, a price that is negative or no number, a range that the rate is not in, a date
        that is none or still to come, several rates and no default.
      ConfigError: a file that cannot be read or is too large.
      UserError: a file that is not YAML.
    """
    book = name or str(path)
    tree = _parse(pathlib.Path(path))
    check(isinstance(tree, dict) and bool(tree), str(path), tree, "must be chips with their prices")
    for chip in tree:
        check(chip in CHIPS, f"{path}: {chip}", chip, f"no such chip; {nearest(chip, CHIPS)}")
    return {chip: _entry(f"{path}: {chip}", fields, book) for chip, fields in tree.items()}


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, where YAML would keep the last; leaves dates as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            word = self.construct_object(key, deep=True)
            if not isinstance(word, str | int | float | None):
                raise yaml.constructor.ConstructorError(None, None, "no name", key.start_mark)
            if word in seen:
                problem = f"{word!r} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


MAX_BYTES = 1 << 20


def _parse(path: pathlib.Path) -> Any:
    field, remedy = "cost.price_book", "give a YAML file of prices"
    try:
        small = not path.is_file() or path.stat().st_size <= MAX_BYTES
        check(small, field, str(path), f"is above {MAX_BYTES} bytes; {remedy}")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        why = f"cannot be read ({error.strerror}); {remedy}"
        raise ConfigError(field, str(path), why) from error
    except RecursionError:
        raise ConfigError(field, str(path), f"is nested too deeply; {remedy}") from None
    except ValueError as error:  # no UTF-8, or a zero byte in the path
        raise ConfigError(field, str(path), f"is not text; {remedy}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}{where}: is not YAML that can be used: {problem}") from error


def _entry(where: str, fields: Any, book: str) -> Entry:
    check(isinstance(fields, dict), where, fields, "must be a block of rates and purchase")
    known = ("default", "rates", "purchase")
    for key in fields:
        check(key in known, f"{where}.{key}", fields[key], f"no such field; {nearest(key, known)}")
    rates = fields.get("rates") or {}
    check(isinstance(rates, dict), f"{where}.rates", rates, "must be rates by kind")
    for kind in rates:
        good = kind in KINDS
        check(good, f"{where}.rates.{kind}", kind, f"no such kind; {nearest(kind, KINDS)}")
    read = {kind: _figure(_Rate, f"{where}.rates.{kind}", rate) for kind, rate in rates.items()}
    default = fields.get("default")
    if default is None and len(read) == 1:
        (default,) = read
    check(
        default in read or (not read and default is None), f"{where}.default", default,
        f"must say which of these rates a run is charged at: {', '.join(read) or 'none given'}",
    )  # fmt: skip
    prices = {k: Price(**dataclasses.asdict(v), kind=k, book=book) for k, v in read.items()}
    purchase = None
    if fields.get("purchase") is not None:
        bought = _figure(_Purchase, f"{where}.purchase", fields["purchase"])
        purchase = Purchase(**dataclasses.asdict(bought), book=book)
    check(bool(prices) or purchase is not None, where, fields, "must have rates or a purchase")
    return Entry(default, prices, purchase)


def _figure(kind: type[_Rate] | type[_Purchase], where: str, fields: Any) -> Any:
    """One rate or purchase price, checked."""
    check(isinstance(fields, dict), where, fields, "must be a block of dollars, date and source")
    if isinstance(fields.get("date"), int) and not isinstance(fields["date"], bool):
        fields = fields | {"date": str(fields["date"])}  # a year
    figure = build(kind, fields, where)
    check(bool(figure.source.strip()), f"{where}.source", figure.source, "must say who says so")
    _check_date(f"{where}.date", figure.date)
    name = "dollars" if kind is _Purchase else "dollars_per_hour"
    dollars = getattr(figure, name)
    low = dollars if figure.low is None else figure.low
    high = dollars if figure.high is None else figure.high
    check(dollars >= 0, f"{where}.{name}", dollars, "must be dollars, 0 or above")
    check(0 <= low <= dollars, f"{where}.low", figure.low, f"must be from 0 to {name}")
    check(high >= dollars, f"{where}.high", figure.high, f"must be at least {name}")
    return figure


def _check_date(where: str, date: str) -> None:
    """Raises ConfigError unless a date is YYYY, YYYY-MM or YYYY-MM-DD, and has come."""
    good = re.fullmatch(r"\d{4}(-\d{2}){0,2}", date) is not None
    try:
        day = datetime.date(*([*map(int, date.split("-")), 1, 1][:3])) if good else None
    except ValueError:
        day = None
    if day is None:
        raise ConfigError(where, date, "must be a date: YYYY-MM-DD, YYYY-MM or YYYY")
    tomorrow = datetime.date.today() + datetime.timedelta(days=1)  # somewhere it is already
    check(day <= tomorrow, where, date, "is still to come; give the day that the price was seen")
