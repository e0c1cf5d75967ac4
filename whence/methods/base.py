"""What a method is: a recipe for scores of the same rows and queries, and what it is given to make them from.

    scores = attribute("tracin", model, task, queries, train, training=read_training("runs/a/train"), out="runs/a/tracin")

A module of this package lists what it offers as `RECIPES`, and that is all there is to adding a method: the command line, the
comparison and the quality benchmark read the list.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from whence import dist, methods
from whence.engine.point import Point
from whence.engine.queries import Queries, encode_queries
from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.fitting.fit import fit_at
from whence.operators import Identity, Operator
from whence.progress import note
from whence.scoring.checks import check_scores
from whence.scoring.results import tabulated
from whence.scoring.score import score_points, self_influence_at
from whence.settings import Fit, Score, Section, settings_of
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder
from whence.store.memory import work
from whence.store.scores import Scores, open_scores
from whence.tasks.base import Task
from whence.train.replay import History, Snapshot

Place = Callable[[str], Path | None]
"""Where a part of that name is kept until all are there; nowhere where nothing is kept."""


class NoSettings(Section):
    """Of a method that has none of its own."""


@dataclass(frozen=True)
class Recipe:
    """A method: what it is called, where it is from, and `make(request, settings)`, which gives its scores.

    `settings` are its own, all with defaults; `needs` is what it can't do without, `uses` what else changes its numbers, and
    `price` what it costs, in a few words.
    """

    name: str
    title: str
    source: str
    """Paper and equation."""
    make: Callable[[Request, Any], Scores]
    settings: type[Section] = NoSettings
    needs: tuple[Literal["factors", "training"], ...] = ()
    uses: tuple[Literal["factors", "training"], ...] = ()
    whole: bool = False
    """It gives one number per query and row: none per token or module, none added up."""
    reads: Callable[[Any], Any] | None = None
    """From its settings, a digest of the files that they name, whose content changes its numbers, too."""
    price: str = "a pass over the rows"

    def own(self, given: Mapping[str, Any], *, typed: bool = False) -> Any:
        """Its settings with those that are given; where they were `typed`, on a command line or in a file, "0.1" is a number.

        Raises UsageError for a setting that it doesn't have, or a value that can't be.
        """
        known = {field.name: field for field in settings_of(self.settings)}
        if given and not known:
            name, *_ = given
            raise UsageError(f"{self.title} has no setting {name!r}.", accepted="no settings")
        read = {name: known[name].check(value, typed=typed) if name in known else value for name, value in given.items()}
        return self.settings().changed(**read)

    def refuse_without(self, request: Request) -> None:
        """Raise UsageError where the request lacks what the method can't do without, or names modules beside factors."""
        if request.factors is not None and request.modules is not None:
            raise UsageError(
                "The tracked modules are those of the factors",
                given=f"factors, and modules={request.modules!r}",
                accepted="one of them",
                fix="leave modules out, or fit factors of these modules",
            )
        given = {"factors": request.factors, "training": request.training}
        if missing := [name for name in self.needs if given[name] is None]:
            folder = {"factors": "whence fit", "training": "whence train"}[missing[0]]
            raise UsageError(
                f"{self.title} needs {' and '.join(missing)}",
                accepted=f"a folder that {folder} made",
                fix=f"--{missing[0]} FOLDER (Python: {missing[0]}=...)",
            )


@dataclass(frozen=True)
class Request:
    """Queries about the rows of a point, and what a method may draw on: the settings of scores, factors, the training."""

    point: Point
    queries: Any
    settings: Score = Score()
    factors: Curvature | None = None
    training: History | None = None
    place: Place = field(default=lambda name: None)
    _own: dict[str, Curvature] = field(default_factory=dict, init=False, repr=False)
    modules: str | Sequence[str] | None = None
    """What is tracked where no factors say it, as `whence.fit` takes it."""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The tracked modules: those of the factors, else `modules`, else the task's default."""
        return self.factors.operator.names if self.factors else tuple(self.point.cover(self.modules).sites)

    @functools.cached_property
    def asked(self) -> Queries:
        """The queries, encoded."""
        return encode_queries(self.point.task, self.queries, self.point.model)

    def curvature(self, method: str = "ekfac") -> Curvature:
        """The factors that were given where they are of this method; else they are fitted on the rows."""
        if self.factors is not None and self.factors.about["method"] == method:
            return self.factors
        if method not in self._own:
            if self.factors is not None:
                note(f"the factors are those of {self.factors.about['method']}, and {method} fits its own")
            self._own[method] = self.fitted(method, f"factors-{method}")
        return self._own[method]

    def fitted(self, method: str, name: str, *, point: Point | None = None) -> Curvature:
        """Factors fitted on the rows, at the point or another of the same rows; kept as a part of that name."""
        kept = {"precision": self.settings.precision, "check": self.settings.check}
        settings = Fit().changed(method=method, modules=self.names, **kept)
        return fit_at(point or self.point, settings, out=self.place(name))

    def kept_checkpoints(self) -> Sequence[Snapshot]:
        """The checkpoints that the training kept, oldest first. Raises UsageError where there is none."""
        if self.training is None or not self.training.checkpoints:
            raise UsageError(
                "No checkpoint of the training was kept" if self.training else "The method needs the training's checkpoints",
                given=f"a training of {len(self.training.steps)} steps" if self.training else "no training",
                accepted="the folder of a training with one checkpoint or more",
                fix="whence train ... --keep 8 --save-steps N, then --training FOLDER (Python: training=read_training(FOLDER))",
            )
        return self.training.checkpoints

    def checkpoints(self) -> Iterator[tuple[Snapshot, Point]]:
        """The checkpoints that the training kept, oldest first, each as a point that is in use until the next.

        Raises UsageError where there is none.
        """
        kept, model = self.kept_checkpoints(), copy.deepcopy(self.point.model)
        for checkpoint in kept:
            checkpoint.load(model)
            yield checkpoint, self.point.at(model)

    def score(
        self, operator: Operator | None = None, name: str = "scores", *, point: Point | None = None, **changes: Any
    ) -> Scores:
        """`grad m(query)^T operator grad log p(row)` at the point, or another of the same rows; kept as a part of that name.

        `changes` are settings of scores that the method needs otherwise, such as `norms`.
        """
        at, given = point or self.point, Identity(self.names) if operator is None else operator
        return score_points(at, at, self.queries, given, self.settings.changed(**changes), out=self.place(name))

    def on_itself(self, operator: Operator, name: str = "self") -> Scores:
        """`grad log p(row)^T operator grad log p(row)`, `[1, N]`; kept as a part of that name."""
        return self_influence_at(self.point, operator, self.settings, out=self.place(name))

    def scores_of(self, raw_QN: np.ndarray, operator: str, unit: str, *, measured: bool = False) -> Scores:
        """Numbers that are no product of gradients, as scores in a unit of their own: they are not divided by the rows' number.

        `measured` says whether they tell what a row does to the queries' measurements. Rows without a loss get zeros.
        """
        train = self.point.examples
        raw_QN = np.where(np.isin(np.arange(len(train)), train.usable), raw_QN, 0.0)
        check_scores(raw_QN, train.ids)
        about = {"unit": unit, "operator": operator}
        scores = tabulated(raw_QN, self.point, self.point, self.asked.table, about, n_train=1)
        return scores if measured else replace(scores, about=about)


