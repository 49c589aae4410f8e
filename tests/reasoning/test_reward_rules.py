"""Rewards on good, malformed and hostile completions; length rules; a function of one's own."""

import json
import math
import pathlib
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError, UserError
from moejax.reasoning import rewards, templates
from moejax.reasoning.rewards import RewardConfig, Scorer, load_function
from moejax.reasoning.tasks import TASKS, TaskConfig, TaskSet
from moejax.reasoning.tasks.task import Problem
from moejax.reasoning.templates import BLANK, TAGS, TEMPLATES

ALL = TaskSet(TaskConfig(names=tuple(TASKS), difficulties=(2,)))
PROBLEMS = {name: task.problem(0, 0, 2, "train") for name, task in TASKS.items()}
WORTH = RewardConfig(accuracy=1.0, format=0.25)


def scorer(config=WORTH, template="r1"):
    return Scorer(config, TEMPLATES[template], ALL.verify)


def formed(answer, think="so"):
    return f"<think>{think}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_wanted_completion_earns_everything(name, template):
    problem = PROBLEMS[name]
    text = TEMPLATES[template].completion(problem.answer, problem.solution)
    found = scorer(template=template).score(problem, text)
    assert (found.total, found.accuracy, found.format) == (1.25, 1, 1)
    assert found.parsed.answer == problem.answer
    assert found.parsed.think == (problem.solution if TEMPLATES[template].thinks else "")


def test_a_wrong_answer_in_the_right_form():
    found = scorer().score(PROBLEMS["add"], formed("0"))
    assert (found.total, found.accuracy, found.format, found.parsed.answer) == (0.25, 0, 1, "0")


@pytest.mark.parametrize("blank", ["", " ", "\n", "\r\n\t "])
def test_white_space_round_the_blocks(blank):
    answer = PROBLEMS["add"].answer
    text = f"{blank}<think>{blank}so{blank}</think>{blank}<answer>{blank}{answer}{blank}</answer>"
    assert scorer().score(PROBLEMS["add"], text + blank).total == 1.25


ANSWER = PROBLEMS["add"].answer
PROMPT = TEMPLATES["r1"].prompt(PROBLEMS["add"].prompt)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no <think>"),
        (ANSWER, "no <think>"),
        (f"<answer>{ANSWER}</answer>", "no <think>"),
        (f"<think>a<answer>{ANSWER}</answer>", "no </think>"),
        (f"<think>a</think><answer>{ANSWER}", "no </answer>"),
        (f"<think>a</think>{ANSWER}</answer>", "no <answer>"),
        (formed(ANSWER) + "x", "text after the blocks"),
        (formed(ANSWER) + "\u00a0", "text after the blocks"),  # a space of no ASCII
        (formed(ANSWER) + "\0", "text after the blocks"),
        ("x" + formed(ANSWER), "text before the blocks"),
        (f"<think>a</think> so <answer>{ANSWER}</answer>", "text between the blocks"),
        (f"<think></think><answer>{ANSWER}</answer>", "an empty block"),
        ("<think>a</think><answer> \n</answer>", "an empty block"),
        (formed(ANSWER) + f"<answer>{ANSWER}</answer>", "several <answer>"),
        (formed("1") + formed(ANSWER), "several <think>"),
        (formed(f"<answer>{ANSWER}</answer>"), "several <answer>"),
        (f"<think><think>a</think></think><answer>{ANSWER}</answer>", "several <think>"),
        (f"<think>a<answer>{ANSWER}</answer></think>", "tags out of order"),
        (f"<answer>{ANSWER}</answer><think>a</think>", "tags out of order"),
        (f"<think>a</think></answer>{ANSWER}<answer>", "tags out of order"),
        (f"<THINK>a</THINK><answer>{ANSWER}</answer>", "no <think>"),
        (f"< think>a</think><answer>{ANSWER}</answer>", "no <think>"),
        (f"<think >a</think><answer>{ANSWER}</answer>", "no <think>"),
        (PROMPT + formed(ANSWER), "several <think>"),
        (formed(ANSWER) + PROMPT, "several <think>"),
        (formed(ANSWER) + "\nUser: 1+1=\nAssistant: 2", "text after the blocks"),
    ],
)
def test_malformed_text_earns_nothing(text, fault):
    for config in (WORTH, RewardConfig(length=0.5, length_rule="group")):
        found = scorer(config).score(PROBLEMS["add"], text)
        assert (found.total, found.accuracy, found.format) == (0, 0, 0)
        assert (found.parsed.fault, found.parsed.answer) == (fault, None)


