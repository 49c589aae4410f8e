"""``moejax generate``: what goes to standard output and what beside it."""

import json
import sys

import pytest

from moejax import cli
from moejax.models.generate import Generated
from moejax.training import restore


@pytest.fixture
def generated(monkeypatch):
    """Stands in for the model; what it was asked for is kept."""
    asked = {}

    def generate(workdir, prompt, *, show=None, **options):
        asked.update(options, shown=show is not None)
        texts = [f"{prompt} one\x07", f"{prompt} two"][: options["count"]]
        for piece in (prompt, " one", "\x07"):
            if show:
                show(piece)
        share = 0.75 if options["speculate"] else None
        return Generated(texts, 8, 2.0, share)

    monkeypatch.setattr(restore, "generate", generate)
    return asked


def test_a_text_and_its_speed(generated, capsys):
    assert cli.main(["generate", "--workdir=x", "--prompt=a"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "a one\\x07\n"
    assert captured.err == "8 tokens in 2.00 s, 4 tokens/s, without compilation\n"
    assert generated == dict(
        tokens=200, seed=0, count=1, stops=[], speculate=0, temperature=0.8, top_k=0, top_p=1.0,
        min_p=0.0, shown=False,
    )  # fmt: skip


def test_flags_reach_the_sampling(generated, capsys):
    flags = [
        "--top-k=3", "--top-p=0.9", "--min-p=0.1", "--count=2", "--stop=.", "--stop=END",
        "--speculate=1", "--seed=5", "--tokens=7", "--temperature=0", "--format=json",
    ]  # fmt: skip
    assert cli.main(["generate", "--workdir=x", "--prompt=a", *flags]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found == {
        "text": "a one\x07", "texts": ["a one\x07", "a two"], "tokens": 8, "accepted_share": 0.75
    }  # fmt: skip
    assert "75% of drafted tokens accepted" in captured.err
    assert generated == dict(
        tokens=7, seed=5, count=2, stops=[".", "END"], speculate=1, temperature=0.0, top_k=3,
        top_p=0.9, min_p=0.1, shown=False,
    )  # fmt: skip


def test_a_terminal_is_shown_the_text_as_it_is_made(generated, capsys, monkeypatch):
    assert cli.main(["generate", "--workdir=x", "--prompt=a", "--stream"]) == 0
    assert generated["shown"] and capsys.readouterr().out == "a one\\x07\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["generate", "--workdir=x", "--prompt=a"]) == 0 and generated["shown"]
    for flag in ("--no-stream", "--format=json", "--count=2"):
        assert cli.main(["generate", "--workdir=x", "--prompt=a", flag]) == 0
        assert not generated["shown"], flag


@pytest.mark.parametrize("flag", ["--format=json", "--count=2"])
def test_several_texts_and_json_are_not_streamed(flag, generated, capsys):
    assert cli.main(["generate", "--workdir=x", "--stream", flag]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "--stream: prints one text" in captured.err
    assert not generated and not captured.out