def attribute(
    method: str,
    model: nn.Module,
    task: Task,
    queries: Any,
    train: Any,
    settings: Score = Score(),
    *,
    factors: Curvature | None = None,
    training: History | None = None,
    modules: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
    **own: Any,
) -> Scores:
    """Score every training example against every query by the method of that name; `own` are the method's own settings.

    `factors` are what `whence.fit` gave, and say which modules are tracked; without them `modules` do. `training` is what
    `read_training` reads of a folder that `whence train` made: a method says what it needs. With `out` the scores are kept in
    that folder as those of `whence.score` are, and a killed run resumes.

    Raises UsageError, NumericalError, StaleArtifact, and what `whence.score` raises.
    """
    recipe = recipe_named(method)
    point = Point(model, task, train, batch_tokens=settings.batch_tokens)
    request = Request(point, queries, settings, factors, training, modules=modules)
    return request_scores(recipe, request, recipe.own(own), out=out, rerun=rerun)


def request_scores(
    recipe: Recipe, request: Request, own: Section, *, out: str | Path | None = None, rerun: bool = False
) -> Scores:
    """The recipe's scores, claimed, resumed and kept as any scores are; see `attribute`."""
    point = request.point
    recipe.refuse_without(request)

    chosen = request.settings
    if recipe.whole and (chosen.per != "example" or chosen.aggregate or chosen.norms or chosen.rescore):
        raise UsageError(
            f"{recipe.title} gives one number per query and row",
            given=f"per={chosen.per!r}, aggregate={chosen.aggregate}, norms={chosen.norms}, rescore={chosen.rescore}",
            accepted='per="example", and none of the others',
        )

    def provenance() -> dict[str, Any]:
        known: dict[str, Any] = {"method": recipe.name, "modules": list(request.names), "own": own.as_json()}
        if recipe.reads is not None:
            known["read"] = recipe.reads(own)
        if request.factors is not None and "factors" in recipe.needs + recipe.uses:
            known["factors"] = fingerprint_operator(request.factors.operator)
        if request.training is not None and "training" in recipe.needs + recipe.uses:
            known["training"] = request.training.identity()
        asked = {"queries": encode_queries(point.task, request.queries).fingerprint, "task": point.settings}
        chosen = {"settings": request.settings.deciding(), "code": fingerprint_code()}
        return {"stage": "score", **point.provenance(), **asked, **known, **chosen}

    with work(out, provenance, rerun=rerun) as folder:
        if not isinstance(folder, Folder):
            return _told(recipe.make(request, own), recipe)
        if folder.finished:
            return open_scores(folder.path)
        parts: list[str] = []

        def place(name: str) -> Path:
            parts.append(name)
            return folder.path / name

        scores = _told(recipe.make(replace(request, place=place), own), recipe)
        for name in parts:
            folder.discard(name)
        dist.on_first(scores.save, folder)
        return scores


def _told(scores: Scores, recipe: Recipe) -> Scores:
    return replace(scores, about={**scores.about, "method": recipe.name, "source": recipe.source})


@functools.cache
def recipes() -> dict[str, Recipe]:
    """All methods by name, in the order of the alphabet."""
    modules = [importlib.import_module(f"{methods.__name__}.{found.name}") for found in pkgutil.iter_modules(methods.__path__)]
    found = {recipe.name: recipe for module in modules for recipe in getattr(module, "RECIPES", ())}
    return dict(sorted(found.items()))


def recipe_named(name: str) -> Recipe:
    """The method of that name; UsageError lists the names there are."""
    if name not in recipes():
        near = difflib.get_close_matches(name, recipes(), n=1)
        fix = f"did you mean {near[0]}? whence methods ls describes them" if near else "whence methods ls describes them"
        raise UsageError(f"There is no method {name!r}", accepted=", ".join(recipes()), fix=fix)
    return recipes()[name]
