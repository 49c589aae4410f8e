"""lm-evaluation-harness on a moejax model: its answers against our own forward pass and against the
harness's own Hugging Face model of the same weights."""

import json

import jax
import numpy as np
import pytest
import tiny

from moejax.config import UserError
from moejax.data.tokenizers import BytesTokenizer
from moejax.interop import hf
from moejax.interop.tokenizer_files import tokenizer_files

pytest.importorskip(
    "lm_eval", reason="needs the extra 'eval' (lm-eval), which this environment lacks"
)
from lm_eval.api.instance import Instance

from moejax.analysis.harness import load_tasks, run_tasks
from moejax.analysis.harness_model import HarnessModel

LENGTH = 32
CONFIG = tiny.dense_config(vocab_size=260)
TOKENIZER = BytesTokenizer()
PAIRS = [
    ("a router sends", " each token"), ("", "experts"), ("many ", "é"), ("x", "y"),
    ("a context much longer than the model's thirty-two positions", " and more"),
]  # fmt: skip
CHOICES = [
    {"question": "the router sends each", "choices": ["token", "cost of many"], "answer": 0},
    {"question": "many", "choices": ["experts and", "the the", "a"], "answer": 2},
    {"question": "counts", "choices": ["cost", "of"], "answer": 1},
]  # fmt: skip
TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
"""
FORMS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["z"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "beams": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["z"], num_beams: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def variables():
    return tiny.variables(CONFIG)


@pytest.fixture(scope="module")
def model(variables):
    return HarnessModel(CONFIG, variables, TOKENIZER, max_length=LENGTH, batch_size=2)


def requests(kind, arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def logits(variables, ids):
    """Of the token after each of the ids, from one row of its own."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(tiny.forward(CONFIG)(variables, padded).logits)[0, : len(ids)]


def own_loglikelihood(variables, context, continuation):
    ids, count = [256, *(context + continuation).encode()], len(continuation.encode())
    ids = ids[-(LENGTH + 1) :]
    scores = np.asarray(jax.nn.log_softmax(logits(variables, ids[:-1])))[-count:]
    wanted = np.array(ids[-count:])
    greedy = bool((scores.argmax(-1) == wanted).all())
    return scores[np.arange(count), wanted].sum(), greedy


def test_loglikelihoods_are_those_of_our_own_forward_pass(model, variables):
    got = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (value, greedy), (context, continuation) in zip(got, PAIRS, strict=True):
        # The harness takes white space before a continuation for a part of it.
        end = len(context.rstrip())
        wanted, own_greedy = own_loglikelihood(
            variables, context[:end], context[end:] + continuation
        )
        assert value == pytest.approx(wanted, rel=1e-5) and greedy == own_greedy


def test_the_continuation_that_the_model_would_write_is_greedy(model, variables):
    contexts = [chr(i) for i in range(33, 127)]
    best = [int(logits(variables, [256, ord(context)])[-1].argmax()) for context in contexts]
    pairs = [(c, chr(i)) for c, i in zip(contexts, best, strict=True) if 33 <= i < 127]
    assert pairs
    other = [(context, "!" if text != "!" else "?") for context, text in pairs]
    for asked, wanted in ((pairs, True), (other, False)):
        got = model.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
        assert all(greedy == wanted for _, greedy in got)


def test_whole_texts_are_scored_in_windows_each_token_once(model, variables):
    text = "a text of more than thirty-two bytes, which takes two windows and a bit of a third"
    ids, total = [256, *text.encode()], 0.0
    # Full windows one after another; the last one reaches back for its context.
    ends = [*range(LENGTH, len(ids) - 1, LENGTH), len(ids) - 1]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        first = max(0, end - LENGTH)
        scores = np.asarray(jax.nn.log_softmax(logits(variables, ids[first:end])))
        wanted = np.array(ids[first + 1 : end + 1])
        total += scores[np.arange(len(wanted)), wanted][start - first :].sum()
    got = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,), ("x",)]))
    assert got[0] == pytest.approx(total, rel=1e-5) and got[1] < 0


