"""What scores promise, done: rows removed or trained on once more, and how rankings hold across seeds and dampings.

`Q` queries, `N` rows. Scores are effects of one more copy on what a query measures (a log-probability), so that removing
the rows with the highest should raise the query's loss the most.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from whence.data.rows import Rows
from whence.errors import UsageError
from whence.evaluate.intervals import Interval, bootstrap
from whence.tasks import Classification
from whence.tasks.base import Batch
from whence.tasks.supervised import predict
from whence.validate.intervals import spearman
from whence.validate.settings import Setting
from whence.validate.trainer import Recipe, retrain

End = Literal["top", "bottom"]


@dataclass(frozen=True)
class Removed:
    """How losses changed when a share of the rows was left out and the model retrained."""

    share: float
    rows: int
    top: np.ndarray
    """Rise of each query's loss without the rows that raise its measurement the most, `[Q]`, nats."""
    bottom: np.ndarray
    """Without those that lower it the most, `[Q]`."""
    random: np.ndarray
    """Without rows drawn at random: the mean over the draws, `[Q]`."""

    @property
    def effects(self) -> dict[str, Interval]:
        """Means over queries, and how far top and bottom are from random (paired), with 95 % intervals."""
        parts = {"top": self.top, "bottom": self.bottom, "random": self.random}
        parts |= {"top - random": self.top - self.random, "bottom - random": self.bottom - self.random}
        return {name: bootstrap(values) for name, values in parts.items()}

    @property
    def beats_random(self) -> bool:
        """Whether leaving the top rows out raises losses more than leaving any out."""
        return self.effects["top - random"].low > 0

    def summary(self) -> list[str]:
        """For people."""
        found = self.effects
        lines = [
            f"without {self.share:.1%} ({self.rows} rows), {name}: loss {i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}] nats"
            for name, i in found.items()
        ]
        return [*lines, *([] if self.beats_random else ["the top rows matter no more than random ones"])]

    def table(self) -> list[dict[str, Any]]:
        """One row per condition."""
        return [{"share": self.share, "removed": name, **i.as_dict()} for name, i in self.effects.items()]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"share": self.share, "rows": self.rows, "effects": {n: i.as_dict() for n, i in self.effects.items()}}


def removal(
    setting: Setting, scores_QN: np.ndarray, share: float = 0.05, *, queries: int = 32, controls: int = 8, seed: int = 0
) -> Removed:
    """Retrain without each query's top rows, without its bottom rows, and without `controls` random draws.

    Order, batches and steps are those of the full training with this seed; the first `queries` queries are asked.
    """
    scores = check(scores_QN, setting)[:queries]
    rows = max(1, round(share * scores.shape[1]))
    asked, draw = len(scores), np.random.default_rng(seed)
    order = np.argsort(-scores, axis=1, kind="stable")
    random = [draw.choice(scores.shape[1], rows, replace=False) for _ in range(controls)]
    left_out = [*order[:, :rows], *order[:, -rows:], *random, []]
    losses_KQ = -measured_without(setting, left_out, seed)[:, :asked]
    own, rises_KQ = np.arange(asked), losses_KQ - losses_KQ[-1]
    return Removed(
        share, rows, rises_KQ[own, own], rises_KQ[asked + own, own], rises_KQ[2 * asked : 2 * asked + controls].mean(0)
    )


@dataclass(frozen=True)
class TailPatch:
    """How measurements changed by one gradient step on the rows that a method puts on top."""

    gains: np.ndarray
    """Rise of each query's measurement, `[Q]`, nats."""
    random: np.ndarray
    """The same after a step on random rows, `[Q]`."""
    k: int

    @property
    def effects(self) -> dict[str, Interval]:
        """Means over queries and their paired difference, with 95 % intervals."""
        parts = {"top": self.gains, "random": self.random, "top - random": self.gains - self.random}
        return {name: bootstrap(values) for name, values in parts.items()}

    @property
    def beats_random(self) -> bool:
        """Whether a step on the top rows helps more than one on random rows."""
        return self.effects["top - random"].low > 0

    def summary(self) -> list[str]:
        """For people."""
        return [
            f"one step on {self.k} rows, {name}: log p {i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}] nats"
            for name, i in self.effects.items()
        ]

    def table(self) -> list[dict[str, Any]]:
        """One row per condition."""
        return [{"rows": self.k, "trained on": name, **i.as_dict()} for name, i in self.effects.items()]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"k": self.k, "effects": {name: i.as_dict() for name, i in self.effects.items()}}


