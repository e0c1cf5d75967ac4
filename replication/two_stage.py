"""Two trainings in a row, what comes of them where some pretraining rows are left out, and how well scores predict it.

A `World` is a pretraining and what its model is tuned to afterwards, with the same head or with a new one. The truth is
training again: both stages, with other weights on the pretraining rows, and the same order of rows, batches and steps. It is
kept in a small file with a hash, and is not trained again.

`K` retrainings, `N` pretraining rows, `Q` queries, `S` seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from whence.engine.stream import identify
from whence.errors import UsageError
from whence.linalg.stats import Interval, bootstrap_groups, spearman
from whence.progress import stage
from whence.store.digest import digest
from whence.tasks import Task
from whence.train.replay import Recorded
from whence.validate.bank import read_arrays, refuse_other, write_arrays
from whence.validate.settings import Setting
from whence.validate.trainer import Parameters, Recipe, Replicas, recorded, retrain

TOGETHER = 25
"""Retrainings between two saves."""


@dataclass(frozen=True)
class Tuning:
    """A second training, and what its model is asked."""

    name: str
    about: str
    model: Callable[[nn.Module], nn.Module]
    """From the pretrained model to the one that is tuned: its shared weights are the pretrained ones, others are drawn."""
    task: Task
    rows: Sequence[Any]
    queries: Sequence[Any]
    recipe: Recipe

    def describe(self) -> dict[str, Any]:
        """What decides the trained weights: JSON values."""
        data = {"rows": identify(self.rows)[1][:16], "queries": identify(self.queries)[1][:16]}
        return {"about": self.about, "recipe": {**vars(self.recipe), "betas": list(self.recipe.betas)}, **data}


@dataclass(frozen=True)
class World:
    """A pretraining, and the trainings that may follow it."""

    pretraining: Setting
    tunings: Mapping[str, Tuning]
    seed: int = 0
    """Of the first weights and of the order of the rows, of both stages."""

    def describe(self) -> dict[str, Any]:
        """What decides every number of a truth."""
        tunings = {name: tuning.describe() for name, tuning in self.tunings.items()}
        return {"pretraining": self.pretraining.describe(), "tunings": tunings, "seed": self.seed}

    def pretrained(self, weights_KN: np.ndarray) -> Replicas:
        """Pretrained models, each with its own counts of the rows."""
        own, seeds = self.pretraining, [self.seed] * len(weights_KN)
        return retrain(
            own.model(self.seed), own.task, own.train, own.recipe, weights_KN, seeds=seeds, order_seeds=seeds, progress=""
        )

    def tuned(self, tuning: Tuning, replicas: Replicas) -> Replicas:
        """Each of the pretrained models, tuned."""
        model, seeds = tuning.model(replicas.copy_of(0)), [self.seed] * len(replicas)
        start = onto(model, replicas)
        return retrain(model, tuning.task, tuning.rows, tuning.recipe, start=start, seeds=seeds, order_seeds=seeds, progress="")


def onto(model: nn.Module, replicas: Replicas) -> Parameters:
    """The parameters of `model` for each of the replicas: theirs by name, and what they lack as `model` has it."""
    count, found = len(replicas), {}
    for name, own in model.named_parameters():
        other = replicas.parameters.get(name)
        shared = other is not None and other.shape[1:] == own.shape
        found[name] = other if shared else own.detach().expand(count, *own.shape).clone()
    return found  # type: ignore[return-value]


# the truth


@dataclass(frozen=True)
class Truth:
    """Measurements of the tuned models after both trainings, with the pretraining rows counted `weights_KN` times."""

    weights_KN: np.ndarray
    changes: Mapping[str, np.ndarray]
    """By tuning: from the models of all rows, `[K, Q]`."""
    whole: Mapping[str, np.ndarray]
    """By tuning, of the models of all rows, `[Q]`."""
    about: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Processor time that the trainings took."""
        return float(self.about["seconds"])

    def predicted(self, scores_QN: np.ndarray) -> np.ndarray:
        """What scores (the effect of one more copy) predict for each retraining, `[Q, K]`."""
        return scores_QN.astype(np.float64) @ (self.weights_KN - 1).T


