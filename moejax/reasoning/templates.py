"""From a question to the text that a model continues, and from its continuation to an answer.

``r1`` is the template of DeepSeek-R1-Zero word for word (arXiv 2501.12948, table 1); ``r1_short``
asks for the same form without the 400 letters of instruction, which a small model that reads bytes
cannot afford; ``plain`` is ``3+4=`` and its answer, without thinking.

The form is strict: one ``<think>`` block, then one ``<answer>`` block, neither blank, no tag inside
them, and nothing but white space (ASCII's) before, between or after. Whoever repeats the prompt,
gives two answers or forgets an end tag has not kept it.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from moejax.config import ConfigError, UserError, check, nearest
from moejax.data.tokenizers import Tokenizer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BLANK = " \t\r\n"
_R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. "
)


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a completion says.

    Attributes:
      think: the reasoning; "" without a well-formed block.
      answer: the answer's text, stripped; None where the form was not kept.
      fault: how the form was not kept; "" where it was.
    """

    think: str
    answer: str | None
    fault: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """A form of prompts and completions.

    Attributes:
      name: key of ``TEMPLATES``.
      before, after: text round a question.
      thinks: whether completions have the two blocks of tags, or are the answer alone.
    """

    name: str
    before: str
    after: str
    thinks: bool

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags that a vocabulary must be able to write."""
        return TAGS if self.thinks else ()

    @property
    def characters(self) -> str:
        """Every character of the template itself."""
        return "".join(sorted(set(self.before + self.after + "".join(self.tags))))

    def prompt(self, question: str) -> str:
        """The text that the model continues."""
        if not self.thinks and question.endswith("="):
            return question
        return f"{self.before}{question}{self.after}"

    def completion(self, answer: str, solution: str = "") -> str:
        """The wanted continuation, for supervised training.

        Raises:
          UserError: a worked solution is needed and missing, or a text would break the form.
        """
        made = f"<think>{solution}</think><answer>{answer}</answer>" if self.thinks else answer
        fault = self.parse(made).fault
        if fault:
            given = f"{solution[:40]!r} and {answer[:40]!r}" if self.thinks else repr(answer[:40])
            raise UserError(
                f"template {self.name!r} cannot hold the solution and answer {given}: {fault}; "
                "mend the data, or take another template"
            )
        return made

    def parse(self, completion: str) -> Parsed:
        """Reads a completion (without its prompt and stop token), in linear time."""
        return _parse_blocks(completion) if self.thinks else _parse_plain(completion)


def _fault(text: str) -> Parsed:
    return Parsed("", None, text)


def _parse_plain(completion: str) -> Parsed:
    answer = completion.strip(BLANK)
    if not answer:
        return _fault("no answer")
    if "\n" in answer:
        return _fault("more than one line")
    return Parsed("", answer)


def _parse_blocks(completion: str) -> Parsed:
    places = []
    for tag in TAGS:
        first = completion.find(tag)
        if first < 0:
            return _fault(f"no {tag}")
        if completion.find(tag, first + len(tag)) >= 0:
            return _fault(f"several {tag}")
        places.append(first)
    if places != sorted(places):
        return _fault("tags out of order")
    ends = [place + len(tag) for place, tag in zip(places, TAGS, strict=True)]
    outside = (completion[: places[0]], completion[ends[1] : places[2]], completion[ends[3] :])
    for where, text in zip(("before", "between", "after"), outside, strict=True):
        if text.strip(BLANK):
            return _fault(f"text {where} the blocks")
    think = completion[ends[0] : places[1]].strip(BLANK)
    answer = completion[ends[2] : places[3]].strip(BLANK)
    if not think or not answer:
        return _fault("an empty block")
    return Parsed(think, answer)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("r1", f"{_R1}User: ", " Assistant: ", True),
        Template("r1_short", "User: ", "\nAssistant: ", True),
        Template("plain", "", "\n", False),
    )
}


def find(name: str) -> Template:
    """The template of a name.

    Raises:
      ConfigError: no such template; the nearest is offered.
    """
    check(name in TEMPLATES, "template", name, f"no such template; {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def check_vocabulary(
    template: Template,
    tokenizer: Tokenizer,
    characters: Iterable[str] = "",
    vocab_size: int | None = None,
) -> None:
    """Refuses a vocabulary that cannot write what the template and the tasks need.

    Args:
      template: its tags must come back from the tokenizer letter for letter.
      tokenizer: of the run.
      characters: what the tasks' prompts and answers hold.
      vocab_size: ids that the model knows; None where it knows all of the tokenizer's.

    Raises:
      ConfigError: one line with the tags, or the first of the characters, that are missing.
    """
    size = tokenizer.vocab_size if vocab_size is None else vocab_size

    def lacks(text: str) -> bool:
        ids = np.asarray(tokenizer.encode(text))
        return bool((ids >= size).any()) or tokenizer.decode(ids) != text

    remedy = "the tokenizer, with the model's vocabulary, cannot write"
    tags = [tag for tag in template.tags if lacks(tag)]
    if tags:
        raise ConfigError(
            "template", template.name, f"{remedy} {' '.join(tags)}; take another template or "
            "data.tokenizer='bytes'"
        )  # fmt: skip
    # White space between letters: tokenizers of words drop it at the ends.
    shown_as = {c: f"a{c}a" if c.isspace() else c for c in {*template.characters, *characters}}
    missing = sorted(c for c, text in shown_as.items() if lacks(text))
    if missing:
        shown = " ".join(map(repr, missing[:8])) + (" …" if len(missing) > 8 else "")
        raise ConfigError(
            "template", template.name, f"{remedy} {shown}, which the template or the tasks need; "
            "take data.tokenizer='bytes', or a tokenizer trained on such text"
        )  # fmt: skip
