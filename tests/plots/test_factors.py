"""What the pictures show, read back from the numbers and from the drawings themselves."""

import math

import numpy as np
import pytest
import torch

from whence.errors import NumericalError
from whence.fitting.covariance import Sides
from whence.fitting.curvature import Curvature
from whence.fitting.health import health
from whence.operators.eigen import BlockDiagonal, EigenBlock
from whence.plots import factors as plots


def looked_at(lam_OI, damping=0.1, sides=None):
    """Health and sorted eigenvalues of a module `m`."""
    kept = {"m": sides} if sides else {}
    (found,) = health(Curvature(BlockDiagonal({"m": EigenBlock(None, None, lam_OI)}), {}, {}, kept), damping)
    return found, plots.spectrum(lam_OI, found)


def planted(n_out=6, n_in=8, where=(3, 5), size=1e3):
    """Random eigenvalues between 1 and 2, one of them `size`."""
    lam = 1 + torch.rand(n_out, n_in, generator=torch.Generator().manual_seed(0))
    lam[where] = size
    return lam


def image(drawing):
    return drawing.axes[0].images[0]


def test_the_planted_eigenvalue_is_at_the_top_left_of_the_map():
    found, values = looked_at(planted())
    shown = plots.lambda_map(planted(), values, None, 100)
    assert shown.cells[0, 0] == 1e3 and (shown.cells.ravel()[1:] < 2).all() and shown.order == "sum of its eigenvalues"
    for axis in (0, 1):
        assert (np.diff(shown.cells.sum(axis)) <= 0).all(), "not in descending order"
    drawn = image(plots.draw_lambda(shown, found.module))
    assert drawn.get_array()[0, 0] == 1e3 and drawn.origin == "upper"
    assert drawn.norm.vmax == 1e3 and drawn.norm(1e3) == 1.0


def test_the_map_is_sorted_by_the_eigenvalues_of_the_covariances_where_they_are_kept():
    out, into = torch.tensor([0.1, 3.0, 2.0]), torch.tensor([1.0, 5.0])
    lam = torch.tensor([[1.0, 9.0], [2.0, 3.0], [4.0, 5.0]])
    sides = Sides(out, into, 9, 9, False, "m")
    shown = plots.lambda_map(lam, looked_at(lam)[1], sides)
    assert shown.cells.tolist() == [[3.0, 2.0], [5.0, 4.0], [9.0, 1.0]] and "covariance" in shown.order
    drawing = plots.draw_lambda(shown, "m")
    assert "descending eigenvalue of its covariance" in drawing.axes[0].get_xlabel()
    assert "descending eigenvalue of its covariance" in drawing.axes[0].get_ylabel()


@pytest.mark.parametrize(("shape", "block"), [((20, 30), (4, 6)), ((21, 32), (5, 7)), ((3, 30), (1, 6))])
def test_blocks_of_a_large_map_keep_the_sum(monkeypatch, shape, block):
    monkeypatch.setattr(plots, "CELLS", 5)
    lam = planted(*shape, where=(2, 20))
    shown = plots.lambda_map(lam, looked_at(lam)[1], None, 100)
    assert shown.cells.shape == (min(5, shape[0]), 5) and shown.block == block
    rows, columns = (np.diff(np.linspace(0, n, c + 1).astype(int)) for n, c in zip(shape, shown.cells.shape, strict=True))
    assert (shown.cells * np.outer(rows, columns)).sum() == pytest.approx(lam.double().sum().item(), rel=1e-12)
    assert np.unravel_index(shown.cells.argmax(), shown.cells.shape) == (0, 0)
    assert f"mean of up to {block[0]} x {block[1]} eigenvalues" in plots.draw_lambda(shown, "m").axes[0].get_xlabel()


@pytest.mark.parametrize("percentile", [99.5, 98.0, 60.0])
def test_colours_end_at_the_percentile(percentile):
    lam = planted()
    shown = plots.lambda_map(lam, looked_at(lam)[1], None, percentile)
    assert shown.high == pytest.approx(np.percentile(lam.double().numpy(), percentile), rel=1e-6)
    assert shown.low == pytest.approx(np.percentile(lam.double().numpy(), 100 - percentile), rel=1e-6)
    drawing = plots.draw_lambda(shown, "m")
    norm = image(drawing).norm
    assert (norm.vmin, norm.vmax) == (shown.low, shown.high) and norm(1e3) == norm(shown.high) == 1.0
    assert f"{percentile:g}" in drawing.axes[0].get_xlabel()


def test_zero_and_negative_cells_are_grey_and_counted():
    lam = planted()
    lam[0, 0], lam[1, 1] = 0.0, -1.0
    shown = plots.lambda_map(lam, looked_at(lam)[1], None)
    drawing = plots.draw_lambda(shown, "m")
    assert image(drawing).get_array().mask.sum() == 2 and "grey: 2 zero or negative" in drawing.axes[0].get_xlabel()


