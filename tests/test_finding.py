"""One question through an index: candidates with the exact scores, in all their parts."""

import numpy as np
import pytest
from models import llama, randomised, texts, tokenizer

import whence
from whence.data import as_rows
from whence.errors import StaleArtifact, UsageError
from whence.finding import _ends

ROWS = as_rows(texts(40, seed=1))


@pytest.fixture(scope="module")
def run():
    model = randomised(llama()).eval()
    run = whence.open((model, tokenizer()), data=ROWS, task=whence.CausalLM(tokenizer()))
    run.fit(modules="all", examples="all")
    run.build_index(bytes=0.25)
    return run


def test_a_finding_holds_the_exact_scores_of_its_candidates(run):
    finding = run.find("w1 w2", " w3 w4", candidates=20, per_answer_token=3)
    exact = whence.score(run.model, run.task(), [{"prompt": "w1 w2", "completion": " w3 w4"}], ROWS, run.inverse()).values[0]
    assert len(finding.rows) == 20 and finding.scanned == 40 and finding.answer_tokens == [" w3", " w4"]
    for row in finding.rows:
        assert row.score == pytest.approx(exact[row.index], rel=1e-3, abs=1e-4 * float(np.abs(exact).max()))
        assert sum(row.tokens) == pytest.approx(row.score, rel=1e-3, abs=1e-5) and len(row.pieces) == len(row.tokens)
    assert [row.rank for row in finding.rows] == list(range(1, 21))
    assert [row.score for row in finding.rows] == sorted((row.score for row in finding.rows), reverse=True)
    assert {row.index for row in finding.rows if row.by_answer} == {row.index for row in finding.rows[:3]}
    for row in finding.rows[:3]:
        np.testing.assert_allclose(np.sum(row.by_answer, 0), row.tokens, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    assert finding.recall["10"] == run.index.recall(10, 18) and set(finding.seconds) == {
        "answer",
        "query",
        "scan",
        "exact",
        "tokens",
    }
    assert finding.as_json()["rows"][0]["text"] == finding.rows[0].text
    assert run.find("w1 w2", " w3 w4", candidates=60).recall == {"10": 1, "100": 1}, "all rows were scored"


def test_candidates_are_rows_of_the_filter(run):
    """A source's rows are ranked among themselves: as many come as there are candidates, however far down all they stand."""
    sources = ["rare" if number % 10 == 0 else "common" for number in range(40)]
    rows = as_rows([{**row, "source": source} for row, source in zip(ROWS, sources, strict=True)])
    other = whence.open((run.model, tokenizer()), data=rows, task=whence.CausalLM(tokenizer()))
    other.fit(modules="all", examples="all")
    other.build_index(bytes=0.25)
    finding = other.find("w1 w2", " w3 w4", candidates=4, where=["source=rare"])
    exact = whence.score(run.model, run.task(), [{"prompt": "w1 w2", "completion": " w3 w4"}], ROWS, run.inverse()).values[0]
    assert [row.index for row in finding.rows] == sorted(range(0, 40, 10), key=lambda row: -exact[row])
    assert {row.source for row in finding.rows} == {"rare"} and finding.scanned == 4
    assert len(other.find("w1 w2", " w3 w4", candidates=30, where=["source=common", "tokens>=1"]).rows) == 30
    with pytest.raises(UsageError, match="No row meets source=none"):
        other.find("w1 w2", " w3 w4", where=["source=none"])


def test_an_index_of_other_rows_or_of_another_order_is_refused(run, tmp_path):
    """Its places would be those of rows that it has never seen."""
    for rows in (ROWS.take(reversed(range(40))), ROWS.take(range(20))):
        other = whence.open((run.model, tokenizer()), data=rows, task=whence.CausalLM(tokenizer()))
        other.curvature, other.index = run.curvature, run.index
        with pytest.raises(StaleArtifact, match="index is of other rows") as raised:
            other.find("w1 w2", " w3 w4")
        assert f"{len(rows)} rows of the run, 40 in the index" in raised.value.given


def test_without_landmarks_nothing_is_found(run):
    other = whence.open((run.model, tokenizer()), data=ROWS, task=whence.CausalLM(tokenizer()))
    with pytest.raises(UsageError, match="There is no index yet"):
        other.find("w1 w2", " w3")
    other.build_index(modules="all", dim=2)
    with pytest.raises(UsageError, match="an index of landmarks"):
        other.find("w1 w2", " w3")


@pytest.mark.parametrize(("first", "last"), [(1, 0), (90, 10), (0, 1), (150, 50), (7, 193)])
def test_the_ends_are_those_of_the_sorted_estimates(first, last):
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    order = np.argsort(values, kind="stable").tolist()
    assert _ends(values, first, last) == [*order[:first], *order[200 - last :]]
    assert _ends(values[:1], 1, 0) == [0]


def test_a_finding_and_its_rows_show_themselves_shortly(run):
    finding = run.find("w1 w2", " w3 w4", candidates=20)
    assert repr(finding).startswith("Finding(20 rows of 40, nats per copy: [Row(1, +") and len(repr(finding)) < 200
    page, first = finding._repr_html_(), finding.rows[0]
    assert finding.summary in page and first.id in page and "solid" in page and page.count("<tr") <= 14
    assert first.id in first._repr_html_() and len(repr(first)) < 120 and "raises +" in first._repr_html_()