def greedy(variables, context, count):
    ids = [256, *context.encode()][-(LENGTH - count) :]
    for _ in range(count):
        ids.append(int(logits(variables, ids)[-1, :257].argmax()))
    return ids[-count:]


def test_greedy_continuations_stop_at_strings(model, variables):
    contexts = ["a router sends", "m", "a context longer than the model's thirty-two positions"]
    given = [(context, {"max_gen_toks": 6}) for context in contexts]
    got = model.generate_until(requests("generate_until", given))
    for context, text in zip(contexts, got, strict=True):
        ids = greedy(variables, context, 6)
        ids = ids[: ids.index(256)] if 256 in ids else ids
        assert text == TOKENIZER.decode(ids)
    whole = next(text for text in got if len(text) > 1)
    stop = whole[1]
    given = [(contexts[got.index(whole)], {"max_gen_toks": 6, "until": ["never there", stop]})]
    (cut,) = model.generate_until(requests("generate_until", given))
    assert cut == whole.split(stop)[0]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task's file and its data, all of it here."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(form: str) -> str:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(choice) + "\n" for choice in CHOICES))
        file = tmp_path / f"{form}.yaml"
        text = TASK.replace("NAME", f"tiny_{form}").replace("FILE", str(data))
        file.write_text(text + FORMS[form])
        return str(file)

    return write


def run(variables, tasks, **options):
    return run_tasks(
        tasks, CONFIG, variables, TOKENIZER, max_length=LENGTH, batch_size=2, **options
    )


def test_tasks_of_ones_own(task, variables):
    tasks = load_tasks([task("choice"), task("written")])
    found = run(variables, tasks)
    right = [
        np.argmax([
            own_loglikelihood(variables, choice["question"], f" {text}")[0]
            for text in choice["choices"]
        ]) == choice["answer"]
        for choice in CHOICES
    ]  # fmt: skip
    choice, written = found["tasks"]["tiny_choice"], found["tasks"]["tiny_written"]
    assert choice["metrics"]["acc"]["value"] == pytest.approx(np.mean(right))
    assert choice["samples"] == 3 and choice["few_shot"] == 0
    assert 0 <= written["metrics"]["exact_match"]["value"] <= 1
    assert found["limit"] is None and found["max_length"] == LENGTH
    limited = run(variables, load_tasks([task("choice")]), limit=1)["tasks"]["tiny_choice"]
    assert limited["samples"] == 1
    assert limited["metrics"]["acc"]["value"] == float(right[0])


def test_what_moejax_does_not_generate_with_is_named(task, variables):
    with pytest.raises(UserError, match="num_beams"):
        run(variables, load_tasks([task("beams")]))


def test_tasks_that_cannot_be_loaded(task, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'arc_easy'"):
        load_tasks(["arc_eazy"])
    with pytest.raises(UserError, match="no such file"):
        load_tasks([str(tmp_path / "none.yaml")])
    file = task("choice")

    def no_network(**_):
        raise ConnectionError("Couldn't reach the Hub\nand more lines")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    with pytest.raises(UserError, match="where there is a network") as error:
        load_tasks([file])
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_harness_own_model_says_the_same_of_an_export(model, variables, tmp_path):
    pytest.importorskip("torch", reason="needs the extra 'parity' (torch, transformers)")
    pytest.importorskip("accelerate", reason="lm-eval's own model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    files = tokenizer_files(TOKENIZER, None, LENGTH)
    more = {"max_position_embeddings": LENGTH, "bos_token_id": 256, "eos_token_id": 256}
    hf.save(tmp_path / "hf", CONFIG, variables, more=more, files=files)
    other = HFLM(
        pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2,
        max_length=LENGTH,
    )  # fmt: skip
    asked = requests("loglikelihood", PAIRS)
    for own, theirs in zip(model.loglikelihood(asked), other.loglikelihood(asked), strict=True):
        assert own[0] == pytest.approx(theirs[0], rel=1e-4) and own[1] == theirs[1]
