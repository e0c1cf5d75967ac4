"""Two trainings that are repeated without each row: the rows of the first are told from the model of the second."""

import json

import pytest

from benchmarks.stages import RESULTS, SPREADS, measure

MATCHING, FLOW, PROXIMAL = "matching transport", "gradient flow", "proximal, alpha = 1 / sum of rates"
SINGLE, DOT = "single-stage at the tuned weights", "gradient dot at the tuned weights"


@pytest.mark.parametrize("tuning", ["prox 0.001", "prox 0.01", "prox 0.1"])
def test_a_proximal_fine_tuning(tuning):
    found = measure(tuning, only=(MATCHING, PROXIMAL, SINGLE))
    assert found[MATCHING] >= 0.99 and found[PROXIMAL] >= 0.99
    assert found[PROXIMAL] == pytest.approx(found[MATCHING], abs=1e-9), "the default alpha is that of the training"
    assert found[SINGLE] < found[MATCHING] - 0.04


@pytest.mark.parametrize("tuning", ["GD 5", "GD 50", "GD 500"])
def test_gradient_flow_needs_no_tuning(tuning):
    found = measure(tuning, only=(MATCHING, FLOW, SINGLE, DOT))
    assert found[MATCHING] >= 0.99 and found[FLOW] >= 0.97
    assert found[SINGLE] < found[FLOW] - 0.04 and found[DOT] < found[SINGLE]


def test_committed_is_what_the_page_says():
    """The mean over three pairs of trainings: gradient flow follows fine-tuning of any length, one stage alone does not."""
    found = json.loads((RESULTS / "stages.json").read_text())["pearson"]
    assert {len(columns) for columns in found.values()} == {6}
    for name, column in found[f"{SPREADS[0]:g}"].items():
        assert column[MATCHING] >= 0.99 and column[FLOW if name.startswith("GD") else PROXIMAL] >= 0.97, name
        assert column[SINGLE] < 0.9 and column[DOT] < column[SINGLE], name
    text = (RESULTS / "stages.md").read_text()
    assert all(f"{value:.3f}" in text for columns in found.values() for column in columns.values() for value in column.values())
