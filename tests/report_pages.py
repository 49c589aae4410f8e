"""``moejax report`` as tests call it, and what its page is made of."""

import contextlib
import html.parser
import io
import json
import pathlib
import re

from moejax import cli

MARKUP = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp;\"'"
VOID = {"meta", "link", "input", "br", "path", "rect", "line", "circle", "image"}


class Outline(html.parser.HTMLParser):
    """What a page is made of; elements that do not close are an error."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == [], self.open

    def handle_startendtag(self, tag, attributes):
        self._see(tag, attributes)

    def handle_starttag(self, tag, attributes):
        self._see(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def _see(self, tag, attributes):
        values = dict(attributes)
        self.elements.append((tag, values))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if values.get("id"):
            self.ids.append(values["id"])
        if values.get("href", "").startswith("#"):
            self.targets.append(values["href"][1:])

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(*arguments) -> dict:
    """The one object on standard output."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["report", *map(str, arguments), "--format=json"])
    assert status == 0, err.getvalue()
    return json.loads(out.getvalue())


def outline(path) -> Outline:
    return Outline(pathlib.Path(path).read_text(encoding="utf-8"))


def refused(capsys, *arguments, root: pathlib.Path) -> str:
    before = sorted(root.rglob("*"))
    capsys.readouterr()
    assert cli.main(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said.err
    assert said.err.startswith("moejax report: ") and "Traceback" not in said.err
    assert sorted(root.rglob("*")) == before
    return said.err
