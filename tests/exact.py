"""Scores with the exact damped Gauss-Newton matrix, for tests of what it is made of."""

import pandas

from whence.data.rows import Rows
from whence.engine.stream import read
from whence.store.scores import Scores, describe_queries, describe_rows
from whence.validate.exact import gauss_newton, influence
from whence.validate.problem import Problem


def exact_scores(
    model,
    task,
    queries,
    train,
    *,
    damping=0.1,
    absolute=None,
    modules="all",
    way="auto",
):
    """Scores with the exact damped Gauss-Newton matrix of all tracked weights together, as `whence.score` gives them.

    Damping is `damping` times the mean eigenvalue of the whole matrix (not module by module), or `absolute`. `about`
    says the damping, the way and the residual of the solutions.
    """
    problem = Problem(model, task, train, queries, modules)
    curvature = gauss_newton(problem, way)
    chosen = curvature.damping(damping, absolute)
    raw, residual = influence(problem, curvature.inverse(chosen.absolute))
    about = {
        "operator": f"exact Gauss-Newton, inverse with damping {chosen.absolute:g} = {chosen.relative:g} x mean eigenvalue",
        "way": curvature.kind,
        "damping": chosen.absolute,
        "mean_eigenvalue": chosen.mean,
        "residual": residual,
    }
    return as_scores(problem, queries, raw, about)


def as_scores(problem, queries, raw, about):
    """The matrix with ids and texts of both sides."""
    rows, train = problem.train.rows, problem.train
    asked = describe_queries(read(queries), problem.task, problem.weighted)
    measurement = problem.task.settings().get("measurement", "logprob")
    unit = "nats per copy" if measurement in ("logprob", "loss") else f"{measurement} per copy"
    return Scores(
        raw=raw,
        n_train=len(problem.rows),
        examples=describe_rows(rows, train.ids, train.sizes, rows.copies if isinstance(rows, Rows) else None),
        queries=pandas.DataFrame({**asked, "measured": problem.measured().numpy(force=True)}),
        about={"unit": unit, "measurement": measurement, **about},
    )
