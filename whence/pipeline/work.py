"""What each stage does: one function per stage, over one workshop that loads models and data when first needed."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from whence import dist, scoring
from whence import fitting as factors
from whence.config import Resolved, runs_of
from whence.data import Rows, as_rows, load_data
from whence.data.text import written
from whence.engine.point import Point
from whence.errors import UsageError
from whence.evaluate.benchmark import SUMMARY, run_benchmark
from whence.evaluate.combined import combine
from whence.evaluate.compare import compare_answers
from whence.fitting import open_factors
from whence.generation import answered, generate_pairs
from whence.loading import in_turns, method_of, rows_of, stage_of, task_of, trained_on
from whence.methods.base import Request, request_scores
from whence.models import load_model
from whence.operators import Operator
from whence.pipeline.stages import TRAININGS, template_files, uses_factors
from whence.plots.style import save
from whence.plots.training import training_curves, training_figure
from whence.progress import note
from whence.report import build_report, gather, write_report
from whence.report.factors import inspect_factors
from whence.scoring.score import score_points
from whence.settings import Score, Through
from whence.stages import Stage, multistage, open_stages
from whence.store.intact import read_json
from whence.store.scores import Scores, open_scores
from whence.tasks.chat import write
from whence.tasks.questions import has_answer
from whence.train.finetune import finetune
from whence.train.reading import how_written
from whence.train.record import read_training
from whence.validate.quick import quick_from_run


class Workshop:
    """A run's models, data and finished work, each loaded when first needed and then kept."""

    def __init__(self, resolved: Resolved, before: Workshop | None = None):
        """`before` is that of the training before this one, for a training that is not a run's last."""
        self.resolved, self.config, self.out = resolved, resolved.config, resolved.out
        self.before = before or next(reversed(list(self.trainings.values())[:-1]), None)

    @functools.cached_property
    def trainings(self) -> dict[str, Workshop]:
        """One for each training of the run by name, in order; this is the last."""
        found: dict[str, Workshop] = {}
        *earlier, (last, _) = runs_of(self.config).items()
        for name, each in earlier:
            out = (self.out / TRAININGS / name).absolute()
            resolved = replace(self.resolved, config=each.changed(out=str(out)))
            found[name] = Workshop(resolved, next(reversed(found.values()), None))
        return {**found, last: self}

    @functools.cached_property
    def tuned(self) -> tuple[Any, Any]:
        """The model that is asked about, with its tokenizer."""
        return self._ended()

    def _ended(self) -> tuple[Any, Any]:
        model, place = self.config.model, self.resolved.place
        if self.config.train is not None:
            return self._load(str(self.out / "train" / "model"))
        return self._load(place(model.path or model.base), place(model.adapter) if model.adapter else None)

    def base(self) -> tuple[Any, Any]:
        """The model before it was tuned; not kept, because few stages need it."""
        return self.before._ended() if self.before else self._load(self.resolved.place(self.config.model.base))

    def _load(self, name: str, adapter: str | None = None) -> tuple[Any, Any]:
        model, place = self.config.model, self.resolved.place
        tokenizer = place(model.tokenizer) if model.tokenizer else None
        return load_model(
            name, dtype=model.dtype, device=model.device, adapter=adapter, tokenizer=tokenizer, attention=model.attention
        )

    def task(self, model: Any, tokenizer: Any, measurement: str = "logprob") -> Any:
        """How text becomes tokens and what is asked."""
        data = self.config.data
        for name in template_files(self.config):
            data = data.changed(chat_template=self.resolved.place(name))
        return task_of(model, tokenizer, data, measurement)

    @functools.cached_property
    def data(self) -> Rows:
        """All rows of the training data, as the model reads them."""
        return rows_of(self.config.data, self.resolved.place(self.config.data.path))

    @functools.cached_property
    def rows(self) -> Rows:
        """The rows that the model was trained on: all of them, or those that fine-tuning did not keep for evaluation."""
        if self.config.train is None:
            return self.data
        trained = set(read_training(self.out / "train").split["train"])
        return self.data.take(number for number, name in enumerate(self.data.ids) if name in trained)

    @functools.cached_property
    def n_train(self) -> int | None:
        """How many rows the model was trained on, where `rows` are only some of them."""
        config, place = self.config, self.resolved.place
        if config.train is not None:
            return None
        weights = config.model.adapter or config.model.path or config.model.base
        return trained_on(place(weights), config.data.changed(path=place(config.data.path)), self.rows)

    @functools.cached_property
    def prompts(self) -> Rows:
        """What is asked, written as the training data is."""
        settings = self.config.prompts
        if settings.path is not None:
            asked = load_data(self.resolved.place(settings.path), columns=settings.columns, limit=settings.limit)
        else:
            asked = as_rows([{"prompt": item} if isinstance(item, str) else item for item in settings.items])
        asked = in_turns(asked, self.data)
        return written(asked, self.config.data.format, self.config.data.normalise)

    @functools.cached_property
    def curvature(self) -> Any:
        """The finished factors."""
        return open_factors(self.out / "factors")

    @property
    def inverse(self) -> Operator:
        """What scores are made with where no method is named."""
        return self.curvature.inverse(self.config.score.damping)

    @functools.cached_property
    def request(self) -> Request:
        """The questions about the rows, with the factors and the training that the run has."""
        settings, config = self.config.score, self.config
        model, tokenizer = self.tuned
        task = self.task(model, tokenizer, settings.measurement)
        chosen = settings.part(Score).changed(seed=config.seed, n_train=settings.n_train or self.n_train)
        point = Point(model, task, self.rows, batch_tokens=chosen.batch_tokens)
        factors = self.curvature if uses_factors(config) else None
        return Request(
            point,
            asked_about(self, model, task),
            chosen,
            factors=factors,
            modules=config.fit.modules if factors is None else None,
            training=read_training(self.out / "train") if config.train is not None else None,
        )

    def stage(self, name: str, through: Through) -> Stage:
        """The training of this run as one of several."""
        config, place = self.config, self.resolved.place
        model, tokenizer = self.tuned
        task = self.task(model, tokenizer, config.score.measurement)
        point = Point(model, task, self.rows, batch_tokens=config.score.batch_tokens)
        ended = place(config.model.adapter or config.model.path or config.model.base)
        if config.train is not None:
            ended = str(self.out / "train" / "model")
        if through.training:
            through = through.changed(training=place(through.training))
        return stage_of(name, through, point, self.curvature, ended, self.n_train)

    @functools.cached_property
    def scores(self) -> Any:
        """The finished scores; of several trainings, those of the rows of all."""
        return open_stages(self.out / "scores").total() if self.config.stages else open_scores(self.out / "scores")

    @property
    def pairs(self) -> dict[str, Any]:
        """The generated answers."""
        return read_json(self.out / "generate" / "generated.json")


