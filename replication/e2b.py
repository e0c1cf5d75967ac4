"""E2b, questions and a replaced head: whether multi-stage influence predicts what retraining both stages does.

    python -m replication.e2b --data ../shared/data

A language model is pretrained on openings of TinyStories, then tuned three times: to answer questions with the same head, to
tell two classes apart with a new head, and to do so with a frozen trunk. Pretraining rows are scored for held-out queries of
each. The truth is training both stages again without a random tenth of the pretraining rows, 24 times for each of three seeds,
which draw the rows, the weights and their order anew; it is kept in results/truths.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import whence
from benchmarks.command import run
from replication.tinystories import SMALL, TINY, make_world
from replication.two_stage import (
    Trained,
    Truth,
    Tuning,
    World,
    agreement,
    make_truth,
    pretrained,
    removals,
    table_of,
    tuned,
)
from whence.engine.point import Point
from whence.filter.bm25 import bm25_scores
from whence.filter.embeddings import nearness
from whence.fitting import Curvature
from whence.operators import BlockDiagonal, Identity
from whence.plots import panels
from whence.plots.style import save
from whence.plots.validation import interval_bars
from whence.progress import stage
from whence.scoring.score import score_points
from whence.settings import Score
from whence.stages import Stage, multistage
from whence.store.scores import row_text
from whence.validate.results import Result, Row

SUBSETS, SHARE, SEEDS = 24, 0.1, (0, 1, 2)
REFERENCE = "multi-stage, flow"
EVERY: dict[str, Any] = {"examples": "all", "eigenvalue_examples": "all"}
UNCHECKED = Score(check=False)
PUBLISHED_ALPHA = 1e-4
"""Of the published transport, a constant."""

Method = Callable[["Case"], "np.ndarray | None"]


@dataclass(frozen=True)
class Before:
    """The pretrained model of a world, and its curvature."""

    world: World
    trained: Trained
    curvature: Curvature

    @classmethod
    def of(cls, world: World) -> Before:
        """Train it, and fit the curvature on all rows."""
        own, found = world.pretraining, pretrained(world)
        return cls(world, found, whence.fit(found.model, own.task, own.train, modules="*", **EVERY))


class Case:
    """The models of a world and a tuning, and what methods share."""

    def __init__(self, before: Before, tuning: Tuning):
        self.world, self.tuning = before.world, tuning
        own, self.first, self.second = before.world.pretraining, before.trained, tuned(before.world, tuning, before.trained)
        self.before = Point(self.first.model, own.task, own.train)
        self.after = Point(self.second.model, tuning.task, tuning.rows)
        self.same_head = type(self.first.model) is type(self.second.model)
        self.pretraining = before.curvature
        self.finetuning = whence.fit(self.second.model, tuning.task, tuning.rows, modules="*", **EVERY)

    def staged(self, transport: str, damping: Any = 0.1, **own: Any) -> np.ndarray:
        """Multi-stage scores of the pretraining rows."""
        stages = [
            Stage("pretraining", self.before, self.pretraining, self.first.training),
            Stage("finetuning", self.after, self.finetuning, self.second.training, transport=transport, **own),  # type: ignore[arg-type]
        ]
        return multistage(stages, self.tuning.queries, damping=damping, check=False).stages["pretraining"].values

    def between(self, curvature: Curvature | None = None) -> np.ndarray | None:
        """Queries' gradients after both stages, through a curvature's inverse, and rows' gradients after the first.

        None where the curvature has no module of the trunk, which was frozen.
        """
        tuned = dict(self.second.model.named_modules())
        names = [name for name in self.pretraining.operator.names if name in tuned]
        if curvature is None:
            return score_points(self.after, self.before, self.tuning.queries, Identity(names), UNCHECKED).values
        if not (blocks := {name: curvature.blocks[name] for name in names if name in curvature.blocks}):
            return None
        inverse = BlockDiagonal(blocks, "fine-tuning").inverse(0.1)
        return score_points(self.after, self.before, self.tuning.queries, inverse, UNCHECKED).values

    def single(self) -> np.ndarray | None:
        """The usual influence of the tuned model, with the curvature of pretraining rows; None where their head is gone."""
        if not self.same_head:
            return None
        own = self.world.pretraining
        curvature = whence.fit(self.second.model, own.task, own.train, modules="*", **EVERY)
        return whence.score(
            self.second.model, own.task, self.tuning.queries, own.train, curvature.inverse(0.1), check=False
        ).values

    def dot_after(self) -> np.ndarray | None:
        """Gradient dot product with both at the tuned weights."""
        if not self.same_head:
            return None
        point = Point(self.second.model, self.world.pretraining.task, self.world.pretraining.train)
        return score_points(point, point, self.tuning.queries, Identity(self.pretraining.operator.names), UNCHECKED).values

    def alike(self) -> np.ndarray:
        """Cosines of the trunk's mean last hidden states, of the tuned model for queries and rows."""
        tokenizer, trunk = self.tuning.task.tokenizer, self.second.model.model  # type: ignore[attr-defined]
        asked, read = (embedded(trunk, tokenizer, texts) for texts in self.texts())
        return nearness(asked, read)

    def words(self) -> np.ndarray:
        """BM25."""
        return bm25_scores(*self.texts()).raw

    def texts(self) -> tuple[list[str], list[str]]:
        """Of queries and rows."""
        return [row_text(row) for row in self.tuning.queries], [row_text(row) for row in self.world.pretraining.train]