HOSTILE = [
    "99**99**99", "9" * 10_000, "-" + "9" * 10_000, "1/" + "0" * 300, "1/0", "(" * 10_000,
    "-" * 10_000, "1+" * 5_000 + "1", "1e999999999", "nan", "inf", "٤٢", "\uff14\uff12", "½",
    "__import__('os').abort()", "exec('1')", "{{7*7}}", "$(reboot)", "%s%n", "\0", "\ud800",
    "a\u0301" * 100, "\u202e42", "True and", "A knight" * 1000, ", " * 1000, "x=" * 500, "=",
    ANSWER + "\0", f"{ANSWER} {ANSWER}", f"{ANSWER}\n{ANSWER}", f"not {ANSWER}", ANSWER + "\u200b",
]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_hostile_answers_are_wrong_and_harmless(name):
    for answer in HOSTILE:
        for template, text in (("r1", formed(answer)), ("plain", answer)):
            found = scorer(template=template).score(PROBLEMS[name], text)
            assert found.accuracy == 0, answer
        ALL.canonical(PROBLEMS[name], answer)


pieces = st.sampled_from(
    [*TAGS, "<", ">", "</", "think", "answer", " ", "\n", ANSWER, PROMPT, "٤٢", "99**99**99", "=",
     "\0", "\ud800", "<answer>" * 5, "9" * 5000]
)  # fmt: skip
texts = st.lists(pieces | st.text(max_size=6), max_size=14).map("".join)


@settings(max_examples=250, deadline=None)
@given(texts, st.sampled_from(sorted(TASKS)), st.sampled_from(sorted(TEMPLATES)))
def test_any_text_at_all(text, name, template):
    """No crash; the form is judged as a slow reading of its definition judges it."""
    found = scorer(template=template).score(PROBLEMS[name], text)
    assert found.format == float(_slowly_well_formed(text, TEMPLATES[template].thinks))
    assert found.total == found.accuracy + 0.25 * found.format
    assert not (found.accuracy and not found.format)
    if found.format:
        inside = (found.parsed.think, found.parsed.answer)
        assert not any(tag in part for tag in TAGS for part in inside if template != "plain")


def _slowly_well_formed(text, thinks):
    """By splitting at the tags, in the order in which they stand."""
    if not thinks:
        return bool(text.strip(BLANK)) and "\n" not in text.strip(BLANK)
    parts, order = [""], []
    at = 0
    while at < len(text):
        tag = next((tag for tag in TAGS if text.startswith(tag, at)), None)
        if tag:
            order.append(tag)
            parts.append("")
        else:
            parts[-1] += text[at]
        at += len(tag or "x")
    blank = [not part.strip(BLANK) for part in parts]
    return order == list(TAGS) and blank == [True, False, True, False, True]


def _lines_run(function, *arguments):
    """How many lines of this package a call runs; what runs in C is a find or a strip: linear."""
    count = 0
    ours = pathlib.Path(rewards.__file__).parent

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    def enter(frame, event, argument):
        return trace(frame, event, argument) if ours in here(frame).parents else None

    here = lambda frame: pathlib.Path(frame.f_code.co_filename)

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "<think>" * n,
        lambda n: "<" * n,
        lambda n: formed("9" * n),
        lambda n: formed(ANSWER, "think " * n),
        lambda n: formed(ANSWER) + " " * n + "x",
        lambda n: "<think>" + "a</think" * n,
        lambda n: formed("(" * n),
        lambda n: formed("1+" * n + "1"),
        lambda n: formed("1," * n),
        lambda n: formed("A knight, " * n),
        lambda n: "x" * n,
    ],
)
@pytest.mark.parametrize("template", ["r1", "plain"])
def test_work_does_not_grow_with_the_text(make, template):
    """From 2 to 200 thousand pieces the same lines of Python run, and few of them."""
    score = scorer(template=template).score
    for problem in PROBLEMS.values():
        small = _lines_run(score, problem, make(2_000))
        assert small == _lines_run(score, problem, make(200_000)) < 400


def test_the_longest_readable_answers_are_cheap():
    """At the bound of length, where a bounded parser still reads everything."""
    for answer in ("(" * 511, "1+" * 255 + "1", "9*" * 255 + "9", "-" * 512, "1," * 256):
        for problem in PROBLEMS.values():
            assert _lines_run(scorer().score, problem, formed(answer)) < 30_000


def test_a_band_of_lengths():
    config = RewardConfig(
        length=0.5, length_rule="band", shortest=10, longest=20, slack=4, format=0.0
    )
    lengths = [5, 6, 8, 10, 15, 20, 21, 24, 99]
    expected = [-1, -1, -0.5, 0, 0, 0, -0.25, -1, -1]
    found = scorer(config).group(PROBLEMS["add"], [formed(ANSWER)] * 9, lengths)
    assert [reward.length for reward in found] == expected
    assert [reward.total for reward in found] == [1 + 0.5 * fit for fit in expected]


