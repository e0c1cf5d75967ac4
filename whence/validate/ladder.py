"""From training again without a row to influence, one step at a time (Bae et al. 2022, table 1).

Each objective changes one thing: begin at the trained weights instead of new ones; stay near them; stay near the outputs of the
trained model instead of the labels, since training had not converged; go along a straight line.

`K` copies that are trained, `R` rows tested, `Q` queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from whence.linalg.stats import agree
from whence.progress import stage
from whence.store.manifest import Folder
from whence.store.memory import Memory
from whence.validate.exact import Way, gauss_newton
from whence.validate.objectives import LOOSE, Objectives
from whence.validate.problem import Problem
from whence.validate.settings import Setting
from whence.validate.trainer import Recipe, retrain

LADDER = ("cold start", "warm start", "+ proximity", "+ Bregman (PBRF)", "+ linearised (influence)")

Start = Literal["initial", "given"]

FEWEST = 3
"""Rows that a table is about at least."""

TOGETHER = 8
"""Rows that are retrained at a time, between two saves."""

PROXIMAL, CONTROL = 5e-4, 5e-5
"""Norm of the gradient at the minima with proximity, in units of a row's own gradient: without a row, and with all."""

CONTROL_ROUNDS, CONTROL_STEPS, ROW_STEPS = 8, 60, 60


@dataclass(frozen=True)
class Ladder:
    """Effects of one more copy of each row under the five objectives, measured by taking `change` of a copy out."""

    change: float
    effects: Mapping[str, np.ndarray]
    """By objective `[Q, R]`, nats: what was measured at the objective's own control minus that without the row."""
    raw: Mapping[str, np.ndarray]
    """The same against the trained weights, where nothing was taken out and nothing trained again."""
    found_R: np.ndarray
    """Rows whose minima were found; the tables are about these if they are enough."""

    @property
    def enough(self) -> bool:
        """Whether enough minima were found to leave the others out."""
        return int(self.found_R.sum()) >= FEWEST

    def of(self, name: str, raw: bool = False) -> np.ndarray:
        """Effects of the rows that the tables are about, `[Q, R]`."""
        values = (self.raw if raw else self.effects)[name]
        return values[:, self.found_R] if self.enough else values

    def table(self) -> list[dict[str, Any]]:
        """Sizes of the effects and of the gap to the next objective (means over rows and queries), and correlations."""
        rows = []
        for name, following in zip(LADDER, [*LADDER[1:], None], strict=True):
            row: dict[str, Any] = {"change": f"{self.change:g}/N", "objective": name, "effect": _size(self.of(name))}
            row["no_control"] = _size(self.of(name, raw=True))
            if following:
                row["gap_to_next"] = _size(self.of(name) - self.of(following))
                row["gap_no_control"] = _size(self.of(name, raw=True) - self.of(following, raw=True))
                row["pearson_next"] = agree(self.of(following), self.of(name)).pearson
            row["pearson_influence"] = agree(self.of(LADDER[-1]), self.of(name)).pearson
            row["spearman_influence"] = agree(self.of(LADDER[-1]), self.of(name)).spearman
            rows.append(row)
        return rows