def test_all_eigenvalues_the_same_can_be_drawn():
    lam = torch.ones(3, 4)
    found, values = looked_at(lam)
    drawing = plots.draw_lambda(plots.lambda_map(lam, values, None), "m")
    drawing.draw_without_rendering()
    assert image(drawing).norm(1.0) == pytest.approx(0.5)
    for other in (plots.draw_spectrum(values), plots.draw_distribution(plots.distribution(values), values)):
        other.draw_without_rendering()


def test_the_spectrum_begins_with_the_planted_one_and_says_the_damping():
    lam = planted()
    lam[0, :2], lam[1, 0] = 0.0, -1.0
    found, values = looked_at(lam, damping=0.5)
    assert values.values[0] == 1e3 and (np.diff(values.values) <= 0).all() and len(values.values) == 48
    assert (values.zero, values.negative, len(values.positive)) == (2, 1, 45)
    assert values.damping == pytest.approx(0.5 * lam.mean().item())
    lam64 = lam.double().numpy()
    assert values.effective_rank == pytest.approx((lam64 / (lam64 + values.damping)).sum())
    drawing = plots.draw_spectrum(values)
    left, right = drawing.axes
    x, y = left.lines[0].get_data()
    assert (x[0], y[0], x[-1], len(y)) == (1, 1e3, 45, 45) and left.get_yscale() == right.get_yscale() == "log"
    assert right.lines[0].get_xdata()[-1] == pytest.approx(100 * 45 / 48)
    assert left.lines[2].get_ydata()[0] == values.damping and left.lines[1].get_xdata()[0] == values.effective_rank
    assert "2 zero and 1 negative not drawn" in drawing.get_suptitle()


def test_long_curves_are_thinned_but_keep_both_ends():
    at = plots.curve_ranks(1_000_000)
    assert len(at) <= plots.POINTS and at[0] == 0 and at[-1] == 999_999 and (np.diff(at) > 0).all()
    assert plots.curve_ranks(7).tolist() == list(range(7)) and plots.curve_ranks(0).tolist() == []


def test_the_distribution_counts_every_eigenvalue_once():
    lam = planted()
    lam[0, 0] = 0.0
    _, values = looked_at(lam, damping=0.02)
    found = plots.distribution(values, bins=30)
    assert found.counts.sum() == 47 and found.left_out == 1
    assert found.counts[-1] == 1 and found.edges[-1] == pytest.approx(3.0), "the planted one is alone at the right"
    assert found.counts[1 + int((math.log10(2) - found.edges[0]) / (found.edges[1] - found.edges[0])) : -1].sum() == 0
    drawing = plots.draw_distribution(found, values)
    axes = drawing.axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 47
    assert axes.lines[0].get_xdata()[0] == pytest.approx(math.log10(values.damping))
    assert "1 zero not drawn" in axes.get_title()


def test_the_cumulative_share_and_its_marks():
    lam = torch.tensor([[1.0, 80.0], [15.0, 4.0]])
    shares, marks = plots.cumulative(looked_at(lam)[1].values)
    assert shares.tolist() == pytest.approx([0.80, 0.95, 0.99, 1.0]) and marks == {0.9: 2, 0.95: 2, 0.99: 3}
    _, values = looked_at(planted(size=1e4))
    shares, marks = plots.cumulative(values.values)
    assert shares[0] == pytest.approx(1e4 / values.values.sum(dtype=np.float64)) and marks[0.9] == marks[0.99] == 1
    line = plots.draw_cumulative(values).axes[0].lines[0]
    assert line.get_ydata()[0] == pytest.approx(100 * shares[0]) and line.get_ydata()[-1] == pytest.approx(100)


def test_both_sides_largest_first_with_condition_and_rank():
    sides = Sides(torch.tensor([1.0, 3.0, 50.0]), torch.tensor([0.0, 2.0, 1e3, 1.0]), 30, 20, False, "m")
    found, _ = looked_at(torch.ones(3, 4), sides=sides)
    left, right = plots.draw_sides(sides, found).axes
    assert left.lines[0].get_ydata().tolist() == [1e3, 2.0, 1.0] and right.lines[0].get_ydata().tolist() == [50.0, 3.0, 1.0]
    assert "20 positions" in left.get_title() and "singular" in left.get_title() and "1 zero not drawn" in left.get_title()
    assert "30 positions" in right.get_title() and "condition 50" in right.get_title()
    assert left.lines[1].get_xdata()[0] == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_is_drawn_of_what_is_not_finite(bad):
    with pytest.raises(NumericalError, match=r"eigenvalues of m are not finite[\s\S]*1 of 48"):
        looked_at(planted(size=bad))


def test_nothing_positive_can_still_be_drawn():
    lam = torch.zeros(2, 3)
    found, values = looked_at(lam)
    for drawing in (
        plots.draw_lambda(plots.lambda_map(lam, values, None), "m"),
        plots.draw_spectrum(values),
        plots.draw_distribution(plots.distribution(values), values),
        plots.draw_cumulative(values),
    ):
        drawing.draw_without_rendering()
    assert plots.cumulative(values.values)[1] == {0.9: 0, 0.95: 0, 0.99: 0}
