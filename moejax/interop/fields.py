"""The fields of a config.json, read strictly: every mistake is one line, nothing goes unseen."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NoReturn

from moejax.config import UserError

CONFIG = "config.json"
REQUIRED = object()

# Fields that decide no number of a forward pass over whole rows or a cache.
HARMLESS = frozenset({
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id",
    "ep_size", "initializer_range", "max_position_embeddings", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "quantization_config", "return_dict", "torch_dtype", "transformers_version", "use_cache",
    "_name_or_path", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    "is_encoder_decoder",
})  # fmt: skip


class Fields:
    """A config.json whose fields are marked as they are read, so that the rest can be told.

    Args:
      values: what the file holds.
      where: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self._seen: set[str] = set(HARMLESS)

    def refuse(self, name: str, remedy: str) -> NoReturn:
        """Raises the UserError for a field: file, field, value, remedy."""
        raise UserError(f"{self.where}: {name} = {self.values.get(name)!r}: {remedy}")

    def check(self, condition: bool, name: str, remedy: str) -> None:
        """Refuses a field unless the condition holds."""
        if not condition:
            self.refuse(name, remedy)

    def get(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """A field's value; the default where it is missing or null.

        Raises:
          UserError: missing without a default, or of another type.
        """
        self._seen.add(name)
        value = self.values.get(name)
        if value is None:
            self.check(default is not REQUIRED, name, "has to be there; restore the file")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        self.check(right, name, f"must be {_KINDS[kind]}; restore the file")
        return value

    def size(self, name: str, default: Any = REQUIRED) -> int:
        """A whole number above zero."""
        value = self.get(name, int, default)
        self.check(value is None or value > 0, name, "must be above zero; restore the file")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses a field that is there, not null, and none of the values that moejax computes."""
        self._seen.add(name)
        value = self.values.get(name)
        shown = " or ".join(map(repr, allowed)) or "null"
        good = value is None or any(value == a and type(value) is type(a) for a in allowed)
        self.check(good, name, f"moejax computes {shown} only; this checkpoint cannot be used")

    def idle(self, *names: str) -> None:
        """Marks fields that are known to change nothing here."""
        self._seen.update(names)

    def unknown(self) -> list[str]:
        """Fields that are there and that nobody asked for."""
        return sorted(set(self.values) - self._seen)


_KINDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a string",
    list: "a list", dict: "a block of fields",
}  # fmt: skip


def read_json(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
      UserError: missing, unreadable, or something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{str(file)!r}: no such file; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r}: cannot be read ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{str(file)!r}: holds no JSON object; {remedy}")
    return values
