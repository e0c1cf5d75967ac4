"""Scores through several stages are products of dense matrices; modules that don't fit are refused; a killed run resumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import agree
from torch import nn

import whence
from whence.engine.point import Point
from whence.errors import StaleArtifact
from whence.stages import Stage, multistage, open_stages
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
