"""What figures of validation show."""

import math

import numpy as np
import pytest

from whence.plots import panels
from whence.plots import validation as plots
from whence.plots.style import save

TABLE = [
    {"damping": "0.1 x mean", "method": "exact", "pearson": 0.999, "pearson_se": 0.001},
    {"damping": "0.1 x mean", "method": "EK-FAC", "pearson": 0.7, "pearson_se": 0.05},
    {"damping": "0.01 x mean", "method": "exact", "pearson": 0.99, "pearson_se": 0.002},
]

LADDER = [
    {"change": "1/N", "objective": "cold start", "gap_to_next": 0.3, "gap_no_control": 0.4, "pearson_influence": 0.2},
    {"change": "1/N", "objective": "warm start", "gap_to_next": 0.1, "gap_no_control": 0.2, "pearson_influence": 0.5},
    {"change": "1/N", "objective": "linear", "pearson_influence": 1.0},
]


def test_scatter_has_all_points_and_the_mean_correlation():
    scores, truth = np.array([[1.0, 2, 3], [1, 2, 3]]), np.array([[2.0, 4, 6], [3, 2, 1]])
    found = plots.scatter_of("both", scores, truth)
    assert found.r == pytest.approx(0.0) and len(found.x) == 6
    constant = plots.scatter_of("one is constant", scores, np.array([[1.0, 1, 1], [1, 2, 3]]))
    assert constant.r == pytest.approx(1.0)
    drawing = panels.scatter_figure([found, constant])
    assert [axes.get_title(loc="left").splitlines()[1] for axes in drawing.axes] == ["r = 0.000", "r = 1.000"]
    assert drawing.axes[0].collections[0].get_offsets().tolist()[1] == [2.0, 4.0]


def test_bars_of_agreement_have_two_standard_errors_and_leave_gaps():
    bars = plots.agreement_bars(TABLE)
    assert bars.labels == ["exact", "EK-FAC"] and list(bars.series) == ["0.1 x mean", "0.01 x mean"]
    assert bars.series["0.1 x mean"] == [0.999, 0.7] and math.isnan(bars.series["0.01 x mean"][1])
    assert bars.ends["0.1 x mean"] == [(0.997, 1.0), pytest.approx((0.6, 0.8))], "a correlation is at most 1"
    axes = panels.bars_figure([bars]).axes[0]
    assert sorted(bar.get_width() for bar in axes.patches) == [0, 0.7, 0.99, 0.999]


def test_ladder_has_gaps_between_and_correlations_at_objectives():
    gaps, correlations = plots.ladder_bars(LADDER)
    assert gaps.labels == ["cold start to warm start", "warm start to linear"]
    assert gaps.series["against the own control"] == [0.3, 0.1]
    assert gaps.series["against the trained weights"] == [0.4, 0.2]
    assert correlations.series == {"with influence": [0.2, 0.5, 1.0]}
    axes = panels.bars_figure([gaps, correlations]).axes
    assert axes[0].get_xscale() == "log" and not axes[0].patches, "sizes of many orders are dots"
    assert axes[0].lines[0].get_xdata().tolist() == [0.3, 0.1] and len(axes[1].patches) == 3


def test_convergence_is_a_curve_per_damping_on_logarithmic_axes():
    table = [
        {"damping": damping, "change": change, "relative_error": error}
        for damping in ("a", "b")
        for change, error in (("1/N", 0.5), ("0.1/N", 0.01))
    ]
    lines = plots.convergence_lines(table)
    assert lines.curves["b"] == [(1.0, 0.5), (0.1, 0.01)]
    axes = panels.lines_figure(lines).axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log" and len(axes.lines) == 2


def test_removal_has_a_band_per_method_and_random_dashed():
    rows = [
        {"method": method, "share": share, "removed": removed, "mean": share * 3, "low": 0.0, "high": 1.0}
        for method, removed in (("EK-FAC", "top"), ("EK-FAC", "bottom"), ("random", "random"))
        for share in (0.05, 0.01)
    ]
    lines = plots.removal_lines(rows)
    assert lines.curves["EK-FAC"] == [pytest.approx((1.0, 0.03)), pytest.approx((5.0, 0.15))], "in order, in percent"
    axes = panels.lines_figure(lines).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["None", "None"], "no line joins two points"
    assert [len(part.get_segments()) for part in axes.collections] == [2, 2]
    rows += [{**row, "share": 0.1} for row in rows if row["share"] == 0.05]
    axes = panels.lines_figure(plots.removal_lines(rows)).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"] and len(axes.collections) == 2


def test_bars_of_an_auc_begin_at_guessing():
    table = [
        {"method": name, "auc": auc, "auc_low": auc - 0.05, "auc_high": auc + 0.05} for name, auc in (("a", 0.9), ("b", 0.4))
    ]
    bars = plots.interval_bars(table, "auc", "AUC", base=0.5)
    axes = panels.bars_figure([bars]).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0.5, pytest.approx(0.4)), (0.5, pytest.approx(-0.1))]
    assert "0.5 is guessing" in axes.get_xlabel() and [text.get_text() for text in axes.texts] == ["0.9", "0.4"]


def test_a_point_at_zero_is_whole():
    points = panels.Points("p", "share", ["a"], {"base": [(0.0, 0.0, 0.1)]})
    axes = panels.points_figure([points]).axes[0]
    (marker,) = (line for line in axes.lines if line.get_marker() == "s")
    assert axes.get_xlim()[0] == 0 and not marker.get_clip_on()


def test_bars_with_given_ends(tmp_path):
    table = [{"method": "a", "auc": 0.9, "auc_low": 0.8, "auc_high": 0.95}]
    bars = plots.interval_bars(table, "auc", "AUC")
    assert bars.series["AUC"] == [0.9] and bars.ends["AUC"] == [(0.8, 0.95)]
    plain = plots.interval_bars([{"method": "a", "lds": 0.5, "low": 0.4, "high": 0.6}], "lds", "LDS", "digits lds halves")
    assert plain.ends["LDS"] == [(0.4, 0.6)] and plain.title == "digits lds halves"
    assert save(panels.bars_figure([bars]), tmp_path / "a.png").stat().st_size > 1000
