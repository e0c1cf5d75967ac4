"""E1, quality against cost: how near every method comes to the exact damped inverse, and what it takes.

    python -m replication.e1 --data ../shared/data

A language model of two layers is trained on openings of TinyStories of 32 words until its loss stands still. The truth is the
damped Gauss-Newton matrix of all rows, solved by conjugate gradients, whose residual is told; all methods get the same
damping. A second truth is the proximal Bregman response function of a few rows, which the first must agree with. All methods
of `whence methods ls` are measured, and what does not fit is named with its reason. Published numbers of a replica of the
same size stand beside, where the data folder has them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import whence
from benchmarks.command import run
from benchmarks.methods import in_place
from replication.tinystories import Size, make_world, opening
from whence.data.rows import make_rows
from whence.engine.matrices import GaussNewton
from whence.engine.point import Point
from whence.engine.queries import encode_queries, precondition
from whence.errors import CoverageError, NumericalError, UsageError
from whence.fitting import Curvature
from whence.linalg.krylov import block_cg
from whence.linalg.stats import pearson, spearman
from whence.methods.base import Request, recipes, request_scores
from whence.methods.cg import CAUTION
from whence.methods.damping import Damped, Damping
from whence.operators import Identity
from whence.plots.methods import Dot, quality_against_cost
from whence.plots.style import save
from whence.progress import stage
from whence.settings import Score
from whence.train.replay import Recorded
from whence.validate.bank import read_arrays, refuse_other, write_arrays
from whence.validate.exact import Inverse
from whence.validate.objectives import Objectives, solve_row
from whence.validate.problem import Problem
from whence.validate.results import Result, Row
from whence.validate.settings import Setting
from whence.validate.trainer import Recipe, recorded

WORDS, CANDIDATES, QUERIES = 32, 256, 10
RELATIVE = 0.1
"""Damping, in units of the mean eigenvalue of the factors."""
TOLERANCE, STEPS = 3e-3, 120
"""Residual of the truth, as a share of the right-hand side, and the steps that it may take."""
CHANGE, LEFT = 0.05, 1e-2
"""Of a copy, which a row is added and taken out for the second truth; gradient at its minima, as a share of the row's pull."""
PLAIN = (5, 10)
"""Steps of conjugate gradients without a preconditioner that are measured."""

SIZE = Size(rows=256, width=16, pretraining=Recipe(0.01, 12, 32, "momentum", schedule="cosine"))
TINY = Size(rows=16, width=4, layers=1, vocabulary=120, pretraining=Recipe(0.01, 1, 8, "momentum"))

OWN: dict[str, dict[str, dict[str, Any]]] = {
    "lissa": {"LiSSA, 30 steps": {"depth": 30}, "LiSSA, 100 steps": {"depth": 100}},
    "astra": {"ASTRA, 30 steps": {"depth": 30}, "ASTRA, 100 steps": {"depth": 100}},
    "fastif": {"FastIF, 50 steps": {"depth": 50}},
    "arnoldi": {
        "Arnoldi, 20 of 40": {"top": 20, "vectors": 40},
        "Arnoldi, without the complement": {"top": 20, "vectors": 40, "complement": False},
    },
    "cg": {},
}
"""Settings that a method is measured with, where it is not only those it has by default; `cg` comes with the truth."""

FEW = ("ekfac", "gradient-dot", "bm25", "random", "gauss-newton")
"""What a tiny run measures."""

LEFT_OUT = {
    "magic": "repeats the training backwards for each query and approximates no damped inverse; see `make quality`",
    "gauss-newton": "is what the truth solves with, formed: minutes of products for the same numbers "
    "(correlation 1.000 at --tiny)",
    "hessian": "takes as long to form, and is not what the truth inverts",
}
"""Methods that a whole run does not measure, and why."""

