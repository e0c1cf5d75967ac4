"""Scores through several stages are products of dense matrices; modules that don't fit are refused; a killed run resumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import agree
from torch import nn

import whence
from whence.engine.point import Point
from whence.errors import StaleArtifact, UsageError
from whence.gradients import Dense
from whence.operators import BlockDiagonal, EigenBlock, Identity, Spectral
from whence.stages import Stage, multistage, open_stages
from whence.stages.names import match
from whence.stages.transport import transport
from whence.tasks import Regression


class Net(nn.Module):
    """Two layers under names of its own, of which the second may have another width."""

    def __init__(self, names=("one", "two"), seed=0, hidden=4):
        super().__init__()
        torch.manual_seed(seed)
        self.order = names
        self.add_module(names[0], nn.Linear(3, hidden, dtype=torch.float64))
        self.add_module(names[1], nn.Linear(hidden, 1, dtype=torch.float64))

    def forward(self, x):
        first, second = (getattr(self, name) for name in self.order)
        return second(torch.tanh(first(x)))


def pairs(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).double()
    return [(each[:3], each[3:]) for each in x]


QUERIES = pairs(2, 9)


def point(seed, count, names=("one", "two"), **net):
    return Point(Net(names, seed, **net), Regression(), pairs(count, 10 + seed))


def three(curvature="gauss-newton", **last):
    """A flow, a proximal step, and modules that are called otherwise in the first stage."""
    return [
        Stage("first", point(1, 6, ("encoder", "top")), curvature=curvature),
        Stage(
            "second",
            point(2, 7),
            curvature=curvature,
            transport="proximal",
            proximal=0.3,
            renamed={"one": "encoder", "two": "top"},
        ),
        Stage("third", point(3, 8), curvature=curvature, rates=2.0, **last),
    ]


# the same with dense matrices


def gradients(at, rows, measured=False):
    """Of the log-likelihood of each row, -1/2 of the squared error, `[N, P]`: weight and bias of each layer side by side."""
    found = []
    for x, y in rows:
        loss = 0.5 * (at.model(x) - y).square().sum()
        parts = dict(zip(names_of(at), torch.autograd.grad(-loss, list(at.model.parameters())), strict=True))
        found.append(flat(parts, at))
    return torch.stack(found)


def names_of(at):
    return [name for name, _ in at.model.named_parameters()]


def flat(parts, at):
    return torch.cat(
        [torch.cat([parts[f"{name}.weight"], parts[f"{name}.bias"][:, None]], 1).flatten() for name in at.model.order]
    )


def gauss_newton(at):
    """`1/N sum J^T J` of the outputs."""
    jacobians = []
    for x, _ in at.rows:
        parts = torch.autograd.grad(at.model(x).sum(), list(at.model.parameters()))
        jacobians.append(flat(dict(zip(names_of(at), parts, strict=True)), at))
    j_NP = torch.stack(jacobians)
    return j_NP.T @ j_NP / len(j_NP)


def function(matrix, of):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * of(values)) @ vectors.T


def inverse(matrix, damping=0.1):
    return torch.linalg.inv(matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix)).double())


def expected(stages, curvatures):
    first, second, third = (stage.point for stage in stages)
    q_QP = gradients(third, QUERIES)
    flow = function(curvatures[2], lambda h: torch.exp(-2.0 * h))
    step = function(curvatures[1], lambda h: 0.3 / (h + 0.3))
    v = {
        "third": q_QP @ inverse(curvatures[2]),
        "second": q_QP @ flow @ inverse(curvatures[1]),
        "first": q_QP @ flow @ step @ inverse(curvatures[0]),
    }
    return {
        name: (v_QP @ gradients(stage.point, stage.point.rows).T).detach() / len(stage.point.rows)
        for stage in stages
        if (name := stage.name) and (v_QP := v[name]) is not None
    }


def test_three_stages_with_dense_matrices():
    stages = three()
    found = multistage(stages, QUERIES)
    for name, values in expected(stages, [gauss_newton(stage.point) for stage in stages]).items():
        agree(found.stages[name].values, values, 1e-8)
    assert [*found.stages] == ["first", "second", "third"]
    assert {scores.unit for scores in found.stages.values()} == {"nats per copy"}


def test_three_stages_with_factors():
    """Each stage's factors are fitted on its own rows: blocks of a module, the inverse of each with its own damping."""
    stages = three("ekfac")
    found = multistage(stages, QUERIES)
    fitted = [whence.fit(stage.point.model, stage.point.task, stage.point.rows, modules=["*"], check=False) for stage in stages]
    blocks = [[each.blocks[name].dense() for name in stage.names] for each, stage in zip(fitted, stages, strict=True)]
    inverses = [torch.block_diag(*map(inverse, own)) for own in blocks]
    whole = [torch.block_diag(*own) for own in blocks]
    q_QP = gradients(stages[2].point, QUERIES)
    v_QP = (
        q_QP @ function(whole[2], lambda h: torch.exp(-2.0 * h)) @ function(whole[1], lambda h: 0.3 / (h + 0.3)) @ inverses[0]
    )
    rows = stages[0].point.rows
    agree(found.stages["first"].values, (v_QP @ gradients(stages[0].point, rows).T).detach() / len(rows), 1e-6)


