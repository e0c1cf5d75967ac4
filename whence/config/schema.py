"""What a `whence.yaml` may say: the settings of the stages (`whence.settings`), and what only a whole run needs."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, TypeVar

from pydantic import StringConstraints, TypeAdapter

from whence.errors import UsageError
from whence.settings import (
    Benchmark,
    Count,
    Data,
    Fit,
    Generate,
    Inspect,
    Measured,
    Score,
    Section,
    Through,
    Train,
    Weights,
    setting,
)

Name = Annotated[str, StringConstraints(pattern=r"^[\w][\w.-]*$")]


S = TypeVar("S", bound=Section)


class Model(Weights):
    """The model: what training starts from, or weights to use as they are."""

    base: str = setting(
        ..., "Hub id, or folder of a model or LoRA adapter: where fine-tuning starts, and what answers are compared with."
    )
    path: str | None = setting(None, "Weights that were fine-tuned already: used as they are, and nothing is trained.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = setting(
        None, "Attention kernels; default: those of transformers' choice."
    )


class Prompts(Section):
    """What is asked."""

    path: str | None = setting(None, "File of prompts, with completions or without.")
    items: tuple[str | dict[str, Any], ...] = setting((), "Prompts written here, instead of a file.")
    columns: dict[str, str] = setting({})
    limit: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (not self.items):
            raise UsageError("prompts come from `path` (a file) or from `items` (a list), one of them")


class Scoring(Measured, Score):
    """The scores."""

    queries: Literal["generated", "prompts"] = setting(
        "generated", "What the tuned model answered, or the prompts file with its own completions."
    )
    method: str | None = setting(
        None, "How rows are scored, by name (whence methods ls); default: by the inverse of the factors."
    )
    options: dict[str, Any] = setting({}, "Settings of the method (whence methods show NAME).")
    self_influence: bool = setting(False, "Also score every row against itself.")
    check: bool = setting(
        True,
        "Check what can be checked in seconds: gradients of a few rows are autograd's, copies of questions come first, and "
        "dampings and seeds agree.",
    )
    export: tuple[Literal["npz", "parquet", "csv", "jsonl"], ...] = setting(
        ("npz", "parquet"), "Files written beside the scores."
    )


class Evaluate(Section):
    """How good the answers are."""

    compare: bool = setting(
        True, "Compare base and tuned answers: BLEU and ROUGE against the references, or against each other."
    )
    benchmark: Benchmark | None = None


class Report(Section):
    """What people read."""

    top: Count = setting(10, "Rows per query that raise it most, and as many that lower it.")
    title: str | None = None


class Training(Through):
    """A training of a run that has several, one after the other."""

    data: Data | None = setting(None, "Its rows; not of the last training, which uses the file's rows.")
    model: str | None = setting(None, "Weights at its end, used as they are; default: trained here, or those it starts from.")
    train: Train | None = setting(None, "Train it, from where the training before ended; the first from `model.base`.")
    fit: Fit | None = setting(None, "Its factors, on its own rows; default: as `fit` of the file.")


class Config(Section):
    """A whole run, from fine-tuning to report."""

    run: Name = setting(..., "Name of the run.")
    out: str | None = setting(None, "Folder of the run; default: runs/NAME.")
    seed: int = setting(0, "Seed of everything drawn.")
    model: Model
    data: Data
    prompts: Prompts
    train: Train | None = setting(None, "Leave it out to use `model.path`, or the base as it is.")
    stages: dict[Name, Training] = setting(
        {},
        "All trainings by name, in order, where there are several; the last is the `model`, `data` and `train` of this file.",
    )
    generate: Generate = Generate()
    fit: Fit = Fit()
    inspect: Inspect = Inspect()
    score: Scoring = Scoring()
    evaluate: Evaluate | None = Evaluate()
    report: Report = Report()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train is not None and (self.model.path or self.model.adapter):
            raise UsageError(
                "`train` trains `model.base`, and `model.path`/`model.adapter` are weights used as they are: one of them"
            )
        *earlier, (last, own) = self.stages.items() if self.stages else [("", Training())]
        if self.stages and not earlier:
            raise UsageError(f"`stages` has one training, {last}: all of them are named, in order, the first one first")
        if said := [name for name in ("data", "model", "train", "fit") if getattr(own, name) is not None]:
            raise UsageError(f"`stages.{last}` is the last training, whose `{said[0]}` is that of the file")
        for name, training in earlier:
            if training.data is None:
                raise UsageError(f"`stages.{name}.data` is missing: only the last training has the rows of the file")
            if training.train is not None and training.model is not None:
                raise UsageError(f"`stages.{name}` is trained, and its `model` are weights used as they are: one of them")
        if self.stages and not (self.train or self.model.path or self.model.adapter):
            raise UsageError(f"`stages.{last}` trained nothing: there is no `train`, `model.path` or `model.adapter`")
        if self.stages and (said := [name for name in ("method", "n_train") if getattr(self.score, name) is not None]):
            raise UsageError(f"`score.{said[0]}` is for the rows of one training, and `stages` has several: one of them")

    @property
    def template_files(self) -> list[str]:
        """The file of the chat template, where it is one."""
        template = self.data.chat_template
        return [template] if template and "{" not in template and template.casefold() not in ("chatml", "none") else []


class Trained(Weights, Through):
    """A training that is over: its weights, and the rows that it read."""

    model: str = setting(..., "Hub id, or folder of a model or LoRA adapter: the weights where the training ended.")
    data: Data
    factors: str | None = setting(None, "Folder that whence fit made for these weights and rows; default: fitted first.")
    fit: Fit = setting(Fit(), "How they are fitted.")


class Stages(Section):
    """Trainings in a row, of which the last made the model that is asked."""

    stages: dict[Name, Trained] = setting(..., "All trainings by name, in order.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.stages) < 2:
            raise UsageError("`stages` has fewer than two trainings: whence score MODEL --factors FOLDER scores one")


def runs_of(config: Config) -> dict[str, Config]:
    """A run of several trainings as one run for each, by name, in order; one training is a run without a name.

    What the trainings before the last leave is below stages/NAME of the run, where a run of its own would have it.
    """
    found, base = {}, config.model.base
    for name, training in list(config.stages.items())[:-1]:
        model = config.model.changed(base=base, path=training.model, adapter=None)
        fit = config.fit if training.fit is None else training.fit
        found[name] = config.changed(stages={}, model=model, data=training.data, train=training.train, fit=fit)
        base = training.model or base
    last = config.changed(stages={}, model=config.model.changed(base=base))
    return {**found, next(reversed(config.stages), ""): last}


@functools.cache
def adapter(section: type[S]) -> TypeAdapter[S]:
    """What checks nested dictionaries, and tells their JSON Schema."""
    return TypeAdapter(section)
