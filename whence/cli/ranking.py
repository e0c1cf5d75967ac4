"""Ranked rows for a terminal: what was asked, the rows with signed effects in words, and the doubts that go with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from whence.escapes import visible
from whence.filter.keywords import Keywords, keyword_overlap
from whence.report import words
from whence.report.words import missing
from whence.show.numbers import three_digits
from whence.show.tokens import BREAK, strong_runs, strongest
from whence.store.scores import Normalisation, Scores
from whence.validate.results import Result

TEXT, SHORT, GAP = 24, 12, 2
"""Columns that a row's text has where names can give way, those that a name keeps, and those between two columns."""

RAISES, LOWERS = "dodger_blue1", "dark_orange"
"""Apart for colour-blind eyes too; words and signs say the same everywhere."""


class Ranking:
    """The top rows of each query of `scores`, normalised or not; per-token scores find the strongest part of a row.

    `trust` and `beside` are what the quick check and others found of the scores (`read_beside`).
    """

    def __init__(
        self,
        scores: Scores,
        norm: Normalisation | None,
        top: int,
        lowest: int,
        coloured: bool = False,
        trust: Result | None = None,
        beside: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.plain, self.scores = scores, scores.normalised(norm) if norm else scores
        self.top, self.lowest, self.coloured, self.trust = top, lowest, coloured, trust
        self.beside = beside or {}
        self.hubs = set(self.scores.hubs(words.HUB_TOP))
        self.unit = words.unit(self.scores)

    @functools.cached_property
    def keywords(self) -> list[tuple[Keywords, ...]]:
        """Of each query, the words that its top rows share with it; found for all queries at once."""
        return keyword_overlap(self.scores, self.top)

    def query(self, number: int) -> dict[str, Any]:
        """The query's columns, numbered, with what log p(answer) is and how far it can rise; what is not known is None."""
        log_p = self.plain.log_p(number)
        return words.query_of(self.scores, number) | {"log_p": log_p, "room": self.plain.room(number)}

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The rows that raise the query's measurement the most, then those that lower it the most, as JSON has them."""
        found = self.scores.top(number, self.top).to_dict("records")
        shown = {row["id"] for row in found}
        lowest = self.scores.top(number, self.lowest, lowest=True).iloc[::-1].to_dict("records")
        found += [row for row in lowest if row["id"] not in shown]
        gain, hubs = self.scores.gain, self.hubs
        known = ({"hub": row["id"] in hubs, "slope": float(row["value"]) / gain} for row in found)
        rows = [{key: _plain(value) for key, value in row.items()} | more for row, more in zip(found, known, strict=True)]
        if self.plain.tokens is not None:
            rows = [row | {"token_values": self.plain.token_scores(number, row["id"]).tolist()} for row in rows]
        return rows

    def sign(self, number: int) -> str:
        """What a positive score says, and in which unit."""
        return words.sign(self.scores, number)

    def heading(self, number: int) -> Text:
        """The question, the answer and its probability."""
        query = self.query(number)
        if query["id"] == "self":
            return Text("Influence of each row on itself", style="bold")
        if query.get("completion"):
            text = Text.assemble(_quoted(query.get("prompt") or ""), " -> ", (_quoted(query["completion"]), "bold"))
        else:
            text = Text(_quoted(query["text"]), style="bold")
        if query.get("contrast"):
            text.append(f" rather than {_quoted(query['contrast'])}")
        if query.get("span"):
            text.append(f", of which {_quoted(query['span'])}")
        return text

    def measured(self, number: int) -> str:
        """What was measured of the query, and who wrote its answer."""
        return words.measured(self.plain, number)

    def table(self, number: int, width: int) -> Table:
        """The ranked rows, in about `width` columns."""
        rows = self.rows(number)
        columns: dict[str, list[str]] = {
            "rank": [str(row["rank"]) for row in rows],
            "effect": [self.effect(number, row) for row in rows],
            "share": [f"{row['share']:.1%}" for row in rows],
            "source": [visible(str(row["source"] or "")) for row in rows],
            "id": [visible(row["id"]) + (" hub" if row["hub"] else "") for row in rows],
            "copies": [f"x{row['copies']}" if row["copies"] > 1 else "" for row in rows],
        }
        columns = {name: cells for name, cells in columns.items() if name in ("rank", "id") or any(cells)}
        widths = {name: max(map(cell_len, [name, *cells])) for name, cells in columns.items()}
        for text, least in ((TEXT, SHORT), (SHORT, SHORT // 2)):  # names give way to the text; numbers and units never do
            for name in [name for name in ("id", "source") if name in widths]:
                lacking = text + sum(widths.values()) + GAP * len(widths) - width
                widths[name] = max(min(widths[name], least), widths[name] - max(0, lacking))
        left = max(SHORT, width - sum(widths.values()) - GAP * len(widths))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in columns:
            side = "right" if name in ("rank", "share") else "left"
            table.add_column(name, justify=side, no_wrap=True, min_width=widths[name], max_width=widths[name])
        table.add_column("text (strongest part)" if self.plain.tokens is not None else "text", no_wrap=True, max_width=left)
        for row, cells in zip(rows, zip(*columns.values(), strict=True), strict=True):
            styles = {"effect": RAISES if row["value"] > 0 else LOWERS}
            shown = [Text(cell, styles.get(name, "")) for name, cell in zip(columns, cells, strict=True)]
            table.add_row(*shown, self.snippet(number, row, left))
        return table

    def effect(self, number: int, row: dict[str, Any]) -> str:
        """The signed effect in words, with its unit and what bounds it where it is beyond that; never a bare number."""
        limit = f" ({words.bound(self.scores, number)})" if row["beyond_first_order"] else ""
        return f"{row['effect']:<6} {three_digits(row['value'])} {self.unit}{limit}"

    def snippet(self, number: int, row: dict[str, Any], width: int) -> Text:
        """A stretch of the row: the strongest where scores per token are there, else its beginning."""
        if self.plain.tokens is None or row.get("pieces") is None:
            return Text(" ".join(visible(str(row["text"])).split())[:width])
        return snippet(
            [visible(piece) for piece in row["pieces"]], self.plain.token_scores(number, row["id"]), width, self.coloured
        )

    def whole(self, number: int, row: dict[str, Any]) -> Text:
        """The row with all its strong tokens marked."""
        values = self.plain.token_scores(number, row["id"])
        return marked([visible(piece) for piece in row["pieces"]], values, self.coloured)

    def ceiling(self, number: int) -> str:
        """What to make of the effects that are marked; empty where none is."""
        return words.ceiling(self.scores, number) if any(row["beyond_first_order"] for row in self.rows(number)) else ""

    def doubts(self) -> list[str]:
        """What the reader should know before believing the order."""
        *doubts, unchecked = words.doubts(self.plain, len(self.hubs))
        checked = [found["sentence"] for found in self.beside.values()]
        known = [*checked, *filter(None, [words.size(self.plain)])]
        if self.trust is None:
            return [*doubts, *known, *([] if checked else [unchecked])]
        return [*doubts, self.trust.about["badge"], *(f"warning: {text}" for text in self.trust.flags), *known]


def _quoted(text: str, limit: int = 240) -> str:
    text = " ".join(visible(text).split())
    return f'"{text if len(text) <= limit else "..." + text[-limit:]}"'


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if missing(value):
        return None
    return value.tolist() if hasattr(value, "tolist") else value


def snippet(pieces: Sequence[str], values: np.ndarray, width: int, coloured: bool) -> Text:
    """The stretch of about `width` characters whose tokens together have the largest effect, in one line."""
    first, last = strongest(pieces, values, width - 10)
    text = marked(pieces[first:last], values[first:last], coloured)
    line = Text("..." if first else "")
    line.append_text(text)
    if last < len(pieces):
        line.append("...")
    return one_line(line)


def marked(pieces: Sequence[str], values: np.ndarray, coloured: bool) -> Text:
    """The tokens joined, the strong ones marked; neighbours of one sign are marked together."""
    text = Text()
    for before, sign, piece, after in strong_runs(pieces, values):
        if sign == 0:
            text.append(piece)
            continue
        shown = piece if coloured else f"⟦{piece}⟧"
        text.append(before).append(shown, style=f"bold underline {RAISES if sign > 0 else LOWERS}").append(after)
    return text


def one_line(text: Text) -> Text:
    """The text with each line break as one sign."""
    line = text.copy()
    line.plain = text.plain.replace("\n", BREAK).replace("\r", " ").replace("\t", " ")
    return line
