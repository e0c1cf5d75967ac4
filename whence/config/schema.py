"""What a `whence.yaml` may say: the settings of the stages (`whence.settings`), and what only a whole run needs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, TypeAdapter

from whence.errors import UsageError
from whence.settings import (
    Benchmark,
    Count,
    Data,
    Doc,
    Fit,
    Generate,
    Inspect,
    Measured,
    Score,
    Section,
    Train,
    Weights,
)


@dataclass(frozen=True, kw_only=True)
class Origin(Section):
    """Which model it is."""

    base: Annotated[
        str,
        Doc("Hub id, or folder of a model or LoRA adapter: where fine-tuning starts, and what answers are compared with."),
    ]
    path: Annotated[str | None, Doc("Weights that were fine-tuned already: used as they are, and nothing is trained.")] = None


@dataclass(frozen=True, kw_only=True)
class Model(Weights, Origin):
    """The model: what training starts from, or weights to use as they are."""

    attention: Annotated[
        Literal["sdpa", "eager", "flash_attention_2"] | None,
        Doc("Attention kernels; those of transformers' choice if not said."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Prompts(Section):
    """What is asked."""

    path: Annotated[str | None, Doc("File of prompts, with completions or without.")] = None
    items: Annotated[tuple[str | dict[str, Any], ...], Doc("Prompts written here, instead of a file.")] = ()
    columns: dict[str, str] = field(default_factory=dict)
    limit: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (not self.items):
            raise UsageError("prompts come from `path` (a file) or from `items` (a list), one of them")


@dataclass(frozen=True, kw_only=True)
class Queries(Section):
    """What is scored."""

    queries: Annotated[
        Literal["generated", "prompts"],
        Doc("What the tuned model answered, or the prompts file with its own completions."),
    ] = "generated"


@dataclass(frozen=True, kw_only=True)
class Scoring(Score, Measured, Queries):
    """The scores."""

    self_influence: Annotated[bool, Doc("Also score every row against itself.")] = False
    check: Annotated[
        bool,
        Doc("Check what can be checked in seconds: copies of questions come first, and dampings and seeds agree."),
    ] = True
    export: Annotated[tuple[Literal["npz", "parquet", "csv", "jsonl"], ...], Doc("Files written beside the scores.")] = (
        "npz",
        "parquet",
    )


@dataclass(frozen=True, kw_only=True)
class Evaluate(Section):
    """How good the answers are."""

    compare: Annotated[
        bool, Doc("Compare base and tuned answers: BLEU and ROUGE against the references, or against each other.")
    ] = True
    benchmark: Benchmark | None = None


@dataclass(frozen=True, kw_only=True)
class Report(Section):
    """What people read."""

    top: Annotated[Count, Doc("Rows per query that raise it most, and as many that lower it.")] = 10
    title: str | None = None


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """A whole run, from fine-tuning to report."""

    run: Annotated[str, StringConstraints(pattern=r"^[\w][\w.-]*$"), Doc("Name of the run.")]
    out: Annotated[str | None, Doc("Folder of the run; runs/NAME if not said.")] = None
    seed: Annotated[int, Doc("Of everything drawn.")] = 0
    model: Model
    data: Data
    prompts: Prompts
    train: Annotated[Train | None, Doc("Leave it out to use `model.path`, or the base as it is.")] = None
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
