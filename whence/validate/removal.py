"""What scores promise, done: rows are removed and the model retrained.

`Q` queries, `N` rows. Scores are effects of one more copy on what a query measures (a log-probability), so that removing
the rows with the highest should raise the query's loss the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from whence.errors import UsageError
from whence.linalg.stats import Interval, bootstrap
from whence.validate.settings import Setting
from whence.validate.trainer import retrain


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


def check(scores_QN: np.ndarray, setting: Setting) -> np.ndarray:
    """The scores; raises UsageError where they are not of the setting's queries and rows."""
    expected = (len(setting.queries), len(setting.train))
    if scores_QN.shape != expected:
        raise UsageError("The scores are of other queries or rows", given=str(scores_QN.shape), accepted=str(expected))
    return scores_QN
