"""Scores of every method are shown for what they are: slopes per copy, nats of another kind, or an order of texts."""

from dataclasses import replace

import pandas as pd
import pytest

from whence.filter.bm25 import bm25_scores
from whence.report import build_report, words
from whence.report.html import render
from whence.report.markdown import as_markdown

TEXTS = [f"The keeper of house {number} eats apples." for number in range(12)]


@pytest.fixture
def bm25():
    return bm25_scores(["Who eats apples in house 3?"], TEXTS)


@pytest.fixture
def tracin(scores):
    about = {"measurement": "logprob", "method": "tracin", "source": "Pruthi et al. 2020"}
    blank = scores.queries.assign(measured=None)  # differs from checkpoint to checkpoint
    return replace(scores, n_train=1, queries=blank, about=about).named("TracIn", "nats per step on the row")


def test_slopes_per_copy_are_called_so(scores):
    assert words.is_slope(scores) and scores.directed and words.meaning(scores) == words.SLOPE
    assert "slope" in words.sign(scores, 0) and words.doubts(scores, 0)[-1] == words.TRUST
    assert words.is_slope(replace(scores, about={"normalised": "cosine", "unit": "cosine"}))


def test_what_is_in_another_unit_is_an_order_with_its_source(tracin):
    assert tracin.directed and not words.is_slope(tracin)
    said = words.sign(tracin, 0)
    assert "raises / lowers log p(answer), by TracIn (Pruthi et al. 2020), in nats per step on the row" in said
    assert "not a slope per copy" in words.meaning(tracin) and not words.excluded(tracin, 0)
    assert words.doubts(tracin, 0)[-1] == words.OTHER_TRUST and words.limits(tracin) == words.OTHER_LIMITS
    assert tracin.top(0, 3)["effect"].isin(["raises"]).all()


def test_a_comparison_of_texts_raises_nothing(bm25):
    assert not bm25.directed and set(bm25.top(0, 3)["effect"]) == {"scores"}
    assert "raises nothing" in words.sign(bm25, 0)
    assert words.direction(bm25) == "a higher score puts the row first"


@pytest.mark.parametrize("which", ["tracin", "bm25"])
def test_a_report_speaks_of_no_slope_where_there_is_none(which, request):
    found = request.getfixturevalue(which)
    report = build_report(found)
    for page in (as_markdown(report), render(report)):
        assert found.unit in page and found.made_by in page
        assert "per copy of a training row" not in page and "Effects are slopes" not in page and "with a slope" not in page


def test_exports_say_what_made_them(tracin, tmp_path):
    table = pd.read_csv(tracin.export(tmp_path / "x.csv"))
    assert set(table["made_by"]) == {"TracIn (Pruthi et al. 2020)"} and set(table["unit"]) == {"nats per step on the row"}
