"""Several methods on one run: the same rows and queries, what each costs, and how well it agrees with a reference.

Each method's scores are in RUN/methods/NAME, claimed and resumed as any scores are; `COST` beside them is what they took.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from whence import dist
from whence.config import Resolved
from whence.errors import UsageError
from whence.escapes import command
from whence.fitting import open_factors
from whence.linalg.stats import Interval
from whence.methods.base import Request, recipe_named, request_scores
from whence.pipeline.lock import Lock
from whence.pipeline.stages import uses_factors
from whence.pipeline.work import Workshop
from whence.plots.methods import Dot, quality_against_cost
from whence.plots.style import save
from whence.progress import Reporter, Stage, current, note, report_to
from whence.store.files import write_json
from whence.store.intact import MANIFEST, read_json
from whence.store.scores import Scores
from whence.validate.agreement import agreement
from whence.validate.bank import Bank, open_bank
from whence.validate.lds import lds

FOLDER, COST = "methods", "cost.json"

ONE_OFF = {"covariance", "eigenvectors", "eigenvalues", "index", "trace"}
"""Stages whose work serves any further queries."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a method took: once, whatever is asked, and for its queries and rows."""

    one_off: float
    asked: float
    pairs: int
    resumed: bool = False
    """Whether an earlier run did a part, whose seconds are not among these."""

    @property
    def per_pair(self) -> float:
        """Of a query and a row."""
        return self.asked / self.pairs


@dataclass(frozen=True)
class Compared:
    """A method on the run, beside the reference and retraining."""

    name: str
    scores: Scores
    cost: Cost
    means: dict[str, float]
    """Spearman's correlation and overlap with the reference, in the mean over queries."""
    ends: tuple[float, float]
    """Of the correlation, 95 %."""
    retraining: Interval | None = None
    """LDS on the run's retraining bank."""

    def as_json(self) -> dict[str, Any]:
        """Everything but the scores; seconds, and NaN as None."""
        about = self.scores.about
        seconds = {"one_off_s": self.cost.one_off, "asked_s": self.cost.asked, "per_pair_s": self.cost.per_pair}
        numbers = {**self.means, "spearman_low": self.ends[0], "spearman_high": self.ends[1]}
        return {
            "method": self.name,
            **{name: float(value) if np.isfinite(value) else None for name, value in numbers.items()},
            "lds": self.retraining.as_dict() if self.retraining else None,
            **seconds,
            "resumed": self.cost.resumed,
            "unit": self.scores.unit,
            **{name: about.get(name) for name in ("operator", "source")},
        }


def compare_methods(
    resolved: Resolved,
    methods: Sequence[str],
    *,
    reference: str = "ekfac",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    bank: str | Path | None = None,
    rerun: bool = False,
) -> list[Compared]:
    """Score the questions of a finished run by each method, with `settings` of its own by its name.

    `bank` is the file of a retraining bank of the same rows and queries; without one, a file `bank-*.npz` in the run is taken.

    Raises UsageError where there is no such method or run, before anything is scored; and what the methods raise.
    """
    if not methods:
        raise UsageError("No method is given.", accepted="names of whence methods ls, joined by commas")
    names = list(dict.fromkeys([*methods, reference]))
    given = {name: recipe_named(name).own((settings or {}).get(name, {}), typed=True) for name in names}
    if unused := [name for name in settings or {} if name not in names]:
        raise UsageError(f"{unused[0]} is not compared, and has settings.", accepted=", ".join(names))
    request = request_of(Workshop.of(resolved))
    for name in names:
        recipe_named(name).refuse_without(request)
    retrained = bank_of(resolved.out, bank)
    found: dict[str, tuple[Scores, Cost]] = {}
    for number, name in enumerate(names, 1):
        note(f"{number}/{len(names)} {name}")
        found[name] = score_by(name, given[name], request, resolved.out, rerun=rerun)
    return [_compared(name, *found[name], found[reference][0], retrained) for name in names]


def request_of(shop: Workshop) -> Request:
    """The questions and rows of a run, with the factors and the training that it has."""
    wanted = {"answers": shop.out / "generate" / "generated.json"} if shop.config.score.queries == "generated" else {}
    wanted |= {"factors": shop.out / "factors" / MANIFEST} if uses_factors(shop.config) else {}
    if lacking := [what for what, file in wanted.items() if not file.is_file()]:
        raise UsageError(
            f"{shop.out} has no {' and no '.join(lacking)} yet.",
            accepted="the folder of a finished run",
            fix=command("whence", "run", shop.out / "whence.yaml"),
        )
    request = shop.request
    if request.factors is None and (shop.out / "factors" / MANIFEST).is_file():
        request = replace(request, factors=open_factors(shop.out / "factors"), modules=None)
    if request.factors is not None:
        request.factors.check(request.point.model, request.point.task)
    return request


