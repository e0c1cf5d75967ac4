"""How well do scores predict retraining? Methods side by side on small settings, with intervals.

    make quality                                     (or: python -m benchmarks.quality --data ../shared/data)

Each setting has two retraining banks (random halves; small removals), made by this command and kept as small files under
benchmarks/results/banks, so that another method costs no retraining: every recipe of `whence.methods` is measured, with the
settings of `METHODS` or else those it has by default. Writes quality.json (one row per setting, method and measure), quality.md
and quality.png. Seconds are processor time of one thread; the price is in trainings of the setting.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import whence
from benchmarks import quality_report
from benchmarks.methods import in_place
from whence.errors import CoverageError, NumericalError, UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.tfidf import tfidf_scores
from whence.fitting import Curvature
from whence.linalg.stats import RANK_RESAMPLES, Interval, ends
from whence.methods.base import attribute, recipes
from whence.methods.damping import stopped_early
from whence.progress import Silent, Stage, report_to
from whence.store.files import atomic
from whence.train.replay import Recorded
from whence.validate.bank import Bank, Spec, make_bank, measured, refuse_other
from whence.validate.exact import gauss_newton, influence
from whence.validate.lds import LDS, ceiling, lds
from whence.validate.problem import Problem
from whence.validate.settings import Setting, setting
from whence.validate.trainer import Replicas, recorded

RESULTS = Path(__file__).parent / "results"

SETTINGS = ("concrete", "energy", "digits", "text", "lm")

SPECS = {
    "removals": Spec("removals", subsets=192, seeds=(0, 1), share=0.03),
    "halves": Spec("halves", subsets=128, seeds=(0, 1)),
}

OWN_SPECS = {"lm": {"removals": Spec("removals", subsets=192, share=0.05), "halves": Spec("halves", subsets=100)}}
"""Where a setting's differ: fewer rows and noisier training, so that more is removed at a time."""

CHECKPOINTS = 6
"""Of the training that methods look back at, evenly spread."""

DEAR, FEW = {"lm": ("cg", "lissa", "fastif")}, 16
"""Methods that take most of an hour in a setting with more than `FEW` queries: measured where they are named (--methods), else
their rows are kept as they are."""

EXACT = ("concrete", "energy", "diabetes")
"""Settings whose Gauss-Newton matrix can be solved with exactly in seconds (by its dual form, one row per number predicted)."""

REFERENCE, WORDS = "EK-FAC, damping 0.1", "BM25"
CEILING = "retraining, another seed (ceiling)"

TOLERANCE = 0.01
"""Of a subset that is retrained as a check: its largest difference, as a share of the spread over subsets."""

Row = dict[str, Any]