def make_truth(world: World, weights_KN: np.ndarray, path: Path) -> Truth:
    """Train both stages for each row of weights; opened where the file is finished, resumed where a killed run stopped.

    Raises StaleArtifact where the file is of another world, UsageError where it is damaged or a training diverges.
    """
    wanted = {**world.describe(), "weights": digest(np.ascontiguousarray(weights_KN).tobytes())}
    names, count = list(world.tunings), len(weights_KN) + 1
    unfinished = path.with_suffix(".unfinished.npz")
    if path.exists():
        return open_truth(path, world, weights_KN)
    found = {name: np.full((count, len(world.tunings[name].queries)), np.nan, np.float32) for name in names}
    seconds = 0.0
    if unfinished.exists():
        arrays, about = read_arrays(unfinished)
        refuse_other(unfinished, about, wanted)
        found, seconds = {name: arrays[name] for name in names}, float(about["seconds"])
    every_KN = np.concatenate([np.ones((1, weights_KN.shape[1])), weights_KN])  # the first is the model of all rows
    done = int((~np.isnan(found[names[0]][:, 0])).sum())
    path.parent.mkdir(parents=True, exist_ok=True)
    with stage(f"truth of {path.stem}", count, "retrainings of both stages", done=done) as advance:
        for first in range(done, count, TOGETHER):
            began = time.process_time()
            chosen = slice(first, min(first + TOGETHER, count))
            replicas = world.pretrained(every_KN[chosen])
            for name in names:
                tuning = world.tunings[name]
                found[name][chosen] = world.tuned(tuning, replicas).measurements(tuning.queries).numpy()
                if not np.isfinite(found[name][chosen]).all():
                    raise UsageError(f"Training {name} diverged", fix="a smaller learning rate in its recipe")
            seconds += time.process_time() - began
            write_arrays(unfinished, found, wanted | {"seconds": seconds})
            advance(len(found[names[0]][chosen]))
    write_arrays(path, found, wanted | {"seconds": round(seconds, 1)})
    unfinished.unlink(missing_ok=True)
    return open_truth(path, world, weights_KN)


def open_truth(path: Path, world: World, weights_KN: np.ndarray) -> Truth:
    """Read a finished truth; raises StaleArtifact where it is of another world or other weights, UsageError where damaged."""
    arrays, about = read_arrays(path)
    refuse_other(path, about, {**world.describe(), "weights": digest(np.ascontiguousarray(weights_KN).tobytes())})
    changes = {name: (found - found[:1])[1:].astype(np.float64) for name, found in arrays.items()}
    return Truth(weights_KN, changes, {name: found[0] for name, found in arrays.items()}, about)


def removals(world: World, subsets: int, share: float) -> np.ndarray:
    """Weights `[K, N]` that leave a random share of the rows out, 0, and count the others once."""
    rows, draw = len(world.pretraining.train), np.random.default_rng([world.seed, subsets])
    weights_KN = np.ones((subsets, rows))
    for weights_N in weights_KN:
        weights_N[draw.choice(rows, max(1, round(share * rows)), replace=False)] = 0.0
    return weights_KN


# the models that are scored


@dataclass(frozen=True)
class Trained:
    """A model of all rows, and the record of its training: rates, and the last checkpoint."""

    replicas: Replicas
    model: nn.Module
    training: Recorded


def pretrained(world: World) -> Trained:
    """The first stage with all rows."""
    own = world.pretraining
    replicas = world.pretrained(np.ones((1, len(own.train))))
    record = last_kept(own.model(world.seed), own.task, own.train, seeded(world, own.recipe))
    return Trained(replicas, replicas.copy_of(0), record)


def tuned(world: World, tuning: Tuning, before: Trained) -> Trained:
    """The second stage, from the first one's model."""
    replicas = world.tuned(tuning, before.replicas)
    record = last_kept(tuning.model(before.model), tuning.task, tuning.rows, seeded(world, tuning.recipe), given=True)
    return Trained(replicas, replicas.copy_of(0), record)


def seeded(world: World, recipe: Recipe) -> Recipe:
    """The recipe with the seeds of the world."""
    return replace(recipe, seed=world.seed, order_seed=world.seed)


def last_kept(model: nn.Module, task: Task, rows: Any, recipe: Recipe, given: bool = False) -> Recorded:
    """The training, repeated, with its last checkpoint."""
    steps = recipe.steps(len(rows))
    return recorded(model, task, rows, recipe, start="given" if given else "initial", checkpoints=[steps], progress="")


# agreement


def agreement(scores_QN: np.ndarray, truth: Truth, name: str) -> np.ndarray:
    """Spearman's correlation of each query over the retrainings, `[Q]`."""
    return spearman(truth.predicted(scores_QN), truth.changes[name].T)


def table_of(per_seed: Mapping[str, Sequence[np.ndarray]], reference: str) -> list[dict[str, Any]]:
    """A row per method: its mean over queries and seeds with an interval, and how far the reference is ahead, paired.

    Intervals draw seeds again, and queries within each.
    """
    rows: list[dict[str, Any]] = []
    for method, found in per_seed.items():
        row: dict[str, Any] = {"method": method, **interval(bootstrap_groups(list(found)), "agreement")}
        row["by seed"] = " ".join(f"{each.mean():.3f}" for each in found)
        if method != reference:
            gaps = [mine - other for mine, other in zip(per_seed[reference], found, strict=True)]
            row |= interval(bootstrap_groups(gaps), "reference ahead")
        rows.append(row)
    return sorted(rows, key=lambda row: -row["agreement"])


def interval(found: Interval, name: str) -> dict[str, float]:
    """Three columns of a table, rounded."""
    return {key: round(value, 4) for key, value in found.columns(name).items()}
