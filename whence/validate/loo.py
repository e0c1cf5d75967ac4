"""Leaving one out: whether influence says what training again without a row does.

Five steps (Koh & Liang 2017; Basu et al. 2021): train on all rows; choose some; train again without each, all else the same;
see how much each query's measurement changed; correlate that with influence. In a convex model trained to the end it must fit.
In a network that can fit everything, one row's effect is of the size of what another seed does, and it often does not.

`R` rows tested, `Q` queries.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from whence.errors import UsageError
from whence.linalg.stats import agree
from whence.store.digest import fingerprint_code
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
from whence.tasks import Classification, Regression
from whence.validate.exact import gauss_newton, influence
from whence.validate.ladder import taken_out
from whence.validate.methods import EVERYTHING, EXACT, refuse_unknown, scored
from whence.validate.pbrf import trained
from whence.validate.problem import Problem
from whence.validate.results import Result
from whence.validate.settings import Setting, seeded, setting
from whence.validate.trainer import Recipe

METHODS = ("ekfac", "identity")
COLD, WARM, MEAN, CEILING = "cold start", "warm start", "cold start, mean of seeds", "another seed"
GOOD = 0.9
"""Correlation from which influence is said to predict leaving one out."""


def check_loo(
    setting: Setting,
    *,
    rows: int = 24,
    queries: int = 20,
    seeds: Sequence[int] = (0, 1, 2),
    damping: float = 0.1,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    out: str | Path | None = None,
    rerun: bool = False,
) -> Result:
    """Train the setting's model again without each of `rows` rows, cold and warm, and compare scores with what changed.

    The first of `seeds` trains the model that is attributed, and is left out of again from the same weights in the same
    order; the others give the noise ceiling. `damping` is in units of the mean eigenvalue; a convex model's is its weight
    decay, which its loss has. The warm start continues from the trained weights in another order, beside its own control.
    With `out`, what is trained is kept, and a killed check resumes.

    Raises UsageError, StaleArtifact.
    """
    if not seeds:
        raise UsageError("Leaving one out takes a seed", accepted="one or more; from two on there is a noise ceiling")
    refuse_unknown(methods)
    provenance = {
        "stage": "loo",
        "of": setting.describe(),
        "settings": {"rows": rows, "queries": queries, "seeds": list(seeds), "seed": seed},
        "code": fingerprint_code(),
    }
    asked = replace(setting, queries=setting.queries[:queries])
    with work(out, lambda: provenance, rerun=rerun) as folder:
        return _check(asked, folder, rows, seeds, damping, methods, seed)


def _check(
    setting: Setting,
    folder: Folder | Memory,
    count: int,
    seeds: Sequence[int],
    damping: float,
    methods: Sequence[str],
    seed: int,
) -> Result:
    began, recipes = time.monotonic(), [replace(setting.recipe, seed=own, order_seed=own) for own in seeds]
    model = trained(setting, recipes[0], folder)
    problem = Problem(model, setting.task, setting.train, setting.queries)
    size = min(count, len(problem.rows))
    rows = sorted(int(row) for row in np.random.default_rng(seed).choice(problem.rows, size=size, replace=False))
    before = problem.measured().numpy(force=True)
    effects = {}
    for recipe in recipes:
        given = (setting, model, recipe, rows, problem, folder)
        control, without = taken_out(*given, start="initial", prefix=f"seed-{recipe.seed}/")
        effects[COLD if recipe is recipes[0] else f"seed {recipe.seed}"] = control[:, None] - without
    onward = replace(recipes[0], order_seed=recipes[0].order_seed + 1000)
    control, without = taken_out(setting, model, onward, rows, problem, folder, start="given")
    effects[WARM], shift = control[:, None] - without, float(np.abs(control - before).mean())
    if len(seeds) > 1:
        effects[MEAN] = np.mean([effects[name] for name in effects if name == COLD or name.startswith("seed ")], axis=0)
    curvature = gauss_newton(problem)
    convex = is_convex(model)
    absolute = curvature.damping(damping, setting.recipe.weight_decay if convex else None).absolute
    raw, _ = influence(problem, curvature.inverse(absolute), rows)
    found = scored(setting, model, methods, seed, **EVERYTHING)
    scores = {EXACT: raw / len(problem.rows)} | {name: at(absolute=absolute)[:, rows] for name, at in found.items()}
    about = {
        "setting": setting.name,
        "about": setting.about,
        "convex": convex,
        "parameters": problem.size,
        "train": len(problem.rows),
        "damping": absolute,
        "seconds": time.monotonic() - began,
        "rows": rows,
        "seeds": list(seeds),
    }
    return loo_result(about, effects, scores, shift)


def loo_result(
    about: dict[str, Any], effects: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray], shift: float
) -> Result:
    """The scores by method, nats per copy, beside the effects by way of retraining, nats, both `[Q, R]`.

    An effect is the measurement of the control minus that without the row; `shift` is the mean size of what training on with
    all rows alone does to a measurement.
    """
    table = []
    for way in (COLD, MEAN, WARM):
        if way in effects:
            size = {"effect": float(np.abs(effects[way]).mean()), "control": shift if way == WARM else 0.0}
            for name, own in scores.items():
                table.append({"retraining": way, "compared": name} | agree(own, effects[way])._asdict() | size)
    r, (queries, rows) = table[0]["pearson"], effects[COLD].shape
    says = [
        f"{about['about']}: {about['parameters']:,} weights, {about['train']} training rows; {rows} left out one at a time, "
        f"{queries} queries, damping {about['damping']:.3g}",
        f"Influence {'predicts' if r >= GOOD else 'does NOT predict well'} training again without a row: r = {r:.3f}",
    ]
    if others := [effects[name] for name in effects if name.startswith("seed ")]:
        noise = agree(np.mean(others, axis=0), effects[COLD])  # what depends on the seed no method can know
        table.append({"retraining": COLD, "compared": CEILING} | noise._asdict())
        says.append(f"Training from another seed agrees with that to r = {noise.pearson:.3f}: no method can be better")
    if not about["convex"] and r < GOOD:
        says.append("These scores can't be trusted here for the effect of one row; they can for groups of rows (LDS, removal)")
    arrays, heading = {"effects": effects, "scores": scores}, f"Leaving one out: {about['setting']}"
    return Result("loo", about, {"Agreement with leaving one out": table}, says, [], arrays, heading)


def is_convex(model: nn.Module) -> bool:
    """Whether the model is a single linear layer, whose loss is convex in its weights."""
    return isinstance(model, nn.Linear)


# settings where influence has to be right

CONVEX = ("cancer", "linear")


def loo_setting(name: str, data: str | Path | None = None) -> Setting:
    """The setting of that name: "cancer" and "linear" are convex and trained to the end, the others those of `setting`."""
    return {"cancer": cancer, "linear": linear}[name]() if name in CONVEX else setting(name, data)


def cancer() -> Setting:
    """Logistic regression on scikit-learn's breast cancer data: 398 rows train, 171 others ask."""
    from sklearn.datasets import load_breast_cancer

    x_NI, y_N = (np.asarray(part) for part in load_breast_cancer(return_X_y=True))
    inputs, order = _standardised(x_NI)
    pairs = [(inputs[i], int(y_N[i])) for i in order]
    return _convex("cancer", "breast cancer: logistic regression", lambda: nn.Linear(30, 2), Classification(), pairs, 0.4)


