"""Templates: their text, and the vocabularies that cannot write it."""

import pytest
import tokenizers as hf

from moejax.config import ConfigError
from moejax.data import tokenizers
from moejax.reasoning import templates
from moejax.reasoning.tasks import TASKS
from moejax.reasoning.templates import TEMPLATES, check_vocabulary

EVERYTHING = "".join(task.characters for task in TASKS.values())


def test_prompts():
    assert TEMPLATES["plain"].prompt("3+4=") == "3+4="
    assert TEMPLATES["plain"].prompt("Copy: ab") == "Copy: ab\n"
    assert TEMPLATES["r1_short"].prompt("3+4=") == "User: 3+4=\nAssistant: "
    long = TEMPLATES["r1"].prompt("3+4=")
    assert long.startswith("A conversation between User and Assistant.")
    assert long.endswith("</answer>. User: 3+4= Assistant: ")
    assert TEMPLATES["r1"].completion("7", "3+4=7") == ("<think>3+4=7</think><answer>7</answer>")
    assert TEMPLATES["plain"].completion("7", "unused") == "7"


def test_no_such_template():
    with pytest.raises(ConfigError, match="template = 'r2': no such template; did you mean 'r1'"):
        templates.find("r2")


@pytest.fixture(scope="module")
def bpe():
    task = TASKS["add"]
    texts = [task.problem(0, i, 2, "train").solution for i in range(50)]
    return tokenizers.train_bpe(texts, 300)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_bytes_and_byte_level_pairs_write_everything(template, bpe):
    for tokenizer in (tokenizers.BytesTokenizer(), bpe):
        check_vocabulary(template, tokenizer, EVERYTHING + "é漢\u0301😀")


def word_level(words, normalizer=None):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[SEP]", *words])}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = hf.decoders.Fuse()
    if normalizer:
        tokenizer.normalizer = normalizer
    return tokenizers.JsonTokenizer(tokenizer, 1)


def test_a_vocabulary_without_the_tags():
    letters = sorted(set("User: Assistant\n0123456789+=" + "".join(templates.TAGS)))
    check_vocabulary(TEMPLATES["r1_short"], word_level(letters), "0+1=")
    lacking = word_level([letter for letter in letters if letter != "<"])
    with pytest.raises(ConfigError) as error:
        check_vocabulary(TEMPLATES["r1_short"], lacking)
    assert str(error.value) == (
        "template = 'r1_short': the tokenizer, with the model's vocabulary, cannot write <think> "
        "</think> <answer> </answer>; take another template or data.tokenizer='bytes'"
    )
    check_vocabulary(TEMPLATES["plain"], lacking, "0123456789")
    with pytest.raises(ConfigError, match=r"template = 'plain': .* cannot write '\*' 'x', which"):
        check_vocabulary(TEMPLATES["plain"], lacking, "0x*")


def test_a_tokenizer_that_changes_letters():
    letters = sorted(set("user: assistant\n" + "".join(templates.TAGS)))
    lower = word_level(letters, hf.normalizers.Lowercase())
    with pytest.raises(ConfigError, match="cannot write 'A' 'U', which"):
        check_vocabulary(TEMPLATES["r1_short"], lower)


def test_a_model_with_fewer_ids():
    with pytest.raises(ConfigError, match="cannot write <think>"):
        check_vocabulary(TEMPLATES["r1"], tokenizers.BytesTokenizer(), vocab_size=60)
    check_vocabulary(TEMPLATES["r1"], tokenizers.BytesTokenizer(), vocab_size=128)
    with pytest.raises(ConfigError, match="cannot write 'é'"):
        check_vocabulary(TEMPLATES["r1"], tokenizers.BytesTokenizer(), "é", vocab_size=128)
    with pytest.raises(ConfigError, match=r"' '|'\\n'"):
        check_vocabulary(TEMPLATES["plain"], tokenizers.BytesTokenizer(), vocab_size=10)
