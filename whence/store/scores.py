"""Scores of queries against training examples: what every method ends in, and all that validation, reports and pages read."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from whence.data.rows import Rows
from whence.errors import UsageError
from whence.settings import Amount, AtLeastZero, Count, valid
from whence.store.files import atomic
from whence.store.manifest import Folder, refuse_other_kind, within

if TYPE_CHECKING:
    import pandas

    from whence.tasks.base import Task

Normalisation = Literal["cosine", "relatif", "length"]

SHARD = "scores"
EXAMPLES, QUERIES = "examples.parquet", "queries.parquet"
PER_COPY, PER_TOKEN = "nats per copy", "nats per copy and token"
"""The units of slopes, as they are and divided by the length of the rows."""


SAMPLED = 256
"""Rows, evenly spread, that say how long texts are."""


class _Table:
    """A field that takes a table, or columns of which one is made when somebody looks at it: that takes a millisecond."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scores: Any, owner: type | None = None) -> pandas.DataFrame:
        if scores is None:
            raise AttributeError(self.name)  # what tells a dataclass that the field has no default
        columns = vars(scores)[self.name]
        if isinstance(columns, Mapping):
            import pandas

            columns = vars(scores)[self.name] = pandas.DataFrame(dict(columns))
        return columns

    def __set__(self, scores: Any, table: pandas.DataFrame | Mapping[str, Any]) -> None:
        vars(scores)[self.name] = table


