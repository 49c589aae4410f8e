"""What a file has to hold before it is shown, and what is wrong with one that does not."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """A plain value: what to call it, and its type. Numbers beyond 64 bits are damage."""

    name: str
    types: tuple[type, ...]

    def holds(self, value: Any) -> bool:
        if object in self.types:
            return True
        if isinstance(value, bool) or not isinstance(value, self.types):
            return False
        return not isinstance(value, int) or value.bit_length() < 64


@dataclasses.dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Any


@dataclasses.dataclass(frozen=True)
class Named:
    """An object whose names are free: the shape of each value."""

    each: Any


TEXT, COUNT = Kind("text", (str,)), Kind("whole number", (int,))
ANY = Kind("value", (object,))
# The writers of records put null for what is not finite.
NUMBER = Maybe(Kind("number", (int, float)))

_DOMAIN = {
    "name": TEXT, "documents": COUNT, "tokens": COUNT, "nats_per_token": NUMBER,
    "bits_per_byte": NUMBER, "interval": Maybe((NUMBER, NUMBER)), "unigram": NUMBER, "gzip": NUMBER,
}  # fmt: skip
_TASK = {
    "samples": Maybe(COUNT), "few_shot": ANY,
    "metrics": Named({"value": NUMBER, "stderr": NUMBER}),
}  # fmt: skip
# What a report shows of an evaluate.json; see moejax.analysis.evaluate for the whole of it.
EVALUATION = {
    "fingerprint": TEXT, "step": COUNT, "batches": {"run": COUNT, "of": COUNT},
    "confidence": Kind("number", (int, float)), "leaks": [TEXT], "total": _DOMAIN,
    "kind": Maybe(TEXT), "why": Maybe(TEXT), "domains": [_DOMAIN],
    "lm_eval": Maybe({"version": TEXT, "limit": Maybe(COUNT), "max_length": COUNT,
                      "tasks": Named(_TASK)}),
}  # fmt: skip


def misfit(value: Any, shape: Any, place: str = "") -> str:
    """The first way in which a value is not of a shape, in words; empty where it is.

    Args:
      value: from a JSON file.
      shape: a ``Kind``, ``Maybe`` or ``Named``; a dictionary, the fields that an object has to
        have; a list of one shape, which each entry has; or a tuple, the shape of every entry.
      place: where the value stands in the file.
    """
    if isinstance(shape, Maybe):
        return "" if value is None else misfit(value, shape.shape, place)
    if isinstance(shape, Kind):
        return "" if shape.holds(value) else f"{place} is no {shape.name}"
    if isinstance(shape, (dict, Named)):
        if not isinstance(value, dict):
            return f"{place} is no object"
        fields = shape if isinstance(shape, dict) else dict.fromkeys(value, shape.each)
        lacking = [_within(place, name) for name in fields if name not in value]
        if lacking:
            return f"lacks {', '.join(lacking)}"
        parts = [(value[name], inner, _within(place, name)) for name, inner in fields.items()]
    else:
        if not isinstance(value, list):
            return f"{place} is no list"
        if isinstance(shape, tuple) and len(value) != len(shape):
            return f"{place} has {len(value)} entries, not {len(shape)}"
        inners = shape if isinstance(shape, tuple) else shape * len(value)
        pairs = enumerate(zip(value, inners, strict=True))
        parts = [(entry, inner, f"{place}[{i}]") for i, (entry, inner) in pairs]
    return next(filter(None, (misfit(*part) for part in parts)), "")


def _within(place: str, name: str) -> str:
    """A field's place. A name from the file may hold line breaks, and the message is one line."""
    name = name if name.isidentifier() else repr(name)
    return f"{place}.{name}" if place else name
