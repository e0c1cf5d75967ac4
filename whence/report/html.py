"""The report as one page that needs nothing but itself: no network, and no script to read its first questions.

Of many questions a few are shown at a time. The others are in the page as they will be shown, but compressed: they neither
take room nor are laid out before somebody looks at them.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from whence.report import charts
from whence.report.model import Query, Report, Row
from whence.report.words import SHARE
from whence.show import numbers
from whence.show.numbers import three_digits
from whence.show.tokens import BREAK, runs, strongest
from whence.store.files import atomic
from whence.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = 10
"""Questions that are shown at a time."""

LIMIT = 5_000_000
"""Bytes that a page stays below."""

PACKED = 6
"""Characters of text that may become one of the page: it is not tried where there are more."""

WHOLE = (20_000, 5000, 2000, 1000, 500, 250)
"""Characters of each row that are shown in full, as many as fit."""

WINDOW = 260
"""Characters of the stretch that is shown of every row at once."""

LEVELS = (0.05, 0.2, 0.5)
"""Shares of a question's strongest token from which on tokens are coloured, in three steps."""

TOKENS = 6
"""Strongest tokens that are listed with their effects."""


def write_html(report: Report, path: str | Path) -> Path:
    """Write the report as one page of less than `LIMIT` bytes; where the rows are long, they are shown in part, and it says so.

    The file is whole or not there at all.
    """
    path, content = Path(path), b""
    lengths = [len(row.text) for query in report.queries for row in query.raises + query.lowers]
    for whole in WHOLE:
        if whole != WHOLE[-1] and sum(min(length, whole) for length in lengths) > PACKED * LIMIT:
            continue  # the texts alone are too long
        content = render(report, whole).encode("utf-8", "replace")
        if len(content) < LIMIT:
            break
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return path


def render(report: Report, whole: int = WHOLE[0]) -> str:
    """The page, with up to so many characters of each row."""
    unit = report.unit.removesuffix(" per copy")
    views = [_View(query, unit, whole) for query in report.queries]
    shown = [views[first : first + PAGE] for first in range(0, len(views), PAGE)]
    pages = [Markup(filled("questions.html.j2", report, views=part)) for part in shown]
    return filled(
        "report.html.j2",
        report,
        pages=[*pages[:1], *map(_packed, pages[1:])],
        size=PAGE,
        coloured=bool(views and views[0].scale),
        version=__version__,
        curve=training_curve(report),
        made=made_from(report),
        short=_short,
    )


def as_elements(documents: Sequence[Mapping[str, Any]], pins: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """Questions as the page of `whence serve` has them in JSON, drawn as the report draws them: HTML, and the style it needs.

    `pins` has the notes of pinned rows by the key of the question and the id of the row.
    """
    drawn = []
    for number, document in enumerate(documents):
        query = _attributes({**document["query"], "number": number, "parts": []})
        unit, known = document["unit"], ("gain", "slope", "unit")
        about = SimpleNamespace(**{name: document[name] for name in known}, queries=documents, rows=document["of"])
        view = _View(query, unit.removesuffix(" per copy"), WHOLE[0], pins.get(document["key"]))
        drawn.append(filled("questions.html.j2", about, views=[view]))
    return "".join(drawn), filled("report.css", SimpleNamespace(unit=""))


def _attributes(value: Any) -> Any:
    """A JSON document read by its names as the dataclasses are that it was made from."""
    return json.loads(json.dumps(value), object_hook=lambda entries: SimpleNamespace(**entries))


def made_from(report: Report) -> list[tuple[str, str]]:
    """What readers want to know before anything else: model, data, method and date, as far as there is a record."""
    known, training = dict(report.provenance), dict(report.training)
    model = known.get("model.architecture", "").split(" ")[0]
    parts = report.queries[0].parts if report.queries else []
    scored = {f" of {part.stage}": (part.rows, part.query.n_train, part.method) for part in parts}
    facts = {
        "model": f"{model}, tuned from {training['base']}" if model and "base" in training else model,
        "weights": known.get("model.weights", ""),
    }
    for of, (rows, n_train, method) in (scored or {"": (report.rows, report.n_train, report.method)}).items():
        facts[f"rows{of}" if of else "training rows"] = f"{rows:,}" + (f" (N = {n_train:,})" if n_train != rows else "")
        facts[f"method{of}"] = method or ""
    facts |= {"data": known.get("data.fingerprint", "")[:16], "scored": known.get("created", "")[:10]}
    return [(name, value) for name, value in facts.items() if value]


def _packed(text: str) -> str:
    """A text as `DecompressionStream("deflate")` of browsers takes it, in letters."""
    return base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), 9)).decode()


def filled(template: str, report: Any, **more: Any) -> str:
    """A template of this package filled in with a report and `more` values, of which functions are filters as well."""
    given = {
        "report": report,
        "unit": report.unit.removesuffix(" per copy"),
        "columns": _columns,
        "share": SHARE,
    }
    functions = {name: value for name, value in more.items() if callable(value)}
    return _compiled(template, **functions).render(given | more)


@functools.cache  # compiling takes longer than filling in
def _compiled(template: str, **filters: Callable[..., Any]) -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    html = template.endswith(".html.j2")
    pages = Environment(loader=PackageLoader("whence.report"), autoescape=html, undefined=StrictUndefined)
    pages.trim_blocks = pages.lstrip_blocks = True
    pages.filters |= {
        "effect": numbers.typeset,
        "digits": three_digits,
        "percent": numbers.percent,
        "percentile": numbers.percentile,
        "times": numbers.times,
        "many": numbers.many,
        "plain": numbers.plain_number,
        "clean": clean,
        "csp": csp,
        **filters,
    }
    return pages.get_template(template)


