"""The linear datamodelling score (Park et al. 2023, section 3): whether scores predict what retraining on subsets does.

For a query, a method's prediction for a subset is the sum of its scores over the rows kept; the LDS is Spearman's correlation
between predictions and measurements over subsets, averaged over queries. Scores say how one more copy of a row would move
the measurement, so that what is kept adds up: the right sign gives a positive LDS.

`Q` queries, `N` rows, `K` subsets, `R` resamples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from whence.errors import UsageError
from whence.linalg.stats import Interval, ends, pearson, resampled_pearson, resampled_spearman, spearman
from whence.validate.bank import Bank, Spec, make_bank
from whence.validate.methods import scored
from whence.validate.results import Result
from whence.validate.settings import Setting

METHODS = ("ekfac", "kfac", "diagonal", "identity", "cosine")
CEILING = "another seed (noise ceiling)"


def check_lds(
    setting: Setting,
    out: str | Path,
    *,
    kind: Literal["halves", "removals"] = "removals",
    subsets: int = 64,
    damping: float = 0.1,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
) -> Result:
    """Retrain on subsets, kept in the folder `out` as a bank, and see how well each method's sums predict what happens."""
    began = time.monotonic()
    spec = Spec(kind, subsets=subsets, seeds=(seed, seed + 1))
    bank = make_bank(setting, spec, Path(out) / f"bank-{kind}.npz")
    model = setting.trained((seed,)).copy_of(0)
    found = {name: lds(scores(damping), bank) for name, scores in scored(setting, model, methods, seed).items()}
    (first, own), *others = found.items()
    noise, at = ceiling(bank).interval, own.interval
    verdict = "" if own.beats_chance else ": no better than chance"
    behind = [name for name, other in others if own.minus(other).low > 0]
    what = "half of the rows" if kind == "halves" else "a few rows"
    says = [
        f"{setting.about}: retrained on {subsets} subsets, each without {what}",
        f"{first}: LDS {at.mean:.3f} [{at.low:.3f}, {at.high:.3f}]{verdict}; training from another seed predicts "
        f"the same to {noise.mean:.3f}",
        f"significantly (paired 95 %) better than: {', '.join(behind) or 'none of the others'}",
    ]
    rows = [*compare(found, first), {"method": CEILING, "lds": noise.mean, "low": noise.low, "high": noise.high}]
    about = {"setting": setting.name, "about": setting.about, "kind": kind, "subsets": subsets}
    return Result("lds", about | {"seconds": time.monotonic() - began}, {f"LDS, {kind}": rows}, says)


@dataclass(frozen=True)
class LDS:
    """Rank correlation of predictions with what was measured, and how certain it is."""

    per_query: np.ndarray
    """`[Q]`."""
    draws: np.ndarray
    """The mean over queries in resamples of queries and subsets, `[R]`; those of two methods are paired."""

    @property
    def mean(self) -> float:
        """Over queries."""
        return float(self.per_query.mean())

    @property
    def interval(self) -> Interval:
        """The mean with its 95 % interval."""
        return Interval(self.mean, *ends(self.draws), len(self.per_query))

    @property
    def beats_chance(self) -> bool:
        """Whether the interval lies above zero: what scores must do before anyone believes them."""
        return self.interval.low > 0

    def minus(self, other: LDS) -> Interval:
        """The difference to another method on the same bank, resampled together."""
        return Interval(self.mean - other.mean, *ends(self.draws - other.draws), len(self.per_query))


def predictions(scores_QN: np.ndarray, bank: Bank) -> np.ndarray:
    """The sum of the scores over the rows that each subset keeps, `[Q, K]`."""
    if scores_QN.shape != (bank.changes.shape[2], bank.kept.shape[1]):
        raise UsageError(
            "The scores are of other queries or rows than the bank's",
            given=str(scores_QN.shape),
            accepted=str((bank.changes.shape[2], bank.kept.shape[1])),
        )
    if not np.isfinite(scores_QN).all():
        raise UsageError("Scores must be finite", given=f"{int((~np.isfinite(scores_QN)).sum())} that are not")
    # what is left out: the same ranking as what is kept, without losing small differences in a large sum
    return -(scores_QN.astype(np.float64) @ (~bank.kept).T.astype(np.float64))


def lds(scores_QN: np.ndarray, bank: Bank, seeds: int | slice = 0) -> LDS:
    """The LDS of scores `[Q, N]` on the bank.

    `seeds` are those whose measurements count, by place: 0 is the same training as that of the attributed model, 1 another,
    `slice(None)` the mean over all.
    """
    return correlate(predictions(np.asarray(scores_QN), bank), bank.of(seeds).T)


def leave_one_out(scores_QN: np.ndarray, bank: Bank, seeds: int | slice = 0) -> LDS:
    """The same by Pearson's correlation, as leaving out one row at a time is judged (Koh & Liang 2017, figure 2).

    The bank's subsets lack one row each; 0 for a query whose scores or effects are constant.
    """
    predicted_QK, measured_QK = predictions(np.asarray(scores_QN), bank), bank.of(seeds).T.astype(np.float64)
    return LDS(np.nan_to_num(pearson(predicted_QK, measured_QK)), resampled_pearson(predicted_QK, measured_QK))


def ceiling(bank: Bank, seed: int = 0) -> LDS:
    """The noise ceiling: how well the same subsets, retrained from other weights in another order, predict this seed's.

    No method that doesn't know the order of the rows can be expected to do better on the measurements of one seed.
    """
    others = [s for s in range(len(bank.changes)) if s != seed]
    if not others:
        raise UsageError("A ceiling takes a second seed", given="a bank of one seed", fix="Spec(seeds=(0, 1))")
    return correlate(bank.changes[others].mean(0).T, bank.changes[seed].T)


def correlate(predicted_QK: np.ndarray, measured_QK: np.ndarray) -> LDS:
    """Spearman's correlation of each query, and resamples of the mean."""
    return LDS(spearman(predicted_QK, measured_QK), resampled_spearman(predicted_QK, measured_QK))


def compare(methods: dict[str, LDS], reference: str) -> list[dict[str, Any]]:
    """Each method's LDS, and how far the reference is above it, with 95 % intervals; the best first."""
    rows = []
    for name, own in sorted(methods.items(), key=lambda pair: -pair[1].mean):
        found, gap = own.interval, methods[reference].minus(own)
        difference = {} if name == reference else {"behind": gap.mean, "behind_low": gap.low, "behind_high": gap.high}
        rows.append({"method": name, "lds": found.mean, "low": found.low, "high": found.high, **difference})
    return rows
