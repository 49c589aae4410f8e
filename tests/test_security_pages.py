"""No text becomes markup in a report."""

import json
import pathlib

import made_folders
import report_pages
from hypothesis import given
from hypothesis import strategies as st

from moejax.analysis.report import html

MARKUPS = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "javascript:alert(1)",
    "</style><script>x</script>", "' onmouseover='x", "<svg/onload=x>", "&lt;b&gt;", "<!--", "]]>",
    "</title><base href=//evil.example>", "https://evil.example/x", "\x1b[31m\x00\x9b\ud800\u202e",
)  # fmt: skip


class Shape(report_pages.Outline):
    """The elements of a page with the names of their attributes, and where it leads."""

    def __init__(self, page: str):
        super().__init__(page)
        self.shape = [(tag, tuple(values)) for tag, values in self.elements]
        self.links = [
            values[name] for _, values in self.elements
            for name in ("href", "src", "action", "data", "xlink:href", "srcset") if name in values
        ]  # fmt: skip


def pages(folder: pathlib.Path, word: str) -> list[str]:
    """Reports of a run and of an ablation, with a word in every text that they show."""
    names = {key: f"{word} {key}" for key in made_folders.VARIANTS}
    ablation = made_folders.write_ablation(
        folder / "ablation", steps=16, names=names, error=word, claim=word
    )
    run = made_folders.write_run(folder / "run", lines=made_folders.metrics(6), sample=word,
                                 data={"licence": word, word: word, "warning": word})  # fmt: skip
    record = json.loads((run / "config.json").read_text())
    record["config"] |= {"stage": word}
    record["config"]["train"] |= {"sample_prompt": word}
    record["config"]["data"] |= {"path": word, "tokenizer": word}
    record |= {"machine": word, "python": word, "packages": {word: word}}
    record["code"] = {"moejax": word, "revision": word}
    (run / "config.json").write_text(json.dumps(record))
    ledger = (run / "ledger.jsonl").read_text().replace('"cpu"', '"cpu"')
    rows = [json.loads(line) for line in ledger.splitlines()]
    for row in rows:
        if "price" in row:
            row["price"] |= {"source": word, "book": word}
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made_folders.write_inspection(run, token=word, domain=word)
    made_folders.write_evaluation(run, word)
    return [pathlib.Path(report_pages.report(f)["output"]).read_text() for f in (ablation, run)]


def test_no_text_becomes_an_element_an_attribute_or_a_link(tmp_path):
    plain = [Shape(page) for page in pages(tmp_path / "plain", "word")]
    for number, markup in enumerate(MARKUPS):
        found = [Shape(page) for page in pages(tmp_path / str(number), markup)]
        for seen, wanted in zip(found, plain, strict=True):
            # A word in a chart may be drawn or left out by its length; nothing else may differ.
            assert set(seen.shape) <= set(wanted.shape), set(seen.shape) - set(wanted.shape)
            kinds = {tag for tag, _ in seen.shape}
            assert kinds.isdisjoint({"script", "iframe", "object", "embed", "base", "form", "img"})
            assert not any(name.startswith("on") for _, names in seen.shape for name in names)
            good = ("#", "data:,", "data:image/png;base64,", "http://", "https://")
            assert all(link.startswith(good) for link in seen.links)
            assert not any("evil" in link or "alert" in link for link in seen.links)


@given(st.text())
def test_escaped_text_is_text(text):
    """An element with any text in it and in an attribute is that element and that text."""
    words = []

    class Reader(report_pages.html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert (tag, [name for name, _ in attributes]) == ("p", ["title"])

        def handle_data(self, data):
            words.append(data)

    Reader().feed(html.tag("p", text, title=text))
    assert len("".join(words)) <= len(text) + 1


def test_a_figure_is_a_file_without_the_words_markup(tmp_path):
    names = {key: f"<script>x</script> {key}" for key in made_folders.VARIANTS}
    folder = made_folders.write_ablation(tmp_path / "odd", steps=16, names=names)
    figures = report_pages.report(folder, "--figures=svg")["figures"]
    assert figures
    for file in figures:
        assert "<script" not in pathlib.Path(file).read_text()
        assert pathlib.Path(file).parent.parent == folder
