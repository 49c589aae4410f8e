"""Mutated configs: each comes to a valid plan or to one line that names a field, in time.

The full counts are of ``experiments/launch/fuzz_configs.py``, whose parts these tests use.
"""

import importlib
import pathlib
import random
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import write_config

from moejax import cli
from moejax import config as mechanism
from moejax.config import ConfigError, UserError, shown, visible
from moejax.training import run_config
from moejax.training.prepare import prepare

SCRIPTS = pathlib.Path(__file__).parents[1] / "experiments" / "launch"


@pytest.fixture(scope="module")
def scripts():
    """The modules ``fuzz_configs`` and ``config_mutations``."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("fuzz_configs"), importlib.import_module("config_mutations")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def fuzz(scripts):
    return scripts[0]


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """A folder where relative paths and caches that are drawn can do no harm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def sample(fuzz, level, count, seed, folder):
    result = fuzz.fuzz(level, count, seed, folder, keep=None)
    assert not result.failures, result.failures
    return result


def test_a_sample_is_valid_or_refused(fuzz, apart):
    result = sample(fuzz, "validate", 120, 11, apart)
    assert result.tried == 120 == result.valid + result.refused
    assert result.valid >= 12 and result.refused >= 40
    assert len(result.fields) >= 25  # mutations reach many fields


def test_a_sample_is_traced(fuzz, apart):
    assert sample(fuzz, "trace", 3, 11, apart).valid == 3


@pytest.mark.slow
def test_a_larger_sample_is_valid_or_refused(fuzz, apart):
    sample(fuzz, "validate", 400, 12, apart)


@pytest.mark.slow
def test_a_larger_sample_is_traced(fuzz, apart):
    sample(fuzz, "trace", 12, 12, apart)


@pytest.mark.slow
def test_a_sample_is_trained(fuzz, apart):
    sample(fuzz, "train", 2, 12, apart)


def test_any_mutation_is_a_config_or_one_line(scripts, tmp_path_factory):
    """Hypothesis draws the choices, so that a failure comes as small as it can be."""
    fuzz, mutations = scripts
    fuzzer = fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"))

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False), st.floats(0, 1))
    def check(rng, hostile):
        config = mutations.tiny(mutations.real_config(rng), "corpus")
        config = mutations.mutate(config, rng, hostile=hostile, small=rng.random() < 0.5)
        try:
            found = run_config.from_dict(config)
        except UserError as error:
            fuzzer._field_of(f"moejax plan: {error}\n", config)
        else:
            assert run_config.from_dict(found.to_dict()) == found

    check()


def test_mutations_are_repeatable(scripts):
    fuzz, mutations = scripts
    draw = lambda: mutations.mutate(
        mutations.real_config(random.Random("a")), random.Random("b"), hostile=0.5, small=False
    )
    assert fuzz.source(draw()) == fuzz.source(draw())


def test_every_field_of_every_block_is_drawn(scripts):
    """By the dataclasses themselves: a field that is added tomorrow is there without a word."""
    _, mutations = scripts
    paths = mutations.known_paths()
    for path in ("seed", "model.attention.rope.factor", "moe.capacity_factor", "mesh.expert",
                 "router.bias_step", "checkpoint.at_steps", "budget.max_hours"):  # fmt: skip
        assert path in paths
    drawn, rng = set(), random.Random(0)
    for _ in range(6000):
        drawn.add(mutations._pick({"router": {}}, rng).path)
    assert {field.path for field in mutations.schema()} == drawn


def test_the_fuzzer_sees_what_it_looks_for(fuzz, apart, monkeypatch):
    """A plan with nonsense, a traceback, a hang, a message without a field: all are failures."""
    for nonsense in ({"a": [float("nan")]}, {"a": {"b": -1}}, {"a": float("inf")}):
        with pytest.raises(fuzz.Failure, match="nonsense"):
            fuzz.check_plan(nonsense)
    fuzzer = fuzz.Fuzzer(apart)
    for said in ("moejax plan: bad\n", "moejax plan: a.b = 1: bad\n", "moejax plan: seed = 1\nx\n",
                 "Traceback ...\n", "moejax plan: seed = \x1b[1m\n"):  # fmt: skip
        with pytest.raises(fuzz.Failure):
            fuzzer._field_of(said, {})
    assert fuzzer._field_of("moejax plan: seed = 1: bad\n", {}) == "seed"

    def wrong(*_):
        raise KeyError("x")

    config = fuzzer.draw("trace", random.Random(0))
    monkeypatch.setattr(fuzzer, "_trace", wrong)
    with pytest.raises(fuzz.Failure, match="KeyError"):
        fuzzer.run("trace", config)
    monkeypatch.setattr(fuzzer, "_trace", lambda *_: __import__("time").sleep(5))
    monkeypatch.setitem(fuzz.SECONDS, "trace", 0.05)
    with pytest.raises(fuzz.Failure, match="Hang"):
        fuzzer.run("trace", config)