class Work:
    """A setting with trained models, and what methods share: each part's seconds are counted with every method that uses it."""

    def __init__(self, chosen: Setting, seeds: Sequence[int] = (0, 2)):
        self.setting = chosen
        self.replicas: Replicas = chosen.trained(seeds)
        self.models: list[nn.Module] = [self.replicas.copy_of(k) for k in range(len(seeds))]
        self._made: dict[tuple[Any, ...], tuple[Any, float]] = {}
        self.seconds, self.training_seconds = 0.0, 0.0
        self.refused: dict[str, str] = {}
        """Methods that do not apply, and why."""

    def shared(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, made once; its seconds are added to those of the method at work."""
        if key not in self._made:
            before = time.process_time()
            self._made[key] = (make(), time.process_time() - before)
            spent = 0.0
        else:
            spent = self._made[key][1]
        self.seconds += spent
        return self._made[key][0]

    def curvature(self, method: str, k: int, draws: int = 1) -> Curvature:
        """The curvature of model `k`, fitted on all rows with so many labels each."""
        own, model = self.setting, self.models[k]
        settings: dict[str, Any] = {"examples": "all", "eigenvalue_examples": "all", "modules": own.modules, "draws": draws}
        return self.shared(("fit", method, k, draws), lambda: whence.fit(model, own.task, own.train, method=method, **settings))

    @functools.cached_property
    def training(self) -> Recorded:
        """The training of the first model, repeated with checkpoints along the way: what methods that look back at it read."""
        own = self.setting
        steps = own.recipe.steps(len(own.train))
        kept = sorted({round(steps * part / CHECKPOINTS) for part in range(1, CHECKPOINTS + 1)})
        before = time.process_time()
        found = recorded(self.models[0], own.task, own.train, own.recipe, checkpoints=kept, progress="")
        self.training_seconds = time.process_time() - before
        return found

    def scores(self, recipe: str, k: int = 0, draws: int = 1, **settings: Any) -> np.ndarray:
        """Values of a method of the registry with model `k`; factors that it would fit are fitted once for all methods."""
        uses = "factors" in recipes()[recipe].needs + recipes()[recipe].uses
        kind = recipe if recipe in ("kfac", "shampoo", "diagonal") else "ekfac"
        factors = self.curvature(kind if uses else "identity", k, draws)  # the identity's say which modules are tracked
        own = self.setting
        given = (self.models[k], own.task, own.queries, own.train)
        found = attribute(recipe, *given, factors=factors, training=self.training, **settings)
        return in_place(found, own.train)

    def measure(self, method: Callable[[Work], np.ndarray | None]) -> tuple[np.ndarray | None, float]:
        """A method's scores `[Q, N]` and its seconds, with those of what it shares."""
        self.seconds, before = 0.0, time.process_time()
        scores = method(self)
        return scores, time.process_time() - before + self.seconds


Method = Callable[[Work], "np.ndarray | None"]


def by(recipe: str, *, seeds: int = 1, draws: int = 1, **settings: Any) -> Method:
    """A method of the registry with settings of its own; the mean over the models of several seeds.

    None where it does not apply to a setting, which is said with the reason.
    """

    def scores(work: Work) -> np.ndarray | None:
        try:
            return np.mean([work.scores(recipe, k, draws, **settings) for k in range(seeds)], axis=0)
        except (UsageError, CoverageError, NumericalError) as error:
            work.refused[recipe] = error.what
            return None

    scores.__name__ = recipe
    return scores


def exact(damping: float | None) -> Method:
    """The damped Gauss-Newton matrix of all weights, solved exactly in float64; no damping: that of the training."""

    def method(work: Work) -> np.ndarray | None:
        own = work.setting
        absolute = of_training(own) if damping is None else None
        if own.name not in EXACT or (damping is None and absolute is None):
            return None
        problem = work.shared(("problem",), lambda: Problem(work.models[0], own.task, own.train, own.queries, own.modules))
        curvature = work.shared(("exact",), lambda: gauss_newton(problem))
        return influence(problem, curvature.inverse(curvature.damping(damping or 0.0, absolute).absolute))[0]

    return method


def of_training(own: Setting) -> float | None:
    """What gradient descent that stops early damps with: one over the sum of its learning rates, and the weight decay.

    With momentum a rate counts 1 / (1 - momentum) times. None for AdamW, whose steps are scaled weight by weight.
    """
    recipe, steps = own.recipe, own.recipe.steps(len(own.train))
    if recipe.optimizer == "adamw":
        return None
    momentum = recipe.momentum if recipe.optimizer == "momentum" else 0.0
    return stopped_early([recipe.rate(step, steps) for step in range(steps)], recipe.weight_decay, momentum)


def words(recipe: str, measure: Callable[[Sequence[str], Sequence[str]], whence.Scores]) -> Method:
    """A measure on words, for settings of texts: their rows are token ids, and these are what was written."""

    def scores(work: Work) -> np.ndarray | None:
        return measure(*work.setting.texts).raw if work.setting.texts else None

    scores.__name__ = recipe
    return scores


METHODS: dict[str, Method] = {
    "exact Gauss-Newton, damping 0.1": exact(0.1),
    "exact Gauss-Newton, damping of training": exact(None),
    "EK-FAC, damping 0.01": by("ekfac", damping=0.01),
    "EK-FAC, damping 0.1": by("ekfac"),
    "EK-FAC, damping 1": by("ekfac", damping=1.0),
    "EK-FAC, damping 10": by("ekfac", damping=10.0),
    "EK-FAC, damping of training": by("ekfac", damping="training"),
    "EK-FAC, damping 0.1, 2 seeds": by("ekfac", seeds=2),
    "EK-FAC, damping 0.1, 4 draws": by("ekfac", draws=4),
    "Shampoo, damping 0.1": by("shampoo"),
    "Shampoo, damping 0.1, 4 draws": by("shampoo", draws=4),
    "K-FAC, damping 0.1": by("kfac"),
    "diagonal, damping 0.1": by("diagonal"),
    "CG, damping 0.1": by("cg", tolerance=1e-3),
    "CG, damping of training": by("cg", tolerance=1e-3, damping="training"),
    "ASTRA, damping of training": by("astra", damping="training"),
    "mean over checkpoints of EK-FAC": by("checkpoint-mean"),
    "mirrored run": by("mirror"),
    "mirrored run, eps .02": by("mirror", eps=0.02),
    "mirrored run, both halves": by("mirror", share=0.5, complement=True),
    "mirrored run, both halves, + .35 EK-FAC": by("mirror", share=0.5, complement=True, ekfac=0.35),
    "gradient dot": by("gradient-dot"),
    "gradient cosine": by("gradient-cosine"),
    "representation similarity": by("representation-similarity"),
    "BM25": words("bm25", bm25_scores),
    "TF-IDF": words("tfidf", tfidf_scores),
    "gradient norm": by("gradient-norm"),
    "random": by("random"),
}
"""A name, and a function from `Work` to scores `[Q, N]` (None where it doesn't apply).

Methods of the registry that are not here come after these, by `every_method`, with the settings that they have by default.
"""


def every_method() -> dict[str, Method]:
    """`METHODS`, and each method of the registry that is not among them."""
    there = {method.__name__ for method in METHODS.values()}
    return METHODS | {recipe.title: by(name) for name, recipe in recipes().items() if name not in there}


@dataclass(frozen=True)
class Measure:
    """What scores are held against."""

    kind: str
    seeds: int = 0
    correlation: Callable[[np.ndarray, Bank, int], LDS] = lds

    def of(self, scores: np.ndarray, bank: Bank) -> LDS:
        """Of scores `[Q, N]` with what the bank measured."""
        return self.correlation(scores, bank, self.seeds)


MEASURES = {
    "lds removals": Measure("removals", 0),
    "lds removals, other seed": Measure("removals", 1),
    "lds halves": Measure("halves", 0),
    "lds halves, other seed": Measure("halves", 1),
}
"""Banks with the seed of the attributed model, and with another: what a user who retrains sees."""


def held_out_slope(scores_QN: np.ndarray, bank: Bank, seed: int = 0) -> Interval:
    """What was measured, regressed on calibrated predictions of it: 1 where sizes are right, with a 95 % interval over queries.

    The gain is made on half of the queries and half of the subsets (least squares through 0), and applied to the other queries
    on the other subsets; the regression is over all four ways to do so.
    """
    counts_KN = bank.spec.weights(bank.kept) - 1
    predicted_QK, measured_QK = np.asarray(scores_QN, np.float64) @ counts_KN.T, bank.of(seed).T.astype(np.float64)
    both, own = (
        np.array([(predicted_QK * other)[:, half::2].sum(1) for half in (0, 1)]) for other in (measured_QK, predicted_QK)
    )

    def slope(drawn: Sequence[np.ndarray]) -> np.ndarray:
        """Of queries with even places and with odd ones, `[R, Q / 2]` each."""
        found = [[(both[half][queries].sum(1), own[half][queries].sum(1)) for queries in drawn] for half in (0, 1)]
        top = bottom = np.zeros(len(drawn[0]))
        for half, side in ((0, 0), (0, 1), (1, 0), (1, 1)):
            (made_both, made_own), (held_both, held_own) = found[half][side], found[1 - half][1 - side]
            gain = made_both / np.maximum(made_own, np.finfo(float).tiny)
            top, bottom = top + gain * held_both, bottom + gain**2 * held_own
        return top / np.maximum(bottom, np.finfo(float).tiny)

    sides, draw = [np.arange(len(predicted_QK))[side::2] for side in (0, 1)], np.random.default_rng(0)
    drawn = [side[draw.integers(len(side), size=(RANK_RESAMPLES, len(side)))] for side in sides]
    return Interval(float(slope([side[None] for side in sides])[0]), *ends(slope(drawn)), len(predicted_QK))


SLOPES = {f"held-out slope, {kind}": kind for kind in SPECS}
"""Measures of size beside those of order."""


def evaluate(
    chosen: Setting, banks: Mapping[str, Bank], methods: dict[str, Method] = METHODS, measures: Mapping[str, Measure] = MEASURES
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of one setting: every method's LDS on every measure, and how far the reference is ahead of it (paired).

    Then what is known of the setting: the seconds of one training, and why some methods do not apply.
    """
    work, found, slopes, seconds = Work(chosen), {}, {}, {}
    unit = work.training and work.training_seconds  # made before anything is timed
    for name, method in methods.items():
        scores, took = work.measure(method)
        if scores is None:
            if method.__name__ in work.refused:
                print(f"  {name:36s} does not apply: {work.refused[method.__name__]}", flush=True)
            continue
        seconds[name] = took
        scores = np.nan_to_num(scores, nan=0.0)  # rows that a method did not score say nothing
        found[name] = {measure: each.of(scores, banks[each.kind]) for measure, each in measures.items()}
        slopes[name] = {measure: held_out_slope(scores, banks[kind]) for measure, kind in SLOPES.items() if kind in banks}
        print(f"  {name:36s} {' '.join(f'{value.mean:7.3f}' for value in found[name].values())}  {took:6.2f} s", flush=True)
    rows = []
    for name, values in found.items():
        for measure, value in values.items():
            rows.append(row(chosen.name, name, measure, value.interval, seconds[name], unit))
            for other in (REFERENCE, WORDS):
                if name != other and other in found:
                    gap = found[other][measure].minus(value)
                    ahead = f"{other} ahead, {measure.removeprefix('lds ')}"
                    rows.append(row(chosen.name, name, ahead, gap, seconds[name], unit))
        for measure, slope in slopes[name].items():
            rows.append(row(chosen.name, name, measure, slope, seconds[name], unit))
    for measure, each in measures.items():
        bank = banks[each.kind]
        if each.correlation is lds and len(bank.spec.seeds) > 1:
            half = bank.seconds / len(bank.spec.seeds)
            rows.append(row(chosen.name, CEILING, measure, ceiling(bank, each.seeds).interval, half, unit))
    return rows, {"training_seconds": round(unit, 2), "refused": work.refused}


def row(name: str, method: str, measure: str, value: Interval, seconds: float, training: float) -> Row:
    """One line of quality.json."""
    return {
        "setting": name,
        "method": method,
        "measure": measure,
        "value": round(value.mean, 4),
        "ci_low": round(value.low, 4),
        "ci_high": round(value.high, 4),
        "seconds": round(seconds, 3),
        "trainings": round(seconds / training, 3),
    }


def recheck(bank: Bank, own: Setting, subset: int = 0, seed: int = 0) -> float:
    """Retrain one subset again, alone, with the seed at this place.

    The largest difference from the bank over queries, as a share of the query's spread over subsets. Raises StaleArtifact
    where the bank is of another setting.
    """
    refuse_other("The bank", bank.about, {"setting": own.describe()})
    weights = np.stack([bank.spec.weights(bank.kept)[subset], np.ones(bank.kept.shape[1])])
    again_2Q, _ = measured(own, weights, bank.spec.seeds[seed])
    spread_Q = np.maximum(bank.changes[seed].std(0), np.finfo(np.float32).tiny)
    return float((np.abs(again_2Q[0] - again_2Q[1] - bank.changes[seed, subset]) / spread_Q).max())


class Printed(Silent):
    """Shows how far the retraining is, a line per save."""

    def advance(self, stage: Stage) -> None:
        """Say what is done and what time is left."""
        if stage.name.startswith(("bank", "truth")) and stage.left is not None:
            print(f"  {stage.name}: {stage.done}/{stage.total}, {stage.left / 60:.1f} min left", flush=True)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with uci, textcls, tinystories")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="some of them, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for quality.* and banks/")
    parser.add_argument("--methods", help="some of them, by name, separated by semicolons; the others' rows are kept")
    parser.add_argument("--slopes", action="store_true", help="write held-out slopes only; all other rows are kept")
    parser.add_argument("--recheck", action="store_true", help="retrain one subset of every bank again first")
    return parser.parse_args(given)


def _dear(own: Setting, methods: Mapping[str, Method]) -> set[str]:
    """The methods that are measured in this setting only where they are named."""
    kinds = DEAR.get(own.name, ()) if len(own.queries) > FEW else ()
    return {name for name, method in methods.items() if method.__name__ in kinds}


def _chosen(methods: dict[str, Method] | None, wanted: str | None) -> dict[str, Method]:
    """The methods to measure; those that are wanted come with the two that all are held against."""
    found = every_method() if methods is None else methods
    if wanted is None:
        return found
    names = [name.strip() for name in wanted.split(";")]
    if unknown := set(names) - set(found):
        raise UsageError(f"There is no method {min(unknown)!r}", accepted="; ".join(found))
    return {name: method for name, method in found.items() if name in (REFERENCE, WORDS, *names)}


def main(given: Sequence[str] | None = None, specs: dict[str, Spec] = SPECS, methods: dict[str, Method] | None = None) -> int:
    """Make what banks are missing, measure every method, write the results."""
    chosen = arguments(given)
    torch.set_num_threads(1)
    started, rows, about, dear = time.perf_counter(), [], {}, set[tuple[str, str]]()
    for name in chosen.settings.split(","):
        own = setting(name, chosen.data)
        print(f"{name}: {own.about}", flush=True)
        wanted = (OWN_SPECS.get(name) if specs is SPECS else None) or specs
        with report_to(Printed()):
            banks = {kind: make_bank(own, spec, chosen.out / "banks" / f"{name}-{kind}.npz") for kind, spec in wanted.items()}
        for kind, bank in banks.items() if chosen.recheck else ():
            subset = len(bank.kept) // 2
            difference = recheck(bank, own, subset)
            print(f"  {kind}: subset {subset} retrained again differs by {difference:.1e} of the spread", flush=True)
            if difference > TOLERANCE:
                print("  the bank is not what this machine trains; delete it and make it again")
                return 1
        named = _chosen(methods, chosen.methods)
        if chosen.methods is None and (skipped := _dear(own, named)):
            print(f"  measured by name only (--methods), an hour and more: {', '.join(sorted(skipped))}", flush=True)
            named = {method: by for method, by in named.items() if method not in skipped}
            dear |= {(own.name, method) for method in skipped}
        measured_rows, known = evaluate(own, banks, named)
        rows += [row for row in measured_rows if not chosen.slopes or row["measure"] in SLOPES]
        about[own.name] = {
            **known,
            "about": own.about,
            "parameters": own.describe()["parameters"],
            "rows": len(own.train),
            "queries": len(own.queries),
            "subsets": {kind: bank.spec.subsets for kind, bank in banks.items()},
            "bank_seconds": round(sum(bank.seconds for bank in banks.values()), 1),
        }
    part = chosen.methods or chosen.slopes or chosen.settings != ",".join(SETTINGS)
    if part or dear:
        rows, about = _with_others(chosen.out / "quality.json", rows, {} if chosen.slopes else about, None if part else dear)
    for name, method in dear - {(row["setting"], row["method"]) for row in rows}:
        about[name]["refused"][method] = "takes more than an hour: measured only where it is named (--methods), and was not yet"
    write(chosen.out, rows, about)
    print(f"{time.perf_counter() - started:.0f} s in all; see {chosen.out / 'quality.md'}")
    return 0


def _with_others(
    file: Path, rows: list[Row], about: dict[str, Any], only: Collection[tuple[str, str]] | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """With what the file has of other settings, methods and measures, or `only` of these settings' methods."""
    if not file.exists():
        return rows, about
    before = json.loads(file.read_text(encoding="utf-8"))
    again = {(row["setting"], row["method"], row["measure"]) for row in rows}
    others = [row for row in before["rows"] if (row["setting"], row["method"], row["measure"]) not in again]
    others = [row for row in others if only is None or (row["setting"], row["method"]) in only]
    known = before["settings"] | about
    for name in set(about) & set(before["settings"]) if only is None else ():
        known[name] = about[name] | {"refused": before["settings"][name].get("refused", {}) | about[name]["refused"]}
    return [row for name in known for row in [*others, *rows] if row["setting"] == name], known


def write(folder: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """quality.json, quality.md and quality.png."""
    made = {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()}
    texts = {
        "quality.json": json.dumps({"made": made, "settings": about, "rows": list(rows)}, indent=1) + "\n",
        "quality.md": quality_report.markdown(rows, about),
    }
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    quality_report.plot(rows, folder / "quality.png")


if __name__ == "__main__":
    raise SystemExit(main())
