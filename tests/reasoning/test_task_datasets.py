"""GSM8K from mocked tfds, a user's JSONL, and reasoning-gym where it is and where it is not."""

import importlib.util
import json
import sys
import types
from unittest import mock

import pytest
import tensorflow_datasets as tfds

from moejax.config import ConfigError, UserError
from moejax.reasoning.tasks import TaskConfig, TaskSet
from moejax.reasoning.tasks.datasets import gsm8k, jsonl
from moejax.reasoning.tasks.gym import GymTask


def question(i, answer=None):
    worked = f"Twice {i} is <<2*{i}={2 * i}>>{2 * i}.\n"
    answer = f"{1000 + 2 * i:,}" if answer is None else answer
    return {
        "question": f"  What is twice {i}, with a thousand?\n".encode(),
        "answer": f"{worked}So 1000+{2 * i}=<<1000+{2 * i}={answer}>>.\n#### {answer}".encode(),
        "annotation": b"",
        "short_answer": b"",
    }


@pytest.fixture
def mocked():
    """tfds with the given rows, the same in each split."""

    def start(rows):
        patched = mock.patch(
            "tensorflow_datasets.testing.mocking._getitems",
            lambda keys, generator: [rows[key] for key in keys],
        )
        patched.start()
        policy = tfds.testing.MockPolicy.USE_CODE
        data = tfds.testing.mock_data(num_examples=len(rows), policy=policy)
        data.__enter__()
        started.append((patched, data))

    started = []
    yield start
    for patched, data in reversed(started):
        data.__exit__(None, None, None)
        patched.stop()


def test_gsm8k(mocked):
    mocked([question(i) for i in range(40)])
    with mock.patch("moejax.data.tfds_source._source") as source:
        rows = {"test": [question(i) for i in range(10)], "train": [question(i) for i in range(40)]}
        source.side_effect = lambda config, builder, split: FakeSource(rows[split])
        task = gsm8k(download=True)
    # The ten questions of `test` stand in `train` too, and are taken out of it.
    assert task.count("test") == 10
    assert task.count("train") + task.count("validation") == 30
    assert task.count("validation") > 0
    problem = task.problem(0, 3, 0, "test")
    assert problem.prompt.startswith("What is twice ") and problem.difficulty == 2
    assert "<<" not in problem.solution and problem.solution.startswith("Twice ")
    assert task.verify(problem, problem.answer.replace(",", ""))
    assert task.verify(problem, problem.answer + ".0")
    assert not task.verify(problem, "1") and not task.verify(problem, "")
    prompts = {s: {task.problem(0, i, 0, s).prompt for i in range(task.count(s))}
               for s in ("train", "validation", "test")}  # fmt: skip
    assert {s: len(found) for s, found in prompts.items()} == {s: task.count(s) for s in prompts}
    assert len(set().union(*prompts.values())) == 40
    epoch = [task.problem(0, i, 0, "rl").prompt for i in range(2 * task.count("rl"))]
    half = len(epoch) // 2
    assert sorted(epoch[:half]) == sorted(epoch[half:]) and epoch[:half] != epoch[half:]
    assert task.problem(0, 7, 0, "rl") == task.problem(0, 7, 0, "rl")
    with pytest.raises(ConfigError, match=r"task\.difficulty = 5: no problem of 'gsm8k' in split"):
        task.problem(0, 0, 5, "train")


class FakeSource:
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, keys):
        return [self.rows[key] for key in keys]


def test_gsm8k_through_tfds_own_mock(mocked):
    mocked([question(i) for i in range(40)])
    tasks = TaskSet(TaskConfig(names=("gsm8k",), download=True))
    problem = tasks.problem(0, 0, "test")  # the mock's splits are alike: all of them are `test`
    assert problem.task == "gsm8k" and tasks.verify(problem, problem.answer)
    assert set("What is twice") <= set(tasks.characters)
    assert "tensorflow" not in sys.modules
    with pytest.raises(ConfigError, match=r"task\.split = 'train'"):
        tasks.problem(0, 0, "train")


@pytest.mark.parametrize("answer", ["many", ""])
def test_gsm8k_with_damaged_answers(mocked, answer):
    mocked([question(0), question(1, answer)])
    with pytest.raises(ConfigError, match=r"task\.names = 'gsm8k/test:1': has no answer after"):
        gsm8k(download=True)


def test_gsm8k_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError) as error:
        gsm8k(str(tmp_path))
    text = str(error.value)
    assert text.startswith("task.names = 'gsm8k': is not prepared in")
    assert "task.download=True" in text and "data.download" not in text and "\n" not in text
    failing = mock.patch.object(
        tfds.core.DatasetBuilder, "download_and_prepare", side_effect=OSError("no network")
    )
    with failing, pytest.raises(ConfigError, match=r"could not be prepared \(OSError: no network"):
        gsm8k(str(tmp_path), download=True)


def write(path, *lines):
    file = path / "questions.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(text + "\n", encoding="utf-8")
    return str(file)