def train(shop: Workshop, out: Path) -> None:
    """Fine-tune the base model."""
    settings = shop.config.train
    assert settings is not None  # the stage is active only then
    model, tokenizer = shop.base()
    written_as = how_written(shop.config.data)
    finetune(
        model, shop.task(model, tokenizer), shop.data, settings, out=out / "train", seed=shop.config.seed, written_as=written_as
    )
    trained = read_training(out / "train")
    curves = training_curves(trained.metrics, trained.learning_rates.tolist())
    save(training_figure(curves), out / "train" / "training.png")


def fit(shop: Workshop, out: Path) -> None:
    """The curvature factors of the tuned model on the rows that it was trained on."""
    model, tokenizer = shop.tuned
    settings = shop.config.fit.changed(seed=shop.config.seed)
    factors.fit(model, shop.task(model, tokenizer), shop.rows, settings, out=out / "factors")


def inspect(shop: Workshop, out: Path) -> None:
    """Pictures and health of the factors."""
    inspect_factors(shop.curvature, out / "inspect", shop.config.inspect, damping=shop.config.score.damping)


def score(shop: Workshop, out: Path) -> None:
    """Scores of the questions against the training rows, and the files that others read them from."""
    settings, request = shop.config.score, shop.request
    point, chosen = request.point, request.settings
    if config := shop.config.stages:
        stages = [run.stage(name, config[name]) for name, run in shop.trainings.items()]
        chosen = chosen.changed(n_train=None)
        found = multistage(stages, request.queries, chosen, damping=settings.damping, out=out / "scores").total()
    elif settings.method is None:
        found = score_points(point, point, request.queries, shop.inverse, chosen, out=out / "scores")
    else:
        recipe, own = method_of(settings)
        found = request_scores(recipe, request, own, out=out / "scores")
    if settings.self_influence:
        scoring.self_influence(point.model, point.task, point.rows, shop.inverse, chosen, out=out / "self")
    dist.on_first(_finish, shop, found, out)


