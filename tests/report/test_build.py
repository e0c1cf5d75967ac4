"""What a report says is what the scores say."""

import dataclasses

import numpy as np
import pytest
from models import CASES

from whence.fitting import fit
from whence.report import build_report
from whence.report.build import layer_and_module, strengths
from whence.report.html import render
from whence.report.markdown import as_markdown
from whence.report.words import SLOPE
from whence.report.write import as_text
from whence.scoring import score, self_influence


def test_rows_have_the_numbers_of_the_scores(scores):
    report = build_report(scores, top=5)
    for number, query in enumerate(report.queries):
        for row in query.raises + query.lowers:
            place = scores.example_ids.index(row.id)
            assert row.value == scores.values[number, place] and row.raw == scores.raw[number, place]
            assert row.effect == ("raises" if row.value > 0 else "lowers") and (row.rank > 0) == (row.value > 0)
            assert row.times_median == pytest.approx(abs(row.value) / np.median(np.abs(scores.values[number])))
            assert row.percentile == pytest.approx(100 * (scores.raw[number] < row.raw).mean() * 240 / 239)
            assert row.exact == scores.exact[number, place]
        assert [row.rank for row in query.raises] == [1, 2, 3, 4, 5] and [row.rank for row in query.lowers] == [
            -1,
            -2,
            -3,
            -4,
            -5,
        ]
        assert [row.value for row in query.raises] == sorted([row.value for row in query.raises], reverse=True)
        assert query.raises[0].value == scores.values[number].max() == query.statistics.maximum
        assert query.lowers[0].value == scores.values[number].min() == query.statistics.minimum


def test_statistics_and_percentiles(scores):
    (query, *_), values = build_report(scores).queries, scores.values[0]
    found = query.statistics
    assert (found.mean, found.median, found.deviation) == pytest.approx((values.mean(), np.median(values), values.std()))
    assert found.median_size == pytest.approx(np.median(np.abs(values)))
    assert dict(found.percentiles) == pytest.approx({p: np.percentile(values, p) for p in dict(found.percentiles)})
    assert [p for p, _ in found.percentiles][0] == 10 and [p for p, _ in found.percentiles][-1] == 99
    assert sum(query.histogram.counts) == 240 and query.curve.rows == 240


def test_copies_are_shown_once(scores):
    rows = build_report(scores).queries[1].raises
    assert rows[0].text == scores.examples["text"][12] and rows[0].copies == 3 and rows[1].text != rows[0].text
    assert len({row.text for row in rows}) == len(rows)


def test_rows_that_top_everything_are_flagged(scores):
    report = build_report(scores)
    assert [(name, count) for name, count, _ in report.hubs] == [("row-5", 4)]
    flagged = {row.id for query in report.queries for row in query.raises + query.lowers if row.hub}
    assert flagged == {"row-5"} and any("WHENCE-20" in note for note in report.notes)


def test_tokens_add_up_and_begin_with_the_first_of_the_text(scores):
    for query in build_report(scores, top=20).queries:
        for row in query.raises + query.lowers:
            assert sum(row.token_values) == pytest.approx(row.value)
            if "<|endoftext|>" not in row.text:
                assert row.token_values[0] == 0 and row.token_values[1]
                assert "".join(row.pieces) == row.text and not row.unread


def test_modules_add_up(scores):
    for query in build_report(scores, top=7).queries:
        assert query.grid.layers == ("layer 0", "layer 1") and query.grid.modules == ("mlp.up_proj", "mlp.down_proj")
        total = sum(value for row in query.grid.values for value in row)
        assert total == pytest.approx(sum(row.value for row in query.raises)) and query.grid.rows == 7
        first = query.raises[0]
        place = scores.example_ids.index(first.id)
        name, value = first.modules[0]
        assert value == scores.modules[name][query.number, place] / 1000
        assert abs(value) == max(abs(raw[query.number, place]) for raw in scores.modules.values()) / 1000


def test_layers_are_in_the_order_of_their_numbers(scores):
    first = next(iter(scores.modules.values()))
    many = dataclasses.replace(scores, modules={f"h.{layer}.fc": first for layer in ("10", "2", "1")} | {"lm_head": first})
    grid = build_report(many).queries[0].grid
    assert grid.layers == ("", "layer 1", "layer 2", "layer 10") and grid.values[0] == (None, grid.values[1][0])


def test_sources_add_up(scores):
    query = build_report(scores).queries[2]
    assert sum(count for _, count, _ in query.sources) == 240
    assert {name: value for name, _, value in query.sources} == pytest.approx(dict(scores.by("source", 2)))


def test_shared_words_and_overlap(scores):
    query = build_report(scores, top=30).queries[0]
    copy = query.raises[0]
    assert copy.overlap == pytest.approx(1) and set(copy.words) >= {"tower", "what"}
    assert query.overlap.top == pytest.approx(np.mean([row.overlap for row in query.raises]))
    other = next(row for row in query.raises if row.text.startswith("The keeper of house"))
    assert "keeper" not in other.words, "nearly all rows have it"


def test_a_row_that_is_the_question_is_found(scores):
    report = build_report(scores)
    assert [query.copy_rank for query in report.queries] == [1, None, None, None, None]
    check = next(check for check in report.checks if check.name == "Self-retrieval")
    assert check.result.startswith("verbatim training rows: 1 of 5 questions; 1 at rank 1")