@dataclass(frozen=True)
class Scores:
    """Scores `raw [Q, N]` with the ids, texts and norms of both sides.

    `values` are in `unit` per copy: the slope of what was measured, at these weights, in copies of the training example:
    `raw / n_train`. While it is small that is what one more copy changes; `beyond` says which values no change can reach.
    `raw` is `grad m(query)^T (G + damping)^-1 grad log p(example)`.
    """

    raw: np.ndarray
    n_train: int
    examples: pandas.DataFrame
    """One row per training example: id, source, copies, tokens, text."""
    queries: _Table = _Table()
    """One row per query: id, text, prompt, completion, contrast, span, source (who gave the completion), tokens
    (measured), measured (their sum, nats for a log-probability), norm, energy (kept by a low rank)."""
    about: dict[str, Any] = field(default_factory=dict)
    norms: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of each training example, `[N]`, where asked for: "gradient" (its norm), "self" (its influence on itself, raw)."""
    modules: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Scores per module, `[Q, N]` each, raw."""
    tokens: np.ndarray | None = None
    """Scores per token, `[Q, all tokens]`, raw, one example after the other; `token_scores` cuts them."""
    exact: np.ndarray | None = None
    """Which scores were computed again at full rank in float32, `[Q, N]`."""

    def __post_init__(self) -> None:
        valid(Count, self.n_train, "n_train")

    def __repr__(self) -> str:
        from whence.store.shown import heading

        return f"Scores({heading(self)})"

    def __str__(self) -> str:
        from whence.store.shown import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from whence.store.shown import as_html

        return as_html(self)

    @property
    def unit(self) -> str:
        """Of `values`."""
        return self.about.get("unit", PER_COPY)

    @property
    def values(self) -> np.ndarray:
        """Slope per copy, `[Q, N]`, in `unit`: the effect of one more copy to first order; `gain` times that where known."""
        return self._in_unit(self.raw)

    def values_of(self, query: int | str) -> np.ndarray:
        """The values of one query, `[N]`."""
        return self._in_unit(self.raw[self.row_of(query)])

    @property
    def gain(self) -> float:
        """What retrainings measured for each nat of a slope (see `calibrated`); 1 where nobody knows, or values are no nats."""
        known = self.about.get("calibration") or {}
        return known["gain"] if known.get("certain") and self.unit in (PER_COPY, PER_TOKEN) else 1.0

    def calibrated(self, known: Mapping[str, Any] | None) -> Scores:
        """The same with values as large as retrainings say: `gain` times the slopes. `raw` and the order of the rows stay.

        `known` is what `whence.validate.without.calibrated` found; without it, or where it is of scores that another operator
        or measurement made, these scores. A gain that is not certain is kept in `about` and not applied.
        """
        if known is None or any(known.get(key) != self.about.get(key) for key in ("operator", "measurement")):
            return self
        return self.noted({"calibration": dict(known)})

    def _in_unit(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores as values."""
        slopes = raw if self.about.get("normalised") else raw / self.n_train
        return slopes if self.gain == 1.0 else slopes * np.asarray(self.gain, slopes.dtype)

    @property
    def made_by(self) -> str:
        """What made the scores, with its source where it was a method: "TracIn (Pruthi et al. 2020, section 3.2)"."""
        source = self.about.get("source")
        return f"{self.about.get('operator', '')}{f' ({source})' if source else ''}"

    @property
    def directed(self) -> bool:
        """Whether a positive value says that the row raises what was measured: a likeness or a norm says no such thing."""
        return "nats" in self.unit or " per " in self.unit or bool(self.about.get("normalised"))

    @property
    def shape(self) -> tuple[int, int]:
        """(Q, N)."""
        return self.raw.shape  # type: ignore[return-value]

    @property
    def query_ids(self) -> list[str]:
        """One per row."""
        return list(self.queries["id"])

    @property
    def example_ids(self) -> list[str]:
        """One per column."""
        return list(self.examples["id"])

    def __add__(self, other: Scores) -> Scores:
        """The sum of the values, for the same queries and examples. What differs between the queries' columns becomes NaN.

        `about` joins both: units and operators where they differ, and all that is known of either under "sum". Norms are
        dropped, since those of a sum are no sum; parts by module and by token add up where both have them.

        Raises UsageError for other queries or examples.
        """
        if not isinstance(other, Scores):
            return NotImplemented
        self._refuse_others(other)
        size = self.n_train / other.n_train

        def added(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            return mine + theirs * np.asarray(size, theirs.dtype)

        same = self.modules.keys() == other.modules.keys()
        per_token = self.tokens is not None and other.tokens is not None
        return Scores(
            raw=added(self.raw, other.raw),
            n_train=self.n_train,
            examples=self.examples,
            queries=_joined_columns(self.queries, other.queries),
            about=_joined_about(self.about, other.about),
            modules={name: added(part, other.modules[name]) for name, part in self.modules.items()} if same else {},
            tokens=added(self.tokens, other.tokens) if per_token else None,  # type: ignore[arg-type]
        )

    def __radd__(self, other: Any) -> Scores:
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, factor: float) -> Scores:
        """All values times a number; norms of gradients stay those of the gradients."""
        factor = valid(float, factor, "factor")

        def scaled(values: np.ndarray) -> np.ndarray:
            return values * np.asarray(factor, values.dtype)

        return replace(
            self,
            raw=scaled(self.raw),
            about={**self.about, "factor": factor * self.about.get("factor", 1.0)},
            modules={name: scaled(part) for name, part in self.modules.items()},
            tokens=None if self.tokens is None else scaled(self.tokens),
        )

    __rmul__ = __mul__

    @staticmethod
    def mean(scores: Sequence[Scores]) -> Scores:
        """The mean of the values of several scores; raises UsageError for other queries or examples, or for none."""
        if not scores:
            raise UsageError("There are no scores to take the mean of", accepted="one or more")
        total: Scores = sum(scores[1:], start=scores[0])
        return total if len(scores) == 1 else replace(total * (1 / len(scores)), about={**total.about, "mean of": len(scores)})

    def combined(self, other: Scores, weight: float = 1.0) -> Scores:
        """A mixture with other scores of the same queries and examples: both over each query's root mean square.

        `weight` is how much the others count beside these; values keep the size of these.
        """
        self._refuse_others(other)
        weight = valid(AtLeastZero, weight, "weight")

        def size(raw: np.ndarray) -> np.ndarray:
            return np.sqrt(np.square(raw, dtype=np.float64).mean(1, keepdims=True))

        mine, theirs = size(self.raw), size(other.raw)
        shared = np.divide(mine, theirs, out=np.zeros_like(mine), where=theirs > 0)
        raw = (self.raw + weight * shared * other.raw) / (1 + weight)
        operator = f"{self.made_by} + {weight:g} x {other.made_by}"
        return replace(self.named(operator), raw=raw, modules={}, tokens=None, norms={})

    def noted(self, known: Mapping[str, Any]) -> Scores:
        """The same, with more said about them."""
        return replace(self, about={**self.about, **known})

    def named(self, operator: str, unit: str | None = None) -> Scores:
        """The same, called something else; `unit` for numbers that are no longer in the unit of what they were made from."""
        return replace(self, about={**self.about, "operator": operator, **({} if unit is None else {"unit": unit})})

    def _refuse_others(self, other: Scores) -> None:
        """Raise UsageError unless the other scores have the same queries and examples, in the same order."""
        for what, mine, theirs in (
            ("queries", self.query_ids, other.query_ids),
            ("examples", self.example_ids, other.example_ids),
        ):
            if mine != theirs:
                common = len(set(mine) & set(theirs))
                raise UsageError(
                    f"These scores have other {what}",
                    given=f"{len(mine):,} and {len(theirs):,} {what}, {common:,} in common",
                    accepted=f"the same {what} in the same order",
                    fix="score the same rows and queries",
                )

    def top(self, query: int | str = 0, k: int = 10, *, lowest: bool = False, fold: bool = True) -> pandas.DataFrame:
        """The `k` examples that raise what was measured the most (with `lowest`, that lower it the most).

        Columns: rank (1 is the strongest, -1 the strongest that lowers), effect (see `directed`), value (in `unit`),
        beyond_first_order (see `beyond`), share (of the sum of all examples' absolute values), raw, id, source, copies, text.
        With `fold`, exact copies of a text are one row.
        """
        import pandas

        row, k = self.row_of(query), valid(Amount, k, "k")
        order = np.argsort(self.raw[row] if lowest else -self.raw[row], kind="stable")
        if fold:
            seen: set[str] = set()
            contents = [name.partition("#")[0] for name in self.example_ids]
            order = [n for n in order if contents[n] not in seen and not seen.add(contents[n])]
        order = np.asarray(order[:k], dtype=int)
        every = self.values_of(row)
        values = every[order]
        sign = -1 if lowest else 1
        table = pandas.DataFrame(
            {
                "rank": sign * np.arange(1, len(order) + 1),
                "effect": np.select([values > 0, values < 0], ["raises", "lowers"], "none") if self.directed else "scores",
                "value": values,
                "beyond_first_order": self.beyond(row)[order],
                "share": np.abs(values) / max(np.abs(every).sum(), np.finfo(float).tiny),
                "raw": self.raw[row, order],
            }
        )
        from whence.store.ranked import ranked

        rest = self.examples.iloc[order].reset_index(drop=True)
        return ranked(pandas.concat([table, rest], axis=1), self.unit)

    def row_of(self, query: int | str) -> int:
        """The row of a query given by number or id."""
        if isinstance(query, str):
            if query not in self.query_ids:
                raise UsageError(f"No query {query!r}", accepted=", ".join(self.query_ids[:10]))
            return self.query_ids.index(query)
        return self._number("query", query, len(self.queries))

    def column_of(self, example: int | str) -> int:
        """The column of an example given by number or id."""
        if isinstance(example, str):
            if example not in self.example_ids:
                near = difflib.get_close_matches(example, self.example_ids, n=3)
                raise UsageError(
                    f"No example {example!r}",
                    accepted=f"ids of the examples, such as {', '.join(near or self.example_ids[:3])}",
                )
            return self.example_ids.index(example)
        return self._number("example", example, len(self.examples))

    @staticmethod
    def _number(what: str, number: int, count: int) -> int:
        number = valid(int, number, what)
        if not -count <= number < count:
            raise UsageError(f"No {what} number {number}", accepted=f"0 to {count - 1}")
        return number

    def log_p(self, query: int | str = 0) -> float | None:
        """The log-probability of a query's answer, in nats; None where another thing was measured, or a contrast to one."""
        asked = self.queries.iloc[self.row_of(query)]
        measured, contrast = asked.get("measured"), asked.get("contrast")
        if measured is None or not np.isfinite(measured) or isinstance(contrast, str):
            return None
        kind = self.about.get("measurement")
        if kind == "margin" and asked.get("tokens") == 1:
            return float(-np.logaddexp(0.0, -measured))
        found = {"logprob": float(measured), "loss": -float(measured)}.get(str(kind))
        return found if found is not None and found <= 0 and self.about.get("likelihood", "probability") else None

    def room(self, query: int | str = 0) -> float | None:
        """How far log p of a query's answer can still rise, in nats: it ends at 0. None where values have no such bound."""
        bounded = self.about.get("measurement") in ("logprob", "loss") and self.unit in (PER_COPY, PER_TOKEN)
        log_p = self.log_p(query)
        return -log_p if bounded and log_p is not None else None

    def beyond(self, query: int | str = 0) -> np.ndarray:
        """Which examples' values are more than what was measured can change by, `[N]`: slopes that are no effects of a copy."""
        values = self.values_of(query)
        return self.exceeds(values * self.examples["tokens"].to_numpy() if self.unit == PER_TOKEN else values, query)

    def exceeds(self, changes_N: np.ndarray, query: int | str = 0) -> np.ndarray:
        """Which of these changes of what was measured would take log p of the query's answer past 0, `[N]`."""
        room = self.room(query)
        if room is None:
            return np.zeros(len(changes_N), dtype=bool)
        return (-changes_N if self.about.get("measurement") == "loss" else changes_N) > room

    def hubs(self, k: int = 10) -> list[str]:
        """Ids of the examples in the top `k` of more than half of the queries: what they raise is no answer in particular.

        Empty for fewer than four queries, or than `4 k` examples, where chance alone would make some.
        """
        k = valid(Count, k, "k")
        if len(self.queries) < 4 or len(self.examples) < 4 * k:
            return []
        times = Counter(name for query in range(len(self.queries)) for name in self.top(query, k)["id"])
        return [name for name, count in times.most_common() if 2 * count > len(self.queries)]

    def rank_of(self, example: int | str, query: int | str = 0) -> int:
        """The example's place among all, 1 for the highest score."""
        row = self.row_of(query)
        return int((self.raw[row] > self.raw[row, self.column_of(example)]).sum()) + 1

    def token_scores(self, query: int | str, example: int | str) -> np.ndarray:
        """Scores of an example's positions `[T]` in `unit`, which add up to its score; each is about the token it predicts."""
        if self.tokens is None:
            raise UsageError("There are no scores per token here", fix='score with per="token" (--per token)')
        column = self.column_of(example)
        stops = np.cumsum(self.examples["tokens"].to_numpy())
        start = stops[column] - self.examples["tokens"].iloc[column]
        return self._in_unit(self.tokens[self.row_of(query), start : stops[column]])

    def module_values(self, query: int | str, examples: Sequence[int] | int) -> dict[str, float]:
        """The values of some examples, by their columns, summed module by module."""
        row, scale = self.row_of(query), self.n_train
        return {name: float(raw[row, examples].sum()) / scale * self.gain for name, raw in self.modules.items()}

    def by(self, column: str = "source", query: int | str = 0) -> pandas.Series:
        """The values summed over groups of examples, largest first."""
        if column not in self.examples or not bool(self.examples[column].notna().any()):
            raise UsageError(f"The examples have no {column!r}", accepted=", ".join(self.examples.columns))
        import pandas

        values = pandas.Series(self.values_of(query), index=self.examples[column])
        summed: pandas.Series = values.groupby(level=0).sum()  # type: ignore[assignment]
        return summed.sort_values(ascending=False)

    def normalised(self, how: Normalisation) -> Scores:
        """Scores divided by what makes long or odd examples score high with every query.

        "cosine": by both gradients' norms (the query's after the operator); "relatif": by the root of the example's
        influence on itself (Barshan et al. 2020, l-RelatIF); "length": by its number of tokens. Only the last
        leaves a unit: that of `values`, per token.
        """
        if how == "length":
            divisor = self.n_train * np.maximum(self.examples["tokens"].to_numpy(), 1)[None, :]
        elif how == "cosine":
            divisor = self.queries["norm"].to_numpy()[:, None] * self._norm("gradient")[None, :]
        elif how == "relatif":
            divisor = np.sqrt(self._norm("self"))[None, :]
        else:
            raise UsageError(f"There is no normalisation {how!r}", accepted="cosine, relatif, length")
        raw = np.divide(self.raw, divisor, out=np.zeros_like(self.raw), where=divisor > 0)
        unit = {"cosine": "cosine", "relatif": "relative influence", "length": f"{self.unit} and token"}[how]
        return replace(self, raw=raw, about={**self.about, "unit": unit, "normalised": how}, tokens=None, modules={})

    def _norm(self, kind: str) -> np.ndarray:
        if kind not in self.norms:
            how = {"gradient": "cosine", "self": "relatif"}[kind]
            raise UsageError(
                f"The norms for {how!r} were not computed",
                fix=f'score with norms=("{how}",) (--norm {how}; of a run: whence run --set score.norms=[{how}])',
            )
        return self.norms[kind]

    def to_pandas(self) -> pandas.DataFrame:
        """One row per query and example: query_id, id, value, beyond_first_order, raw, rank, percentile, its columns."""
        import pandas

        frames = []
        for row, query in enumerate(self.query_ids):
            order = np.argsort(np.argsort(-self.raw[row], kind="stable"), kind="stable")
            columns = {
                "query_id": query,
                "value": self.values_of(row),
                "beyond_first_order": self.beyond(row),
                "raw": self.raw[row],
                "rank": order + 1,
                "percentile": 100 * (1 - order / max(1, len(order) - 1)) if len(order) > 1 else 100.0,
            }
            frames.append(pandas.concat([pandas.DataFrame(columns), self.examples.reset_index(drop=True)], axis=1))
        return pandas.concat(frames, ignore_index=True)

    def to_arrow(self) -> Any:
        """The table of `to_pandas` as a pyarrow Table; its metadata holds unit, number of examples and provenance."""
        import pyarrow

        table = pyarrow.Table.from_pandas(self.to_pandas(), preserve_index=False)
        about = json.dumps({"unit": self.unit, "n_train": self.n_train, **self.about}, default=str)
        return table.replace_schema_metadata({**(table.schema.metadata or {}), "whence": about})

    def export(self, path: str | Path) -> Path:
        """Write the scores as .parquet, .csv, .jsonl (one row per query and example) or .npz (the matrix with its ids).

        All of them say the unit, the number of training examples and what made them: as metadata, as columns, or as arrays.

        Raises UsageError for another ending, or where the file exists.
        """
        path = Path(path)
        if path.exists():
            raise UsageError(f"{path} exists", fix="choose another name, or remove it")
        if path.suffix not in (".parquet", ".csv", ".jsonl", ".npz"):
            raise UsageError(f"Can't export to {path.name!r}", accepted=".parquet, .csv, .jsonl, .npz")
        with atomic(path) as temporary, temporary.open("wb") as file:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                pyarrow.parquet.write_table(self.to_arrow(), file)
            elif path.suffix == ".csv":
                self._labelled().to_csv(file, index=False)
            elif path.suffix == ".jsonl":
                self._labelled().to_json(file, orient="records", lines=True, force_ascii=False)
            else:
                ids = {"query_ids": np.array(self.query_ids, dtype=str), "example_ids": np.array(self.example_ids, dtype=str)}
                matrix = {"scores": self.values, "raw": self.raw}
                about = {"n_train": np.array(self.n_train), "unit": np.array(self.unit), "made_by": np.array(self.made_by)}
                np.savez(file, allow_pickle=False, **matrix, **about, **ids)
        return path

    def _labelled(self) -> pandas.DataFrame:
        """The table of `to_pandas` with the columns unit, n_train and made_by, for files that have no place for metadata."""
        about: dict[str, Any] = {"unit": self.unit, "n_train": self.n_train, "made_by": self.made_by}
        return self.to_pandas().drop(columns="pieces", errors="ignore").assign(**about)

    def save(self, folder: Folder) -> None:
        """Write everything into a run folder and finish it."""
        import torch

        arrays = {"raw": self.raw, **{f"norm/{key}": norm for key, norm in self.norms.items()}}
        arrays |= {f"module/{name}": values for name, values in self.modules.items()}
        arrays |= {key: value for key in ("tokens", "exact") if (value := getattr(self, key)) is not None}
        folder.save(SHARD, {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()})
        folder.save_table(EXAMPLES, self.examples)
        folder.save_table(QUERIES, self.queries)
        for part in folder.shards():  # the chunks that led here
            if part != SHARD:
                folder.drop(part)
        folder.finish({"about": self.about, "n_train": self.n_train})


def part_of(scores: Scores, queries: Sequence[int] | None = None, rows: Sequence[int] | None = None) -> Scores:
    """The scores of these queries and rows, by number and in this order (None: of all), with all that belongs to them."""
    of_Q, of_N = (
        np.arange(len(table)) if some is None else np.asarray(some, dtype=int)
        for some, table in ((queries, scores.queries), (rows, scores.examples))
    )
    both, tokens = np.ix_(of_Q, of_N), scores.tokens
    if tokens is not None:
        stops = [0, *np.cumsum(scores.examples["tokens"].to_numpy()).tolist()]
        places = [place for n in of_N.tolist() for place in range(stops[n], stops[n + 1])]
        tokens = tokens[np.ix_(of_Q, np.asarray(places, dtype=int))]
    return replace(
        scores,
        raw=scores.raw[both],
        queries=scores.queries.iloc[of_Q].reset_index(drop=True),
        examples=scores.examples.iloc[of_N].reset_index(drop=True),
        norms={name: norms_N[of_N] for name, norms_N in scores.norms.items()},
        modules={name: raw_QN[both] for name, raw_QN in scores.modules.items()},
        tokens=tokens,
        exact=None if scores.exact is None else scores.exact[both],
    )


def _joined_columns(mine: pandas.DataFrame, theirs: pandas.DataFrame) -> pandas.DataFrame:
    """The table of queries; numbers that differ are not known of the sum."""
    joined = mine.copy()
    for column in mine.select_dtypes("number").columns.intersection(theirs.columns):
        joined[column] = mine[column].where(mine[column].to_numpy() == theirs[column].to_numpy())
    return joined


def _joined_about(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in both, units and operators of both, and all of either under "sum"."""
    parts = [part for about in (mine, theirs) for part in about.get("sum", [dict(about)])]
    joined = {key: value for key, value in mine.items() if key in theirs and theirs[key] == value and key != "factor"}
    for key in ("unit", "operator"):
        named = list(dict.fromkeys(str(part[key]) for part in parts if key in part))
        joined |= {key: " + ".join(named)} if named else {}
    return joined | {"sum": parts}


def open_scores(path: str | Path) -> Scores:
    """Read finished scores from their folder; StaleArtifact where they are unfinished or damaged."""
    folder = Folder.open(within(path, SHARD))
    refuse_other_kind(folder, "n_train" in folder.manifest, "scores", "whence score")
    arrays = {key: tensor.numpy() for key, tensor in folder.load(SHARD).items()}

    def named(prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    return Scores(
        raw=arrays["raw"],
        n_train=folder.manifest["n_train"],
        examples=folder.read_table(EXAMPLES),
        queries=folder.read_table(QUERIES),
        about=folder.manifest["about"],
        norms=named("norm/"),
        modules=named("module/"),
        tokens=arrays.get("tokens"),
        exact=arrays.get("exact"),
    )


def describe_rows(
    rows: Sequence[Any], ids: Sequence[str], sizes: Sequence[int], copies: Sequence[int] | None
) -> pandas.DataFrame:
    """The table of examples that goes with scores: id, source, copies, tokens, text (empty where the rows are tensors)."""
    import pandas

    as_text = [row_text(row) for row in rows]
    sources = [row.get("source") if isinstance(row, Mapping) else None for row in rows]
    return pandas.DataFrame(
        {
            "id": list(ids),
            "source": pandas.Series(sources, dtype="object"),
            "copies": list(copies) if copies is not None else [1] * len(ids),
            "tokens": list(sizes),
            "text": as_text,
        }
    )


def texts_bytes(rows: Sequence[Any]) -> int:
    """Bytes of the rows' texts, from `SAMPLED` of them: their table takes less, since it is compressed."""
    some = [row_text(rows[index]) for index in range(0, len(rows), -(-len(rows) // SAMPLED))] if len(rows) else []
    return sum(len(text.encode()) for text in some) * len(rows) // max(1, len(some))


def row_text(row: Any) -> str:
    """A row of text in one piece; empty where the row is not text."""
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        return ""
    if "messages" in row:
        return "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])
    parts = [row.get(key) for key in ("text", "prompt", "completion")]
    return "".join(part for part in parts if isinstance(part, str))


def describe_queries(rows: Sequence[Any], task: Task, weighted: Sequence[Sequence[tuple[Any, float]]]) -> dict[str, list[Any]]:
    """What the table of queries says about each: id, text and what that is made of, and how many tokens are measured."""
    ids = list(rows.ids) if isinstance(rows, Rows) else [f"query-{number}" for number in range(len(rows))]
    parts = [_parts(row) for row in rows]
    fields = {key: [part.get(key) for part in parts] for key in ("prompt", "completion", "contrast", "span", "source")}
    tokens = [sum(task.predictions(item) for item, weight in query if weight > 0) for query in weighted]
    return {"id": ids, "text": [row_text(row) for row in rows], **fields, "tokens": tokens}


def _parts(row: Any) -> dict[str, str]:
    """The parts of a query that are text; of a conversation, what was said last and to what."""
    if not isinstance(row, Mapping):
        return {}
    said = [message["content"] for message in row.get("messages", [])][-2:]
    last = dict(zip(("completion", "prompt"), reversed(said), strict=False))
    parts: dict[str, str] = last | {key: value for key, value in row.items() if isinstance(value, str)}
    if isinstance(span := row.get("span"), tuple):
        parts["span"] = parts.get("completion", parts.get("text", ""))[slice(*span)]
    return parts
