"""One object for a model, the rows that it was trained on, and what has been found out about them.

    run = whence.open("./my-model", data="train.jsonl")     # or the folder of a finished `whence run`
    print(run.plan())                                        # memory, disk and time, before anything is spent
    scores = run.trace("What is the refund period?")         # answers, fits if need be, scores
    print(scores)
    run.check(scores)
    run.report("refund.html", scores)

Model, rows and factors are loaded when first needed and then stay. Nothing here computes: every method calls the function of
the library that its name says, with what the others have found. The commands and the stages of a `whence run` are made of it.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import nn

from whence import dist, fitting, planning
from whence.config import Resolved, read_config
from whence.coverage import cover
from whence.data import Rows, as_rows, content_id, load_data
from whence.data.rows import with_contents
from whence.data.text import asked as asked_in
from whence.data.text import written
from whence.engine.point import Point
from whence.errors import StaleArtifact, UsageError
from whence.finding import Finding, find
from whence.fitting import Curvature, open_factors
from whence.generation import ANSWER_TOKENS, OWN_QUESTIONS, answered, can_answer, own_questions
from whence.indexing import Index, add_rows, build_index_at, open_index
from whence.loading import in_turns, question_like, rows_of, task_of, trained_on
from whence.methods.base import Request, recipe_named, request_scores
from whence.models import load_model
from whence.opened import is_model, is_settings, remember, remembered
from whence.operators import Identity, Operator
from whence.planning.blank import blank_adapter, blank_model, tokenizer_of
from whence.progress import note
from whence.report import build_report, gather, write_html, write_report
from whence.report.gather import open_all
from whence.report.write import check_vacant
from whence.scoring.score import score_points, self_influence_at
from whence.settings import Data, Fit, Measured, Score, Weights, settings_of
from whence.settings import Index as Indexing
from whence.show.markup import facts, framed
from whence.store.digest import fingerprint_settings
from whence.store.intact import MANIFEST
from whence.store.manifest import Folder, within
from whence.store.scores import Scores, open_scores
from whence.tasks import CausalLM
from whence.tasks.base import Task
from whence.train.evidence import evidence_of_training
from whence.train.reading import READING, as_trained, record_of
from whence.train.record import ROWS, START, Training, read_training
from whence.validate.quick import quick
from whence.validate.results import Result

if TYPE_CHECKING:
    from whence.planning import Plan

SETTINGS = "whence.yaml"
"""In the folder of a `whence run`."""

ASKED = "asked"
"""What is asked of a finished run is kept below it, beside what its stages made."""


def open(
    model: Any,
    data: Any = None,
    *,
    out: str | Path | None = None,
    task: Task | None = None,
    factors: str | Path | Curvature | None = None,
    index: str | Path | None = None,
    training: str | Path | None = None,
    attention: str | None = None,
    **settings: Any,
) -> Run:
    """Open a model with its training data, or the folder of a run, or its `whence.yaml`.

        run = whence.open("gpt2", data="train.jsonl", columns={"text": "story"}, max_length=256)
        run = whence.open((model, tokenizer), data=rows)
        run = whence.open("runs/patents")

    `model` is a hub id, a folder (of a model, a LoRA adapter, or a training by whence, whose rows are then taken where no
    `data` is named), or a model in memory: `(model, tokenizer)`, or the model alone with its `task`. `data` is what
    `whence.load_data` reads, or rows in memory. `settings` say how both are read: those of `whence.settings.Data` (columns,
    split, limit, format, max_length, chat_template, append_eos, normalise) and of `whence.settings.Weights` (adapter,
    tokenizer, dtype, device). How a model was trained is read from the `training.json` beside it and need not be given.

    What is computed is kept in the folder `out` and taken from there the next time; default: runs/MODEL-DATA, as
    `whence trace` has it, and nowhere for a model in memory. The folder then opens by its name alone, as that of a `whence run`
    does. `factors`, `index` and `training` name folders that other commands made.

    Raises UsageError where the data that the model was trained on is not given, or for an unknown setting. Whatever else is
    wrong with model or data is found when they are loaded, at the first use.
    """
    named = isinstance(model, str | os.PathLike)
    folder = Path(model).expanduser() if named else None
    if data is None and folder is not None and (is_settings(folder) or (folder / SETTINGS).is_file()):
        if settings or task or attention:
            raise UsageError(
                f"{folder} says itself how it was made.",
                given=", ".join([*settings, *(["task"] if task else []), *(["attention"] if attention else [])]),
                fix="omit them, or change them there",
            )
        return Run.of(read_config(folder))
    if data is None and folder is not None and (known := remembered(folder)):
        given = {"out": out or folder, "task": task, "factors": factors, "index": index, "training": training}
        known |= {name: value for name, value in {**given, "attention": attention}.items() if value is not None}
        if _finished(folder / "factors"):
            known.setdefault("factors", str(folder / "factors"))
        return open(known.pop("model"), **known | settings)
    reading = {name: value for name, value in settings.items() if name in {field.name for field in settings_of(Data)}}
    weights = Weights().changed(**{name: value for name, value in settings.items() if name not in reading})
    if folder is not None and (folder / "model").is_dir() and record_of(folder):
        folder = folder / "model"
    if data is None:
        data, reading = _rows_trained_on(folder, reading)
    path = os.fspath(data) if isinstance(data, str | os.PathLike) else ""
    return Run(
        str(folder) if folder is not None and folder.exists() else os.fspath(model) if named else model,
        Data(path=path, **reading),
        weights,
        rows=None if path else as_rows(data) if task is None else data,
        task=task,
        out=out,
        factors=factors,
        index=index,
        training=training,
        attention=attention,
        said=reading,
    )


def _rows_trained_on(folder: Path | None, reading: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The rows that a training by whence kept beside its model. Raises UsageError where there are none."""
    home = record_of(folder) if folder is not None else None
    if home is not None and (rows := home[0].parent / ROWS).is_file():
        return rows, {"columns": {"id": "id"}, **reading}
    if folder is not None and folder.is_dir() and not is_model(folder):
        raise UsageError(
            f"{folder} does not say which model and data it belongs to.",
            accepted="the folder of a run by whence run, trace, fit or demo; a model with its data",
            fix=f"whence.open(MODEL, data=DATA, out={str(folder)!r})",
        )
    raise UsageError(
        "The data that the model was trained on is not given.",
        accepted="a file, folder or data set of the hub, or rows in memory",
        fix=f'whence.open({str(folder or "MODEL")!r}, data="train.jsonl")',
    )