def test_shorter_ones_of_a_group():
    """Kimi k1.5: 0.5 - (len - min) / (max - min), and at most 0 for a wrong answer."""
    config = RewardConfig(length=1.0, length_rule="group", format=0.0)
    group = [formed(ANSWER), formed("0"), formed(ANSWER), formed("0"), "broken"]
    found = scorer(config).group(PROBLEMS["add"], group, [10, 10, 30, 20, 15])
    assert [reward.length for reward in found] == [0.5, 0, -0.5, 0, 0]
    assert [reward.total for reward in found] == [1.5, 0, 0.5, 0, 0]
    alike = scorer(config).group(PROBLEMS["add"], group[:2], [7, 7])
    assert [reward.length for reward in alike] == [0, 0]
    assert scorer(config).group(PROBLEMS["add"], []) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accuracy": -1.0}, "reward.accuracy = -1.0: must not be below zero"),
        ({"slack": 0}, "reward.slack = 0: must be above zero"),
        ({"length_rule": "band"}, "reward.length = 0.0: the length rule needs a weight"),
        ({"length_rule": "band", "length": 1.0, "shortest": 5}, "reward.longest = 0: must not be"),
    ],
)
def test_configs_that_cannot_be_used(fields, message):
    with pytest.raises(ConfigError) as error:
        RewardConfig(**fields)
    assert message in str(error.value)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards_for_tests.py").write_text(
        "import math\n"
        "def short(problem, completion): return 1 / (1 + len(completion))\n"
        "def nan(problem, completion): return math.nan\n"
        "def infinite(problem, completion): return -math.inf\n"
        "def text(problem, completion): return '1'\n"
        "def nothing(problem, completion): pass\n"
        "def broken(problem, completion): raise KeyError('two\\nlines')\n"
        "def yes(problem, completion): return True\n"
        "constant = 3\n"
    )
    (tmp_path / "own_rewards_that_fail.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    return "own_rewards_for_tests"


def test_a_function_of_ones_own(own):
    config = RewardConfig(function=f"{own}:short", format=0.0)
    found = scorer(config).score(PROBLEMS["add"], "x" * 9)
    assert (found.total, found.own, found.accuracy, found.format) == (0.1, 0.1, 0, 0)
    assert scorer(RewardConfig(function=f"{own}:yes")).score(PROBLEMS["add"], "x").total == 1
    assert json.dumps(found.total)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nan", "returned nan; return a finite number"),
        ("infinite", "returned -inf; return"),
        ("text", "returned 1; return a finite number"),
        ("nothing", "returned None; return"),
        ("broken", "raised KeyError: 'two\\nlines'; mend it"),
    ],
)
def test_a_function_that_fails_is_one_line(own, function, message):
    failing = scorer(RewardConfig(function=f"{own}:{function}"))
    with pytest.raises(UserError) as error:
        failing.score(PROBLEMS["add"], formed(ANSWER))
    text = str(error.value)
    assert text.startswith(f"reward.function = '{own}:{function}': on the problem ")
    assert message in text and "\n" not in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "write it as package.module:function"),
        ("own_rewards_for_tests:", "write it as"),
        (":short", "write it as"),
        ("no_such_module:f", "importing no_such_module raised ModuleNotFoundError"),
        ("own_rewards_that_fail:f", "raised RuntimeError: at import"),
        ("own_rewards_for_tests:shot", "has no function shot"),
        ("own_rewards_for_tests:constant", "has no function constant"),
    ],
)
def test_a_function_that_is_not_there(own, path, message):
    with pytest.raises(ConfigError) as error:
        load_function(path)
    assert str(error.value).startswith(f"reward.function = {path!r}: ") and message in str(error)


def test_rewards_are_finite_for_the_optimizer():
    found = scorer().group(PROBLEMS["add"], ["", formed(ANSWER), "9" * 100_000])
    assert all(math.isfinite(reward.total) for reward in found)


def test_text_that_cannot_be_a_wanted_completion():
    for answer, solution in (("1", ""), ("", "so"), ("</answer>", "so"), ("1", "<think>")):
        with pytest.raises(UserError, match="template 'r1_short' cannot hold"):
            templates.find("r1_short").completion(answer, solution)
    with pytest.raises(UserError, match="more than one line"):
        templates.find("plain").completion("1\n2")


def test_a_problem_of_no_task():
    with pytest.raises(KeyError):
        scorer().score(Problem("none", "1", "1", 1, "train"), formed("1"))
