"""Mutated configs for ``fuzz_configs.py``: real ones, with fields of every block changed.

What can be changed is read off the dataclasses of the blocks, so that a new field or a new block is
covered as soon as it is there. A mutation is drawn from a ``random.Random``: the same generator
gives the same config, and hypothesis can hand in one of its own.
"""

import copy
import dataclasses
import functools
import itertools
import math
import pathlib
import random
import types
import typing
from collections.abc import Iterator
from typing import Any

from moejax import config as mechanism
from moejax.cost.grid import CARBON_KG_PER_KWH as REGIONS
from moejax.cost.hardware import CHIPS
from moejax.cost.price_book import KINDS as PRICE_KINDS
from moejax.models.model_config import LAYER_KINDS
from moejax.moe import MoEConfig
from moejax.moe.routers import REGISTRY
from moejax.training.run_config import RunConfig

EXPERIMENTS = pathlib.Path(__file__).parents[1]
REAL = (
    EXPERIMENTS / "quickstart.py", EXPERIMENTS / "ablations" / "base.py",
    *sorted(p for p in (EXPERIMENTS / "models").glob("*.py") if p.stem != "published"),
)  # fmt: skip

# Values of fields of text that have a list of their own.
WORDS: dict[str, tuple[str, ...]] = {
    "router.name": tuple(REGISTRY), "cost.hardware": ("auto", *CHIPS),
    "cost.region": tuple(REGIONS), "cost.price_kind": PRICE_KINDS,
    "data.tokenizer": ("bytes", "bpe"), "model.segments": LAYER_KINDS,
    "stage": ("pretrain", "sft", "rl_train"),
}  # fmt: skip
INTEGERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 64, 100, 257, 1000, 4096, 10**6, 2**31 - 1)
SMALL = (0, 1, 1, 2, 2, 2, 3, 4, 4, 6, 8, 8, 16, 32)
FLOATS = (0.0, 1e-8, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0, 1.25, 2.0, 10.0)
EDGES = (
    -1, -8, 2**31, 2**32, 2**53 + 1, 2**63, 10**30, 10**400, 10**5000, -(10**400), -0.0, -1.0,
    5e-324, 1e-300, 1e300, math.nan, math.inf, -math.inf,
)  # fmt: skip
WRONG = (
    None, True, False, "", " ", "many", "1", "nan", "None", "\x1b[31mred", "a\nb", "größe \u202e",
    "x" * 10_000, "a\0b", "../../etc", "no/such.py", "os.system", "this.Zen", [], [1], [None],
    [[]], {}, {"a": 1}, {"": {}}, {1: 2}, (1, 2), b"bytes", 3 + 4j, {3}, range(3),
)  # fmt: skip
ODD_NAMES = ("", "__class__", "__post_init__", "a b", "größe", "x" * 300, "\x1b[2J", "a\nb", "1")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a block: its dotted path in a config, and its type."""

    path: str
    kind: Any


def fields_of(cls: type, path: str = "") -> Iterator[Field]:
    """All fields of a dataclass, nested ones and their blocks included, by dotted path."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        where, kind = f"{path}.{field.name}" if path else field.name, hints[field.name]
        # The blocks moe and router stand on their own in a config.
        if inner(kind) is MoEConfig or where == "moe.router":
            continue
        yield Field(where, kind)
        if dataclasses.is_dataclass(inner(kind)):
            yield from fields_of(inner(kind), where)
        part = typing.get_args(kind)[:1] if typing.get_origin(kind) is tuple else ()
        if part and dataclasses.is_dataclass(part[0]):  # the first block of a list of them
            yield from fields_of(part[0], f"{where}.0")


