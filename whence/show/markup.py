"""Results as HTML for notebooks: plain elements, no script, and nothing of a user's text that could act.

Colours are those of the page around it, so that it reads in light and in dark; the sign of an effect is said in words, and by
a line's kind besides its colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

from whence.escapes import visible

CELL = "padding:.15em .7em .15em 0;text-align:{side};vertical-align:top;border:0;background:none;"
FAINT = "border-top:1px solid color-mix(in srgb,currentColor 18%,transparent);"
SIGNS = {
    1: "text-decoration:underline solid 2px #2f7fd1;text-underline-offset:.2em",
    -1: "text-decoration:underline dashed 2px #d9731a;text-underline-offset:.2em",
}
"""Of words that raise what was measured, and of those that lower it."""


def framed(title: str, *parts: Markup | str) -> str:
    """A result with its title."""
    head = Markup('<div style="font-weight:600;margin-bottom:.3em">{}</div>').format(shown(title)) if title else Markup()
    inner = head + Markup().join(map(escape, parts))
    return str(Markup('<div class="whence" style="line-height:1.45;max-width:72em;overflow-x:auto">{}</div>').format(inner))


def shown(text: Any) -> Markup:
    """A text of a user, with nothing that acts on the page or hides in it; line breaks and tabs are blanks."""
    return escape(" ".join(visible(str(text)).split()))


def line(text: Any, *, faint: bool = False) -> Markup:
    """A line of text."""
    return Markup('<div style="{}">{}</div>').format(
        "opacity:.72" if faint else "", text if isinstance(text, Markup) else shown(text)
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names with what they stand for, a line each."""
    return table((), [(Markup('<span style="opacity:.72">{}</span>').format(shown(name)), value) for name, value in pairs])


def table(names: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> Markup:
    """Rows of cells below the names of their columns; those numbered in `right` are aligned to the right.

    A cell that is Markup stays as it is, anything else is text.
    """

    def cells(tag: str, row: Sequence[Any], style: str = "") -> Markup:
        return Markup().join(
            Markup("<{0} style='{1}'>{2}</{0}>").format(
                Markup(tag),
                CELL.format(side="right" if number in right else "left") + style,
                cell if isinstance(cell, Markup) else shown(cell),
            )
            for number, cell in enumerate(row)
        )

    head = (
        Markup("<thead><tr>{}</tr></thead>").format(cells("th", names, "font-weight:600;opacity:.72;")) if names else Markup()
    )
    body = Markup().join(
        Markup("<tr style='background:none'>{}</tr>").format(cells("td", row, FAINT if names or number else ""))
        for number, row in enumerate(rows)
    )
    return Markup("<table style='border-collapse:collapse;margin:.3em 0;font-size:inherit'>{}<tbody>{}</tbody></table>").format(
        head, body
    )


def signed(text: str, sign: int) -> Markup:
    """Words that raise what was measured (1) or lower it (-1), or neither (0)."""
    if not sign:
        return escape(visible(text))
    return Markup('<span style="{}">{}</span>').format(SIGNS[sign], visible(text))


def folded(title: str, content: Markup) -> Markup:
    """What is shown when its title is clicked; no script is needed."""
    return Markup('<details style="margin:.3em 0"><summary style="cursor:pointer">{}</summary>{}</details>').format(
        shown(title), content
    )
