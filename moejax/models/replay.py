"""Routing replay: whether a model can be given the experts that its tokens shall go to.

The collections are those of ``moejax.moe.routers.base.Router``: a call with
``mutable=["router_choice"]`` returns what was chosen, and the same tree given as ``router_replay``
is chosen in its place.
"""

from typing import Any

from moejax.config import check
from moejax.models.model_config import ModelConfig
from moejax.moe.routers import find


def check_replay(config: ModelConfig, field: str = "routing_replay", value: Any = True) -> None:
    """Refuses a model whose routing cannot be replayed.

    Args:
      config: the model's.
      field: the config field that asks for replay, for the message about a dense model.
      value: its value.

    Raises:
      ConfigError: it has no MoE layer, or its router does not take given choices.
    """
    check(
        config.moe is not None and config.layers("moe") > 0, field, value,
        "needs experts to replay, but the model has no MoE layer; leave it off",
    )  # fmt: skip
    name = config.moe.router.name
    check(
        find(name).replays, "router.name", name,
        f"cannot be given choices, which {field} = {value!r} needs; use a top-k router such as "
        "deepseek_v3, or leave it off",
    )  # fmt: skip


def as_replay(choice: Any) -> dict[str, Any]:
    """The collection ``router_replay`` from what a call wrote; see the module's text.

    Args:
      choice: the variables that a call with ``mutable=["router_choice"]`` returned.
    """
    return {"router_replay": choice["router_choice"]}
