"""Scores as people read them where there is no page and no terminal of our own: the repr, `print`, a notebook's cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from whence.escapes import visible
from whence.show.markup import folded, framed, line, shown, signed, table
from whence.show.numbers import three_digits
from whence.show.tokens import strong_runs, strongest

if TYPE_CHECKING:
    from whence.store.scores import Scores

NOT_CALIBRATED = "not calibrated: slope at these weights"
"""What slopes are that were not compared with retrainings."""

QUERIES, RAISING, LOWERING = 3, 5, 2
"""Queries that are shown at a time, rows that raise each of them, and rows that lower it."""

WIDTH, LONG, WHOLE = 60, 220, 5000
"""Characters of a row's text in a line, in a cell, and where it is shown in full."""


def heading(scores: Scores) -> str:
    """What scores are, in a line."""
    queries, rows = scores.shape
    parts = [name for name, there in (("token", scores.tokens is not None), ("module", bool(scores.modules))) if there]
    by = f", by {scores.made_by}" if scores.made_by else ""
    also = f", also per {' and '.join(parts)}" if parts else ""
    return f"{queries:,} {'query' if queries == 1 else 'queries'} x {rows:,} rows, {scores.unit}{by}{also}"


def as_text(scores: Scores) -> str:
    """The first queries with their strongest rows, for `print`."""
    lines = [heading(scores)]
    for number in range(min(QUERIES, len(scores.queries))):
        lines += ["", asked_of(scores, number), *lines_of(_rows(scores, number), scores.unit, bound(scores, number))]
    return "\n".join([*lines, *_rest(scores)])


def as_html(scores: Scores) -> str:
    """The same for a notebook, with the strong tokens of each row marked where there are scores per token."""
    parts = [line(heading(scores), faint=True)]
    for number in range(min(QUERIES, len(scores.queries))):
        rows = _rows(scores, number)
        texts = [_marked(scores, number, row) for row in rows]
        parts += [line(asked_of(scores, number)), table_of(rows, scores.unit, texts, bound(scores, number))]
    if scores.tokens is not None:
        raises, lowers = signed("raise the answer", 1), signed("lower it", -1)
        parts.append(line(Markup("Tokens that {} most, and that {}.").format(raises, lowers), faint=True))
    return framed("", *parts, *(line(text, faint=True) for text in _rest(scores)))


def bound(scores: Scores, number: int) -> str:
    """The most that log p can change in the way that effects raise it, "at most +0.0047"; empty where nothing bounds it."""
    room = scores.room(number)
    if room is None:
        return ""
    return f"at least {three_digits(-room)}" if scores.about.get("measurement") == "loss" else f"at most {three_digits(room)}"


def _rest(scores: Scores) -> Iterator[str]:
    if (more := len(scores.queries) - QUERIES) > 0:
        yield f"and {more:,} more {'query' if more == 1 else 'queries'}: scores.top({QUERIES})"


def asked_of(scores: Scores, number: int) -> str:
    """The question, the answer and its probability."""
    asked, log_p = scores.queries.iloc[number], scores.log_p(number)
    if asked["id"] == "self":
        return "each row on itself"
    prompt, answer = asked.get("prompt"), asked.get("completion")
    words = f"{_quoted(prompt)} -> {_quoted(answer)}" if isinstance(answer, str) else _quoted(asked["text"] or asked["id"])
    words += f" rather than {_quoted(asked['contrast'])}" if isinstance(asked.get("contrast"), str) else ""
    return words + ("" if log_p is None else f"   log p {log_p:.2f} nats")


def _quoted(text: Any) -> str:
    words = " ".join(visible(str(text if isinstance(text, str) else "")).split())
    return f'"{words if len(words) <= 2 * WIDTH else "..." + words[-2 * WIDTH :]}"'


def _rows(scores: Scores, number: int) -> list[dict[str, Any]]:
    """The rows that raise the query most, then those that lower it most."""
    found = scores.top(number, RAISING).to_dict("records")
    names = {row["id"] for row in found}
    lowest = scores.top(number, LOWERING, lowest=True).iloc[::-1].to_dict("records") if scores.directed else []
    return [*found, *(row for row in lowest if row["id"] not in names and row["value"] < 0)]


def _cells(row: Mapping[str, Any], unit: str, limit: str) -> list[str]:
    """Rank, effect, share, source and id."""
    limit = f" ({limit or 'beyond first order'})" if row.get("beyond_first_order") else ""
    effect = f"{row['effect']} {three_digits(row['value'])} {unit.removesuffix(' per copy')}{limit}"
    copies = f" x{row['copies']}" if row.get("copies", 1) > 1 else ""
    source = row.get("source")
    return [
        str(row["rank"]),
        effect,
        f"{row['share']:.1%}",
        visible(source) if isinstance(source, str) else "",
        visible(str(row["id"])) + copies,
    ]


def lines_of(rows: list[dict[str, Any]], unit: str, limit: str = "") -> list[str]:
    """The rows as aligned lines of text."""
    cells = [[*_cells(row, unit, limit), " ".join(visible(str(row["text"])).split())[:WIDTH]] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(6)] if cells else []
    return [
        "  ".join(
            cell.rjust(width) if column in (0, 2) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in cells
    ]


def table_of(rows: list[dict[str, Any]], unit: str, texts: list[Markup], limit: str = "") -> Markup:
    """The rows as a table, whose last cells are given."""
    cells = [_cells(row, unit, limit) for row in rows]
    names = ["rank", "effect", "share", "source", "id"]
    kept = [column for column in range(5) if column != 3 or any(row[3] for row in cells)]
    signs = [int(np.sign(row["value"])) if row["effect"] != "scores" else 0 for row in rows]
    body = [
        [*(signed(row[1], sign) if column == 1 else row[column] for column in kept), text]
        for row, sign, text in zip(cells, signs, texts, strict=True)
    ]
    return table([*(names[column] for column in kept), "text"], body, right=(0, 2))


def _marked(scores: Scores, number: int, row: Mapping[str, Any]) -> Markup:
    """A cell of the row, its strong tokens marked where scores per token are there."""
    if scores.tokens is None or not isinstance(row.get("pieces"), list | tuple | np.ndarray):
        return cell_of(str(row["text"]))
    return marked(str(row["text"]), row["pieces"], scores.token_scores(number, row["id"]))


def marked(text: str, tokens: Sequence[str], values: np.ndarray) -> Markup:
    """The strongest stretch of a text by its tokens' values, with all of it below."""
    pieces = [" ".join(visible(str(piece)).split("\n")) for piece in tokens]
    first, last = strongest(pieces, values, LONG)
    runs = (
        Markup("{}{}{}").format(before, signed(words, sign), after)
        for before, sign, words, after in strong_runs(pieces[first:last], values[first:last])
    )
    found = Markup("{}{}{}").format("..." if first else "", Markup().join(runs), "..." if last < len(pieces) else "")
    return found if not first and last == len(pieces) else found + folded("all of the row", shown(text[:WHOLE]))


def cell_of(text: str) -> Markup:
    """The beginning of a text, with all of it below where that is not all."""
    words = " ".join(text.split())
    if len(words) <= LONG:
        return shown(words)
    return Markup("{}...").format(shown(words[:LONG])) + folded("all of the row", shown(words[:WHOLE]))
