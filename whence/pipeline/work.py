"""What each stage does: one function per stage, over one workshop that loads models and data when first needed."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from whence import dist
from whence.config import Config, Resolved, runs_of
from whence.data import Rows, as_rows, load_data
from whence.data.text import written
from whence.errors import UsageError
from whence.evaluate.benchmark import SUMMARY, run_benchmark
from whence.evaluate.combined import combine
from whence.evaluate.compare import compare_answers
from whence.generation import answered, generate_pairs
from whence.loading import as_prompts, in_turns, method_of, stage_of, task_of
from whence.methods.base import Request, request_scores
from whence.models import load_model
from whence.pipeline.stages import TRAININGS, uses_factors
from whence.plots.style import save
from whence.plots.training import training_curves, training_figure
from whence.progress import note
from whence.report import build_report, gather, write_report
from whence.report.factors import inspect_factors
from whence.run import Run
from whence.scoring.score import score_points
from whence.settings import Score, Through
from whence.stages import Stage, multistage
from whence.store.intact import read_json
from whence.store.scores import Scores
from whence.tasks.chat import write
from whence.tasks.questions import has_answer
from whence.train.finetune import finetune
from whence.train.reading import how_written
from whence.train.record import read_training


class Workshop(Run):
    """A run by a `whence.yaml`, with what its stages need besides."""

    out: Path
    before: Workshop | None = None
    """That of the training before this one, of several in a row."""

    @classmethod
    def of(cls, resolved: Resolved) -> Self:
        """The run of a `whence.yaml`; of several trainings in a row the last, which knows those before it."""
        shop = super().of(resolved)
        shop.before = next(reversed(list(shop.trainings.values())[:-1]), None)
        return shop

    @functools.cached_property
    def trainings(self) -> dict[str, Workshop]:
        """One for each training of the run by name, in order; this is the last."""
        found: dict[str, Workshop] = {}
        assert self.resolved is not None
        *earlier, (last, _) = runs_of(self.config).items()
        for name, each in earlier:
            out = (self.out / TRAININGS / name).absolute()
            shop = Workshop.of(replace(self.resolved, config=each.changed(out=str(out))))
            shop.before = next(reversed(found.values()), None)
            found[name] = shop
        return {**found, last: self}

    @property
    def config(self) -> Config:
        """Its settings."""
        assert self.resolved is not None
        return self.resolved.config

    def place(self, name: str) -> str:
        """A path of the `whence.yaml`, seen from here; a name of the hub as it is."""
        assert self.resolved is not None
        return self.resolved.place(name)

    def base(self, adapter: str | None = None) -> tuple[Any, Any]:
        """The model before it was tuned, or that with an adapter; not kept: few stages need it, and training changes it."""
        if self.before is not None:
            return self.before.load()
        model, place = self.config.model, self.place
        tokenizer = place(model.tokenizer) if model.tokenizer else None
        return load_model(
            place(model.base),
            dtype=model.dtype,
            device=model.device,
            adapter=adapter,
            tokenizer=tokenizer,
            attention=model.attention,
        )

    @functools.cached_property
    def prompts(self) -> Rows:
        """What is asked, written as the training data is."""
        settings = self.config.prompts
        if settings.path is not None:
            asked = load_data(self.place(settings.path), columns=settings.columns, limit=settings.limit)
            asked = as_prompts(asked) if self.config.score.queries == "generated" else asked
        else:
            asked = as_rows([{"prompt": item} if isinstance(item, str) else item for item in settings.items])
        asked = in_turns(asked, self.all_rows)
        return written(asked, self.config.data.format, self.config.data.normalise)

    @functools.cached_property
    def request(self) -> Request:
        """The questions about the rows, with the factors and the training that the run has."""
        settings, config = self.config.score, self.config
        chosen = settings.part(Score).changed(seed=config.seed, n_train=settings.n_train or self.n_train)
        point = self.point(settings.measurement, chosen.batch_tokens)
        factors = self.curvature if uses_factors(config) else None
        return Request(
            point,
            asked_about(self, point.model, point.task),
            chosen,
            factors=factors,
            modules=config.fit.modules if factors is None else None,
            training=self.training if config.train is not None else None,
        )

    def stage(self, name: str, through: Through) -> Stage:
        """The training of this run as one of several."""
        point = self.point(self.config.score.measurement, self.config.score.batch_tokens)
        if through.training:
            through = through.changed(training=self.place(through.training))
        return stage_of(name, through, point, self.curvature, self._weights.adapter or self.name or "", self.n_train)

    @property
    def stages(self) -> list[Stage]:
        """All trainings of the run, oldest first; none where there is one."""
        return [run.stage(name, self.config.stages[name]) for name, run in self.trainings.items() if name in self.config.stages]

    @property
    def pairs(self) -> dict[str, Any]:
        """The generated answers."""
        return read_json(self.out / "generate" / "generated.json")


def train(shop: Workshop, out: Path) -> None:
    """Fine-tune the base model."""
    settings = shop.config.train
    assert settings is not None  # the stage is active only then
    model, tokenizer = shop.base()
    task, written_as = task_of(model, tokenizer, shop.reading), how_written(shop.config.data)
    finetune(model, task, shop.all_rows, settings, out=out / "train", seed=shop.config.seed, written_as=written_as)
    trained = read_training(out / "train")
    curves = training_curves(trained.metrics, trained.learning_rates.tolist())
    save(training_figure(curves), out / "train" / "training.png")


def fit(shop: Workshop, out: Path) -> None:
    """The curvature factors of the tuned model on the rows that it was trained on."""
    shop.fit(out=out / "factors")


def inspect(shop: Workshop, out: Path) -> None:
    """Pictures and health of the factors."""
    inspect_factors(shop.curvature, out / "inspect", shop.config.inspect, damping=shop.config.score.damping)


def score(shop: Workshop, out: Path) -> None:
    """Scores of the questions against the training rows, and the files that others read them from."""
    settings, request = shop.config.score, shop.request
    point, chosen = request.point, request.settings
    if stages := shop.stages:
        chosen = chosen.changed(n_train=None)
        found = multistage(stages, request.queries, chosen, damping=settings.damping, out=out / "scores").total()
    elif settings.method is None:
        found = score_points(point, point, request.queries, shop.inverse(settings.damping), chosen, out=out / "scores")
    else:
        recipe, own = method_of(settings)
        found = request_scores(recipe, request, own, out=out / "scores")
    if settings.self_influence:
        shop.self_influence(chosen, out=out / "self")
    dist.on_first(_finish, shop, found, out)


def _finish(shop: Workshop, found: Scores, out: Path) -> None:
    """The files that others read the scores from, and the checks that take seconds."""
    settings = shop.config.score
    for ending in settings.export:
        path = out / "exports" / f"scores.{ending}"
        path.unlink(missing_ok=True)  # of a run that was killed after it
        found.export(path)
    if settings.check and settings.method is None:
        note("are these scores steady? copies of the questions, other dampings and other factors (score.check):")
        note(shop.check().about["badge"])
    elif settings.check:
        note(f"not checked: the quick checks are for scores by factors, not by {settings.method}")


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
    settings, config, (model, tokenizer) = shop.config.generate, shop.config, shop.loaded
    another = config.train is not None or config.model.path or config.model.adapter
    document = generate_pairs(
        model,
        tokenizer,
        [_as_text(row, shop.task()) for row in shop.prompts],
        settings,
        out=out / "generate" / "generated.json",
        base=shop.base if settings.base and another else None,
        seed=config.seed,
    )
    lengths = [len(tokenizer(pair["completion"], add_special_tokens=False)["input_ids"]) for pair in document["data"]]
    without_end = config.train is not None and not shop.reading.append_eos and "completion" in shop.all_rows[0]
    if without_end and min(lengths) >= settings.max_new_tokens - 1:  # the first token may be one with the space before it
        note(
            f"no answer ended by itself within {settings.max_new_tokens} tokens: the rows were trained on without an end of "
            "text, which data.append_eos: true gives them"
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
    data = shop.place(settings.data) if settings.data else None
    models: dict[str, Any] = {"base": shop.base, "tuned": lambda: shop.loaded}
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
