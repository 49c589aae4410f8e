"""The page round a report's sections: head, contents, footer; one file that needs nothing else."""

import dataclasses
from collections.abc import Sequence

from moejax.analysis.report.html import Html, join, tag
from moejax.analysis.report.style import style_sheet

# The mark by which a report is told from another's file, which is not overwritten.
MARK = '<meta name="generator" content="moejax report"/>'
# No script runs and nothing is loaded, whatever a name or a sample may hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
      anchor: its name in links.
      title: its heading.
      content: what stands below.
    """

    anchor: str
    title: str
    content: Html


def page(
    title: str, kicker: str, opening: Html, warnings: Sequence[str], sections: Sequence[Section],
    footer: str,
) -> str:  # fmt: skip
    """The whole HTML file.

    Args:
      title: the heading.
      kicker: the line above it: what kind of report this is.
      opening: what stands before the sections: a summary in words and figures.
      warnings: what a reader has to know before believing it.
      sections: the parts, in their order; those without content are left out.
      footer: the last line.
    """
    sections = [section for section in sections if section.content]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        Html(MARK),
        tag("title", f"{title} · moejax report"),
        tag("link", rel="icon", href="data:,"),
        Html(f"<style>{style_sheet()}</style>"),
    )
    toggle = tag("label", tag("input", type="checkbox", id="theme"), "other theme", class_="toggle")
    header = tag("header", toggle, tag("p", kicker, class_="kicker"), tag("h1", title), opening)
    body = tag(
        "body",
        tag(
            "div", header, _contents(sections),
            tag("main", _warnings(warnings), join(_section(s) for s in sections)),
            tag("footer", footer),
            class_="layout",
        ),
    )  # fmt: skip
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n{body}</html>\n'


def _contents(sections: Sequence[Section]) -> Html:
    items = [tag("li", tag("a", s.title, href=f"#{s.anchor}")) for s in sections]
    inner = tag("div", tag("span", "Contents", class_="title"), tag("ol", *items))
    return tag("nav", inner, aria_label="Contents")


def _warnings(warnings: Sequence[str]) -> Html:
    if not warnings:
        return Html("")
    items = [tag("li", line) for line in dict.fromkeys(warnings)]
    return tag(
        "section", tag("h2", "Warnings", id="warnings"), tag("ul", *items),
        class_="warnings", aria_labelledby="warnings",
    )  # fmt: skip


def _section(section: Section) -> Html:
    heading = tag("h2", section.title, id=section.anchor)
    return Html(f"\n{tag('section', heading, section.content, aria_labelledby=section.anchor)}")
