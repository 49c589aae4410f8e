"""HTML that is escaped unless it was made here: elements, tables, lists of facts, figures."""

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already; every other text is escaped where it becomes part of some."""


def escape(value: Any) -> Html:
    """A value as HTML: as it is where it is Html, else its text with markup made harmless.

    Control characters, which no HTML may hold, become the replacement character.
    """
    if isinstance(value, Html):
        return value
    plain = "".join(
        c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f" and not _lone(c)) else "\ufffd"
        for c in str(value)
    )
    return Html(html.escape(plain, quote=True))


def _lone(character: str) -> bool:
    """Half of a surrogate pair, which UTF-8 cannot write."""
    return "\ud800" <= character <= "\udfff"


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Parts one after another, escaped."""
    return Html(between.join(escape(part) for part in parts))


_VOID = ("meta", "link", "input", "br", "col", "path", "rect", "line", "circle", "image", "stop")


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. ``class_`` is ``class``; underscores in attributes are hyphens; None is left out.

    Args:
      name: of the element.
      children: what is in it; text is escaped.
      attributes: values are escaped; True writes the name alone.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{escape(value)}"')
    opening = f"<{name}{''.join(written)}"
    if name in _VOID and not children:
        return Html(f"{opening}/>")
    return Html(f"{opening}>{join(children)}</{name}>")


def paragraph(*children: Any, class_: str | None = None) -> Html:
    """A paragraph."""
    return tag("p", *children, class_=class_)


LONG = 28  # characters of a row's name, beyond which it is broken into lines
UNKNOWN = "\N{EN DASH}"  # where a table has no figure


def number(value: Any, form: str = ".4f") -> str:
    """A figure, or a dash where there is none."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return format(value, form) if known else UNKNOWN


def p_value(value: float | None) -> str:
    """A p-value."""
    return "<0.001" if value is not None and value < 0.001 else number(value, ".3f")


def between(interval: Sequence[float] | None, form: str = ".4f") -> str:
    """An interval in words."""
    if not interval or None in interval:
        return UNKNOWN
    return f"{number(interval[0], form)} to {number(interval[1], form)}"


def table(
    headings: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    label: str,
    text_columns: Sequence[int] = (0,),
    note: Any = None,
    emphasis: Sequence[int] = (),
) -> Html:
    """A table that scrolls within itself where it is too wide, with its caption above.

    Args:
      headings: of the columns.
      rows: cells; the first names the row.
      label: the caption.
      text_columns: those that are flush left; numbers are flush right.
      note: a line below the caption.
      emphasis: numbers of the rows to set off, such as totals.
    """
    side = lambda i: None if i in text_columns else "n"
    head = tag("tr", *(
        tag("th", name, scope="col", class_=side(i)) for i, name in enumerate(headings)
    ))  # fmt: skip
    body = []
    for number, row in enumerate(rows):
        first, *rest = row
        cells = [tag("th", first, scope="row", class_=_wide(first, side(0)))]
        cells += [tag("td", cell, class_=_wide(cell, side(i))) for i, cell in enumerate(rest, 1)]
        body.append(tag("tr", *cells, class_="sum" if number in emphasis else None))
    caption = tag("caption", tag("span", label, class_="title"), "" if note is None else
                  tag("span", note, class_="note"))  # fmt: skip
    whole = tag("table", caption, tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def _wide(cell: Any, otherwise: str | None) -> str | None:
    """The class of a cell: what is long may be broken into lines."""
    text = re.sub("<[^>]*>", "", cell) if isinstance(cell, Html) else str(cell)
    return "long" if len(text) > LONG or (isinstance(cell, Html) and "<p" in cell) else otherwise


def facts(pairs: Iterable[tuple[Any, Any]]) -> Html:
    """Names and what they are, as a description list."""
    items = [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs]
    return tag("dl", *items, class_="facts")


def details(summary: Any, *children: Any, open_: bool = False) -> Html:
    """What is folded away until it is wanted; on paper it is open."""
    return tag("details", tag("summary", summary), *children, open=open_)


def code(text: str) -> Html:
    """Lines to be typed or read as they are."""
    return tag("pre", tag("code", text), tabindex="0")


def badge(word: str, kind: str) -> Html:
    """A verdict or status as a word on its colour: ``good``, ``bad``, ``unsure``, ``plain``."""
    return tag("span", word, class_=f"badge {kind}")