def test_a_folder_has_all_of_it(tmp_path):
    out = tmp_path / "run"
    stages = three("ekfac")
    whole = multistage(stages, QUERIES, out=out)
    again = open_stages(out)
    assert [*again.stages] == [*whole.stages] and again.table.equals(whole.table) and again.about == whole.about
    for name, scores in again.stages.items():
        np.testing.assert_array_equal(scores.raw, whole.stages[name].raw)
        np.testing.assert_array_equal(whence.open_scores(out / name / "scores").raw, scores.raw)
        assert whence.open_factors(out / name / "factors").about["method"] == "ekfac"
    np.testing.assert_array_equal(multistage(stages, QUERIES, out=out).total().raw, whole.total().raw)
    with pytest.raises(StaleArtifact, match="proximal 0.3 -> 0.4"):
        multistage([stages[0], replace(stages[1], proximal=0.4), stages[2]], QUERIES, out=out)


def test_what_a_stage_left_as_it_was_passes_everything_on():
    """Whether it is tracked there or not: the first layer is the pretrained one, and only the second was fine-tuned."""
    base, tuned = point(1, 6), point(2, 7)
    tuned.model.one.load_state_dict(base.model.one.state_dict())
    first = Stage("first", base, curvature="ekfac")
    both = multistage([first, Stage("second", tuned, rates=2.0)], QUERIES)
    only = multistage([first, Stage("second", tuned, rates=2.0, modules="two")], QUERIES)
    assert list(both.table["status"]) == list(only.table["status"]) == ["frozen", "shared"]
    inverses = whence.fit(base.model, base.task, base.rows, check=False).inverse().dense()
    q_QP, g_NP = gradients(tuned, QUERIES), gradients(base, base.rows)
    size = len(inverses["one"])
    through_first = q_QP[:, :size] @ inverses["one"] @ g_NP[:, :size].T
    flow = function(
        whence.fit(tuned.model, tuned.task, tuned.rows, check=False).blocks["two"].dense(), lambda h: torch.exp(-2.0 * h)
    )
    through_second = q_QP[:, size:] @ flow @ inverses["two"] @ g_NP[:, size:].T
    agree(both.stages["first"].values, (through_first + through_second).detach() / 6, 1e-6)
    agree(only.stages["first"].values, both.stages["first"].values, 1e-6)


def test_rows_of_several_stages_add_up():
    """A row of the first stage is read again, twice, in the second: the second copy there is one of its own."""
    stages = three("diagonal")[1:]
    shared = stages[0].point.rows[2]
    stages[1] = replace(stages[1], point=Point(stages[1].point.model, Regression(), [*pairs(5, 3), shared, shared]))
    found = multistage(stages, QUERIES)
    first, second = (scores.values for scores in found.stages.values())
    total = found.total()
    np.testing.assert_allclose(total.values[:, 2], first[:, 2] + second[:, 5], rtol=1e-12)
    np.testing.assert_allclose(total.values, np.c_[first[:, :2], total.values[:, 2], first[:, 3:], second[:, :5], second[:, 6]])
    assert list(total.examples["stage"]) == ["second"] * 2 + ["second+third"] + ["second"] * 4 + ["third"] * 6
    assert total.unit == "nats per copy" and len(set(total.example_ids)) == total.shape[1] == 13
    shares = found.shares()
    assert list(shares["stage"]) == ["second", "third"] * 2
    assert shares["share"][0] == pytest.approx(np.abs(first[0]).sum() / (np.abs(first[0]).sum() + np.abs(second[0]).sum()))
    np.testing.assert_allclose(shares["net"][:2], [first[0].sum(), second[0].sum()], rtol=1e-12)


def test_rows_with_the_same_id_are_told_apart_by_their_content():
    found = multistage(three("diagonal")[1:], QUERIES)
    named = {
        name: replace(scores, examples=scores.examples.assign(id=list(map(str, range(scores.shape[1])))))
        for name, scores in found.stages.items()
    }
    total = replace(found, stages=named).total()
    assert total.shape[1] == 15 and total.example_ids[5:9] == ["5", "6", "third:0", "third:1"]


# modules that don't fit


