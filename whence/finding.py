"""Which rows made the model say this, through an index: a scan for candidates, and their exact scores.

run = whence.open("runs/tiny")
finding = run.find("Once upon a time, there was a little")
print(finding.recall, finding.seconds)
for row in finding.rows[:5]:
    print(row.rank, row.score, row.text)
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from whence.data import Rows, as_rows
from whence.engine.point import Point
from whence.escapes import visible
from whence.filter.where import matching
from whence.indexing import Index
from whence.operators import Operator
from whence.scoring.score import score_points
from whence.settings import Score
from whence.show.markup import framed, line, signed, table
from whence.show.numbers import three_digits
from whence.store.scores import Scores
from whence.store.shown import asked_of, cell_of, marked
from whence.tasks import CausalLM

LOWERING = 0.1
"""Share of the candidates that the scan puts last: rows that lower the answer."""

DEPTHS = (10, 100)

RAISING, LOWEST, WIDTH = 10, 3, 60
"""Rows that a notebook shows of either kind, and characters of a row in a line."""

EFFECTS = {1: "raises", 0: "", -1: "lowers"}


@dataclass(frozen=True, repr=False)
class Row:
    """A training row, in nats per copy: above 0 it raises the answer's log-probability."""

    rank: int
    """From 1, by its score."""
    index: int
    """Place in the training data, from 0."""
    id: str
    source: str | None
    text: str
    copies: int
    score: float
    estimate: float
    """What the scan said."""
    pieces: list[str] | None = None
    tokens: list[float] | None = None
    """Scores of the row's tokens, which add up to its own."""
    by_answer: list[list[float]] | None = None
    """The same for each token of the answer by itself, `[A][T]`; they add up to `tokens`."""

    def __repr__(self) -> str:
        return f"Row({self.rank}, {three_digits(self.score)}, {self.id}, {' '.join(visible(self.text).split())[:WIDTH]!r})"

    def _repr_html_(self) -> str:
        return framed("", _table([self]))


@dataclass(frozen=True, repr=False)
class Finding:
    """The candidates for one question with their exact scores, the strongest first."""

    scores: Scores
    """Of the candidates, `[1, C]`."""
    rows: list[Row]
    queries: Rows
    """The question with its answer."""
    answer_tokens: list[str]
    """What is measured."""
    recall: Mapping[str, float]
    """Share of a question's best 10 and 100 rows that as many candidates hold: the mean of questions held out of the index.
    Candidates among fewer rows hold at least that."""
    recall_questions: int
    seconds: Mapping[str, float]
    """Wall time of the answer, the query's gradient, the scan, the exact scores, and those by token of the answer."""
    scanned: int
    """Rows that could have been found: all, or those that meet the conditions."""
    where: Sequence[str] = ()
    """These."""

    def __repr__(self) -> str:
        return f"Finding({len(self.rows)} rows of {self.scanned:,}, {self.scores.unit}: {self.rows[:1]})"

    def _repr_html_(self) -> str:
        lowest = [row for row in self.rows[RAISING:][-LOWEST:] if row.score < 0]
        shown = [*self.rows[:RAISING], *lowest]
        return framed("", line(asked_of(self.scores, 0)), _table(shown), line(self.summary, faint=True))

    @property
    def summary(self) -> str:
        """How many rows were scored, and what share of the best ones scans found."""
        known = [f"{share:.0%} of the exact top {k}" for k, share in self.recall.items() if share == share]
        held_out = f"; of {self.recall_questions} questions held out, scans found {' and '.join(known)}" if known else ""
        where = f" with {' and '.join(self.where)}" if self.where else ""
        return f"exact scores of {len(self.rows):,} of {self.scanned:,} rows{where}, proposed by a scan of the index{held_out}"

    def as_json(self, gain: float = 1.0) -> dict[str, Any]:
        """Everything but the scores themselves, as plain values.

        A row has the `slope` and the `value`, which is `gain` times that (`Scores.gain`), as estimate and tokens are.
        """
        plain = {name: getattr(self, name) for name in ("answer_tokens", "recall_questions", "scanned")}
        maps = {"recall": dict(self.recall), "seconds": dict(self.seconds)}
        rows = []
        for row in self.rows:
            known = dataclasses.asdict(row)
            slope = known.pop("score")
            sized = {name: known[name] for name in ("estimate", "tokens", "by_answer") if known[name] is not None}
            known |= {name: (gain * np.array(value)).tolist() for name, value in sized.items()}
            rows.append(known | {"value": gain * slope, "slope": slope})
        return {"query": dict(self.queries[0]), **plain, **maps, "rows": rows}