def _finish(shop: Workshop, found: Scores, out: Path) -> None:
    """The files that others read the scores from, and the checks that take seconds."""
    settings = shop.config.score
    for ending in settings.export:
        path = out / "exports" / f"scores.{ending}"
        path.unlink(missing_ok=True)  # of a run that was killed after it
        found.export(path)
    if settings.check and settings.method is None:
        note(quick_from_run(shop).about["badge"])
    elif settings.check:
        note(f"not checked: the checks that take seconds are of scores by factors, not by {settings.method}")


def asked_about(shop: Workshop, model: Any, task: Any) -> Rows:
    """The queries: what the tuned model answered, or the prompts with their own completions."""
    if shop.config.score.queries == "prompts":
        return answered(model, task, shop.prompts, shop.config.generate.max_new_tokens)
    pairs = shop.pairs["data"]
    silent = [pair["prompt"] for pair in pairs if not pair["completion"]]
    if len(silent) == len(pairs):
        raise UsageError("The model answers no prompt: there is nothing to ask about.", given=repr(silent[0]), code=22)
    if silent:
        note(f"{len(silent)} of {len(pairs)} prompts have no answer and are left out: {silent[0]!r} ...")
    return as_rows([{key: pair[key] for key in ("prompt", "completion")} for pair in pairs if pair["completion"]])


def generate(shop: Workshop, out: Path) -> None:
    """What the tuned model answers, and the base model beside it."""
    model, tokenizer = shop.tuned
    settings, config = shop.config.generate, shop.config
    another = config.train is not None or config.model.path or config.model.adapter
    generate_pairs(
        model,
        tokenizer,
        [_as_text(row, shop.task(model, tokenizer)) for row in shop.prompts],
        settings,
        out=out / "generate" / "generated.json",
        base=shop.base if settings.base and another else None,
        seed=config.seed,
    )


def _as_text(row: dict[str, Any], task: Any) -> dict[str, Any]:
    """A conversation as the prompt that its chat template makes of it, and the assistant's last words as the completion."""
    if "messages" not in row:
        return row
    said = row["messages"][-1]["content"] if has_answer(row) else None
    turns = row["messages"][:-1] if has_answer(row) else row["messages"]
    return {"prompt": write(task.tokenizer, task.chat_template, turns, add_generation_prompt=True), "completion": said}


def benchmark(shop: Workshop, out: Path) -> None:
    """Questions with known answers, asked of the base and the tuned model."""
    settings = shop.config.evaluate.benchmark if shop.config.evaluate else None
    assert settings is not None  # the stage is active only then
    data = shop.resolved.place(settings.data) if settings.data else None
    models: dict[str, Any] = {"base": shop.base, "tuned": lambda: shop.tuned}
    asked = {name: load for name, load in models.items() if getattr(settings, name)}
    run_benchmark(asked, settings.changed(data=data), out=out / "benchmark")


def evaluate(shop: Workshop, out: Path) -> None:
    """Base answers beside tuned ones with what influenced them, and everything about quality on one page."""
    settings, folder = shop.config.evaluate, out / "evaluate"
    assert settings is not None  # the stage is active only then
    folder.mkdir(parents=True)
    if settings.benchmark is not None:
        shutil.copy(shop.out / "benchmark" / SUMMARY, folder / SUMMARY)
    if settings.compare:
        compare_answers(shop.pairs, out=folder, scores=shop.scores, top=shop.config.report.top, seed=shop.config.seed)
    if settings.compare or settings.benchmark is not None:
        combine(folder)


def report(shop: Workshop, out: Path) -> None:
    """What people read."""
    settings = shop.config.report
    write_report(build_report(**gather(shop.out), top=settings.top, title=settings.title), out / "report")