def test_a_file_of_ones_own(tmp_path):
    path = write(
        tmp_path,
        *({"question": f"capital of land {i}?", "answer": f"City  {i}"} for i in range(60)),
        "",
        {"prompt": "2+2?", "answer": 4, "solution": "2+2=4", "difficulty": 3, "split": "test"},
        {"prompt": "1/2?", "answer": 0.5, "split": "train"},
        {"prompt": "2+2? ", "answer": "4", "split": "test"},  # stands there twice: taken once
    )
    tasks = TaskSet(TaskConfig(names=("jsonl",), path=path))
    task = tasks.tasks["jsonl"]
    counts = {split: task.count(split) for split in ("train", "validation", "test")}
    assert sum(counts.values()) == 62 and min(counts.values()) > 0
    (sum_,) = [p for p in (task.problem(0, i, 0, "test") for i in range(counts["test"]))
               if p.difficulty == 3]  # fmt: skip
    assert (sum_.prompt, sum_.answer, sum_.solution) == ("2+2?", "4", "2+2=4")
    assert task.verify(sum_, "4.0") and not task.verify(sum_, "44")
    city = next(p for p in tasks.distinct(5, "train") if "City" in p.answer)
    assert task.verify(city, city.answer.replace("  ", " ")) and not task.verify(city, "City")
    assert task.canonical(city, "1.50") == task.canonical(city, "3/2") == "3/2"
    with pytest.raises(UserError, match=f"has about {counts['test']} different problems"):
        tasks.distinct(100, "test")


GOOD = {"prompt": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    ("lines", "where", "message"),
    [
        ([GOOD, "{"], ":2", "is not a line of JSON"),
        ([GOOD, "[" * 100_000], ":2", "is not a line of JSON"),
        ([GOOD, "", "[1]"], ":3", "is not a JSON object"),
        ([GOOD, {"answer": "2"}], ":2", "has no `prompt` or `question`"),
        ([GOOD, {"prompt": "1"}], ":2", "has no `answer`; add one"),
        ([GOOD, {"prompt": "1", "answer": None}], ":2", "has no `answer`"),
        ([GOOD, {"prompt": "1", "answer": " "}], ":2", "its `answer` is no text or number"),
        ([GOOD, {"prompt": "1", "answer": [2]}], ":2", "its `answer` is no text or number"),
        ([GOOD, {"prompt": "1", "answer": True}], ":2", "its `answer` is no text or number"),
        ([GOOD, '{"prompt": "1", "answer": NaN}'], ":2", "its `answer` is no text or number"),
        ([GOOD, {"prompt": 5.0, "answer": 1}, {"prompt": "", "answer": 1}], ":3", "its `prompt`"),
        ([GOOD, '{"prompt": "\\ud800", "answer": 1}'], ":2", "is not Unicode"),
        ([GOOD, {**GOOD, "difficulty": -1}], ":2", "its `difficulty` is not a whole number"),
        ([GOOD, {**GOOD, "split": "dev"}], ":2", "its `split` is none of"),
        ([GOOD, {**GOOD, "split": ["test"]}], ":2", "its `split` is none of"),
        ([GOOD, {**GOOD, "answer": "3"}], ":2", "asks what"),
        ([{"prompt": "1"}, {"prompt": "2"}], "", "holds no answers; give every line"),
        ([""], "", "holds no lines"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, where, message):
    path = write(tmp_path, *lines)
    with pytest.raises(ConfigError) as error:
        jsonl(path)
    assert str(error.value).startswith(f"task.path = {path + where!r}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        jsonl(str(tmp_path / "none.jsonl"))


def test_a_question_in_two_splits_is_refused(tmp_path):
    path = write(tmp_path, {**GOOD, "split": "train"}, {**GOOD, "split": "test"})
    with pytest.raises(ConfigError, match=r":2': asks what .*:1 asks, with another answer or in"):
        jsonl(path)


def test_without_reasoning_gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError) as error:
        TaskSet(TaskConfig(names=("gym:basic_arithmetic",)))
    text = str(error.value)
    assert text.startswith("tasks named gym:NAME need the package reasoning-gym (")
    assert "pip install reasoning-gym" in text and "\n" not in text


@pytest.fixture
def like_gym(monkeypatch):
    """The package's interface, as of 0.1.25, with two tasks of our own."""

    class ProceduralDataset:
        def __init__(self, seed, size):
            self.seed = seed

        def score_answer(self, answer, entry):
            raise AssertionError("a scorer of the package was run")

    class Doubling(ProceduralDataset):
        def __getitem__(self, index):
            return {"question": f"Double {self.seed + index}.\n",
                    "answer": str(2 * (self.seed + index)), "metadata": {}}  # fmt: skip

    class Open(Doubling):
        def score_answer(self, answer, entry):
            return eval(answer)

    factory = types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"doubling": (Doubling, None), "open": (Open, None)}
    factory.ProceduralDataset = ProceduralDataset
    package = types.ModuleType("reasoning_gym")
    package.factory = factory
    package.create_dataset = lambda name, **kw: factory.DATASETS[name][0](**kw)
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def test_a_task_of_reasoning_gym(like_gym):
    _walk(GymTask("gym:doubling"))
    with pytest.raises(ConfigError, match=r"task\.names = 'gym:dubling': no such task .*doubling"):
        GymTask("gym:dubling")
    with pytest.raises(ConfigError, match=r"only its own code can judge.*take one of doubling$"):
        GymTask("gym:open")


@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
@pytest.mark.parametrize("name", ["gym:basic_arithmetic", "gym:gcd"])
def test_the_package_itself(name):
    _walk(GymTask(name))
    with pytest.raises(ConfigError, match="only its own code can judge"):
        GymTask("gym:spiral_matrix")


def _walk(task):
    problems = {s: [task.problem(0, i, 0, s) for i in range(20)] for s in ("rl", "test")}
    assert not {p.key for p in problems["rl"]} & {p.key for p in problems["test"]}
    assert problems["rl"] == [task.problem(0, i, 0, "rl") for i in range(20)]
    for problem in problems["rl"]:
        assert task.verify(problem, problem.answer)
        assert not task.verify(problem, problem.answer + "1")
        assert not task.verify(problem, "__import__('os').abort()")
    with pytest.raises(ConfigError, match="has only level 0"):
        task.problem(0, 0, 1, "rl")