class Run:
    """A model with its task, its training rows and the work that is finished; see `whence.open`."""

    def __init__(
        self,
        model: Any,
        data: Data,
        weights: Weights | None = None,
        *,
        rows: Any = None,
        task: Task | None = None,
        out: str | Path | None = None,
        factors: str | Path | Curvature | None = None,
        index: str | Path | None = None,
        training: str | Path | None = None,
        attention: str | None = None,
        said: Collection[str] = (),
    ):
        self.name = model if isinstance(model, str) else None
        """Of the model: a folder or hub id; None for one in memory."""
        self._weights, self._attention, self._data, self._said = weights or Weights(), attention, data, said
        self._given_rows, self._given_task = rows, task
        self._factors, self._index, self._training = factors, index, training
        self.out = Path(out) if out is not None else Path("runs") / self._own_name() if self.name and data.path else None
        """Folder of all that is kept; None where nothing is."""
        self.fitting, self.scoring, self.asking = Fit(), Score(), Measured()
        """What `fit`, `score` and all that asks take by default."""
        self.resolved: Resolved | None = None
        """The settings of a `whence run`, if it is one."""
        self._scored: list[tuple[Scores, Path | None]] = []
        self._answers: list[Rows] = []
        """Queries that need nothing done to them any more."""
        self._checked: Curvature | None = None
        if isinstance(factors, Curvature):
            self.curvature = factors
        if not isinstance(model, str):
            self.loaded = self._in_memory(model)

    @classmethod
    def of(cls, resolved: Resolved) -> Self:
        """The run of a `whence.yaml`, finished or at work. What is asked beside its stages is kept in its folder `asked`."""
        config, place, out = resolved.config, resolved.place, resolved.out
        chosen, trained = config.model, out / "train" if config.train is not None else None
        data = config.data.changed(path=place(config.data.path), chat_template=resolved.chat_template)
        adapter = place(chosen.adapter) if chosen.adapter and trained is None else None
        weights = chosen.part(Weights).changed(adapter=adapter, tokenizer=chosen.tokenizer and place(chosen.tokenizer))
        run = cls(
            place(chosen.path or chosen.base) if trained is None else str(trained / "model"),
            data,
            weights,
            out=out,
            factors=out / "factors" if (out / "factors" / MANIFEST).is_file() else None,
            training=trained,
            attention=chosen.attention,
            said=READING,
        )
        run.resolved, run.fitting = resolved, config.fit.changed(seed=config.seed)
        run.scoring = config.score.part(Score).changed(seed=config.seed, n_train=config.score.n_train)
        run.asking = config.score.part(Measured)
        return run

    # what it is made of

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return self.load()

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded again, for work that changes weights."""
        return load_model(self.name or "", **self._weights.as_json(), attention=self._attention)

    @property
    def model(self) -> nn.Module:
        """The model that is asked."""
        return self.loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Of the model; None for a model in memory that was given with its task alone."""
        return self.loaded[1]

    @functools.cached_property
    def reading(self) -> Data:
        """How the rows are read: as in the model's training, or as its factors were, but for what was set."""
        if self.resolved is not None:
            return self._data
        made = self.index.provenance if self._index else _provenance_of(self._factors) if self._factors else None
        return as_trained(self._data, self._said, self._weights.adapter, self.name, made=made)

    @functools.cached_property
    def rows(self) -> Any:
        """The rows that the model was trained on, as it reads them."""
        if self.resolved is None or self.resolved.config.train is None:
            return self.all_rows
        trained = set(self.training.split["train"])  # the others were kept for evaluation
        return self.all_rows.take(number for number, name in enumerate(self.all_rows.ids) if name in trained)

    @functools.cached_property
    def all_rows(self) -> Any:
        """All rows of the data, as the model reads them."""
        reading, given = self.reading, self._given_rows
        if given is None:
            return rows_of(reading)
        return given if self._given_task is not None else written(given, reading.format, reading.normalise)

    def task(self, measurement: str = "logprob") -> Task:
        """How text becomes tokens and what is measured of an answer; a task that was given stays as it is."""
        return self._given_task or task_of(*self.loaded, self.reading, measurement)

    @functools.cached_property
    def n_train(self) -> int | None:
        """How many rows the model was trained on, where `rows` are only some of them."""
        if self.name is None or (self.resolved is not None and self.resolved.config.train is not None):
            return None
        return trained_on(self._weights.adapter or self.name, self.reading, self.rows)

    def point(self, measurement: str = "logprob", batch_tokens: int | None = None) -> Point:
        """The model with its task and its rows, encoded once."""
        return self._point(measurement, batch_tokens)

    @functools.cached_property
    def training(self) -> Training:
        """What the training kept, for methods that look back at it."""
        if self._training is None and (self.name is None or (record := record_of(self.name)) is None):
            raise UsageError(
                "How the model was trained is unknown.", accepted="a folder of whence train", fix="training=FOLDER"
            )
        return read_training(self._training or record[0].parent)

    @functools.cached_property
    def curvature(self) -> Curvature:
        """The factors: those that were named or fitted, else those in the folder of the run."""
        named = None if isinstance(self._factors, Curvature) else self._factors
        return open_factors(named or self._place("factors") or _unfinished("factors", "run.fit()"))

    @functools.cached_property
    def scores(self) -> Scores:
        """The newest scores: what was scored last, else those of the `whence run`; of several trainings those of all rows.

        Of a folder that other commands filled, those that were finished last.
        """
        home = self.out / "scores" if self.out is not None else None
        if home is not None and not home.is_dir() and (kept := self.kept_scores()):
            home = max(kept, key=lambda place: (place / MANIFEST).stat().st_mtime)
        scores = open_all(home if home is not None else _unfinished("scores", 'run.trace("...")'))
        self._scored.append((scores, home))
        return scores

    @functools.cached_property
    def index(self) -> Index:
        """The index: the one that was named or built, else the one in the folder of the run."""
        return open_index(self._index or self._place("index") or _unfinished("index", "run.build_index()"))

    def folder_of(self, scores: Scores) -> Path | None:
        """Where scores of this run are kept."""
        return next((place for kept, place in self._scored if kept is scores), None)

    # what it does

    def plan(self, settings: Fit | None = None, *, index: Indexing | None = None, **asked: Any) -> Plan:
        """Estimate memory, disk and time of `fit` and `score`, before anything is spent; see `whence.plan`.

        If the model is not loaded yet, only its config is read; if a `whence run` has yet to train it, that of its base.
        `asked` are `queries` (how many, or which), budgets `memory` and `disk` in bytes, `rank`, `calibrate`, and settings of
        `whence.settings.Fit`.

            print(run.plan(queries=8, memory=24 * 10**9))

        Raises DoesNotFit where there is a budget and no settings fit in it.
        """
        first = self._to_train
        if "loaded" in vars(self):
            model, tokenizer = self.loaded
        else:
            name = first.place(first.config.model.base) if first else self.name or ""
            model = blank_model(name, self._weights.dtype, self._weights.adapter, self._weights.device)
            tokenizer = tokenizer_of(self._weights.tokenizer or name)
        task = self._given_task or task_of(model, tokenizer, self.reading)
        if first and first.config.train:
            model = blank_adapter(model, task, first.config.train.lora)
        rows = self.all_rows if first else self.rows
        return planning.plan(model, task, rows, settings or self.fitting, device=self._weights.device, index=index, **asked)

    @property
    def _to_train(self) -> Resolved | None:
        """The settings of a `whence run` that has yet to train its model."""
        trains = self.resolved is not None and self.resolved.config.train is not None
        return self.resolved if trains and not is_model(self.name or "") else None

    def fit(
        self,
        settings: Fit | None = None,
        *,
        out: str | Path | None = None,
        save_every: float = 60.0,
        rerun: bool = False,
        **changes: Any,
    ) -> Curvature:
        """Fit the factors, or take the finished ones from the folder; see `whence.fit`.

            curvature = run.fit(modules="all", examples=4000)

        Raises what `whence.fit` raises: StaleArtifact where the folder has others and `rerun` is not set to move them aside.
        """
        settings = Fit.of(settings or self.fitting, changes)
        self._warn_if_untrained  # noqa: B018
        point, place = self.point(batch_tokens=settings.batch_tokens), out or self._place("factors")
        self.curvature = fitting.fit_at(point, settings, out=place, save_every=save_every, rerun=rerun)
        self._remember(place)
        return self.curvature

    def ask(
        self,
        queries: Any,
        *,
        columns: Mapping[str, str] | None = None,
        generate: bool = True,
        max_new_tokens: int = 64,
    ) -> Rows:
        """Queries, written as the training rows are; prompts without a completion with the model's greedy answer.

        `queries` are a file or data set with these `columns`, or rows in memory: `{"prompt", "completion"}`, and optionally
        `contrast` (another completion) or `span` (a part of the completion). Without `generate` they stay as they are.
        """
        self._at_hand()  # before anything is generated
        if isinstance(queries, str) and " " in queries and not (Path(queries).exists() or glob.glob(queries)):
            raise UsageError(
                f"There is no file {queries!r}.",
                accepted="a file or data set of queries, or rows in memory",
                fix='of a question: run.trace("..."), or run.score([{"prompt": "...", "completion": "..."}])',
            )
        rows = load_data(queries, columns=columns) if isinstance(queries, str | Path) else as_rows(queries)
        rows = asked_in(rows, self.reading.format, self.reading.normalise)
        if generate:
            rows = in_turns(rows, self.rows, mere=True) if self._has_rows else rows
            rows = answered(self.model, self.task(), rows, max_new_tokens)
        self._answers.append(rows)
        return rows

    def question(
        self,
        prompt: str,
        completion: str | None = None,
        *,
        contrast: str | None = None,
        span: str | tuple[int, int] | None = None,
        max_new_tokens: int = 64,
    ) -> Rows:
        """One question as the model is used to being asked, with its answer: the completion, else what the model says.

        It is a user's turn where the rows or the tokenizer speak of conversations. `span` is a text in the answer, or its
        first and one past its last character there.
        """
        self._at_hand()
        first, name = self.rows[0] if self._has_rows else {}, self._weights.adapter or self.name
        parts = {"completion": completion, "contrast": contrast, "span": span if isinstance(span, str) else None}
        like = question_like(first, prompt, parts, self.task(), self.reading, name)
        asked = asked_in(as_rows([like]), self.reading.format, self.reading.normalise)
        asked = answered(self.model, self.task(), asked, max_new_tokens)
        if span is not None and not isinstance(span, str):
            asked = with_contents(asked, [{**asked[0], "span": tuple(span)}])
        self._answers.append(asked)
        return asked

    def trace(
        self,
        prompt: str,
        completion: str | None = None,
        *,
        contrast: str | None = None,
        span: str | tuple[int, int] | None = None,
        max_new_tokens: int = 64,
        asking: Measured | None = None,
        norm: Literal["cosine", "relatif", "length"] | None = None,
        fit: Fit | None = None,
        rerun: bool = False,
        **changes: Any,
    ) -> Scores:
        """Find the training rows that made the model say this: answer, fit if need be, score per token.

            scores = run.trace("Where was Ada Velt born?")
            scores = run.trace("The capital of France is", " Paris", contrast=" Lyon")

        `asking` has the damping and the measurement, `norm` is what the scores will be normalised by, `changes` are other
        settings of `whence.settings.Score`. The same question is answered from the folder the next time.

        Raises what `fit` and `whence.score` raise.
        """
        asking, chosen = asking or self.asking, fit or self.fitting
        queries = self.question(prompt, completion, contrast=contrast, span=span, max_new_tokens=max_new_tokens)
        curvature = (self._at_hand() if fit is None else None) or self.fit(chosen, rerun=rerun)
        own: dict[str, Any] = {"per": cover(self.model, list(curvature.blocks)).finest}
        own |= {"norms": (norm,) if norm in ("cosine", "relatif") else (), "precision": chosen.precision}
        own |= {name: getattr(chosen, name) for name in ("batch_tokens", "chunks", "check")}
        made_from = [list(queries.rows), asking.measurement, asking.damping, norm, chosen.method]
        made_from += [changes] if changes else []
        out = self._place(f"trace-{fingerprint_settings(made_from)[:8]}")
        return self.score(queries, Score().changed(**own | changes), asking=asking, out=out, rerun=rerun)

    def score(
        self,
        queries: Any,
        settings: Score | None = None,
        *,
        method: str | None = None,
        own: Mapping[str, Any] | None = None,
        asking: Measured | None = None,
        absolute_damping: float | None = None,
        out: str | Path | None = None,
        rerun: bool = False,
        **changes: Any,
    ) -> Scores:
        """Score every training row against every query, by the inverse of the factors or by a `method` with its `own` settings.

            scores = run.score("questions.jsonl", per="token")
            scores = run.score([{"prompt": "2 + 2 =", "completion": " 5"}], method="bm25")

        `queries` are as for `ask`; `changes` are settings of `whence.settings.Score`. See `whence.score`, `whence methods ls`.
        """
        asking = asking or self.asking
        settings = self._numbered(Score.of(settings or self.scoring, changes))
        asked = self._asked(queries)
        if out is None:
            made_from = [_plain(asked), asking.as_json(), absolute_damping, method, own, settings.deciding()]
            out = self._place(f"trace-{fingerprint_settings(made_from)[:8]}")
        if method is not None:
            recipe = recipe_named(method)
            request = self.request(asked, settings, asking, training="training" in recipe.needs)
            self.scores = request_scores(recipe, request, recipe.own(own or {}), out=out, rerun=rerun)
            return self._keep(self.scores, out)
        operator = self.inverse(asking.damping, absolute=absolute_damping, n_train=settings.n_train)
        point = self.point(asking.measurement, settings.batch_tokens)
        self.scores = score_points(point, point, asked, operator, settings, out=out, rerun=rerun)
        return self._keep(self.scores, out)

    def request(
        self,
        queries: Any,
        settings: Score,
        asking: Measured | None = None,
        *,
        modules: Any = None,
        training: bool = False,
    ) -> Request:
        """What methods of `whence methods ls` take: queries about the rows, with the available factors."""
        factors = self._at_hand(settings.n_train)
        point = self.point((asking or self.asking).measurement, settings.batch_tokens)
        history = self.training if training or self._training is not None else None
        return Request(point, queries, settings, factors, history, modules=modules)

    def self_influence(
        self,
        settings: Score | None = None,
        *,
        asking: Measured | None = None,
        absolute_damping: float | None = None,
        out: str | Path | None = None,
        rerun: bool = False,
        **changes: Any,
    ) -> Scores:
        """Score every row against itself: rare, mislabelled and memorised rows come first; see `whence.self_influence`."""
        asking, settings = asking or self.asking, self._numbered(Score.of(settings or self.scoring, changes))
        operator = self.inverse(asking.damping, absolute=absolute_damping, n_train=settings.n_train)
        point = self.point(asking.measurement, settings.batch_tokens)
        out = out or self._place("self")
        return self._keep(self_influence_at(point, operator, settings, out=out, rerun=rerun), out)

    def build_index(
        self,
        settings: Indexing | None = None,
        *,
        questions: Any = None,
        out: str | Path | None = None,
        rerun: bool = False,
        **changes: Any,
    ) -> Index:
        """Build the index that `search` and `find` read, with the factors that are at hand; see `whence.build_index`.

        Half of its landmarks are `questions` like those that will be asked (a file, or rows as for `ask`), as far as there are
        any, and prompts from the rows, with the model's own answers. For landmarks factors are fitted where there are none.
        """
        settings, curvature = Indexing.of(settings or Indexing(), changes), self._at_hand()
        if settings.kind == "landmarks" and curvature is None:
            curvature = self.fit()
        given = {"curvature": curvature, "n_train": self.n_train, "out": out or self._place("index"), "rerun": rerun}
        if curvature is not None and settings.kind != "projections" and settings.dim is None:
            given["landmarks"] = self._landmarks(questions)
        self.index = build_index_at(self.point(batch_tokens=settings.batch_tokens), settings, **given)
        self._remember(given["out"])
        return self.index

    def _landmarks(self, questions: Any) -> Any:
        """Questions for the landmarks of an index: those that were given, answered, and the model's own."""
        given = list(self.ask(questions, max_new_tokens=ANSWER_TOKENS)) if questions is not None else []
        task = self.task()
        if not can_answer(self.model, task):
            return given
        return [*given, *own_questions(self.model, task, self.rows, max(0, OWN_QUESTIONS - len(given)))]

    @property
    def has_index(self) -> bool:
        """Whether there is an index: one that was named or built, or one in the folder of the run."""
        return self._index is not None or "index" in vars(self) or _finished(self._place("index"))

    def add_to_index(self, data: Any = None, *, n_train: int | None = None) -> Index:
        """Add rows to the index of landmarks (default: those of the run); see `whence.indexing.build.add_rows`."""
        rows = self.rows if data is None else data
        curvature = self._at_hand() or self.curvature
        path = self._index or self._place("index") or _unfinished("index", "run.build_index()")
        self.index = add_rows(path, self.model, self.task(), rows, curvature, n_train=n_train)
        return self.index

    def find(
        self,
        prompt: str,
        completion: str | None = None,
        *,
        contrast: str | None = None,
        span: str | tuple[int, int] | None = None,
        max_new_tokens: int = 64,
        candidates: int = 100,
        per_answer_token: int = 0,
        where: Sequence[str] = (),
        asking: Measured | None = None,
    ) -> Finding:
        """Find the rows behind an answer in about a second: a scan of the index for candidates, and their exact scores.

            finding = run.find("Where was Ada Velt born?")
            finding.rows[0].text, finding.recall, finding.seconds
            finding = run.find("Where was Ada Velt born?", where=["source=wiki", "tokens>=20"])

        Without a completion the model answers. `where` are conditions that rows must meet to be found at all
        (`whence.filter.where`). Everything that the next question needs stays in memory. Of the best
        `per_answer_token` rows there are also scores for each token of the answer by itself.

        Raises UsageError where there is no index of landmarks, StaleArtifact where it belongs to another model or other rows.
        """
        asking, began = asking or self.asking, time.perf_counter()
        index = self.index
        if tuple(index.examples["id"]) != tuple(self.rows.ids):
            raise StaleArtifact(
                "The index is of other rows.",
                given=f"{len(self.rows):,} rows of {self.reading.path or 'the run'}, {len(index):,} in the index",
                fix="give the data that it was built from, or build the index anew: whence index build with --rerun",
            )
        if index.kind != "landmarks":
            raise UsageError(
                "Exact scores are found through an index of landmarks.", given="projections", fix="run.build_index()"
            )
        words = {"contrast": contrast, "span": span, "max_new_tokens": max_new_tokens}
        asked = self.question(prompt, completion, **words)
        self._answers.pop()  # a long session must not keep them all
        answering = time.perf_counter() - began
        point, operator = self.point(asking.measurement), self._operator(asking.damping)
        found = find(index, point, operator, asked, candidates, per_answer_token, where)
        return replace(found, seconds={"answer": answering, **found.seconds})

    @functools.cached_property
    def _operator(self) -> Any:
        return functools.cache(lambda damping: self.inverse(damping))

    def search(
        self,
        queries: Any,
        *,
        asking: Measured | None = None,
        absolute_damping: float | None = None,
        plain: bool = False,
        exact: int | None = None,
        norms: Collection[str] = (),
    ) -> Scores:
        """Estimate the scores by one scan of the index, which is built where there is none; `plain`: without curvature.

            candidates = run.search("Where was Ada Velt born?")
            verdicts = run.search("Where was Ada Velt born?", exact=20)

        `queries` are a question, or what `ask` and `question` return, or rows as for `ask`; a file: run.search(run.ask(FILE)).
        With `exact`, the rows with the N highest and N lowest estimates are scored again, and only they are there.

        Raises StaleArtifact where the index is of another model or of other rows.
        """
        asking = asking or self.asking
        asked = self.question(queries) if isinstance(queries, str) else self._asked(queries)
        operator = None if plain else self.inverse(asking.damping, absolute=absolute_damping)
        if not self.has_index:
            self.build_index()
        index, task = self.index, self.task(asking.measurement)
        if self._has_rows and index.provenance and self.rows.fingerprint != index.provenance["data"]["fingerprint"]:
            raise StaleArtifact(
                "The index is of other rows.",
                given=f"{len(self.rows):,} rows of {self.reading.path or 'the run'}, {len(index):,} in the index",
                fix="give the data that it was built from, read with the same options",
            )
        found = index.search(self.model, task, asked, operator)
        if exact is None:
            return found
        tops = [found.top(each, exact, lowest=low)["id"] for each in range(len(found.queries)) for low in (False, True)]
        point, names = self.point(asking.measurement), list(dict.fromkeys(name for top in tops for name in top))
        chosen = Score().changed(norms=tuple(norms), n_train=index.n_train)
        return score_points(point, point, asked, operator or Identity(), chosen, rows=names)

    def inverse(self, damping: float = 0.1, *, absolute: float | None = None, n_train: int | None = None) -> Operator:
        """The damped inverse of the curvature, which is fitted where it is missing."""
        curvature = self._at_hand(n_train) or self.fit()
        return curvature.inverse(damping, absolute=absolute)

    def check(self, scores: Scores | str | Path | None = None, **settings: Any) -> Result:
        """Check in seconds how far scores by the factors can be trusted (default: the newest); kept beside them.

            print(run.check(scores))

        `scores` may be a folder of them. `settings` are those of `whence.validate.quick.quick`: sample, asked, seed, lds.

        Raises UsageError for scores of a method, or of another model or other rows.
        """
        if isinstance(scores, str | Path):
            scores = self._keep(open_scores(scores), scores)
        if scores is None and self.resolved is not None and (stages := self.resolved.config.stages):
            home = self.resolved.out / "scores" / next(reversed(stages)) / "scores"
            scores = self._keep(open_scores(home), home)  # rows of the last training are scored as those of a single one
        scores = scores if scores is not None else self.scores
        if (method := scores.about.get("method")) is not None:
            raise UsageError(f"The quick checks are for scores by factors, not by {method}.")
        task = self.task(scores.about.get("measurement", "logprob"))
        curvature = self._at_hand() or self.curvature
        known = {"out": self.folder_of(scores), "update": self._update()}
        return quick(scores, self.model, task, self.rows, curvature, **known, **settings)

    def report(self, path: str | Path, scores: Scores | None = None, *, top: int = 10, title: str | None = None) -> list[Path]:
        """Write what scores (default: the newest) have to say, with their checks: one page, or a folder with everything.

            run.report("refund.html")

        Raises UsageError where the file or the folder exists: nothing is overwritten.
        """
        scores, path = scores if scores is not None else self.scores, Path(path)
        page, folder = path.suffix == ".html", self.folder_of(scores)
        check_vacant(path)
        given = self._gathered(scores, folder)
        report = build_report(**given, top=top, title=title)
        return [write_html(report, path)] if page else write_report(report, path)

    # how it is shown

    def __repr__(self) -> str:
        parts = [self.name or type(self.model).__name__, *(f"{name}: {value}" for name, value in self._facts())]
        return f"Run({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        return framed(self.name or type(self.model).__name__, facts(self._facts()))

    def _facts(self) -> Iterator[tuple[str, str]]:
        """What is known without loading anything."""
        rows = vars(self).get("rows", self._given_rows)
        count = "" if rows is None else f"{len(rows):,} rows"
        yield "data", " of ".join(filter(None, [count, self._data.path])) or "none"
        if self.out is not None:
            yield "folder", str(self.out)
        if "curvature" in vars(self):
            about = self.curvature.about
            yield "factors", f"{about['method']}, {len(about['modules'])} modules, {about['examples']:,} rows"
        elif _finished(self._factors if isinstance(self._factors, str | Path) else self._place("factors")):
            yield "factors", "finished"
        if "index" in vars(self) or _finished(self._index or self._place("index")):
            yield "index", "built"
        if kept := [place.name for place in self.kept_scores()]:
            yield "scores", ", ".join(kept[:5]) + (f" and {len(kept) - 5} more" if len(kept) > 5 else "")

    def kept_scores(self) -> list[Path]:
        """Folders of finished scores of this run."""
        kinds = ("scores", "methods/*", "trace-*", f"{ASKED}/trace-*")
        homes = [] if self.out is None else [home for kind in kinds for home in self.out.glob(kind)]
        return [home for home in homes if _finished(home)]

    # parts of the above

    def _update(self) -> float | None:
        """How far the training moved the weights, as a share of their length; None without a record."""
        record = record_of(self.name) if self.name is not None else None
        home = self._training or (record[0].parent if record is not None else None)
        if home is None or not (Path(home) / f"{START}.safetensors").is_file():
            return None
        return read_training(home).update(self.model)

    @functools.cached_property
    def _warn_if_untrained(self) -> None:
        """Warn once when the model assigns the training rows no lower loss than shuffled tokens."""
        task = self.task()
        if not isinstance(task, CausalLM) or (self.resolved is not None and self.resolved.config.train is not None):
            return
        evidence = evidence_of_training(self.model, task, self.rows)
        if not evidence.learnt:
            note(
                f"warning: this model shows no sign of training on this data: loss {evidence.loss:.2f} nats per token, "
                f"{evidence.shuffled:.2f} with the tokens shuffled. Are these the fine-tuned weights? [WHENCE-03]"
            )

    def _at_hand(self, n_train: int | None = None) -> Curvature | None:
        """The factors that were named or fitted already. Raises StaleArtifact where they are of another model."""
        if self._factors is None and "curvature" not in vars(self):
            return None
        if self._factors is not None and self.curvature is not self._checked:
            self.curvature.check(self.model, self.task())
            if self._has_rows and "data" in self.curvature.provenance:
                known = n_train or self.scoring.n_train or self.n_train
                self._note_other_rows(self.curvature.provenance["data"], known)
            self._checked = self.curvature
        return self.curvature

    def _note_other_rows(self, fitted: Mapping[str, Any], n_train: int | None) -> None:
        """Note what N the scores are divided by where these rows are not those that the factors saw."""
        if fitted["examples"] != len(self.rows):
            if n_train is None:
                note(
                    f"warning: the factors are of {fitted['examples']:,} rows, and these are {len(self.rows):,}. Nats per copy "
                    f"are for a training on N = {len(self.rows):,} rows; for another N give --n-train, and don't compare raw "
                    f"scores across different N [WHENCE-21]"
                )
        elif isinstance(self.rows, Rows) and fitted["fingerprint"] != self.rows.fingerprint:
            rows = "these are not the rows that the factors were fitted on"
            note(f"{rows}: scores are for hypothetical training rows [WHENCE-09]")

    def _asked(self, queries: Any) -> Any:
        """Queries as they are where they were asked already, or where a task of the user's own reads them."""
        done = self._given_task is not None or any(queries is each for each in self._answers)
        return queries if done else self.ask(queries)

    @functools.cached_property
    def _point(self) -> Any:
        return functools.cache(
            lambda measurement, batch_tokens: Point(self.model, self.task(measurement), self.rows, batch_tokens=batch_tokens)
        )

    @property
    def _has_rows(self) -> bool:
        return bool(self._data.path) or self._given_rows is not None

    def _numbered(self, settings: Score) -> Score:
        """The settings with the number of rows that the model was trained on, where these are some of them."""
        return settings.changed(n_train=settings.n_train or self.n_train)

    def _keep(self, scores: Scores, place: str | Path | None) -> Scores:
        self._remember(place)
        self._scored.append((scores, Path(place) if place is not None else None))
        return scores

    def _place(self, name: str) -> Path | None:
        """Where what is made here is kept; of a `whence run` beside what its stages make."""
        if self.out is None:
            return None
        return self.out / ASKED / name if self.resolved is not None and name != "factors" else self.out / name

    def _remember(self, made: str | Path | None) -> None:
        """Note in a run's folder, beside what was made there, how it is opened again; the newest factors decide."""
        home, name = (Path(made).parent, Path(made).name) if made is not None else (Path(), "")
        of_a_run = home != Path() and (home == self.out or name in ("factors", "index"))
        if not of_a_run or self.resolved or self._given_task or not (self.name and self._data.path):
            return
        usual = {field.name: field.default for field in (*settings_of(Data), *settings_of(Weights))}
        settings = (self._data.as_json() | self._weights.as_json()).items()
        own = {name: value for name, value in settings if name in self._said or value != usual[name]}
        own |= {"model": self.name, "data": own.pop("path"), "attention": self._attention, "device": None}  # of this machine
        parts = {"factors": self._factors, "index": self._index, "training": self._training}
        own |= {part: place for part, place in parts.items() if part != name and isinstance(place, str | Path)}
        dist.on_first(remember, home, own, anew=name == "factors")

    def _gathered(self, scores: Scores, folder: Path | None) -> dict[str, Any]:
        """What a report of the scores is made of."""
        if self.resolved is not None and folder is not None and folder.parent == self.out:
            return gather(folder.parent)
        record = record_of(self.name) if self.name else None
        given: dict[str, Any] = {"scores": scores} if folder is None else gather(folder)
        if record is not None:
            given["training"] = record[1]
        if (home := self._place("self")) is not None and _finished(home):
            given["self_scores"] = open_scores(home)
        if "curvature" in vars(self) and not given.get("factors"):
            given["curvature"] = self.curvature
        return given

    def _own_name(self) -> str:
        return f"{_short_name(self.name or '')}-{_short_name(self._data.path)}"

    def _in_memory(self, model: Any) -> tuple[Any, Any]:
        """A model that was given, with its tokenizer. Raises UsageError where how to read its rows is unknown."""
        pair = model if isinstance(model, tuple) else (model, None)
        if len(pair) != 2 or not isinstance(pair[0], nn.Module) or (pair[1] is None and self._given_task is None):
            raise UsageError(
                f"The model can't be a {type(model).__name__}" + (" alone." if isinstance(model, nn.Module) else "."),
                accepted="a name, (model, tokenizer), or a torch.nn.Module with its task",
                fix="whence.open((model, tokenizer), data=rows), or whence.open(model, data=rows, task=whence.Regression())",
            )
        return pair


def _short_name(path: str) -> str:
    """A part of a run's name that tells one model or file from another: all of its path, as seen from here."""
    place = Path(path).expanduser()
    whole = (place.parent / place.stem if place.is_file() else place).absolute()
    parts = whole.relative_to(Path.cwd()).parts if whole.is_relative_to(Path.cwd()) else whole.parts[1:]
    parts = parts[1:] if len(parts) > 1 and parts[0] == "runs" else parts
    return "-".join(re.sub(r"[*?\[\]]+", "", part) for part in parts if part != "..")


def _finished(folder: str | Path | None) -> bool:
    return folder is not None and (Path(folder) / MANIFEST).is_file()


def _plain(queries: Any) -> Any:
    """Queries for a hash; tensors by their content."""
    return list(queries.rows) if isinstance(queries, Rows) else [content_id(query) for query in queries]


def _unfinished(what: str, fix: str) -> Any:
    raise UsageError(f"There {'is' if what == 'index' else 'are'} no {what} yet.", fix=fix)


def _provenance_of(factors: str | Path | Curvature) -> dict[str, Any]:
    """What factors were made from, without reading them."""
    return factors.provenance if isinstance(factors, Curvature) else Folder.open(within(factors, "factors")).provenance
