"""Pairs of prompt and completion, and preferences between two completions, in memory and as JSONL.

A line is an object with the fields ``prompt`` and ``completion``, and maybe ``weight``: how much
each of the completion's targets counts in the loss, 1 where it is not there. A line of preferences
has ``prompt``, ``chosen`` and ``rejected``. Other fields are left alone.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from moejax import config
from moejax.data.documents import decode

FIELDS = ("prompt", "completion")
PREFERENCE_FIELDS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Prompts and their completions, in order.

    Attributes:
      prompts: what a model is given; may be empty.
      completions: what it shall write; none is empty.
      weights: of each completion's targets in the loss; empty for 1 everywhere.
      names: where each is from, for messages; empty for its number.
      provenance: JSON-ready: where they are from.

    Raises:
      ConfigError: not as many completions as prompts, an empty completion, a weight that is none.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    weights: Sequence[float] = ()
    names: Sequence[str] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.prompts)
        for name in ("completions", "weights", "names"):
            values = getattr(self, name)
            config.check(
                len(values) == count or (not values and name != "completions"),
                f"pairs.{name}", len(values), f"are not as many as the {count} prompts",
            )  # fmt: skip
        for i, completion in enumerate(self.completions):
            config.check(bool(completion), "data.path", self.name(i), EMPTY)
        for i, weight in enumerate(self.weights):
            check_weight(weight, self.name(i))

    def __len__(self) -> int:
        return len(self.prompts)

    def name(self, i: int) -> str:
        """Where pair ``i`` is from."""
        return self.names[i] if self.names else f"pair {i}"

    def weight(self, i: int) -> float:
        """How much each of its targets counts."""
        return float(self.weights[i]) if self.weights else 1.0


EMPTY = "has an empty completion, so there is nothing to learn; write one, or leave the line out"


def read_pairs(path: str) -> Pairs:
    """The pairs of a JSONL file, or of all those of a folder, by name.

    Args:
      path: the file, or the folder; hidden files are left out.

    Raises:
      ConfigError: nothing there, or a line that is no pair; file and line are named.
    """
    found, provenance = _read(path, parse_line)
    return Pairs(*found, {"source": "pairs", **provenance})


def read_preferences(path: str) -> tuple[Pairs, Pairs]:
    """The preferences of a JSONL file, or of all those of a folder, by name.

    Args:
      path: as of ``read_pairs``.

    Returns:
      The prompts with the responses that are preferred, and with the others, pair by pair.

    Raises:
      ConfigError: as ``read_pairs``, or both responses of a line are the same.
    """
    (prompts, chosen, rejected, names), provenance = _read(path, parse_preference)
    provenance = {"source": "preferences", **provenance}
    make = lambda completions: Pairs(prompts, completions, (), names, provenance)
    return make(chosen), make(rejected)


def _read(path: str, parse: Callable[[bytes, str], tuple]) -> tuple[tuple[list, ...], dict]:
    """Columns of all lines, as ``parse`` gives them of a line and its name, and where they are
    from."""
    root = pathlib.Path(path).expanduser()
    config.check(root.exists(), "data.path", path, "no such file or folder; give pairs that exist")
    files = [root]
    if root.is_dir():
        found = (p for p in root.rglob("*.jsonl") if p.is_file())
        files = sorted(p for p in found if not p.relative_to(root).as_posix().startswith("."))
        remedy = "the folder has no .jsonl files; put pairs in it"
        config.check(bool(files), "data.path", path, remedy)
    columns: tuple[list, ...] = ([], [], [], [])
    for file in files:
        try:
            with file.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        pair = parse(line, f"{file}:{number}")
                        for column, value in zip(columns, pair, strict=True):
                            column.append(value)
        except OSError as error:
            remedy = f"cannot be read ({error.strerror}); mend it or leave it out"
            raise config.ConfigError("data.path", str(file), remedy) from error
    config.check(bool(columns[0]), "data.path", path, "holds no pairs at all; put some in it")
    return columns, {"path": str(root.resolve()), "licence": "unknown"}


def parse_line(line: bytes, name: str) -> tuple[str, str, float, str]:
    """Prompt, completion, weight and name of a line.

    Args:
      line: of JSONL.
      name: file and line, for messages.

    Raises:
      ConfigError: it is no pair, with the reason and what to do.
    """
    record = _parsed(line, name, FIELDS)
    config.check(bool(record["completion"]), "data.path", name, EMPTY)
    weight = check_weight(record.get("weight", 1.0), name)
    return record["prompt"], record["completion"], weight, name


def parse_preference(line: bytes, name: str) -> tuple[str, str, str, str]:
    """Prompt, preferred response, other response and name of a line; see ``parse_line``."""
    record = _parsed(line, name, PREFERENCE_FIELDS)
    _, chosen, rejected = values = tuple(record[field] for field in PREFERENCE_FIELDS)
    config.check(bool(chosen and rejected), "data.path", name, EMPTY)
    hint = "has the same response twice, so that none is preferred; leave the line out"
    config.check(chosen != rejected, "data.path", name, hint)
    return *values, name


def _parsed(line: bytes, name: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """The object of a line, with text in all of the fields."""
    text = decode(line, name)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise config.ConfigError("data.path", name, "is not a line of JSON; mend it") from error
    wanted = "write {" + ", ".join(f'"{field}": ...' for field in fields) + "}"
    config.check(isinstance(record, dict), "data.path", name, f"is not a JSON object; {wanted}")
    for field in fields:
        hint = f"has no field {field!r}; {wanted}"
        config.check(field in record, "data.path", name, hint)
        value = record[field]
        hint = f"holds {type(value).__name__} in {field!r}, not text; {wanted}"
        config.check(isinstance(value, str), "data.path", name, hint)
        try:
            value.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON can spell
            hint = f"holds text in {field!r} that is not Unicode; mend it or leave the line out"
            raise config.ConfigError("data.path", name, hint) from error
    return record


def check_weight(value: Any, name: str) -> float:
    """A pair's weight; raises ConfigError where it is no number above zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        good = number and math.isfinite(value) and value > 0
    except OverflowError:  # an integer beyond any float
        good = False
    shown = str(value) if isinstance(value, float) else repr(value)[:40]
    hint = f"has the weight {shown}; give a number above 0, or leave the line out"
    config.check(good, "data.path", name, hint)
    return float(value)


def write_pairs(path: pathlib.Path, pairs: Pairs) -> None:
    """Writes pairs as JSONL, which ``read_pairs`` reads back."""
    with pathlib.Path(path).open("w", encoding="utf-8") as stream:
        for i in range(len(pairs)):
            record = {"prompt": pairs.prompts[i], "completion": pairs.completions[i]}
            if pairs.weights:
                record["weight"] = pairs.weight(i)
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
