"""From files and overrides to dataclasses: every mistake is one ConfigError or UserError line."""

import dataclasses
import os
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax import config
from moejax.config import ConfigError, UserError, build, load, nearest, parse_literal, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.5

    def __post_init__(self):
        config.check_positive("outer.inner", self, "width")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "a"
    flag: bool = False
    kind: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = ()
    pair: tuple[str, int] = ("x", 1)
    nested: tuple[tuple[tuple[str, ...], int], ...] = ()
    inner: Inner = Inner(1)
    maybe: int | None = None
    free: Any = None


def refusal(values, cls=Outer):
    with pytest.raises(ConfigError) as error:
        build(cls, values, "outer")
    assert "\n" not in str(error.value)
    return error.value


def test_values_are_taken_by_type():
    got = build(
        Outer,
        {
            "sizes": [1, 2], "pair": ["y", 3], "nested": [[["moe", "dense"], 2]], "maybe": 4,
            "inner": {"width": 2, "rate": 3}, "kind": "two", "free": {"any": "thing"},
        },
    )  # fmt: skip
    assert got == Outer(
        sizes=(1, 2), pair=("y", 3), nested=((("moe", "dense"), 2),), maybe=4,
        inner=Inner(2, 3.0), kind="two", free={"any": "thing"},
    )  # fmt: skip
    assert isinstance(got.inner.rate, float)
    assert build(Outer, {"maybe": None}).maybe is None
    assert build(Outer, {"inner": Inner(7)}).inner == Inner(7)


@pytest.mark.parametrize(
    ("values", "field", "text"),
    [
        ({"nam": "b"}, "outer.nam", "no such field; did you mean 'name'?"),
        ({"zzzzz": 1}, "outer.zzzzz", "known: flag, free, inner"),
        ({"name": 3}, "outer.name", "is an integer, but must be a string"),
        ({"flag": 1}, "outer.flag", "is an integer, but must be True or False"),
        ({"maybe": True}, "outer.maybe", "is True or False, but must be an integer"),
        ({"maybe": "4"}, "outer.maybe", "is a string, but must be an integer"),
        ({"kind": "tow"}, "outer.kind", "not a possible value; did you mean 'two'?"),
        ({"kind": 1}, "outer.kind", "one of 'one', 'two'"),
        ({"sizes": 3}, "outer.sizes", "must be a list"),
        ({"sizes": "12"}, "outer.sizes", "must be a list"),
        ({"sizes": [1, 2.5]}, "outer.sizes[1]", "is a number, but must be an integer"),
        ({"pair": ["x"]}, "outer.pair", "must have 2 entries"),
        ({"nested": [[["moe"], "2"]]}, "outer.nested[0][1]", "must be an integer"),
        ({"inner": 3}, "outer.inner", "must be a block of fields"),
        ({"inner": {"width": 1, "rat": 1}}, "outer.inner.rat", "did you mean 'rate'?"),
        ({"inner": {}}, "outer.inner.width", "has no default"),
        ({"inner": {"width": -1}}, "outer.inner.width", "must be above zero"),
        ({"inner": {"width": 1, "rate": float("nan")}}, "outer.inner.rate", "finite"),
        ({"inner": {"width": 1, "rate": 10**400}}, "outer.inner.rate", "too large"),
        ({"inner": {"width": 1, "rate": True}}, "outer.inner.rate", "must be a number"),
        ({"inner": {"width": 1, "rate": None}}, "outer.inner.rate", "is None"),
    ],
)
def test_refusals_name_field_value_and_remedy(values, field, text):
    error = refusal(values)
    assert error.field == field
    assert text in str(error)
    assert str(error).startswith(f"{field} = ")


def test_a_block_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="config = 3: must be a block"):
        build(Outer, 3)


def test_line_breaks_in_values_stay_on_one_line():
    assert "\n" not in str(ConfigError("a.b", ["x\ny"], "no\nway"))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = [field.name for field in dataclasses.fields(Outer)] + ["nam", "width"]
BLOCK = st.dictionaries(st.sampled_from(FIELDS) | st.integers(), ANY, max_size=4)
NEARLY = st.fixed_dictionaries({"width": ANY, "rate": ANY}).map(lambda inner: {"inner": inner})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(BLOCK | NEARLY | ANY)
def test_build_raises_nothing_but_config_errors(values):
    try:
        built = build(Outer, values, "outer")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(built, Outer)
        assert isinstance(built.inner.rate, float)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text())
