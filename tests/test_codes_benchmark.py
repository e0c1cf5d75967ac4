"""What the benchmarks of an index make of their numbers."""

import numpy as np
import pytest

from benchmarks import lists
from benchmarks.codes import joined, targets
from benchmarks.few_rows import recalled


def result(*rows, count=20_000):
    """Results of (codes, KiB, recall)."""
    columns = ("all @10 in 2%", "all @100 in 2%")
    table = [{"codes": codes, "KiB": size, **dict.fromkeys(columns, recall)} for codes, size, recall in rows]
    return {"rows": count, "questions": {"stories": 16}, "table": table, "seconds": 60.0, "targets": targets(table)}


def test_sizes_are_added_to_earlier_results():
    earlier = result(("BM25", None, 0.5), ("landmarks", 1.0, 0.9), ("random signs", 1.0, 0.3), ("landmarks", 4.0, 0.97))
    both = joined(earlier, result(("BM25", None, 0.5), ("landmarks", 16.0, 1.0), ("landmarks", 4.0, 0.99)))
    assert [(row["KiB"], row["all @10 in 2%"]) for row in both["table"]] == [
        (None, 0.5), (1.0, 0.9), (1.0, 0.3), (4.0, 0.99), (16.0, 1.0),
    ]  # fmt: skip
    assert both["seconds"] == 120 and [each["met"] for each in both["targets"]] == [True, True, True]
    with pytest.raises(SystemExit, match=r"of 20,000 rows, these of 500"):
        joined(earlier, result(("landmarks", 16.0, 1.0), count=500))


@pytest.mark.parametrize(
    ("signs", "landmarks", "met"),
    [(0.3, 0.76, True), (0.3, 0.74, False), (0.66, 0.96, True), (0.66, 0.94, False)],
)
def test_more_than_is_possible_is_not_asked_for(signs, landmarks, met):
    first, second, _ = result(("landmarks", 1.0, landmarks), ("random signs", 1.0, signs))["targets"]
    assert first["met"] == second["met"] == met and ("possible" in first["name"]) == (signs == 0.66)


def test_recall_counts_the_best_rows_that_are_among_the_first():
    exact, estimates = np.array([[5.0, 4, 3, 2, 1]]), np.array([[5.0, 1, 4, 3, 2]])
    assert recalled(estimates, exact, 2, 2) == 0.5 and recalled(estimates, exact, 2, 5) == 1


def test_lists_hold_the_best_rows_where_rows_cluster_and_not_where_they_do_not():
    draw = np.random.default_rng(0)
    centres = 10 * np.eye(20)
    near = np.repeat(centres, 20, 0) + draw.standard_normal((400, 20)) / 10
    apart = draw.standard_normal((400, 20))
    clustered, scattered = (lists.recalled(rows, centres, centres @ rows.T, 20) for rows in (near, apart))
    assert clustered[0.05] == 1 and scattered[0.05] < 0.8 < scattered[0.5]