def bank_of(run: Path, given: str | Path | None) -> Bank | None:
    """The retraining bank that was given, or the one that lies in the run."""
    files = [Path(given)] if given else sorted(run.glob("bank-*.npz"))
    return open_bank(files[0]) if files else None


def score_by(
    name: str, own: Any, request: Request, run: Path, *, rerun: bool = False, out: str | Path | None = None
) -> tuple[Scores, Cost]:
    """A method's scores, kept in RUN/methods/NAME or in `out`, and what they cost: measured now, or when they were made."""
    folder, recipe = Path(out or run / FOLDER / name), recipe_named(name)
    with report_to(watch := Watch(current())):
        before, began = _made(folder), time.monotonic()
        scores = request_scores(recipe, request, own, out=folder, rerun=rerun)
        took = time.monotonic() - began
    file = folder / COST
    if dist.from_first(file.is_file()):
        return scores, Cost(**read_json(file)["cost"])
    if dist.from_first(before is not None and _made(folder) == before):
        return scores, Cost(float("nan"), float("nan"), scores.raw.size)  # killed between these scores and their cost
    once = sum(seconds for stage, seconds in watch.seconds.items() if stage in ONE_OFF)
    taken = request.factors is not None and "factors" in recipe.needs + recipe.uses
    fitted = _fitted(run) if taken and not once else 0.0
    cost = Cost(once + fitted, took - once, scores.raw.size, watch.resumed)
    dist.on_first(write_json, file, {"cost": asdict(cost)}, None)
    return scores, cost


def _made(folder: Path) -> float | None:
    """When the scores in a folder were finished; None where they are not."""
    return (folder / MANIFEST).stat().st_mtime if (folder / MANIFEST).is_file() else None


def _fitted(run: Path) -> float:
    """Seconds that the run's factors took."""
    record = Lock.read(run).records.get("fit")
    return record.seconds if record else 0.0


class Watch:
    """Passes what is reported on, and remembers how long each stage took."""

    def __init__(self, inner: Reporter):
        self.inner, self.resumed = inner, False
        self.seconds: dict[str, float] = {}

    def begin(self, stage: Stage) -> None:
        self.resumed = self.resumed or stage.resumed > 0
        self.inner.begin(stage)

    def advance(self, stage: Stage) -> None:
        self.inner.advance(stage)

    def end(self, stage: Stage) -> None:
        self.seconds[stage.name] = self.seconds.get(stage.name, 0.0) + stage.elapsed
        self.inner.end(stage)

    def note(self, text: str) -> None:
        self.inner.note(text)


def _compared(name: str, scores: Scores, cost: Cost, reference: Scores, bank: Bank | None) -> Compared:
    found = agreement(scores, reference)
    retraining = None if bank is None or not np.isfinite(scores.raw).all() else lds(scores.raw, bank).interval
    return Compared(name, scores, cost, found.means(), found.interval(), retraining)


def keep(found: Sequence[Compared], run: Path, reference: str) -> list[Path]:
    """Write the comparison and its picture into the run: quality, which is LDS where there is a bank, against cost."""
    document = {"reference": reference, "methods": [each.as_json() for each in found]}
    write_json(run / FOLDER / "comparison.json", document, indent=1)
    retrained = [each for each in found if each.retraining]
    dots = [_dot(each, bool(retrained)) for each in retrained or found if np.isfinite(each.cost.asked)]
    files = [run / FOLDER / "comparison.json"]
    if dots:
        quality = "LDS on the retraining bank" if retrained else f"Spearman's correlation with {reference}"
        files.append(save(quality_against_cost(dots, quality), run / FOLDER / "comparison.png"))
    return files


def _dot(each: Compared, retrained: bool) -> Dot:
    if retrained and each.retraining:
        quality, ends = each.retraining.mean, (each.retraining.low, each.retraining.high)
    else:
        quality, ends = each.means["spearman"], each.ends
    return Dot(each.name, quality, ends if np.isfinite(ends).all() else None, each.cost.one_off, each.cost.per_pair)