PUBLISHED = {
    "EK-FAC": "ekfac-all",
    "EK-FAC, MLP modules only": "ekfac-mlp",
    "LiSSA, 100 steps": "lissa-all-iters=10000",
    "LiSSA, 30 steps": "lissa-all-iters=500",
    "CG, 10 steps": "cg-all-iters=500",
    "CG, 5 steps": "cg-all-iters=50",
    "Arnoldi, without the complement": "arnoldi-all",
    "Gradient dot product": "gdp-all",
    "Linear CKA of representations": "cka-all",
    "TRAK": "trak-all",
}
"""What of the published table is measured here, under the name it has there; see the README for what differs."""


@dataclass(frozen=True)
class Case:
    """The trained model, its rows and queries, and what all methods share."""

    setting: Setting
    model: torch.nn.Module
    training: Recorded
    candidates: np.ndarray
    factors: Mapping[str, tuple[Curvature, float]]
    """By method, with the seconds of the fit."""
    damping: float
    training_seconds: float

    @property
    def point(self) -> Point:
        """The model with its rows."""
        return Point(self.model, self.setting.task, self.setting.train)


def replica(chosen: argparse.Namespace) -> Result:
    """Everything, in order."""
    case = prepared(chosen.data, chosen.tiny)
    truth = kept_truth(case, chosen.out / "truths" / "e1.npz", rows=2 if chosen.tiny else 3)
    rows, refused = measured(case, truth, FEW if chosen.tiny else [name for name in recipes() if name not in LEFT_OUT])
    published = read_published(chosen.data)
    for row in rows:
        row |= published.get(PUBLISHED.get(row["method"], ""), {})
    save(figure(rows), chosen.out / "e1.svg")
    own, about, second = case.setting, truth.about, truth.agreement()
    best = next(row for row in rows if row["method"] == "EK-FAC")
    pairs = QUERIES * len(own.train)
    says = [
        f"{own.about}: {about['weights']:,} tracked weights, {len(own.train)} rows; {QUERIES} queries x "
        f"{len(case.candidates)} candidates",
        f"Truth: damped Gauss-Newton matrix of all rows, damping {RELATIVE} x mean eigenvalue = {about['damping']:.3g}; "
        f"conjugate gradients, {about['steps']} steps to a residual of {about['residual']:.1e}, {about['seconds']:.0f} s",
        f"Second truth: the PBRF of {len(truth.rows)} rows, {CHANGE}/N added and taken out: Pearson {second['pearson']:.4f}, "
        f"slope {second['slope']:.3f} with the first; gradient left {about['pbrf residual']:.0e} of the row's",
        f"EK-FAC: Pearson {best['pearson']:.3f}, Spearman {best['spearman']:.3f}, {best['overhead_s']:.1f} s once and "
        f"{best['per_pair_ms']:.2f} ms a pair; the truth takes {1000 * about['seconds'] / pairs:.1f} ms a pair",
        "Seconds are processor time of one thread; a pair is a query and a row, and all rows are scored",
        *([] if published else ["Published numbers are left out: the data folder has no multi_stage/results.json"]),
        *(f"Not measured: {name}: {why}" for name, why in ({} if chosen.tiny else LEFT_OUT | refused).items()),
    ]
    about = {"about": own.about, "truth": about, "pbrf": second}
    return Result("e1", about, {"": rows}, says, heading="E1: quality against cost")


