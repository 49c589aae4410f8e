"""From a config file to validated, frozen dataclasses: the mechanism only.

Each room of moejax owns a small frozen dataclass that checks itself. Here is what they share: the
error that names field, value and remedy, the builder that turns nested mappings into dataclasses
by their type annotations, the loader of ``get_config()`` files and the command-line overrides.
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import math
import os
import pathlib
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can mend; shown as one line, and the process exits with status 2."""

    def __init__(self, message: str):
        super().__init__(visible(" ".join(message.splitlines())))


def visible(text: str) -> str:
    """A text with what a terminal would obey made visible: ``\\x1b`` for the escape character.

    Line ends and tabs stay, and so does everything that can be printed.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


_MOST_SHOWN = 200  # characters of a value in a message
# Within bounds from the start: YAML's aliases make trees whose repr would fill the memory.
_REPR = reprlib.Repr()
_REPR.maxlevel = 4
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 2 * _MOST_SHOWN
_REPR.maxtuple = _REPR.maxlist = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = 20


def shown(value: Any) -> str:
    """A value for a message of one line: its ``repr``, cut where it is long."""
    try:
        known = isinstance(value, (tuple, list, set, frozenset, dict))
        text = _REPR.repr(value) if known else repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits, wherever it stands
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


class ConfigError(UserError):
    """A config field that cannot be used.

    Args:
      field: dotted path of the field, for example ``moe.top_k``.
      value: what was found there.
      remedy: what is wrong with it and what to do, in one sentence.
    """

    def __init__(self, field: str, value: Any, remedy: str):
        self.field, self.value, self.remedy = field, value, remedy
        name = field if len(field) <= _MOST_SHOWN else f"{field[:_MOST_SHOWN]}…"
        super().__init__(f"{name} = {shown(value)}: {remedy}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known name closest to a misspelt one, as a hint: ``did you mean 'top_k'?``.

    Without a close match, all the known names are listed instead.
    """
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def check(condition: bool, field: str, value: Any, remedy: str) -> None:
    """Raises ConfigError(field, value, remedy) unless the condition holds."""
    if not condition:
        raise ConfigError(field, value, remedy)


def check_positive(prefix: str, options: Any, *names: str) -> None:
    """Raises ConfigError for the first named field of a dataclass that is not above zero."""
    for name in names:
        value = getattr(options, name)
        check(value > 0, f"{prefix}.{name}", value, "must be above zero")


def check_not_negative(prefix: str, options: Any, *names: str) -> None:
    """Raises ConfigError for the first named field of a dataclass that is below zero."""
    for name in names:
        value = getattr(options, name)
        check(value >= 0, f"{prefix}.{name}", value, "must not be below zero")


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds a frozen dataclass from a mapping, by the types of its fields.

    Missing fields keep their defaults. Nested dataclasses are built from nested mappings, lists
    become tuples, integers are taken where floats are wanted, and nothing else is converted.

    Args:
      cls: a dataclass type.
      values: field names to values.
      path: dotted path of this block in the config, for messages.

    Returns:
      An instance of ``cls``.

    Raises:
      ConfigError: an unknown field (the nearest is offered), a missing one or a wrong type.
    """
    check(isinstance(values, Mapping), path or "config", values, "must be a block of fields")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    built = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in fields:  # the nearest name is looked for only then: it takes long
            raise ConfigError(where, value, f"no such field; {nearest(name, fields)}")
        built[name] = _convert(hints[name], value, where)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in built:
            where = f"{path}.{name}" if path else name
            raise ConfigError(where, None, "has no default; set it in the config")
    return cls(**built)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Returns ``value`` as the annotated type ``kind``; raises ConfigError where it is not one."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = [a for a in args if a is not type(None)]
        return _convert(kind, value, where)
    if origin is typing.Literal:
        if value in args:
            return value
        hint = (
            nearest(value, args)
            if isinstance(value, str)
            else f"one of {', '.join(map(repr, args))}"
        )
        raise ConfigError(where, value, f"not a possible value; {hint}")
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, where)
    if origin is tuple:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        check(is_list, where, value, "must be a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        check(len(value) == len(args), where, value, f"must have {len(args)} entries")
        return tuple(
            _convert(a, v, f"{where}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) <= sys.float_info.max, where, "...", "is too large for a number")
        value = float(value)
    right_type = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    check(right_type, where, value, f"is {_a(type(value))}, but must be {_a(kind)}")
    if kind is float:
        check(math.isfinite(value), where, value, "must be a finite number")
    if kind is int:
        check(abs(value) < 2**63, where, value, "must be below 2**63")
    return value


def _a(kind: type) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}
    return names.get(kind, "None" if kind is type(None) else f"a {kind.__name__}")


def load(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a config file's ``get_config()`` and applies command-line overrides.

    Args:
      path: a Python file that defines ``get_config() -> ml_collections.ConfigDict``.
      overrides: settings such as ``moe.top_k=4``; values are Python literals, or plain words.

    Returns:
      Nested plain dictionaries.

    Raises:
      UserError: no such file, no ``get_config`` in it, or it raised.
      ConfigError: a malformed override.
    """
    return override(_run_get_config(pathlib.Path(path)), overrides)


