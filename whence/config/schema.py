"""What a `whence.yaml` may say: the settings of the stages (`whence.settings`), and what only a whole run needs."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, TypeAdapter

from whence.errors import UsageError
from whence.settings import Benchmark, Count, Data, Fit, Generate, Inspect, Measured, Score, Section, Train, Weights, setting


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


class Config(Section):
    """A whole run, from fine-tuning to report."""

    run: Annotated[str, StringConstraints(pattern=r"^[\w][\w.-]*$")] = setting(..., "Name of the run.")
    out: str | None = setting(None, "Folder of the run; default: runs/NAME.")
    seed: int = setting(0, "Of everything drawn.")
    model: Model
    data: Data
    prompts: Prompts
    train: Train | None = setting(None, "Leave it out to use `model.path`, or the base as it is.")
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


@functools.cache
def adapter() -> TypeAdapter[Config]:
    """What checks nested dictionaries, and tells their JSON Schema."""
    return TypeAdapter(Config)
