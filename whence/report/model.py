"""A report as data: everything that the page, the Markdown and the texts say, and nothing about how they look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from whence.filter.keywords import Keywords
from whence.plots.scores import Curve, Histogram


@dataclass(frozen=True)
class Row:
    """A training row that matters to a query."""

    rank: int
    """1 raises the most, -1 lowers the most."""
    effect: str
    """"raises" or "lowers"."""
    value: float
    """The effect per copy, in the report's unit: the slope, times the gain where retrainings have said what it is."""
    slope: float
    """Before any gain."""
    limit: str
    """The most that what was measured can change, where `value` is beyond that: "at most +0.0047"; else empty."""
    raw: float
    share: float
    """Of the sum of all rows' absolute effects."""
    percentile: float
    """Share of the other rows with a lower score, in percent."""
    times_median: float | None
    """Its absolute effect, in medians of all rows' absolute effects."""
    id: str
    source: str | None
    stage: str | None
    """Of training, that the row is from: "pretraining+finetuning" where it is from both; None where there is one training."""
    word: str
    """How much its effect is beside those of all rows: "strong", "medium" or "weak"."""
    copies: int
    """Rows of the data with exactly this content, of which one is shown."""
    tokens: int
    text: str
    hub: bool
    """Whether it is in the top of more than half of the queries."""
    exact: bool | None
    """Whether it was scored again at full rank; None where none was."""
    overlap: float | None
    """Cosine of its TF-IDF vector with the query's; None where there is no text."""
    words: tuple[str, ...]
    """Words it shares with the query, the rarest first."""
    pieces: tuple[str, ...] = ()
    """Its tokens, from the first on; those before the first prediction have no effect. Empty without scores per token."""
    token_values: tuple[float, ...] = ()
    """Effect through the prediction of each of `pieces`; they add up to `value`."""
    unread: int = 0
    """Characters at its end that were cut off before the model saw them, as far as is known."""
    modules: tuple[tuple[str, float], ...] = ()
    """The modules through which most of the effect goes; empty without scores per module."""


@dataclass(frozen=True)
class Statistics:
    """All rows' scores of a query in numbers, in the report's unit."""

    maximum: float
    minimum: float
    mean: float
    median: float
    deviation: float
    median_size: float
    """Median of the absolute values."""
    percentiles: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Grid:
    """Effects of the rows that raise a query's answer most, added up by layer and module: `values[layer][module]`."""

    layers: tuple[str, ...]
    modules: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    rows: int


@dataclass(frozen=True)
class Overlap:
    """Whether shared words explain a query's ranking: mean TF-IDF cosines, and the rank correlation with the scores."""

    top: float
    every: float
    correlation: float | None


@dataclass(frozen=True)
class Query:
    """What was asked, and what the training rows did to the answer."""

    number: int
    id: str
    prompt: str
    completion: str
    contrast: str | None
    span: str | None
    base_completion: str | None
    base_logprob: float | None
    reference: str | None
    measured: str
    """What was measured, its value and tokens, and who wrote the answer, in words."""
    value: float | None
    log_p: float | None
    """Log-probability of the answer, where it is known."""
    ceiling: str
    """What to make of rows that are beyond their limit; empty where none is."""
    tokens: int | None
    energy: float | None
    """Share of the gradient's energy that a low rank kept."""
    sign: str
    """What a positive effect says."""
    target: str
    """What the effects are on: "log p(answer)"."""
    raises: tuple[Row, ...]
    lowers: tuple[Row, ...]
    statistics: Statistics
    histogram: Histogram
    curve: Curve
    stands_out: float | None
    """The highest score over the 99th percentile; None where that is not positive, or there are too few rows."""
    diffuse: bool
    """Whether no row stands out: the highest score is near the 99th percentile, and not many times the typical one."""
    excluded: bool
    """Whether the model all but excludes the answer."""
    grid: Grid | None
    sources: tuple[tuple[str, int, float], ...]
    """Source, rows, sum of their slopes."""
    overlap: Overlap | None
    keywords: tuple[Keywords, ...]
    """How many of the rows that raise it most have a rare word of its prompt or answer; empty where these have none."""
    copy_rank: int | None
    """Rank of the training row with exactly the query's text, where there is one."""
    n_train: int
    """Rows that its values are per copy of."""
    parts: tuple[Part, ...] = ()
    """What went through each stage of training, in order; empty where there is one."""


@dataclass(frozen=True)
class Part:
    """What rows of one stage of training did to an answer; sums of their slopes per copy, in the report's unit."""

    stage: str
    rows: int
    raises: float
    lowers: float
    net: float
    share: float
    """Of the sum of the absolute slopes of all stages' rows."""
    query: Query
    """The question, with the rows of this stage."""
    method: str
    """How these were scored."""


@dataclass(frozen=True)
class Check:
    """Something that decides how far to trust the scores, and what came out; None where it was not measured."""

    name: str
    result: str | None
    meaning: str


@dataclass(frozen=True)
class Report:
    """Everything that finished scores have to say."""

    title: str
    unit: str
    n_train: int
    rows: int
    method: str
    slope: bool
    """Whether values are slopes per copy of the row; other methods' have a unit of their own."""
    gain: float
    """What effects are slopes times of, as retrainings found; 1 where nobody knows."""
    meaning: str
    """What a value is."""
    limits: tuple[str, ...]
    """What no reader should forget."""
    queries: tuple[Query, ...]
    notes: tuple[str, ...]
    hubs: tuple[tuple[str, int, str], ...]
    """Id, in the top of how many queries, text."""
    checks: tuple[Check, ...]
    health: tuple[Mapping[str, Any], ...]
    damping: float | None
    """That `health` was computed with."""
    factors: Mapping[str, Any]
    """How the factors were fitted."""
    training: tuple[tuple[str, str], ...]
    """What the record of the training says, by name."""
    history: tuple[Mapping[str, Any], ...]
    """Metrics by step: "step", "loss", "eval_loss"."""
    evaluation: Mapping[str, tuple[Mapping[str, str], ...]]
    """Tables by title."""
    self_influence: tuple[Row, ...]
    absent: tuple[str, ...]
    """What this report could have had and was not given."""
    stages: tuple[str, ...]
    """How weights reach each stage of training from the one before, and what modules they share; empty where there is one."""
    modules: tuple[Mapping[str, Any], ...]
    """The modules of those stages, beside those of the stage before."""
    provenance: tuple[tuple[str, str], ...]
    settings: str | None
    command: str | None
