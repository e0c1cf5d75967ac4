"""What the words of queries and rows alone say: no model is run, and for facts it is hard to beat."""

from __future__ import annotations

from collections.abc import Callable

from whence import dist
from whence.errors import UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.tfidf import tfidf_scores
from whence.methods.base import NoSettings, Recipe, Request
from whence.settings import AtLeastZero, Section, Share, setting
from whence.store.scores import Scores, row_text


class Saturated(Section):
    """How much repeated words and long rows count."""

    k1: AtLeastZero = setting(1.5, "How soon repetitions of a word stop to count; 0: at once.")
    b: Share = setting(0.75, "How much long rows are held back: 0 not at all, 1 in proportion to their length.")


def bm25(request: Request, settings: Saturated) -> Scores:
    """Sum over the query's words of idf times saturated frequency (Robertson and Zaragoza 2009)."""
    return _of_words(request, lambda asked, rows: bm25_scores(asked, rows, settings.k1, settings.b))


def tfidf(request: Request, settings: NoSettings) -> Scores:
    """Cosine of the TF-IDF vectors of query and row (Salton and Buckley 1988)."""
    return _of_words(request, tfidf_scores)


def _of_words(request: Request, measure: Callable[..., Scores]) -> Scores:
    """The measure of the texts of queries and rows; by the first of several processes. Raises UsageError without texts."""
    asked, rows = request.asked.rows, request.point.examples.rows
    for what, side in (("queries", asked), ("rows", rows)):
        if not any(row_text(row) for row in side):
            raise UsageError(
                f"The {what} have no text whose words could be compared",
                given=f"{len(side)} {what}, the first a {type(side[0]).__name__}",
                accepted="texts, prompts with completions, or conversations",
            )
    found = dist.on_first(measure, asked, rows)
    return request.scores_of(found.raw, found.about["operator"], found.unit)


TEXTS = "no pass of the model"

RECIPES = (
    Recipe("bm25", "BM25", "Robertson and Zaragoza 2009, eq. 3.15", bm25, Saturated, whole=True, price=TEXTS),
    Recipe("tfidf", "TF-IDF", "Salton and Buckley 1988", tfidf, whole=True, price=TEXTS),
)
