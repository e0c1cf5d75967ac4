"""Influence beside the proximal Bregman response function (PBRF), what influence functions of networks approximate.

Bae et al. 2022, "If influence functions are the answer, then what is the question?". One row's loss is added `e` times to

    1/N sum_i D(h(theta, x_i), h(theta_s, x_i)) + e L(z, theta) + l/2 |theta - theta_s|^2

with `D` the Bregman divergence of the loss between outputs (KL for cross-entropy), and the minimum is found again. The effect
of one more copy of the row on a measurement `m` is `(m(theta(e)) - m(theta(-e))) / (2 e N)`; its limit for small `e` is the
score with the exact damped Gauss-Newton matrix. One minimum serves all queries. The ladder leads from what a user may have in
mind, training again from new weights without the row, to influence, one step at a time.

`R` rows tested, `Q` queries, `E` sizes of the change, in units of 1/N.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from whence.errors import UsageError
from whence.linalg.stats import agree, mean_error, pearson
from whence.progress import note, stage
from whence.store.digest import fingerprint_code
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
from whence.validate.exact import Way, gauss_newton, influence
from whence.validate.ladder import LADDER, Climb, Ladder
from whence.validate.methods import EVERYTHING, EXACT, NAMES, refuse_unknown, scored
from whence.validate.objectives import EPSILONS, LARGE_STEPS, LOOSE, STEPS, TOLERANCE, Minima, Objectives, solve_row
from whence.validate.problem import Problem
from whence.validate.results import Result, Row
from whence.validate.settings import Setting, perceptron, seeded
from whence.validate.trainer import Recipe, retrain

DAMPINGS = (0.1, 0.01)
CLIMBED = 0.1
"""Changes of this share of a copy and more have a ladder; smaller ones drown in the rounding of the trainer."""

FAITHFUL = 0.99
"""Correlation from which exact influence and the PBRF count as the same."""


@dataclass(frozen=True)
class Solved:
    """What the minima of one damping gave."""

    relative: float
    absolute: float
    epsilons: tuple[float, ...]
    effects_EQR: np.ndarray
    """Of one more copy, by central differences, in nats; NaN where a row was not tested at that size."""
    without_EQR: np.ndarray
    """Measurements with that much of the row out."""
    residuals_ER: np.ndarray
    """Norm of the gradient at the worse of the two minima, over `e |grad L(z)|`."""
    steps_ER: np.ndarray
    scores: Mapping[str, np.ndarray]
    """By method, `[Q, R]`, in nats per copy (cosine: no unit)."""
    whole: Mapping[str, np.ndarray]
    """The same for all rows that have a loss, `[Q, N]`."""


def check_pbrf(
    setting: Setting,
    *,
    rows: int = 48,
    large: int = 12,
    queries: int = 20,
    dampings: Sequence[float] = DAMPINGS,
    epsilons: Sequence[float] = EPSILONS,
    methods: Sequence[str] = tuple(NAMES),
    ladder: bool = True,
    way: Way = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    rerun: bool = False,
) -> Result:
    """Train the setting's model, minimise the proximal objective for `rows` of its rows, and compare scores with that.

    `dampings` are in units of the mean eigenvalue of the exact curvature; every method gets the same absolute damping.
    `epsilons` are in units of 1/N, largest first: all rows are tested at the smallest, `large` of them at the others, and these
    have the five objectives too if there is to be a `ladder`, at the first damping. With `out` every row's minima are saved
    as they are found: a killed check resumes from there.

    Raises UsageError, StaleArtifact.
    """
    refuse_unknown(methods)
    if list(epsilons) != sorted(epsilons, reverse=True) or min(epsilons) <= 0:
        raise UsageError("The sizes of the change must decrease, and stay above zero", given=str(list(epsilons)))
    settings = {"rows": rows, "large": large, "dampings": tuple(dampings), "epsilons": tuple(epsilons)}
    check = _Check(replace(setting, queries=setting.queries[:queries]), seed, settings)
    provenance = {
        "stage": "pbrf",
        "of": setting.describe(),
        "settings": {**settings, "queries": queries, "seed": seed, "solver": [TOLERANCE, STEPS, LOOSE, LARGE_STEPS]},
        "code": fingerprint_code(),
    }
    with work(out, lambda: provenance, rerun=rerun) as folder:
        return check.run(folder, methods, ladder, way)


class _Check:
    """One check at work: what its parts have in common."""

    def __init__(self, setting: Setting, seed: int, settings: Mapping[str, Any]):
        self.began, self.setting, self.seed, self.settings = time.monotonic(), setting, seed, settings
        self.recipe: Recipe = replace(setting.recipe, seed=seed, order_seed=seed)
        self.notes: list[str] = []

    def run(self, folder: Folder | Memory, methods: Sequence[str], ladder: bool, way: Way) -> Result:
        """Everything, in order."""
        self.folder = folder
        self.model = trained(self.setting, self.recipe, folder)
        self.problem = Problem(self.model, self.setting.task, self.setting.train, self.setting.queries)
        drawn = np.random.default_rng(self.seed).permutation(self.problem.rows).tolist()
        self.rows = sorted(drawn[: self.settings["rows"]])
        self.large = sorted(drawn[: min(self.settings["large"], self.settings["rows"])])
        curvature = gauss_newton(self.problem, way)
        found = scored(self.setting, self.model, methods, self.seed, **EVERYTHING)
        solved: list[Solved] = []
        residuals, ladders = [], []
        for number, relative in enumerate(self.settings["dampings"]):
            chosen = curvature.damping(relative)
            objectives = Objectives(self.problem, curvature.inverse(chosen.absolute), self.weight_decay)
            raw, residual = influence(self.problem, objectives.inverse)
            scores = {EXACT: raw / len(self.problem.rows)} | {name: at(absolute=chosen.absolute) for name, at in found.items()}
            solved.append(self.solve(number, relative, objectives, scores))
            residuals.append(residual)
            if ladder and number == 0:
                ladders = self.climb(objectives, solved[0], curvature.kind)
        about = {
            "setting": self.setting.name,
            "about": self.setting.about,
            "parameters": self.problem.size,
            "train": len(self.problem.rows),
            "way": curvature.kind,
            "residual": max(residuals),
            "seconds": time.monotonic() - self.began,
            "rows": self.rows,
        }
        return pbrf_result(about, solved, ladders, self.notes)

    @property
    def weight_decay(self) -> float:
        """That of the training objective; decoupled decay is in no objective."""
        return 0.0 if self.recipe.optimizer == "adamw" else self.recipe.weight_decay

    def solve(self, number: int, relative: float, objectives: Objectives, scores: Mapping[str, np.ndarray]) -> Solved:
        """The minima of one damping for all rows."""
        epsilons = self.settings["epsilons"]
        if number:  # a whole copy is more than most rows have a minimum for at small dampings
            epsilons = tuple(part for part in epsilons if part < 1) or epsilons
        names = [f"pbrf-{number}/row-{row:06d}" for row in self.rows]
        with stage(f"PBRF {relative:g}", len(names), "rows", done=sum(map(self.folder.has, names))) as advance:
            for name, row in zip(names, self.rows, strict=True):
                if not self.folder.has(name):
                    tried = epsilons if row in self.large else epsilons[-1:]
                    self.folder.save(name, solve_row(objectives, row, tried).tensors())
                    advance(1)
        found = [Minima(**self.folder.load(name)).padded(len(epsilons)) for name in names]
        plus_EQR, minus_EQR = (
            torch.stack([getattr(row, side) for row in found], dim=2).numpy() for side in ("plus_EQ", "minus_EQ")
        )
        residuals_ER = torch.stack([row.residual_E for row in found], dim=1).numpy()
        for e, epsilon in enumerate(epsilons):
            if loose := int((residuals_ER[e] > LOOSE).sum()):
                tried = int((~np.isnan(residuals_ER[e])).sum())
                self.note(f"at damping {relative:g} and {epsilon:g}/N {loose} of {tried} rows have no minimum to {LOOSE:g}")
        return Solved(
            relative,
            objectives.absolute,
            tuple(epsilons),
            (plus_EQR - minus_EQR) / (2 * np.array(epsilons)[:, None, None]),
            minus_EQR,
            residuals_ER,
            torch.stack([row.steps_E for row in found], dim=1).numpy(),
            {name: values[:, self.rows] for name, values in scores.items()},
            {name: values[:, self.problem.rows] for name, values in scores.items()},
        )

    def climb(self, objectives: Objectives, solved: Solved, way: Way) -> list[Ladder]:
        """A ladder for every change that is large enough to train with."""
        climb, ladders = Climb(self.setting, self.model, self.recipe, self.large, self.folder), []
        large = [self.rows.index(row) for row in self.large]
        for e, epsilon in enumerate(solved.epsilons):
            if CLIMBED <= epsilon <= 1:
                minima = (solved.without_EQR[e][:, large], solved.residuals_ER[e][large])
                ladders.append(climb.climb(objectives, epsilon, minima, solved.scores[EXACT][:, large], way))
                if loose := int((~ladders[-1].found_R).sum()):
                    what = "left out there" if ladders[-1].enough else "they are where the search ended"
                    self.note(f"{loose} of {len(large)} rows have no minimum under some objective at {epsilon:g}/N: {what}")
        return ladders

    def note(self, text: str) -> None:
        """Remember what the reader should know, and report it."""
        self.notes.append(text)
        note(f"warning: {text}")


def trained(setting: Setting, recipe: Recipe, folder: Folder | Memory) -> nn.Module:
    """The setting's model trained on all rows, kept in the folder."""
    model = setting.model(recipe.seed)
    if not folder.has("model"):
        found = retrain(model, setting.task, setting.train, recipe, progress="train")
        folder.save("model", {name: weight[0] for name, weight in found.parameters.items()})
    kept = folder.load("model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return model.eval()


def small(setting: Setting) -> Setting:
    """The setting with a network whose exact curvature fits: images have two layers of 32 tanh units.

    A tanh has second derivatives everywhere; at a ReLU's kinks the minimum of a smooth objective is not one.
    """
    if setting.name not in ("digits", "mnist"):
        return setting
    inputs = len(setting.train[0][0])

    def model(seed: int) -> nn.Module:
        return seeded(seed, lambda: perceptron([inputs, 32, 32, 10], nn.Tanh))

    return replace(setting, model=model, about=f"{setting.name}: {inputs}-32-32-10 tanh, cross-entropy")


def pbrf_result(
    about: dict[str, Any], solved: Sequence[Solved], ladders: Sequence[Ladder] = (), notes: Sequence[str] = ()
) -> Result:
    """Influence beside the PBRF, one `Solved` per damping; the first has all sizes of the change."""
    first, title = solved[0], f"Agreement with exact influence, all {about['train']} rows"
    tables = {
        "Agreement with the PBRF": [row for own in solved for row in _methods(own, own.scores, own.effects_EQR[-1])],
        "Convergence in the size of the change": [row for own in solved for row in _convergence(own)],
        # where exact influence is the PBRF, this tells methods apart by more rows
        title: [row for own in solved for row in _methods(own, without(own.whole, EXACT), own.whole[EXACT])],
    }
    if climbed := [row for ladder in ladders for row in ladder.table()]:
        tables["From retraining to influence"] = climbed
    r = {row["method"]: row["pearson"] for row in tables["Agreement with the PBRF"] if row["lambda"] == first.absolute}
    says = [
        f"{about['about']}: {about['parameters']:,} weights, {about['train']} training rows; {len(about['rows'])} of them "
        f"tested on {first.effects_EQR.shape[1]} queries, damping {first.relative:g} x mean eigenvalue = {first.absolute:.3g}",
        f"Exact influence {'agrees' if r[EXACT] >= FAITHFUL else 'does NOT agree'} with the PBRF: "
        f"r = {r[EXACT]:.4f} at a change of {first.epsilons[-1]:g}/N",
    ]
    if others := sorted(without(r, EXACT), key=lambda name: -r[name]):
        says.append("Approximations, best first: " + ", ".join(f"{name} {r[name]:.3f}" for name in others))
    if r[EXACT] >= FAITHFUL:
        told = [
            f"{row['method']} {row['pearson']:.3f}"
            + (f" (behind by {row['behind_ekfac']:.4f} ± {row['behind_se']:.4f})" if "behind_ekfac" in row else "")
            for row in tables[title]
            if row["lambda"] == first.absolute
        ]
        says.append(f"By the exact influence of all {about['train']} rows: {', '.join(told)}")
    for ladder in ladders:
        cold = agree(ladder.of(LADDER[-1]), ladder.of(LADDER[0])).pearson
        says.append(
            f"With {ladder.change:g} of a copy out, influence correlates {cold:.2f} with training again from new weights: "
            "the PBRF is what it approximates, retraining is another question"
        )
    smallest = max(float(own.residuals_ER[-1].max()) for own in solved)
    says.append(
        f"Residuals at worst: {smallest:.1e} of the row's gradient at the smallest change, {about['residual']:.1e} exact"
    )
    says += [f"WARNING {text}" for text in notes]
    arrays = {
        "effects": [
            {
                "damping": own.relative,
                "lambda": own.absolute,
                "epsilons": list(own.epsilons),
                "pbrf": own.effects_EQR,
                "scores": own.scores,
            }
            for own in solved
        ],
        "ladders": [{"change": own.change, "found": own.found_R, "effects": own.effects} for own in ladders],
    }
    return Result("pbrf", about, tables, says, list(notes), arrays, f"Influence and the PBRF: {about['setting']}")


def _methods(solved: Solved, scores: Mapping[str, np.ndarray], truth: np.ndarray) -> list[Row]:
    """A line per method: its agreement with the truth, and how far it is behind EK-FAC, paired."""
    rows, reference = [], scores.get(NAMES["ekfac"])
    for name, found in scores.items():
        row: Row = {"damping": f"{solved.relative:g} x mean", "lambda": solved.absolute, "method": name}
        row |= agree(found, truth)._asdict()
        if reference is not None and name not in (EXACT, NAMES["ekfac"]):
            behind = mean_error(pearson(reference, truth) - pearson(found, truth))
            row |= dict(zip(("behind_ekfac", "behind_se"), behind, strict=True))
        rows.append(row)
    return rows


def _convergence(solved: Solved) -> list[Row]:
    """By size of the change: agreement of the exact influence with the PBRF, and how well the minima were found."""
    rows = []
    for e, epsilon in enumerate(solved.epsilons):
        tried = ~np.isnan(solved.residuals_ER[e])
        exact, truth = solved.scores[EXACT][:, tried], solved.effects_EQR[e][:, tried]
        residuals, steps = solved.residuals_ER[e][tried], solved.steps_ER[e][tried]
        error = float(np.linalg.norm(exact - truth) / max(np.linalg.norm(truth), 1e-300))
        row: Row = {"damping": f"{solved.relative:g} x mean", "change": f"{epsilon:g}/N", "rows": int(tried.sum())}
        row |= agree(exact, truth)._asdict() | {"relative_error": error, "steps": float(steps.mean())}
        rows.append(row | {"residual": float(residuals.max()), "not_found": int((residuals > LOOSE).sum())})
    return rows


def without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All but one."""
    return {key: value for key, value in values.items() if key != name}