@torch.no_grad()
def embedded(trunk: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """The mean last hidden state of each text, `[n, D]`."""
    ids = (torch.tensor([tokenizer(text)["input_ids"]]) for text in texts)
    return torch.stack([trunk(each).last_hidden_state[0].mean(0) for each in ids]).numpy()


METHODS: dict[str, Method] = {
    REFERENCE: lambda case: case.staged("flow"),
    "multi-stage, flow, damping of training": lambda case: case.staged("flow", "training"),
    "multi-stage, flow, without the cross term": lambda case: None if case.same_head else case.staged("flow", head="none"),
    "multi-stage, proximal": lambda case: case.staged("proximal"),
    "multi-stage, inverse with alpha 1e-4 (as published)": lambda case: case.staged("inverse", proximal=PUBLISHED_ALPHA),
    "multi-stage, identity": lambda case: case.staged("identity"),
    "fine-tuning curvature only": lambda case: case.between(case.finetuning),
    "single-stage at the tuned weights": lambda case: case.single(),
    "gradient dot, rows before tuning": lambda case: case.between(),
    "gradient dot, rows at the tuned weights": lambda case: case.dot_after(),
    "representation similarity": lambda case: case.alike(),
    "BM25": lambda case: case.words(),
    "random": lambda case: np.random.default_rng(case.world.seed).random(
        (len(case.tuning.queries), len(case.world.pretraining.train))
    ),
}
"""Scores `[Q, N]` of the pretraining rows; None where a method does not apply."""


def replica(chosen: argparse.Namespace) -> Result:
    """Everything: truths, scores and how well they agree."""
    size, seeds, subsets = (TINY, SEEDS[:2], 5) if chosen.tiny else (SMALL, SEEDS, SUBSETS)
    agreements: dict[str, dict[str, list[np.ndarray]]] = {}
    told: list[Row] = []
    seconds = 0.0
    for seed in seeds:
        world = make_world(chosen.data, seed, size)
        truth = make_truth(world, removals(world, subsets, SHARE), chosen.out / "truths" / f"tinystories-{seed}.npz")
        seconds += truth.seconds
        before = Before.of(world)
        for name, tuning in world.tunings.items():
            with stage(f"scores of {name}, seed {seed}", len(METHODS), "methods") as advance:
                found = scored(Case(before, tuning), advance)
            told.append(described(name, truth, seed))
            for method, scores_QN in found.items():
                agreements.setdefault(name, {}).setdefault(method, []).append(agreement(scores_QN, truth, name))
    tables = {
        f"Agreement with retraining both stages: {name}": table_of(found, REFERENCE) for name, found in agreements.items()
    }
    save(figure(agreements), chosen.out / "e2b.png")
    first = world.pretraining
    tunings = ", ".join(f"{name}: {one.about}" for name, one in world.tunings.items())
    says = [
        f"Pretraining: {first.about}, {len(first.train)} rows; {tunings}",
        f"Truth: both stages trained again {subsets} times per seed ({len(seeds)} seeds) without a random {SHARE:.0%} of the "
        f"pretraining rows: {seconds / 60:.1f} minutes of processor time, kept in results/truths",
        "Agreement: Spearman's correlation over these retrainings between the sum of the scores left out and the change of a "
        "query's log p, mean over queries and seeds; 95 % intervals draw seeds, then queries in each, again",
        *verdicts(agreements),
    ]
    return Result(
        "e2b", {"about": first.about}, {**tables, "Worlds": told}, says, heading="E2b: questions, and a replaced head"
    )


def scored(case: Case, advance: Callable[[int], None]) -> dict[str, np.ndarray]:
    """What every method gives that applies."""
    found: dict[str, np.ndarray] = {}
    for name, method in METHODS.items():
        scores = method(case)
        if scores is not None:
            found[name] = scores
        advance(1)
    return found


def described(name: str, truth: Truth, seed: int) -> Row:
    """What a truth looks like."""
    whole, changes = truth.whole[name], truth.changes[name]
    return {
        "tuning": name,
        "seed": seed,
        "log p, mean": float(whole.mean()),
        "change, standard deviation": float(changes.std()),
    }


def verdicts(agreements: Mapping[str, Mapping[str, list[np.ndarray]]]) -> list[str]:
    """Of which methods the reference is ahead, and of which it is not."""
    says = []
    for name, found in agreements.items():
        rows = [row for row in table_of(found, REFERENCE) if "reference ahead" in row]
        own = next(row for row in table_of(found, REFERENCE) if row["method"] == REFERENCE)
        for what, chosen in (
            ("ahead of", [row for row in rows if row["reference ahead_low"] > 0]),
            ("not to be told from", [row for row in rows if row["reference ahead_low"] <= 0 <= row["reference ahead_high"]]),
            ("BEHIND", [row for row in rows if row["reference ahead_high"] < 0]),
        ):
            if chosen:
                listed = ", ".join(f"{row['method']} ({row['reference ahead']:+.3f})" for row in chosen)
                says.append(f"{name}: {REFERENCE} ({own['agreement']:.3f}) is {what} {listed}")
    return says


def figure(agreements: Mapping[str, Mapping[str, list[np.ndarray]]]) -> Any:
    """A panel of bars for each tuning."""
    drawn = [
        interval_bars(table_of(found, REFERENCE), "agreement", "Spearman correlation", name)
        for name, found in agreements.items()
    ]
    return panels.bars_figure(drawn)


def main(given: Sequence[str] | None = None) -> int:
    """See the module."""
    return run("replication.e2b", __doc__ or "", replica, given)


if __name__ == "__main__":
    raise SystemExit(main())