def tail_patch(
    setting: Setting,
    model: nn.Module,
    scores_QN: np.ndarray,
    k: int = 16,
    *,
    learning_rate: float = 1e-3,
    queries: int = 64,
    seed: int = 0,
) -> TailPatch:
    """One step of gradient descent from the trained `model` on the mean loss of each query's top `k` rows.

    Chang et al. 2024 call this the tail-patch score.
    """
    scores, draw = check(scores_QN, setting)[:queries], np.random.default_rng(seed)
    recipe = Recipe(learning_rate, 1, k)

    def gain(q: int, rows: np.ndarray) -> float:
        patched = retrain(model, setting.task, take(setting.train, rows), recipe, start="given", progress="")
        return float(patched.measurements(take(setting.queries, [q]))[0, 0])

    still = Recipe(1e-30, 1, k)  # a step of nothing
    before = retrain(model, setting.task, take(setting.train, range(k)), still, start="given", progress="")
    whole = before.measurements(setting.queries)[0].double().cpu().numpy()
    top = np.array([gain(q, np.argsort(-row, kind="stable")[:k]) for q, row in enumerate(scores)])
    random = np.array([gain(q, draw.choice(scores.shape[1], k, replace=False)) for q in range(len(scores))])
    return TailPatch(top - whole[: len(scores)], random - whole[: len(scores)], k)


@dataclass(frozen=True)
class Brittleness:
    """The smallest share of the rows whose removal flips a prediction."""

    shares: np.ndarray
    """Of each query that was predicted right; infinite where `limit` was not enough, `[q]`."""
    limit: float

    @property
    def median(self) -> float:
        """Over queries."""
        return float(np.median(self.shares)) if len(self.shares) else math.nan

    @property
    def flipped(self) -> float:
        """Share of the queries that flip within the limit."""
        return float(np.isfinite(self.shares).mean()) if len(self.shares) else math.nan

    def summary(self) -> list[str]:
        """For people."""
        return [f"{self.flipped:.0%} of {len(self.shares)} predictions flip without {self.limit:.0%} of the rows or fewer"]

    def table(self) -> list[dict[str, Any]]:
        """One row per query."""
        return [{"query": q, "share": float(share)} for q, share in enumerate(self.shares)]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        shares = [None if math.isinf(share) else float(share) for share in self.shares]
        return {"limit": self.limit, "flipped": self.flipped, "shares": shares}