def taken_out(
    setting: Setting,
    model: nn.Module,
    recipe: Recipe,
    rows: Sequence[int],
    problem: Problem,
    folder: Folder | Memory,
    *,
    start: Start,
    change: float = 1.0,
    prefix: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """Measurements after training with all rows `[Q]`, and with `change` of each of `rows` out `[Q, R]`.

    `TOGETHER` of them are trained at a time, and kept in the folder.
    """
    everyone, found = [None, *rows], []
    for first in range(0, len(everyone), TOGETHER):
        name, part = f"{prefix}retrained-{start}-{change:g}/{first:06d}", everyone[first : first + TOGETHER]
        if not folder.has(name):
            weights_KN = torch.ones(len(part), len(setting.train), dtype=torch.float64)
            for k, row in enumerate(part):
                if row is not None:
                    weights_KN[k, row] -= change
            label = "cold start" if start == "initial" else "warm start"
            trained = retrain(model, setting.task, setting.train, recipe, weights_KN, start=start, progress=label)
            copies = [{name: value[k] for name, value in trained.parameters.items()} for k in range(len(part))]
            measured_KQ = torch.stack([problem.measured(problem.vector(own)) for own in copies]).cpu()
            folder.save(name, {"measured_KQ": measured_KQ})
        found.append(folder.load(name)["measured_KQ"])
    measured_KQ = torch.cat(found).numpy()
    return measured_KQ[0], measured_KQ[1:].T


class Climb:
    """One ladder at work; what is found is kept in a folder, row by row."""

    def __init__(self, setting: Setting, model: nn.Module, recipe: Recipe, rows: Sequence[int], folder: Folder | Memory):
        self.setting, self.model, self.recipe, self.folder = setting, model, recipe, folder
        self.rows = [int(row) for row in rows]

    def climb(
        self, objectives: Objectives, change: float, pbrf: tuple[np.ndarray, np.ndarray], influence_QR: np.ndarray, way: Way
    ) -> Ladder:
        """All five; `pbrf` has the measurements with `change` of each row out `[Q, R]`, and the residuals `[R]`."""
        before = objectives.problem.measured().numpy(force=True)[:, None]
        effects, raw = {}, {}
        starts: dict[str, Start] = {"cold start": "initial", "warm start": "given"}
        for name, start in starts.items():
            control, without = taken_out(
                self.setting, self.model, self.recipe, self.rows, objectives.problem, self.folder, start=start, change=change
            )
            effects[name], raw[name] = (control[:, None] - without) / change, (before - without) / change
        control, without, residuals = self.proximal(objectives, change, way)
        effects["+ proximity"], raw["+ proximity"] = (control[:, None] - without) / change, (before - without) / change
        effects[LADDER[3]] = raw[LADDER[3]] = (before - pbrf[0]) / change
        effects[LADDER[4]] = raw[LADDER[4]] = influence_QR
        return Ladder(change, effects, raw, (residuals <= LOOSE) & (pbrf[1] <= LOOSE))

    def control(self, objectives: Objectives, usual: float, way: Way) -> dict[str, Tensor]:
        """The minimum of training loss and proximity with all rows; the curvature is recomputed on the way there."""
        if not self.folder.has("proximal-control"):
            theta, found = objectives.problem.theta, None
            with stage("control", CONTROL_ROUNDS, "rounds") as advance:
                for _ in range(CONTROL_ROUNDS):
                    nearby = at_weights(objectives, theta, way)
                    found = nearby.solve(objectives.proximal(None, 0.0), theta, CONTROL * usual, CONTROL_STEPS)
                    theta = found.theta
                    advance(1)
                    if found.converged:
                        break
            assert found is not None
            self.folder.save("proximal-control", {"theta": theta, "residual": torch.tensor(found.residual)})
        return self.folder.load("proximal-control")

    def proximal(self, objectives: Objectives, change: float, way: Way) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same at minima of training loss and proximity, and their residuals `[R]`; rows begin at the control's."""
        problem, n = objectives.problem, len(objectives.problem.rows)
        sizes = [float(problem.row_gradient(row).norm()) for row in self.rows]
        usual = float(np.median(sizes)) * change / n
        control = self.control(objectives, usual, way)
        residual = float(control["residual"]) / usual
        nearby = at_weights(objectives, control["theta"], way)
        measured, residuals = [], []
        with stage("proximity", len(self.rows), "rows") as advance:
            for row, size in zip(self.rows, sizes, strict=True):
                name, goal = f"proximal-{change:g}/row-{row:06d}", max(size * change / n, usual)
                if not self.folder.has(name):
                    function = objectives.proximal(row, -change / n)
                    found = nearby.solve(function, control["theta"], PROXIMAL * goal, ROW_STEPS)
                    kept = {"measured": problem.measured(found.theta), "residual": torch.tensor(found.residual / goal)}
                    self.folder.save(name, kept)
                kept = self.folder.load(name)
                measured.append(kept["measured"])
                residuals.append(max(float(kept["residual"]), residual))
                advance(1)
        at_control = problem.measured(control["theta"]).numpy(force=True)
        return at_control, torch.stack(measured, dim=1).numpy(force=True), np.array(residuals)


def at_weights(objectives: Objectives, theta: Tensor, way: Way) -> Objectives:
    """Objectives that are solved with the curvature at other weights; what they are stays."""
    moved = objectives.problem.moved_to(theta)
    return objectives.solved_with(gauss_newton(moved, way).inverse(objectives.absolute + objectives.weight_decay))


def _size(values: np.ndarray) -> float:
    return float(np.abs(values).mean()) if values.size else float("nan")