def find(
    index: Index,
    point: Point,
    operator: Operator,
    asked: Rows,
    candidates: int = 100,
    per_answer_token: int = 0,
    where: Sequence[str] = (),
) -> Finding:
    """Scan the index for one question, and score the `candidates` exactly, per token where the modules have such scores.

    Nine tenths of them have the highest estimates, the others the lowest. The best `per_answer_token` rows also have
    scores by token of the answer. Candidates are rows that meet the conditions `where` (`whence.filter.where`).
    """
    meant = np.flatnonzero(matching(index.examples, where))
    estimates = index.search(point.model, point.task, asked, operator)
    seconds, began = dict(index.seconds), time.perf_counter()
    last = min(round(candidates * LOWERING), max(0, len(meant) - 1))
    first = min(candidates - last, len(meant) - last)
    places = meant[_ends(-estimates.raw[0][meant], first, last)].tolist()
    per = point.cover(operator.names).finest
    settings = Score().changed(per=per, n_train=index.n_train, check=False, products="float32")
    scores = score_points(point, point, asked, operator, settings, rows=places)
    seconds["exact"] = time.perf_counter() - began
    (item, _), *_ = point.task.encode_queries(asked)[0]
    best, parts = np.argsort(-scores.raw[0], kind="stable").tolist(), {}
    pieces = _answer_tokens(point, item)
    if per_answer_token and per == "token" and isinstance(point.task, CausalLM):
        began = time.perf_counter()
        parts = _by_answer(point, asked, item, operator, settings, [places[column] for column in best[:per_answer_token]])
        seconds["tokens"] = time.perf_counter() - began
    found = []
    for rank, column in enumerate(best, 1):
        about = scores.examples.iloc[column]
        tokens = None if scores.tokens is None else scores.token_scores(0, column).tolist()
        source = about["source"]
        found.append(
            Row(
                rank,
                places[column],
                about["id"],
                source if isinstance(source, str) else None,
                about["text"],
                int(about["copies"]),
                float(scores.values[0, column]),
                float(estimates.values[0, places[column]]),
                None if tokens is None or "pieces" not in scores.examples else list(about["pieces"]),
                tokens,
                parts.get(places[column]),
            )
        )
    among = len(index) if len(places) == len(meant) else first  # of rows that are all scored none is missed
    recall = {str(k): index.recall(k, among) for k in DEPTHS}
    return Finding(scores, found, asked, pieces, recall, len(index.measured["places"]), seconds, len(meant), where)


def _table(rows: Sequence[Row]) -> Markup:
    """Rows for a notebook, their strong tokens marked."""
    cells, named = [], any(row.source for row in rows)
    for row in rows:
        sign = int(np.sign(row.score))
        effect = signed(f"{EFFECTS[sign]} {three_digits(row.score)}", sign)
        text = marked(row.text, row.pieces, np.array(row.tokens)) if row.pieces and row.tokens else cell_of(row.text)
        cells.append([str(row.rank), effect, *([row.source or ""] if named else []), row.id, text])
    return table(["rank", "effect, nats", *(["source"] if named else []), "id", "text"], cells, right=(0,))


def _ends(values_N: np.ndarray, first: int, last: int) -> list[int]:
    """Places of the `first` lowest values and of the `last` highest, in order; a tenth of the time of sorting a million."""
    count = len(values_N)
    bounds = sorted({max(0, first - 1), min(count - 1, count - last)})
    parted = np.argpartition(values_N, bounds)
    ends = parted[:first], parted[count - last :]
    return [place for end in ends for place in end[np.lexsort((end, values_N[end]))].tolist()]


def _answer_tokens(point: Point, item: Any) -> list[str]:
    """The tokens that are measured."""
    pieces = point.task.predicted_tokens(item) or []
    if not isinstance(point.task, CausalLM):
        return pieces
    measured = item.in_loss[1 : len(pieces) + 1]
    return [piece for piece, is_measured in zip(pieces, measured, strict=True) if is_measured]


def _by_answer(
    point: Point, asked: Rows, item: Any, operator: Operator, settings: Score, places: Sequence[int]
) -> dict[int, list[list[float]]]:
    """Scores of these rows per token, of every token of the answer by itself."""
    task, at = copy.copy(point.task), np.flatnonzero(item.in_loss)
    items = [dataclasses.replace(item, in_loss=np.arange(len(item.ids)) == place) for place in at]
    task.encode_queries = lambda rows: [[(each, 1.0)] for each in items]  # type: ignore[method-assign]
    each = as_rows([dict(asked[0])] * len(items))
    scores = score_points(
        Point(point.model, task, batch_tokens=point.batch_tokens), point, each, operator, settings, rows=places
    )
    return {
        place: [scores.token_scores(query, column).tolist() for query in range(len(items))]
        for column, place in enumerate(places)
    }