def prepared(data: Path, tiny: bool) -> Case:
    """Train the model, and fit the factors that methods share."""
    size = TINY if tiny else SIZE
    world = make_world(data, 0, replace(size, words=WORDS))
    own = world.pretraining
    openings = [row["text"] for row in own.queries][:QUERIES]
    tokenizer = own.task.tokenizer  # type: ignore[attr-defined]
    halves = [(half := opening(tokenizer, text, WORDS // 2), text[len(half or "") :]) for text in openings]
    queries = make_rows([{"prompt": a, "completion": b} for a, b in halves], origin="tinystories")
    own = replace(own, queries=queries)
    before = time.process_time()
    steps = own.recipe.steps(len(own.train))
    kept = [round(steps * part / 3) for part in (1, 2, 3)]
    training = recorded(own.model(0), own.task, own.train, own.recipe, checkpoints=kept, progress="")
    model = own.model(0)
    training.checkpoints[-1].load(model)
    took = time.process_time() - before
    factors: dict[str, tuple[Curvature, float]] = {}
    for method in ("ekfac", "kfac", "shampoo", "diagonal", "identity"):
        factors[method] = fitted(own, model, method, "all")
    factors["mlp"] = fitted(own, model, "ekfac", "mlp")
    drawn = np.sort(np.random.default_rng(0).permutation(len(own.train))[:CANDIDATES])
    return Case(own, model, training, drawn, factors, RELATIVE * factors["ekfac"][0].mean_eigenvalue, took)


def fitted(own: Setting, model: torch.nn.Module, method: str, modules: str) -> tuple[Curvature, float]:
    """Factors of all rows, and their seconds."""
    before = time.process_time()
    every: dict[str, Any] = {"examples": "all", "eigenvalue_examples": "all"}
    return whence.fit(model, own.task, own.train, method=method, modules=modules, **every), time.process_time() - before


# the truths


@dataclass(frozen=True)
class Truth:
    """What methods are held against."""

    scores_QN: np.ndarray
    plain: Mapping[str, tuple[np.ndarray, float]]
    """Scores `[Q, N]` and seconds after some steps of conjugate gradients without a preconditioner."""
    rows: np.ndarray
    """Those of the second truth."""
    pbrf_QR: np.ndarray
    """The effect of one more copy of each of them."""
    about: Mapping[str, Any]

    def agreement(self) -> dict[str, float]:
        """Of the two truths: correlation, and the slope of the second on the first."""
        score_QR = self.scores_QN[:, self.rows] / self.scores_QN.shape[1]
        slope = float((self.pbrf_QR * score_QR).sum() / (score_QR**2).sum())
        return {"pearson": float(pearson(score_QR.ravel(), self.pbrf_QR.ravel())), "slope": slope}


def kept_truth(case: Case, path: Path, rows: int) -> Truth:
    """The truth in the file; made where there is none. Raises StaleArtifact where it is of another model, rows or queries."""
    asked = {"tolerance": TOLERANCE, "change": CHANGE, "left": LEFT, "rows": rows, "plain": list(PLAIN), "relative": RELATIVE}
    wanted = {"setting": case.setting.describe(), **asked}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays, about = exact(case, rows)
        write_arrays(path, arrays, wanted | {"found": about})
    arrays, about = read_arrays(path)
    refuse_other(path, about, wanted)
    found = about["found"]
    plain = {f"CG, {n} steps": (arrays[f"plain {n}"], found["plain seconds"][str(n)]) for n in PLAIN}
    return Truth(arrays["scores"], plain, arrays["rows"], arrays["pbrf"], found)


def exact(case: Case, rows: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Scores `[Q, N]` with the exact damped inverse, those of plain conjugate gradients, and the PBRF of some rows.

    The gradients of these rows are solved for in the same search, and begin the search for their minima.
    """
    point, curvature = case.point, case.factors["ekfac"][0]
    names = curvature.operator.names
    asked, every = (gradients_of(point, names, rows) for rows in (case.setting.queries, case.setting.train))
    tried = case.candidates[:: max(1, len(case.candidates) // rows)][:rows]
    b = {name: torch.cat([asked[name], every[name][tried]]) for name in names}
    damping = Damping(case.damping, names)
    matrix = (GaussNewton(point, names) + damping.operator).on_tensors(b[names[0]])
    near = damping.times(CAUTION).inverse(curvature).on_tensors(b[names[0]])

    def scores(x: Mapping[str, Tensor]) -> np.ndarray:
        return torch.stack([x[name][:QUERIES].flatten(1) @ every[name].flatten(1).T for name in names]).sum(0).numpy()

    before = time.process_time()
    with stage("truth", STEPS, "steps") as advance:
        found = block_cg(matrix, b, near, tolerance=TOLERANCE, iterations=STEPS, after=lambda state, residual: advance(1))
    seconds = time.process_time() - before
    plain, plain_seconds = plain_steps(matrix, asked, scores)
    pbrf_QR, residual = bregman(case, tried, {name: part[QUERIES:] for name, part in found.x.items()})
    about = {
        "weights": sum(part[0].numel() for part in b.values()),
        "damping": case.damping,
        "steps": found.steps,
        "residual": float(found.residual_Q.max()),
        "seconds": round(seconds, 1),
        "pbrf residual": residual,
        "plain seconds": plain_seconds,
    }
    return {"scores": scores(found.x), "rows": tried, "pbrf": pbrf_QR, **plain}, about


def plain_steps(matrix: Any, b: dict[str, Tensor], scores: Any) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores after some steps of block conjugate gradients without a preconditioner, and the seconds up to each."""
    found: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    before = time.process_time()

    def after(state: Mapping[str, Tensor], residual_Q: Tensor) -> None:
        steps = int(state["steps"])
        if steps in PLAIN:
            found[f"plain {steps}"] = scores({name: state[f"x/{name}"] for name in b})
            seconds[str(steps)] = round(time.process_time() - before, 2)

    with contextlib.suppress(NumericalError):  # it is not to come down to the tolerance
        block_cg(matrix, b, tolerance=1e-12, iterations=PLAIN[-1] + 1, after=after)
    return found, seconds


def gradients_of(point: Point, names: Sequence[str], rows: Any) -> dict[str, Tensor]:
    """Gradients of the log-likelihood of the rows, or of the answers to queries, `{module: [N, O, I]}`."""
    sites = point.cover(names).sites
    found = precondition(point, encode_queries(point.task, rows), sites, Identity(names)).gradients
    return {name: found[name].dense().w_BOI for name in names}


def bregman(case: Case, rows: Sequence[int], newton: Mapping[str, Tensor]) -> tuple[np.ndarray, float]:
    """The effect of one more copy of each row by the minima of the proximal Bregman objective, `[Q, R]`, and what is left.

    `newton` are the solutions for the rows' gradients, `{module: [R, O, I]}`; what is left is the largest norm of a gradient
    at a minimum, as a share of what the row pulls with.
    """
    own, names = case.setting, list(newton)
    problem = Problem(case.model, own.task, own.train, own.queries, names)
    near = case.factors["ekfac"][0].inverse(absolute=case.damping)

    def vectors(blocks: Mapping[str, Tensor]) -> Tensor:
        count = len(blocks[names[0]])
        return torch.stack([problem.vector({f"{name}.weight": blocks[name][k] for name in names}) for k in range(count)])

    def preconditioned(v_KP: Tensor) -> Tensor:
        named = [problem.named(v_P) for v_P in v_KP.float()]
        blocks = {name: torch.stack([each[f"{name}.weight"] for each in named]) for name in names}
        return vectors(near.on_tensors(blocks[names[0]])(blocks))

    objectives = Objectives(problem, Inverse(problem, case.damping, preconditioned))
    effects, residuals = [], []
    with stage("PBRF", len(rows), "rows") as advance:
        for row, newton_P in zip(rows, vectors(newton), strict=True):
            # the solutions are of gradients of log-likelihoods, and a loss is what is added
            minima = solve_row(objectives, int(row), (CHANGE,), LEFT, -newton_P)
            # a copy of weight c / N moves a measurement by c times what a whole copy does
            effects.append((minima.plus_EQ - minima.minus_EQ)[0] / (2 * CHANGE))
            residuals.append(float(minima.residual_E[0]))
            advance(1)
    return torch.stack(effects, 1).numpy(), max(residuals)


# the methods


def measured(case: Case, truth: Truth, names: Sequence[str]) -> tuple[list[Row], dict[str, str]]:
    """A row for each method, the best first, and why some do not fit."""
    found: list[Row] = []
    refused: dict[str, str] = {}
    wanted = [(title, name, own, "") for name in names for title, own in OWN.get(name, {recipes()[name].title: {}}).items()]
    pairs = QUERIES * len(case.setting.train)
    with stage("methods", len(wanted) + 1, "methods") as advance:
        for title, name, own, factors in [*wanted, ("EK-FAC, MLP modules only", "ekfac", {}, "mlp")]:
            try:
                scores_QN, overhead, seconds = scored(case, name, own, factors)
                found.append(row_of(case, title, scores_QN, truth, overhead, seconds / pairs))
                print(f"  {title:40s} {found[-1]['pearson']:.3f} {seconds:.1f} s", flush=True)
            except (UsageError, CoverageError, NumericalError) as error:
                refused[title] = error.what
            advance(1)
    found += [row_of(case, title, scores, truth, 0.0, seconds / pairs) for title, (scores, seconds) in truth.plain.items()]
    return sorted(found, key=lambda row: -row["pearson"]), refused


def scored(case: Case, name: str, own: Mapping[str, Any], factors: str) -> tuple[np.ndarray, float, float]:
    """Scores `[Q, N]` of a method, the seconds of what it is given once, and those of the scores."""
    recipe, overhead = recipes()[name], 0.0
    uses = recipe.needs + recipe.uses
    kind = factors or (name if name in case.factors else "ekfac" if "factors" in uses else "identity")
    curvature, took = case.factors[kind]
    settings = dict(own)
    if issubclass(recipe.settings, Damped):
        settings = {"absolute_damping": case.damping, **settings}
    overhead += took if kind != "identity" else 0.0
    overhead += case.training_seconds if "training" in recipe.needs else 0.0
    request = Request(case.point, case.setting.queries, Score(check=False), curvature, case.training)
    before = time.process_time()
    scores = request_scores(recipe, request, recipe.own(settings))
    return in_place(scores, case.setting.train), overhead, time.process_time() - before


def row_of(case: Case, title: str, scores_QN: np.ndarray, truth: Truth, overhead: float, per_pair: float) -> Row:
    """Agreement with the truth over the candidates, and the price."""
    found, exact = np.nan_to_num(scores_QN)[:, case.candidates], truth.scores_QN[:, case.candidates]
    r, rho = np.nan_to_num(pearson(found, exact)), spearman(found, exact)
    row: Row = {"method": title, "pearson": r.mean(), "pearson_std": r.std(), "spearman": rho.mean(), "spearman_std": rho.std()}
    row |= {"overhead_s": overhead, "per_pair_ms": 1000 * per_pair}
    return {key: round(float(value), 4) if key != "method" else value for key, value in row.items()}


def read_published(data: Path) -> dict[str, Row]:
    """Columns of the published table by its own names; none where the data folder does not have it."""
    file = data / "multi_stage" / "results.json"
    if not file.is_file():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))
    return {
        each["alg"]: {"published as": each["alg"], "its pearson": round(each["pc"], 3), "its spearman": round(each["sc"], 3)}
        for each in known
    }


def figure(rows: Sequence[Row]) -> Any:
    """Quality against cost, as the published figure has it."""
    dots = [
        Dot(
            row["method"],
            row["pearson"],
            (row["pearson"] - row["pearson_std"], row["pearson"] + row["pearson_std"]),
            row["overhead_s"],
            max(row["per_pair_ms"] / 1000, 1e-6),
        )
        for row in rows
    ]
    return quality_against_cost(dots, "Pearson correlation with the truth")


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    return run("replication.e1", __doc__ or "", replica, given)


if __name__ == "__main__":
    raise SystemExit(main())