def test_modules_of_another_shape_are_refused_with_a_table():
    wide = Stage("second", point(2, 7, hidden=5), rates=1.0)
    with pytest.raises(UsageError, match="2 of 2 modules of second have another shape in first") as raised:
        multistage([Stage("first", point(1, 6)), wide], QUERIES)
    lines = str(raised.value).splitlines()
    assert lines[1].split() == ["given", "here", "before", "shape", "share"]
    assert lines[2].split() == ["one", "one", "5", "x", "4,", "before", "4", "x", "4", "76.9%", "another", "shape"]
    assert 'renamed={"one": None}' in str(raised.value)


def test_nothing_in_common_and_unknown_names_are_refused():
    first = Stage("first", point(1, 6, ("encoder", "top")))
    with pytest.raises(UsageError, match="no tracked module in common"):
        multistage([first, Stage("second", point(2, 7), rates=1.0)], QUERIES)
    with pytest.raises(UsageError, match="names no tracked module: encodr"):
        multistage([first, Stage("second", point(2, 7), rates=1.0, renamed={"one": "encodr", "two": "top"})], QUERIES)


def test_modules_are_named_one_by_one_or_by_patterns():
    stages = [
        Stage("first", point(1, 6, ("block_a", "block_b"))),
        Stage("second", point(2, 7, ("layer_a", "layer_b")), rates=1.0),
    ]
    by_name, by_pattern = ({"layer_a": "block_a"}, {"layer_*": "block_*"})
    assert [each.status for each in match([stages[0], replace(stages[1], renamed=by_name)])] == ["shared", "new", "gone"]
    modules = match([stages[0], replace(stages[1], renamed=by_pattern)])
    assert [(each.name, each.before, each.status) for each in modules] == [
        ("layer_a", "block_a", "shared"),
        ("layer_b", "block_b", "shared"),
    ]
    new = match([stages[0], replace(stages[1], renamed={**by_pattern, "layer_b": None})])
    assert [each.status for each in new] == ["shared", "new", "gone"]
    assert sum(each.share for each in new if each.name) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../up"}, "named by what can be the name of a folder"),
        ({"transport": "teleport"}, "transport can't be 'teleport'"),
        ({"curvature": "magic"}, "There is no curvature 'magic'"),
        ({"proximal": 0.0}, "proximal can't be 0.0"),
        ({"rates": None}, "needs to know how far its training went"),
    ],
    ids=str,
)
def test_what_can_not_be_is_said(changes, message):
    with pytest.raises(UsageError, match=message):
        multistage([three()[1], replace(three()[2], **changes)], QUERIES)
    with pytest.raises(UsageError, match="Each stage has its own number of training rows"):
        multistage(three(), QUERIES, n_train=5)


@pytest.mark.parametrize(
    ("how", "function"),
    [
        ({"rates": 4.0}, lambda h: np.exp(-4 * h)),
        ({"rates": 4.0, "transport": "proximal"}, lambda h: 0.25 / (h + 0.25)),
        ({"rates": 4.0, "transport": "proximal", "proximal": 0.5}, lambda h: 0.5 / (h + 0.5)),
        ({"transport": "inverse", "proximal": 1e-4}, lambda h: 1 / (h + 1e-4)),
        ({"transport": "identity"}, np.ones_like),
    ],
    ids=["flow", "proximal", "alpha", "inverse", "identity"],
)
def test_each_transport_is_its_function_of_the_eigenvalues(how, function):
    lam_OI = torch.tensor([[0.0, 1e-3, 0.5], [2.0, 0.1, 100.0]]).double()
    given = {"one": Dense(torch.ones(1, 2, 3).double())}
    expected = function(lam_OI.numpy())
    stage = Stage("second", point(2, 7), **how)
    blocks = BlockDiagonal({"one": EigenBlock(None, None, lam_OI)})
    agree((transport(stage, blocks) @ given)["one"].dense().w_BOI[0], expected, 1e-12)
    whole = Spectral.of(torch.diag(lam_OI.flatten()), {"one": (2, 3)})
    agree((transport(stage, whole) @ given)["one"].dense().w_BOI[0], expected, 1e-12)


def test_a_transport_of_ones_own():
    stages = three()[1:]
    half = replace(stages[1], transport=0.5 * Identity(("one", "two"), "half"))
    whole = multistage([stages[0], replace(stages[1], transport="identity")], QUERIES)
    np.testing.assert_allclose(multistage([stages[0], half], QUERIES).stages["second"].raw, whole.stages["second"].raw / 2)


def test_a_formed_matrix_is_kept_only_on_the_way(tmp_path):
    kept = multistage(three()[1:], QUERIES, out=tmp_path / "run")
    again = multistage(three()[1:], QUERIES).total().raw
    np.testing.assert_allclose(kept.total().raw, again, rtol=1e-10)  # last bits may hang on where in memory a matrix lies
    assert {file.name for file in (tmp_path / "run" / "second").iterdir()} == {"scores"}
