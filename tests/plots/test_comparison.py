import math

import pandas as pd
import pytest

from whence.plots.comparison import benchmark_panels, comparison_panels
from whence.plots.panels import points_figure


def summary(*rows):
    return pd.DataFrame(rows, columns=["measure", "of", "n", "mean", "low", "high"])


def test_a_comparisons_panels_hold_its_numbers():
    against, difference, alike = comparison_panels(
        summary(
            ("bleu", "tuned", 8, 40.0, 30.0, 50.0),
            ("bleu", "base", 8, 20.0, 10.0, 30.0),
            ("bleu", "tuned minus base", 8, 20.0, 5.0, 35.0),
            ("rougeL", "tuned", 8, 0.5, 0.4, 0.6),
            ("rougeL", "base against tuned", 9, 0.7, math.nan, math.nan),
            ("words", "tuned", 9, 11.0, 9.0, 13.0),
        )
    )
    assert against.labels[0] == "BLEU / 100" and against.labels[3] == "ROUGE-L"
    assert against.series == {
        "base": [(0.2, 0.1, 0.3), None, None, None],
        "tuned": [(0.4, 0.3, 0.5), None, None, (0.5, 0.4, 0.6)],
    }
    assert (against.unit, alike.unit) == ("mean over 8 prompts", "mean over 9 prompts")
    assert difference.series["tuned minus base"][0] == (0.2, 0.05, 0.35) and difference.around_zero
    assert alike.series["base against tuned"][3][0] == 0.7 and not alike.around_zero


def test_without_references_there_is_only_how_alike_answers_are():
    (alike,) = comparison_panels(
        summary(("rougeL", "base against tuned", 9, 0.7, 0.6, 0.8), ("words", "base", 9, 3.0, 2.0, 4.0))
    )
    assert alike.title == "How alike base and tuned answers are"
    assert comparison_panels(summary(("words", "tuned", 9, 3.0, 2.0, 4.0))) == []


RESULTS = [
    {"task": task, "model": model, "n": 20, "accuracy": at, "low": at - 0.1, "high": at + 0.1, "chance": 0.25}
    for task, model, at in (("mmlu_virology", "base", 0.3), ("mmlu_virology", "tuned", 0.4), ("total", "tuned", 0.5))
]
DIFFERENCE = {"task": "mmlu_virology", "of": "tuned minus base", "difference": 0.1, "low": -0.1, "high": 0.3}


def test_a_benchmarks_panels_hold_its_numbers():
    accuracy, difference = benchmark_panels({"results": RESULTS, "differences": [DIFFERENCE]})
    assert accuracy.labels == ["virology (20)", "total (20)"] and accuracy.chance == [0.25, 0.25]
    assert accuracy.series["base"] == [pytest.approx((0.3, 0.2, 0.4)), None]
    assert accuracy.series["tuned"] == [pytest.approx((0.4, 0.3, 0.5)), pytest.approx((0.5, 0.4, 0.6))]
    assert difference.series == {"tuned minus base": [(0.1, -0.1, 0.3), None]}
    assert len(benchmark_panels({"results": RESULTS, "differences": []})) == 1


def test_what_is_drawn_is_where_the_numbers_are():
    panels = benchmark_panels({"results": RESULTS, "differences": [DIFFERENCE]})
    top, bottom = points_figure(panels).axes
    points = {line.get_label(): line.get_xdata()[0] for line in top.lines if len(line.get_xdata()) == 1}
    assert points["base"] == 0.3 and points["tuned"] == 0.4
    bars = [tuple(line.get_xdata()) for line in top.lines if len(line.get_xdata()) == 2]
    assert pytest.approx((0.2, 0.4)) in bars and (0.25, 0.25) in bars
    assert [label.get_text() for label in top.get_yticklabels()] == ["virology (20)", "total (20)"]
    assert top.get_xlim()[0] == 0 > bottom.get_xlim()[0]
    assert top.get_ylim()[0] > top.get_ylim()[1] and [0, 0] in [list(line.get_xdata()) for line in bottom.lines]
    (text,) = points_figure([]).texts
    assert "nothing to compare" in text.get_text()