# What the fuzzer found, each as the setting that it came down to.
FOUND = {
    "more digits than Python prints": ("train.steps", 10**5000),
    "an integer that no array holds": ("mesh.data", 2**70),
    "more steps than a schedule counts": ("train.steps", 2**40),
    "layers without end": ("model.num_layers", 10**9),
    "MTP modules without end": ("model.mtp_depth", 10**6),
    "a utilisation that makes hours infinite": ("cost.mfu", 5e-324),
    "a price that makes dollars infinite": ("cost.price", 1e300),
    "electricity that makes dollars infinite": ("cost.dollars_per_kwh", 1e300),
    "a config that is a list": ("model", []),
    "a router of the standard library": ("router.name", "this.Zen"),
    "a price book that is a folder": ("cost.price_book", "."),
    "a price book that is no path": ("cost.price_book", "a\0b"),
    "experts that the mesh does not cut": ("mesh.expert", 8),
}


def test_names_that_are_not_text_are_one_line(apart, capsys):
    config = apart / "odd.py"
    config.write_text(
        "import ml_collections\n\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'moe': {1: 2, 'a': 3}})\n"
    )
    assert cli.main(["plan", f"--config={config}"]) == 2
    assert "name fields by text" in capsys.readouterr().err


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name, fuzz, apart):
    field, value = FOUND[name]
    config = mechanism.load(str(write_config(apart)))
    mechanism.override(config, [f"{field}=x"])
    *blocks, last = field.split(".")
    target = config
    for block in blocks:
        target = target[block]
    target[last] = value
    assert fuzz.Fuzzer(apart).run("validate", config) == field


def test_rows_longer_than_any_text_are_refused_at_once(fuzz, apart):
    """A plan knows no text; the checks before a run took minutes over the room in such rows."""
    path = write_config(apart)
    with fuzz.within(20), pytest.raises(ConfigError, match=r"train\.seq_len = 2147483647"):
        prepare(run_config.load(str(path), ["train.seq_len=2147483647"]))


HOSTILE_SETTINGS = (
    "train.steps=1e999", "train.steps=" + "9" * 6000, "train.steps=" + "(" * 3000,
    "train.steps=[1]*10**9", "train.steps=__import__('os').system('false')", "train.steps=\x1b[31m",
    "train.steps=b'x'", "train.steps={1,2}", "train.steps=1j", "train.steps=a\nb", "train.steps=",
    "train.steps='" + "x" * 100_000 + "'", "train=3", "train..steps=3", ".train.steps=3",
    "train.steps.x.y.z=1", "model.__class__=1", "größe=1", "=", "a" * 5000 + "=1", "moe=[]",
    "router={'name': ['a']}", "router.name=[]", "router.name=os.system", "router.name=...",
    "router.name=.", "data.path=\0", "checkpoint.at_steps=[[[]]]", "model.segments=((('moe',),0),)",
    "stage=\ud800", "seed=True", "seed=nan", "optim.learning_rate=-inf", "model.attention=None",
    "-=1", "train.steps=-0", "train.steps=0x10", "train.steps=" + "-" * 5000 + "1",
)  # fmt: skip


# A name of one's own, a number, and a path, which a plan does not look at.
TAKEN = ("stage=\ud800", "train.steps=0x10", "data.path=\0")


@pytest.mark.parametrize("setting", HOSTILE_SETTINGS, ids=range(len(HOSTILE_SETTINGS)))
def test_hostile_settings_on_the_command_line(setting, apart, capsys):
    """One line and exit status 2, or a plan; the text after ``=`` is never run."""
    config = write_config(apart)
    status = cli.main(["plan", f"--config={config}", f"--config.{setting}", "--format=json"])
    said = capsys.readouterr()
    if setting in TAKEN:
        assert status == 0, said.err
    else:
        assert status == 2
        assert said.out == "" and said.err.count("\n") == 1 and said.err[:-1].isprintable()
        assert "Traceback" not in said.err and len(said.err) < 1500


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_setting_is_taken_or_refused(name, text):
    try:
        mechanism.override({"a": {"b": 1}, "c": 2}, [f"{name}={text}"])
    except ConfigError as error:
        assert str(error).isprintable()


@given(st.text())
def test_visible_text_has_no_orders_for_a_terminal(text):
    seen = visible(text)
    assert all(c.isprintable() or c in "\n\t" for c in seen)
    assert seen == text if text.isprintable() else True
    assert visible("a\x1b[31mb\x9b\u202e") == r"a\x1b[31mb\x9b\u202e"


def test_values_are_shown_in_bounds():
    tree = ["x"]
    for _ in range(60):  # 10**60 entries, were they all written
        tree = [tree] * 10
    assert len(shown(tree)) < 300 and len(shown("x" * 10**6)) < 300
    assert shown(10**5000) == "a int too long to print"
    assert shown({"a": (1, 2)}) == "{'a': (1, 2)}"