def override(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies settings such as ``moe.top_k=4`` to nested dictionaries, in place; see ``load``.

    An entry of a list is named by its number: ``data.mixture[1].weight=2``.
    """
    for setting in overrides:
        name, equals, text = setting.partition("=")
        check(bool(equals and name), f"--config.{name}", text, "write it as --config.FIELD=VALUE")
        *blocks, last = name.split(".")
        target = config
        for i, block in enumerate(blocks):
            where = ".".join(blocks[: i + 1])
            target = _entry(target, block, where)
            check(isinstance(target, dict), where, target, f"is a value, not a block with {last!r}")
        target[last] = parse_literal(text)
    return config


def _entry(block: dict[str, Any], name: str, where: str) -> Any:
    """A block within a block, made if need be; or of a list of blocks the one that is numbered."""
    numbered = re.fullmatch(r"(\w+)\[(\d{1,6})\]", name)
    if numbered is None:
        return block.setdefault(name, {})
    entries, number = block.get(numbered[1]), int(numbered[2])
    found = list(entries) if isinstance(entries, (list, tuple)) else []
    check(number < len(found), where, "...", f"there is no such entry; the list has {len(found)}")
    block[numbered[1]] = found  # a tuple becomes a list; its blocks stay what they are
    return found[number]


def parse_literal(text: str) -> Any:
    """A command-line value: a Python literal, true/false/none in any case, or else the text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _run_get_config(path: pathlib.Path) -> dict[str, Any]:
    config = run_file(path, "get_config", "--config")
    if not isinstance(config, ml_collections.ConfigDict):
        found = type(config).__name__
        raise UserError(
            f"--config = {str(path)!r}: get_config() returned a {found}; return a ConfigDict"
        )
    try:
        return config.to_dict()
    except (TypeError, ValueError, RecursionError) as error:  # names that are no text, for one
        raise UserError(
            f"--config = {str(path)!r}: get_config() returned a ConfigDict that cannot be read "
            f"({error}); name fields by text"
        ) from error


def run_file(path: str | pathlib.Path, function: str, flag: str) -> Any:
    """Runs a function without arguments in a user's Python file; its folder can be imported from.

    Args:
      path: of the file.
      function: its name.
      flag: the flag that named the file, for messages.

    Returns:
      What the function returns.

    Raises:
      UserError: no such file, no such function in it, or it raised.
    """
    path, where = pathlib.Path(path), f"{flag} = {str(path)!r}"
    if not path.is_file():
        raise UserError(f"{where}: no such file; give a Python file with {function}()")
    spec = importlib.util.spec_from_file_location("moejax_config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: not a Python file; give one with {function}()")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise UserError(f"{where}: defines no {function}(); add that function")
        return getattr(module, function)()
    except UserError:
        raise
    except Exception as error:  # the user's own file may raise anything
        line = _line_in(error, path)
        raise UserError(
            f"{where}: {type(error).__name__} at line {line}: {error}; mend it"
        ) from error
    finally:
        sys.path.remove(folder)


def import_module(name: str, *, here: bool = True) -> types.ModuleType:
    """Imports a user's module from the Python path and, if ``here``, the working directory."""
    folder = os.getcwd()
    added = here and folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        return importlib.import_module(name)
    finally:
        if added:
            sys.path.remove(folder)


def _line_in(error: BaseException, path: pathlib.Path) -> int | str:
    """The last line of the config file that an exception passed through, or '?'."""
    if isinstance(error, SyntaxError):
        return error.lineno or "?"
    line: int | str = "?"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.absolute()):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def to_dict(options: Any) -> Any:
    """A dataclass, with all it holds, as JSON-ready dictionaries and lists."""
    if dataclasses.is_dataclass(options):
        return {f.name: to_dict(getattr(options, f.name)) for f in dataclasses.fields(options)}
    if isinstance(options, Mapping):
        return {k: to_dict(v) for k, v in options.items()}
    if isinstance(options, (list, tuple)):
        return [to_dict(v) for v in options]
    return options
