"""What a family of checkpoints is: its names, its config, its tables."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax.interop.fields import Fields
from moejax.interop.tables import Table
from moejax.models import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
      model_type: ``model_type`` of its config.json.
      architecture: the class that runs it, in Transformers or in the code released with it.
      read: from the file's fields to our config.
      write: from our config to the file's fields, losses aside. What it cannot say is found by
        reading the result again.
      tables: from the file's values to the tables of tensors, the released layout first.
      also: further model types with the same fields and tensors.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    tables: Callable[[Mapping[str, Any]], tuple[Table, ...]]
    also: tuple[str, ...] = ()