def linear() -> Setting:
    """Linear regression on scikit-learn's diabetes data: 309 rows train, 133 others ask."""
    from sklearn.datasets import load_diabetes

    x_NI, y_N = (np.asarray(part) for part in load_diabetes(return_X_y=True))
    inputs, order = _standardised(x_NI)
    targets = torch.from_numpy((y_N - y_N.mean()) / y_N.std()).float()[:, None]
    pairs = [(inputs[i], targets[i]) for i in order]
    return _convex("linear", "diabetes: linear regression", lambda: nn.Linear(10, 1), Regression(), pairs, 0.2)


def _standardised(x_NI: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    order = np.random.default_rng(0).permutation(len(x_NI))
    train = order[: round(0.7 * len(x_NI))]
    return torch.from_numpy((x_NI - x_NI[train].mean(0)) / x_NI[train].std(0)).float(), order


def _convex(name: str, about: str, build: Any, task: Any, pairs: list[Any], rate: float) -> Setting:
    """A linear model with weight decay, trained on all rows at once until nothing moves."""
    rows = round(0.7 * len(pairs))
    recipe = Recipe(rate, 500, rows, "momentum", weight_decay=1e-2)
    return Setting(name, about, lambda seed: seeded(seed, build), task, pairs[:rows], pairs[rows:], recipe)
