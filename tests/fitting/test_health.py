import json
import math

import pytest
import torch

from whence.errors import NumericalError, UsageError
from whence.fitting.covariance import Sides
from whence.fitting.curvature import Curvature
from whence.fitting.health import choose_modules, concentration, health
from whence.linalg.rotation import Rotation
from whence.operators.eigen import BlockDiagonal, EigenBlock


def curvature(lam_OI, sides=None, largest=None):
    """One module; with `sides` in bases whose blocks are `largest` wide."""
    q_O, q_I = (
        Rotation(tuple(torch.eye(len(part)) for part in torch.arange(n).split(largest or n))) if sides else None
        for n in lam_OI.shape
    )
    return Curvature(BlockDiagonal({"m": EigenBlock(q_O, q_I, lam_OI)}), {}, {}, {"m": sides} if sides else {})


def test_numbers_of_a_known_spectrum():
    (found,) = health(curvature(torch.tensor([[4.0, 0.0], [0.0, 0.0]])), damping=0.5)
    assert found.module == "m" and found.shape == (2, 2) and found.sound
    assert (found.mean, found.largest, found.smallest, found.zero) == (1.0, 4.0, 0.0, 0.75)
    assert found.d == 0.5 and found.condition == pytest.approx((4 + 0.5) / 0.5)
    assert found.effective_rank == pytest.approx(4 / 4.5) and found.relative_rank == pytest.approx(4 / 4.5 / 4)
    assert found.inputs is found.outputs is None and found.warnings == ()


@pytest.mark.parametrize("part", [1, 4, 5, 100])
def test_effective_rank_by_hand_and_in_parts(monkeypatch, part):
    monkeypatch.setattr("whence.fitting.health.PART", part)
    lam = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.25, 0.0]
    (found,) = health(curvature(torch.tensor(lam).view(2, 4)), damping=0.25)
    assert found.d == 0.5
    assert found.effective_rank == pytest.approx(sum(value / (value + 0.5) for value in lam), rel=1e-12)
    (undamped,) = health(curvature(torch.tensor(lam).view(2, 4)), damping=0.0)
    assert undamped.effective_rank == 7 and undamped.condition == math.inf


@pytest.mark.parametrize(
    ("lam", "negative", "not_finite"),
    [
        ([1.0, -1e-3], 1, 0),
        ([1.0, math.nan], 0, 1),
        ([1.0, math.inf], 0, 1),
        ([math.nan, math.nan], 0, 2),
        ([0.0, 0.0], 0, 0),
    ],
)
def test_trouble_is_not_sound(lam, negative, not_finite):
    (found,) = health(curvature(torch.tensor([lam])))
    assert not found.sound and (found.negative, found.not_finite) == (negative, not_finite) and found.warnings


def test_no_number_is_made_up_where_an_eigenvalue_is_nan():
    (found,) = health(curvature(torch.tensor([[1.0, math.nan]])))
    assert all(math.isnan(value) for value in (found.mean, found.largest, found.condition, found.effective_rank, found.zero))
    assert "1 eigenvalues are NaN or infinite" in found.warnings[0]
    written = found.as_json()
    assert json.loads(json.dumps(written, allow_nan=False)) == json.loads(json.dumps(written))
    assert written["mean"] is None and written["not_finite"] == 1 and written["sound"] is False


def test_sides_in_numbers():
    sides = Sides(torch.tensor([1.0, 2.0, 8.0]), torch.tensor([0.0, 5.0]), 12, 10, False, "m")
    (found,) = health(curvature(torch.ones(3, 2), sides))
    assert found.outputs.condition == 8.0 and found.outputs.rank == found.outputs.width == 3
    assert found.outputs.per_column == 4.0 and found.inputs.per_column == 5.0
    assert found.inputs.condition == math.inf and found.inputs.rank == 1
    assert found.warnings == ("input covariance has rank 1 of 2",)
    assert found.as_json()["inputs"]["condition"] is None and found.as_json()["outputs"]["per_column"] == 4.0


@pytest.mark.parametrize(("samples", "largest", "warned"), [(7, None, True), (8, None, False), (3, 4, True), (4, 4, False)])
def test_fewer_positions_than_columns_are_said(samples, largest, warned):
    sides = Sides(torch.ones(2), torch.ones(8), 100, samples, False, "m")
    (found,) = health(curvature(torch.ones(2, 8), sides, largest))
    expected = f"fewer positions ({samples}) than columns ({largest or 8}): rank-deficient input covariance"
    assert found.warnings == ((expected,) if warned else ())


def test_a_row_fills_as_many_directions_as_its_gradient_has_on_the_other_side():
    """E[w^T w] over 4 rows of [2, 8] has rank 8, over 3 rows 6."""
    for rows, warned in ((4, False), (3, True)):
        (found,) = health(curvature(torch.ones(2, 8), Sides(torch.ones(2), torch.ones(8), rows, rows, True, "m")))
        assert bool(found.warnings) == warned
    assert "fewer rows (3) than columns (8)" in found.warnings[0]


@pytest.mark.parametrize(("method", "rows", "warned"), [("ekfac", 8, True), ("ekfac", 32, False), ("kfac", 8, False)])
def test_eigenvalues_of_few_rows_are_said(method, rows, warned):
    about = {"method": method, "eigenvalue_examples": rows}
    (found,) = health(Curvature(curvature(torch.ones(2, 2)).operator, about))
    assert found.warnings == (("each eigenvalue is a mean over few rows (8): off by 50% or more",) if warned else ())


def test_a_side_that_is_not_finite_is_said():
    (found,) = health(curvature(torch.ones(1, 2), Sides(torch.ones(1), torch.tensor([1.0, math.nan]), 9, 9, False, "m")))
    assert found.inputs.not_finite == 1 and math.isnan(found.inputs.condition)
    assert found.warnings == ("1 eigenvalues of the input covariance are NaN or infinite",)


def test_concentration_counts_the_largest():
    assert concentration(torch.tensor([[1.0, 80.0], [15.0, 4.0]])) == {0.9: 2, 0.95: 2, 0.99: 3}
    assert concentration(torch.ones(2, 50), shares=(0.5,)) == {0.5: 50}
    assert concentration(torch.zeros(2, 2), shares=(0.5,)) == {0.5: 0}
    with pytest.raises(NumericalError, match=r"1 of 2 are NaN"):
        concentration(torch.tensor([[1.0, math.nan]]))


NAMES = ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj", "model.norm"]


def test_modules_are_chosen_by_layer_name_or_glob():
    assert choose_modules(NAMES) == choose_modules(NAMES, 2) == NAMES[1:3]
    assert choose_modules(NAMES, 0) == NAMES[:1]
    assert choose_modules(NAMES, patterns=["*.up_proj", "model.norm"]) == [NAMES[0], NAMES[1], NAMES[3]]
    assert choose_modules(NAMES, patterns=["*"]) == NAMES
    assert choose_modules(["inner", "head"]) == ["inner", "head"]


def test_a_choice_that_chooses_nothing_is_refused():
    with pytest.raises(UsageError, match=r"layer 1[\s\S]*layers 0, 2"):
        choose_modules(NAMES, 1)
    with pytest.raises(UsageError, match=r"'\*.up_prj'[\s\S]*model.norm"):
        choose_modules(NAMES, patterns=["*.up_proj", "*.up_prj"])
    with pytest.raises(UsageError, match="one of them"):
        choose_modules(NAMES, 2, ["*"])
    with pytest.raises(UsageError, match="no layer"):
        choose_modules(["inner", "head"], 1)