def brittleness(
    setting: Setting, scores_QN: np.ndarray, *, limit: float = 0.3, rounds: int = 6, queries: int = 32, seed: int = 0
) -> Brittleness:
    """Find by bisection how many of a query's top rows must go until its class is no longer predicted (Ilyas et al. 2022).

    `rounds` halvings of `limit`; each retrains for all queries at once. Raises UsageError for a job without classes.
    """
    if not isinstance(setting.task, Classification):
        raise UsageError("Only classifiers have predictions that flip", given=type(setting.task).__name__)
    task = copy.copy(setting.task)
    task.measurement = lead
    margins = replace(setting, task=task)
    order = np.argsort(-check(scores_QN, setting)[:queries], axis=1, kind="stable")
    right = np.flatnonzero(measured_without(margins, [[]], seed)[0, : len(order)] > 0)
    low, high = np.zeros(len(right), int), np.full(len(right), max(1, round(limit * order.shape[1])))
    middle, flips = high.copy(), np.zeros(len(right), bool)
    for number in range(rounds + 1):
        if not len(right):
            break
        measured = measured_without(margins, [order[q, :k] for q, k in zip(right, middle, strict=True)], seed)
        flipped = measured[np.arange(len(right)), right] <= 0
        if number == 0:  # at the limit
            flips = flipped
        else:
            low, high = np.where(flipped, low, middle), np.where(flipped, middle, high)
        middle = np.maximum((low + high) // 2, 1)
    return Brittleness(np.where(flips, high / order.shape[1], np.inf), limit)


def lead(model: nn.Module, batch: Batch) -> torch.Tensor:
    """How far the label's logit is above the highest other, `[B]`: positive where it is the prediction."""
    logits, labels = predict(model, batch)
    own = labels.unsqueeze(-1)
    return (logits.gather(-1, own) - logits.scatter(-1, own, -torch.inf).amax(-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True)
class Agreement:
    """How alike two rankings of the rows are, query by query."""

    jaccard: np.ndarray
    """Of the two top `k`: shared rows over all rows in either, `[Q]`."""
    overlap: np.ndarray
    """Share of the top `k` that both have, `[Q]`."""
    rank_correlation: np.ndarray
    """Spearman's over all rows, `[Q]`."""
    k: int

    def summary(self) -> list[str]:
        """For people."""
        shared, ranked = bootstrap(self.jaccard), bootstrap(self.rank_correlation)
        return [
            f"top {self.k}: Jaccard {shared.mean:.2f} [{shared.low:.2f}, {shared.high:.2f}]",
            f"all rows: rank correlation {ranked.mean:.2f} [{ranked.low:.2f}, {ranked.high:.2f}]",
        ]

    def table(self) -> list[dict[str, Any]]:
        """One row per query."""
        return [
            {"query": q, "jaccard": float(j), "overlap": float(o), "rank_correlation": float(r)}
            for q, (j, o, r) in enumerate(zip(self.jaccard, self.overlap, self.rank_correlation, strict=True))
        ]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        parts = {"jaccard": self.jaccard, "overlap": self.overlap, "rank_correlation": self.rank_correlation}
        return {"k": self.k, **{name: bootstrap(values).as_dict() for name, values in parts.items()}}


def agreement(one_QN: np.ndarray, other_QN: np.ndarray, k: int = 20) -> Agreement:
    """Compare scores of two seeds, two dampings or two methods."""
    k = min(k, one_QN.shape[1])
    tops = [np.argsort(-scores, axis=1, kind="stable")[:, :k] for scores in (one_QN, other_QN)]
    shared = np.array([len(np.intersect1d(a, b)) for a, b in zip(*tops, strict=True)])
    return Agreement(shared / (2 * k - shared), shared / k, spearman(one_QN, other_QN), k)


@dataclass(frozen=True)
class Stability:
    """Agreement of the scores of models that differ in their seed alone, every pair of them."""

    pairs: dict[tuple[int, int], Agreement]

    @property
    def jaccard(self) -> float:
        """Mean over pairs and queries."""
        return float(np.mean([own.jaccard.mean() for own in self.pairs.values()]))

    @property
    def rank_correlation(self) -> float:
        """Mean over pairs and queries."""
        return float(np.mean([own.rank_correlation.mean() for own in self.pairs.values()]))

    def summary(self) -> list[str]:
        """For people."""
        return [f"{len(self.pairs)} pairs of seeds: Jaccard {self.jaccard:.2f}, rank correlation {self.rank_correlation:.2f}"]

    def table(self) -> list[dict[str, Any]]:
        """One row per pair."""
        return [
            {"seeds": pair, "jaccard": float(own.jaccard.mean()), "rank_correlation": float(own.rank_correlation.mean())}
            for pair, own in self.pairs.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"pairs": [{"seeds": list(pair), **own.as_json()} for pair, own in self.pairs.items()]}


def stability(scores: Sequence[np.ndarray], k: int = 20) -> Stability:
    """Compare the scores `[Q, N]` of every two seeds."""
    if len(scores) < 2:
        raise UsageError("Stability takes the scores of two seeds or more", given=str(len(scores)))
    return Stability({(a, b): agreement(scores[a], scores[b], k) for b in range(len(scores)) for a in range(b)})


@dataclass(frozen=True)
class DampingSweep:
    """How rankings change with the damping."""

    reference: float
    agreements: dict[float, Agreement]

    def summary(self) -> list[str]:
        """For people."""
        return [
            f"damping {damping:g} against {self.reference:g}: rank correlation {own.rank_correlation.mean():.2f}, "
            f"top {own.k} shared {own.overlap.mean():.0%}"
            for damping, own in self.agreements.items()
        ]

    def table(self) -> list[dict[str, Any]]:
        """One row per damping."""
        return [
            {
                "damping": damping,
                "rank_correlation": float(own.rank_correlation.mean()),
                "overlap": float(own.overlap.mean()),
                "k": own.k,
            }
            for damping, own in self.agreements.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"reference": self.reference, "dampings": {f"{d:g}": own.as_json() for d, own in self.agreements.items()}}


def damping_sweep(
    score_at: Callable[[float], np.ndarray],
    dampings: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0),
    *,
    reference: float = 0.1,
    k: int = 20,
) -> DampingSweep:
    """Compare the scores `[Q, N]` that `score_at(damping)` gives with those at the reference."""
    base = score_at(reference)
    return DampingSweep(reference, {damping: agreement(base, score_at(damping), k) for damping in dampings})


def measured_without(setting: Setting, left_out: Sequence[Sequence[int] | np.ndarray], seed: int = 0) -> np.ndarray:
    """Measurements `[K, Q]` after training without these rows, one set after the other, in order and batches of all rows."""
    weights_KN = np.ones((len(left_out), len(setting.train)))
    for own, rows in zip(weights_KN, left_out, strict=True):
        own[np.asarray(rows, int)] = 0
    replicas = retrain(
        setting.model(seed),
        setting.task,
        setting.train,
        replace(setting.recipe, seed=seed, order_seed=seed),
        weights_KN,
        progress="retrain without",
    )
    return replicas.measurements(setting.queries).double().cpu().numpy()


def take(data: Any, indices: Sequence[int] | np.ndarray | range) -> Any:
    """Some of the rows, in the form that they are in."""
    chosen = [int(index) for index in indices]
    return data.take(chosen) if isinstance(data, Rows) else [data[index] for index in chosen]


def check(scores_QN: np.ndarray, setting: Setting) -> np.ndarray:
    """The scores; raises UsageError where they are not of the setting's queries and rows."""
    expected = (len(setting.queries), len(setting.train))
    if scores_QN.shape != expected:
        raise UsageError("The scores are of other queries or rows", given=str(scores_QN.shape), accepted=str(expected))
    return scores_QN