def test_standing_out(scores):
    first = build_report(scores).queries[0].stands_out
    assert first == pytest.approx(scores.values[0].max() / np.percentile(scores.values[0], 99))
    even = np.linspace(-1.0, 1.0, 240)
    flat = dataclasses.replace(scores, raw=np.stack([even, np.r_[even[:-1], 9.0], -even, even, even]))
    assert [query.diffuse for query in build_report(flat).queries] == [True, False, True, True, True]
    assert [query.excluded for query in build_report(flat).queries] == [False, True, False, False, False]
    few = dataclasses.replace(
        scores,
        raw=scores.raw[:, :50],
        examples=scores.examples[:50],
        modules={},
        tokens=None,
        exact=None,
    )
    assert build_report(few).queries[0].stands_out is None, "of 50 rows the 99th percentile is the runner-up"


def test_answers_of_the_base_model(scores, pairs):
    queries = build_report(scores, pairs=pairs).queries
    assert [query.base_completion for query in queries] == [f" base {n}" for n in range(5)]
    assert queries[0].base_logprob == -9.25
    assert build_report(scores).queries[0].base_completion is None


def test_what_is_missing_is_said(scores):
    bare = dataclasses.replace(scores, tokens=None, modules={}, exact=None)
    report = build_report(bare)
    assert {"health of the factors", "record of the training", "evaluation of the answers"} < set(report.absent)
    assert any("per token" in name for name in report.absent) and any("per module" in name for name in report.absent)
    results = {check.name: check.result for check in report.checks}
    assert results["LDS"] is results["Removal"] is results["Another seed"] is None
    assert build_report(bare, checks={"lds": "0.42 [0.31, 0.53]"}).checks[-3].result == "0.42 [0.31, 0.53]"
    assert report.queries[0].grid is None and report.queries[0].raises[0].pieces == ()


def test_only_positive_rows_raise():
    case = CASES["llama"]
    task, train = case.task(), case.train(6)
    scores = score(case.model(), task, case.queries(), train, fit(case.model(), task, train, method="identity").operator)
    report = build_report(scores, top=6)
    for number, query in enumerate(report.queries):
        values = scores.values[number]
        assert len(query.raises) == (values > 0).sum() and len(query.lowers) == (values < 0).sum()


def test_a_planted_copy_of_the_question_tops_the_report():
    case = CASES["llama"]
    model, task, (question, *_) = case.model(), case.task(), case.queries()
    train = [*case.train(9), question]
    curvature = fit(model, task, train, examples="all")
    scores = score(model, task, [question], train, curvature.inverse(0.1), per="token")
    itself = self_influence(model, task, train, curvature.inverse(0.1))
    report = build_report(scores, curvature=curvature, self_scores=itself)
    (query,) = report.queries
    top = query.raises[0]
    assert top.text == question["prompt"] + question["completion"] and query.copy_rank == 1 and top.overlap == pytest.approx(1)
    assert sum(top.token_values) == pytest.approx(top.value, rel=1e-5) and "".join(top.pieces) == top.text
    assert [row.value for row in report.self_influence] == sorted(itself.values[0], reverse=True)
    assert len(report.health) == 6 and all(entry["sound"] for entry in report.health) and report.damping == 0.1
    assert report.factors["examples"] == 10 and "not measured" not in str(report.checks[1].result)


def test_a_text_without_a_prompt_is_asked_about_as_a_whole():
    case = CASES["llama"]
    model, task = case.model(), case.task()
    operator = fit(model, task, case.train(3), method="identity").operator
    (query,) = build_report(score(model, task, [{"text": "w1 w2 w3"}], case.train(3), operator)).queries
    assert query.prompt == "" and query.completion == "w1 w2 w3"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.down_proj", ("layer 3", "mlp.down_proj")),
        ("transformer.h.11.mlp.c_fc", ("layer 11", "mlp.c_fc")),
        ("decoder.block.2.layer.1.DenseReluDense.wi", ("decoder layer 2", "layer.1.DenseReluDense.wi")),
        ("lm_head", ("", "lm_head")),
        ("0.weight", ("layer 0", "weight")),
    ],
)
def test_layers_are_read_off_names(name, place):
    assert layer_and_module(name) == place


def test_slopes_beyond_what_log_p_can_rise_are_marked_everywhere(scores):
    sure = dataclasses.replace(scores, queries=scores.queries.assign(measured=-0.05))
    report = build_report(sure)
    for query in report.queries:
        for row in query.raises + query.lowers:
            assert row.limit == ("at most +0.0500" if row.value > 0.05 else "")
        assert bool(query.ceiling) == (query.raises[0].value > 0.05)
    assert report.queries[0].raises[0].value == 0.09 and report.queries[0].log_p == -0.05
    page, text, plain = render(report), as_markdown(report), as_text(report.queries[0], report)
    assert "at most +0.0500: beyond first order" in page and "p = 0.951" in page and SLOPE in page
    assert "+0.0900 (at most +0.0500) |" in text and "p = 0.951" in text and SLOPE in text
    assert "Rank = 1; Score = +0.0900 (at most +0.0500)\n" in plain and SLOPE in plain and report.queries[0].ceiling in plain
    assert "at most +" not in render(build_report(scores)) + as_markdown(build_report(scores))
    assert "with doubt" not in report.queries[0].ceiling
    surer = build_report(dataclasses.replace(scores, queries=scores.queries.assign(measured=-1e-5)))
    assert "the largest being 9,000 times that, even its order with doubt" in surer.queries[0].ceiling


def test_strength_in_a_word():
    many = np.append(np.linspace(-1, 1, 999), 100.0)
    assert [strengths(many)(value) for value in (2.5, -2.5, 1.1, 0.9)] == ["strong", "strong", "medium", "weak"]
    few = np.array([0.1, -0.1, 0.1, 5.0])
    assert [strengths(few)(value) for value in (1.0, -0.4, 0.2)] == ["strong", "medium", "weak"]
    assert strengths(np.zeros(5))(0.0) == "weak"