class _View:
    """One query as the page needs it: with its colours, charts and words."""

    def __init__(self, query: Query, unit: str, whole: int, notes: Mapping[str, str] | None = None):
        self.query, self.whole, self.notes = query, whole, notes or {}
        self.rows = [*query.raises, *query.lowers]
        self.scale = max((abs(value) for row in self.rows for value in row.token_values), default=0.0)
        self.largest = max((abs(row.value) for row in self.rows), default=0.0)
        self.histogram = charts.histogram(query.histogram, unit, [row.value for row in self.rows])
        self.curve = charts.curve(query.curve, unit)
        self.before = [(part.stage, _View(part.query, unit, whole)) for part in query.parts[:-1]]
        """Of the stages of training before the last."""

    def width(self, row: Row) -> str:
        """The length of a row's bar, in percent of the longest."""
        return f"{100 * abs(row.value) / self.largest:.1f}"

    def snippet(self, row: Row) -> Markup:
        """The stretch of the row that matters most, in one line; its beginning where nothing tells."""
        return self._stretch(row, WINDOW, one_line=True)

    def text(self, row: Row) -> Markup:
        """The row in full, or as much of it as there is room for."""
        return self._stretch(row, self.whole, one_line=False)

    def _stretch(self, row: Row, width: int, one_line: bool) -> Markup:
        if not row.pieces:
            shown = " ".join(row.text.split()) if one_line else row.text
            cut = len(shown) if len(shown) <= width else max(shown.rfind(" ", width - 20, width), width - 20)
            return escape(clean(shown[:cut])) + _more(len(shown) - cut, one_line)
        values = np.array(row.token_values)
        first, last = strongest(row.pieces, values, width)
        before, after = sum(map(len, row.pieces[:first])), sum(map(len, row.pieces[last:]))
        inside = coloured(row.pieces[first:last], values[first:last], self.scale, one_line)
        return _more(before, one_line) + inside + _more(after, one_line)

    def tokens(self, row: Row) -> list[tuple[str, float]]:
        """The strongest tokens of the row with their effects."""
        order = sorted(zip(row.pieces, row.token_values, strict=True), key=lambda pair: -abs(pair[1]))
        return [(clean(piece).replace("\n", BREAK).strip() or "␣", value) for piece, value in order[:TOKENS] if value]

    @functools.cached_property
    def grid(self) -> list[tuple[str, list[tuple[float | None, str]]]]:
        """The heat map: per layer its values and their colours."""
        if (grid := self.query.grid) is None:
            return []
        largest = max((abs(value) for row in grid.values for value in row if value is not None), default=0.0)
        cells = ([(value, _heat(value, largest)) for value in values] for values in grid.values)
        return list(zip(grid.layers, cells, strict=True))


def coloured(pieces: Sequence[str], values: np.ndarray, scale: float, one_line: bool = False) -> Markup:
    """The tokens joined, those that count marked in three steps: `u1` to `u3` raise, `d1` to `d3` lower."""
    steps = np.searchsorted(np.multiply(LEVELS, scale), np.abs(values), side="right") if scale else np.zeros(len(values), int)
    levels = (np.sign(values).astype(int) * steps).tolist()
    parts: list[str] = []
    for before, level, words, after in runs(pieces, levels):
        if level == 0:
            parts.append(str(escape(_line(words, one_line))))
            continue
        shown = _line(words, True) if one_line else clean(words).replace("\n", f"{BREAK}\n")
        parts.append(f"{before}<mark class={'u' if level > 0 else 'd'}{abs(level)}>{escape(shown)}</mark>{after}")
    return Markup("".join(parts))


def clean(text: str) -> str:
    """The text without characters that a page can't hold."""
    known = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    return known.replace("\r\n", "\n").replace("\r", "\n")


def csp(text: str) -> str:
    """What a Content-Security-Policy calls a script or a style by, so that no other one counts."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _line(text: str, one_line: bool) -> str:
    return clean(text).replace("\n", BREAK + " ") if one_line else clean(text)


def _more(characters: int, one_line: bool) -> Markup:
    """What stands for characters that are left out."""
    if characters <= 0:
        return Markup("")
    said = "…" if one_line else f" … {characters:,} more characters … "
    return Markup("<span class=more>{}</span>").format(said)


def _heat(value: float | None, largest: float) -> str:
    """The class of a cell: the sign, and how strong in four steps."""
    if value is None or not largest or abs(value) < 0.02 * largest:
        return "h0"
    return f"h{'u' if value > 0 else 'd'}{min(4, 1 + int(4 * abs(value) / largest))}"


def _short(text: str, width: int = 60) -> str:
    """A line of so many characters at most."""
    line = " ".join(clean(text).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _columns(rows: Iterable[Any]) -> list[str]:
    """The names of all columns of rows that are mappings, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def training_curve(report: Report) -> Markup | None:
    """The loss over the steps of training, and that on rows kept out, as far as the record has them."""
    series = []
    for name, said in (("loss", "loss in training"), ("eval_loss", "loss on rows held out")):
        measured = (entry for entry in report.history if "step" in entry and entry.get(name) is not None)
        if part := [(float(entry["step"]), float(entry[name])) for entry in measured]:
            series.append((said, part))
    return charts.lines(series, "step", "Loss in nats per token over the steps of training") if series else None
