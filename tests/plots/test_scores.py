import numpy as np
import pytest

from whence.plots.scores import draw_scores, score_curve, score_histogram


def test_few_scores_are_all_in_the_curve():
    found = score_curve(np.array([0.5, -2.0, 3.0]))
    assert found.ranks == (1, 2, 3) and found.values == (3.0, 0.5, -2.0) and found.rows == 3


def test_of_many_scores_those_at_the_ends_are_kept():
    values = np.random.default_rng(0).standard_t(2, 100_000)
    found, falling = score_curve(values), np.sort(values)[::-1]
    assert len(found.ranks) < 250 and list(found.ranks) == sorted(set(found.ranks))
    assert found.ranks[:5] == (1, 2, 3, 4, 5) and found.ranks[-5:] == (99_996, 99_997, 99_998, 99_999, 100_000)
    assert list(found.values) == falling[np.array(found.ranks) - 1].tolist()


@pytest.mark.parametrize("values", [[-1.0, 2.0, 2.5, 0.0], [1.0, 2.0, 5.0], [-3.0, -1.0], [0.0, 4.0]])
def test_every_score_is_counted_once(values):
    found = score_histogram(np.array(values), bins=10)
    edges, counts = np.array(found.edges), np.array(found.counts)
    assert len(edges) == len(counts) + 1 and counts.sum() == len(values) and (np.diff(edges) > 0).all()
    for low, high, count in zip(edges[:-2], edges[1:-1], counts[:-1], strict=True):
        assert count == sum(low <= value < high for value in values)
    if min(values) < 0 < max(values):
        assert np.abs(edges).min() == 0, "no bar mixes the signs"


def test_equal_scores_have_one_bar():
    assert score_histogram(np.zeros(7)).counts == (7,)


@pytest.mark.parametrize("values", [np.array([0.5, -2.0, 3.0]), np.zeros(4), np.random.default_rng(0).normal(size=3000)])
def test_the_drawing_shows_the_numbers(values):
    curve, histogram = score_curve(values), score_histogram(values)
    drawing = draw_scores(curve, histogram, "nats", "query 0")
    left, right = drawing.axes
    assert left.lines[-1].get_xydata().tolist() == [
        [rank, value] for rank, value in zip(curve.ranks, curve.values, strict=True)
    ]
    assert [patch.get_height() for patch in right.patches] == list(histogram.counts)
    assert "nats" in left.get_ylabel() and f"{len(values):,} rows" in left.get_xlabel()