def inner(kind: Any) -> Any:
    """A type without its None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [a for a in typing.get_args(kind) if a is not type(None)]
    return kind


def schema(router: Any = None) -> tuple[Field, ...]:
    """The fields of a config, with the options of one router or, if it is none, of the default."""
    name = router if isinstance(router, str) and router in REGISTRY else "deepseek_v3"
    return _schema(name)


@functools.cache
def _schema(router: str) -> tuple[Field, ...]:
    options = fields_of(REGISTRY[router].Options, "router")
    return (*fields_of(RunConfig), *fields_of(MoEConfig, "moe"), *options)


def known_paths() -> set[str]:
    """Every dotted path that an error may name: blocks, and fields of all routers."""
    paths = {field.path for name in REGISTRY for field in schema(name)}
    return {path.replace(".0", "") for path in paths} | {"moe", "router", "config"}


def real_config(rng: random.Random) -> dict[str, Any]:
    """One of the real configs, as nested dictionaries."""
    return copy.deepcopy(_loaded(rng.choice(REAL)))


_CONFIGS: dict[pathlib.Path, dict[str, Any]] = {}


def _loaded(path: pathlib.Path) -> dict[str, Any]:
    if path not in _CONFIGS:
        _CONFIGS[path] = mechanism.load(str(path))
    return _CONFIGS[path]


def tiny(config: dict[str, Any], corpus: str) -> dict[str, Any]:
    """A real config with its kinds of layers, attention and router, and sizes to compile soon."""
    config = copy.deepcopy(config)
    model, attention = config["model"], config["model"].setdefault("attention", {})
    model |= {"vocab_size": 260, "d_model": 16, "d_ff": 24, "loss_chunk": 0}
    attention["num_heads"] = 4
    if attention.get("kind") == "mla":
        attention |= {"q_lora_rank": 8 if attention.get("q_lora_rank") else 0, "kv_lora_rank": 8,
                      "nope_head_dim": 4, "rope_head_dim": 4, "v_head_dim": 4}  # fmt: skip
    else:
        attention |= {"head_dim": 4, "num_kv_heads": 2 if attention.get("num_kv_heads") else 0}
    if attention.get("window"):
        attention["window"] = 4
    if model.get("segments"):
        model["segments"] = [[list(kinds), 1] for kinds, _ in model["segments"]]
        model["num_layers"] = sum(len(kinds) for kinds, _ in model["segments"])
    else:
        model["num_layers"] = 3
        model["first_k_dense"] = min(1, model.get("first_k_dense", 0))
    if "moe" in config:
        config["moe"] |= {"num_experts": 8, "top_k": 2, "d_expert": 8}
        router = config["router"]
        if router.get("num_groups", 1) > 1:
            router |= {"num_groups": 4, "groups_kept": 2}
        router.pop("layer_weights", None)
    config["data"] = {"source": "text", "path": corpus, "tokenizer": "bytes"}
    config["train"] = {"steps": 2, "batch_size": 8, "seq_len": 16}
    config["optim"] = {"optimizer": config["optim"].get("optimizer", "adamw"), "warmup_steps": 1}
    config["mesh"], config["cost"] = {}, {}
    return config


def mutate(config: dict[str, Any], rng: random.Random, *, hostile: float, small: bool) -> dict:
    """One to four changes of a config.

    Args:
      config: nested dictionaries, changed in place.
      rng: the source of every choice.
      hostile: how often a change is one that should be refused, 0 to 1.
      small: draw sizes that compile in seconds.

    Returns:
      The config.
    """
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        bad = rng.random() < hostile
        change = rng.choice((_hostile_value, _hostile_value, _structure) if bad else
                            (_other_value, _other_value, _router, _together))  # fmt: skip
        change(config, rng, small)
    return config


def _fields(config: dict[str, Any]) -> tuple[Field, ...]:
    router = config.get("router")
    return schema(router.get("name") if isinstance(router, dict) else None)


def _pick(config: dict[str, Any], rng: random.Random) -> Field:
    """A field: first a block, so that blocks with many fields are not all that is drawn."""
    fields = _fields(config)
    blocks = sorted({field.path.partition(".")[0] for field in fields})
    block = rng.choice(blocks)
    return rng.choice([field for field in fields if field.path.partition(".")[0] == block])


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    """Sets a field; where a block on the way is none any more, nothing is set."""
    *blocks, last = path.split(".")
    target: Any = config
    for block, below in itertools.pairwise([*blocks, last]):
        if block == "0":
            target = target[0] if isinstance(target, list) and target else None
        else:
            target = target.setdefault(block, [{}] if below == "0" else {})
        if below != "0" and not isinstance(target, dict):
            return
    if isinstance(target, dict):
        target[last] = value


def _other_value(config: dict[str, Any], rng: random.Random, small: bool) -> None:
    field = _pick(config, rng)
    _set(config, field.path, draw(field.kind, field.path, rng, small))


def _hostile_value(config: dict[str, Any], rng: random.Random, small: bool) -> None:
    field = _pick(config, rng)
    _set(config, field.path, copy.deepcopy(rng.choice(rng.choice((EDGES, WRONG)))))


def _structure(config: dict[str, Any], rng: random.Random, small: bool) -> None:
    """An unknown field or block, a missing one, a block that is a value."""
    field = _pick(config, rng)
    above = field.path.rpartition(".")[0]
    what = rng.choice(
        ("unknown", "misspelt", "missing", "block missing", "scalar", "unknown block")
    )
    if what == "unknown":
        _set(config, f"{above}.{rng.choice(ODD_NAMES)}".lstrip("."), rng.choice(WRONG))
    elif what == "misspelt":
        _set(config, field.path[:-1] or "x", 1)
    elif what == "missing":
        target = config.get(above) if above else config
        if isinstance(target, dict):
            target.pop(field.path.rpartition(".")[2], None)
    elif what == "block missing":
        config.pop(field.path.partition(".")[0], None)
    elif what == "scalar":
        config[field.path.partition(".")[0]] = copy.deepcopy(rng.choice(WRONG))
    else:
        config[rng.choice(ODD_NAMES)] = rng.choice(WRONG)


def _router(config: dict[str, Any], rng: random.Random, small: bool) -> None:
    """Another router, with some of its options."""
    if "moe" not in config and rng.random() < 0.8:
        config["moe"] = {"num_experts": 8, "top_k": 2, "d_expert": 8}
    name = rng.choice(list(REGISTRY))
    options = [f for f in fields_of(REGISTRY[name].Options, "router") if f.path != "router.name"]
    config["router"] = {"name": name}
    for field in rng.sample(options, rng.randint(0, min(3, len(options)))):
        _set(config, field.path, draw(field.kind, field.path, rng, small))
    if isinstance(config.get("moe"), dict) and rng.random() < 0.7:
        config["moe"] |= {"allow_leak": True, "gate_rank": rng.choice((0, 2, 4))}


def _together(config: dict[str, Any], rng: random.Random, small: bool) -> None:
    """Fields that depend on one another, all of them drawn anew."""
    sets = (
        ("moe.num_experts", "moe.top_k", "router.num_groups", "router.groups_kept"),
        ("moe.num_experts", "moe.num_shared_experts", "moe.shared_gate", "moe.latent_dim"),
        ("model.d_model", "model.attention.num_heads", "model.attention.num_kv_heads"),
        ("model.attention.kind", "model.attention.kv_lora_rank", "model.attention.rope_head_dim",
         "model.attention.nope_head_dim", "model.attention.v_head_dim"),
        ("moe.dispatch", "moe.exchange", "moe.capacity_factor", "moe.drop_policy"),
        tuple(f.path for f in schema() if f.path.startswith("mesh.")),
        ("train.batch_size", "train.micro_batches", "mesh.data", "mesh.fsdp"),
        ("model.num_layers", "model.first_k_dense", "model.mtp_depth", "model.unroll"),
        ("optim.schedule", "optim.warmup_steps", "train.steps", "optim.decay_fraction"),
    )  # fmt: skip
    kinds = {field.path: field.kind for field in _fields(config)}
    for path in rng.choice(sets):
        if path in kinds:
            _set(config, path, draw(kinds[path], path, rng, small))


def draw(kind: Any, path: str, rng: random.Random, small: bool) -> Any:
    """A value of a type, sensible or not for its field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if inner(kind) is not kind:
        return None if rng.random() < 0.3 else draw(inner(kind), path, rng, small)
    if origin is typing.Literal:
        return rng.choice(args)
    if dataclasses.is_dataclass(kind):
        fields = [f for f in fields_of(kind, path) if "." not in f.path[len(path) + 1 :]]
        chosen = rng.sample(fields, rng.randint(0, len(fields)))
        return {f.path.rpartition(".")[2]: draw(f.kind, f.path, rng, small) for f in chosen}
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return [draw(args[0], path, rng, small) for _ in range(rng.randint(0, 3))]
    if origin is tuple:
        return [draw(arg, path, rng, small) for arg in args]
    if kind is bool:
        return rng.random() < 0.5
    if kind is int:
        return rng.choice(SMALL if small else INTEGERS)
    if kind is float:
        return rng.choice(FLOATS)
    if kind is str:
        return rng.choice(WORDS.get(path, ("", "a", "def ", "größe")))
    return rng.choice((None, 1, "a", {}))