def test_parse_literal_takes_any_text(text):
    parse_literal(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4), ("-1e-3", -0.001), ("True", True), ("true", True), ("none", None),
        ("null", None), ("[1, 2]", [1, 2]), ("('a', 1)", ("a", 1)), ("'4'", "4"),
        ("deepseek_v3", "deepseek_v3"), ("a/b c.txt", "a/b c.txt"), ("", ""),
        ("{[]: 1}", "{[]: 1}"),
        ("__import__('os')", "__import__('os')"), ("9**9", "9**9"), ("(" * 500, "(" * 500),
    ],
)  # fmt: skip
def test_literals(text, value):
    got = parse_literal(text)
    assert got == value and type(got) is type(value)


def test_nearest():
    assert nearest("topk", ["top_k", "num_experts"]) == "did you mean 'top_k'?"
    assert nearest("qqq", ["b", "a"]) == "known: a, b"


GOOD = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"moe": {"top_k": 2}, "seed": 0, "none": None})
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="some_config.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_load_applies_overrides_in_order(write):
    settings = ["moe.top_k=4", "moe.router.name=softmax_topk", "seed=1", "seed=2", "text=a=b"]
    got = load(write(GOOD), settings)
    assert got == {
        "moe": {"top_k": 4, "router": {"name": "softmax_topk"}},
        "seed": 2,
        "none": None,
        "text": "a=b",
    }
    assert type(got["moe"]) is dict


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("moe.top_k", "write it as --config.FIELD=VALUE"),
        ("=3", "write it as --config.FIELD=VALUE"),
        ("seed.deep=1", "seed = 0: is a value, not a block with 'deep'"),
        ("none.deep=1", "none = None: is a value"),
    ],
)
def test_malformed_overrides(write, setting, text):
    with pytest.raises(ConfigError) as error:
        load(write(GOOD), [setting])
    assert text in str(error.value)


def test_entries_of_a_list_are_overridden_by_their_number():
    blocks = lambda: {"data": {"mixture": ({"weight": 1, "path": "x"}, {"weight": 2})}}
    given = ["data.mixture[1].weight=5", "data.mixture[0].path=y", "data.mixture[1].label=z"]
    found = config.override(blocks(), given)
    assert found == {"data": {"mixture": [{"weight": 1, "path": "y"}, {"weight": 5, "label": "z"}]}}
    for setting, message in (
        ("data.mixture[2].weight=1", r"data\.mixture\[2\] = .*no such entry; the list has 2"),
        ("data.mixtures[0].weight=1", r"data\.mixtures\[0\] = .*the list has 0"),
        ("data.mixture[0].path.x=1", r"data\.mixture\[0\]\.path = 'x': is a value"),
        ("data.mixture[].x=1", None),
    ):
        if message is None:  # no number, so it is a field that no block has
            assert config.override(blocks(), [setting])["data"]["mixture[]"] == {"x": 1}
            continue
        with pytest.raises(ConfigError, match=message):
            config.override(blocks(), [setting])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x = 1\n", "defines no get_config(); add that function"),
        ("get_config = 3\n", "defines no get_config()"),
        ("def get_config():\n    return {}\n", "returned a dict; return a ConfigDict"),
        ("x = 1\ny = 1 / 0\n", "ZeroDivisionError at line 2"),
        ("def get_config():\n\n    return missing\n", "NameError at line 3"),
        ("x = 1\ny = (\n", "SyntaxError at line 2"),
        ("import not_a_module_at_all\n", "ModuleNotFoundError at line 1"),
    ],
)
def test_a_config_file_that_fails_says_where(write, source, text):
    with pytest.raises(UserError) as error:
        load(write(source))
    assert text in str(error.value) and "some_config.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_is_found_for_a_relative_path_too(write, monkeypatch):
    path = write("x = 1\ny = 1 / 0\n")
    monkeypatch.chdir(os.path.dirname(path))
    with pytest.raises(UserError, match="at line 2"):
        load("some_config.py")


def test_files_that_are_none(tmp_path, write):
    for path in (str(tmp_path / "nothing.py"), str(tmp_path)):
        with pytest.raises(UserError, match="no such file"):
            load(path)
    with pytest.raises(UserError, match="not a Python file"):
        load(write(GOOD, "config.txt"))


def test_a_config_may_import_its_neighbours(write):
    write("WIDTH = 7\n", "neighbour_of_test_config.py")
    source = "import ml_collections\nfrom neighbour_of_test_config import WIDTH\n"
    source += "def get_config():\n    return ml_collections.ConfigDict({'width': WIDTH})\n"
    assert load(write(source)) == {"width": 7}


def test_to_dict_is_json_ready():
    got = to_dict(Outer(sizes=(1, 2), free={"a": Inner(3)}))
    assert got["sizes"] == [1, 2]
    assert got["free"] == {"a": {"width": 3, "rate": 0.5}}
    assert got["inner"] == {"width": 1, "rate": 0.5}
    assert build(Outer, {**got, "free": None}) == Outer(sizes=(1, 2))
