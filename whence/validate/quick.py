"""How far finished scores can be trusted, as far as that shows without training anything again; seconds on a small model.

A copy of each question is put among the rows and should come out on top, with the sign that it must have. Part of the rows
is scored again: with other dampings, with factors of other labels, one row at a time, and exactly. What no such check can
tell is whether training without a row would change the answer: that is what LDS and removal measure.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from whence.data import Rows, as_rows
from whence.engine.point import Point
from whence.engine.stream import identify, read
from whence.errors import UsageError
from whence.fitting import Curvature, fit_at
from whence.linalg.stats import spearman, spread, top_overlap
from whence.operators import Identity, Operator
from whence.precision import EXACT
from whence.scoring.score import score_points
from whence.settings import Fit, Score
from whence.show.numbers import many
from whence.store.files import write_json
from whence.store.intact import read_json
from whence.store.scores import Scores, row_text
from whence.tasks.base import Task
from whence.validate.results import Result

FILE = "quick.json"
"""Beside the scores that were checked."""

QUERIES, COPIES, ROWS, FEWEST = 4, 12, 512, 64
"""The most queries asked again, copied, and rows scored; and the fewest rows, even for lack of time."""

FLOPS, EIGH_FLOPS, BYTES = 1e12, 2e11, 2**31
"""Work of one pass over the rows, and of the eigenvectors of another fit, that take seconds on two cores; memory of queries."""

TOP, SINGLES = 20, 8
FACTOR = 10.0
"""By which the damping is raised and lowered."""

IN_FULL = Score().changed(rank=None, precision=EXACT)
"""Scores of whole gradients, in float32."""

LOW_OVERLAP, LOW_CORRELATION, LARGE_DIFFERENCE, LARGE_ERROR = 0.5, 0.8, 1e-3, 0.05
"""Where a warning begins: of the first rows and of all under another damping or seed; of batches; of the stored scores."""


def quick(
    scores: Scores,
    model: nn.Module,
    task: Task,
    rows: Any,
    curvature: Curvature,
    *,
    damping: float | None = None,
    queries: Any = None,
    out: str | Path | None = None,
    sample: int = ROWS,
    asked: int = QUERIES,
    seed: int = 0,
    lds: str | None = None,
    update: float | None = None,
) -> Result:
    """Check scores of `model` on its training `rows`, made with the inverse of `curvature`.

    The damping is what the scores say they were made with, unless given. `queries` are needed only where the scores don't
    hold their text: conversations and tensors. With `out`, the folder of the scores, the result is kept there as
    `quick.json`. `sample` rows at most are scored again; on models where that takes more than seconds, fewer. `lds` and
    `update` are reported with them: what an LDS found, and how far training moved the weights, as a share of their length.

    Raises UsageError where model, rows or queries are not those that were scored.
    """
    started = time.monotonic()
    checker = _Checker(scores, model, task, rows, curvature, damping, queries, sample, asked, seed)
    found = quick_result({**checker.run(), "seconds": round(time.monotonic() - started, 2), "lds": lds, "update": update})
    if out is not None:
        write_json(Path(out) / FILE, found.as_json())
    return found


def read_quick(folder: str | Path) -> Result | None:
    """What was found of the scores in a folder; None where they were not checked. Raises StaleArtifact where it is damaged."""
    path = Path(folder) / FILE
    return quick_result(read_json(path)) if path.is_file() else None


def quick_result(found: Mapping[str, Any]) -> Result:
    """What `_Checker.run` found, in words; `checks` are what `build_report` takes."""
    measured = {name: value for name, value in found.items() if name not in ("check", "summary", "tables", "flags")}
    checks, flags = _checks(measured), _flags(measured)
    about = measured | {"badge": _badge(measured), "checks": checks, "warnings": flags}
    says = [about["badge"], *(f"  {name:<15}{result}" for name, result in checks.items())]
    says += [] if about["seeds"] else [f"  {'seeds':<15}not measured: {about['seeds_note']}"]
    says += [f"  WARNING {text}" for text in flags]
    return Result("quick", about, {"": [{"check": name, "result": result} for name, result in checks.items()]}, says, flags)


def _badge(about: Mapping[str, Any]) -> str:
    """All of it in one line."""
    ranks, signs, seeds = about["ranks"], about["signs"], about["seeds"]
    damping = min((each["correlation"] for each in about["dampings"]), default=None)
    parts = [
        f"self-retrieval {ranks.count(1)}/{len(ranks)}",
        *([] if all(signs) else [f"signs {sum(signs)}/{len(signs)}"]),
        f"damping rho {_short(damping)}" if damping is not None else "damping not measured",
        f"seeds rho {_short(seeds['correlation'])}" if seeds else "seeds not measured",
        f"batch {about['batch']:.0e}".replace("e-0", "e-").replace("e+00", ""),
        about["lds"] or "LDS not measured",
    ]
    return "trust  " + ", ".join(parts)


def _checks(about: Mapping[str, Any]) -> dict[str, str]:
    """Results by name."""
    ranks, seeds = about["ranks"], about["seeds"]
    looked = "" if about["rows"] == about["of_rows"] else f"; {about['rows']:,} of {about['of_rows']:,} rows checked"
    if len(ranks) == 1:
        first = "first" if ranks == [1] else f"{ranks[0]:,}"
        copies = f"a copy of the question ranks {first} and has the {'right' if about['signs'][0] else 'wrong'} sign"
    else:
        copies = f"{ranks.count(1)} of {len(ranks)} copies of a question rank first"
        copies += "" if ranks.count(1) == len(ranks) else f" (ranks {', '.join(map(str, ranks))})"
        copies += f"; {sum(about['signs'])} have the right sign"
    found = {"self-retrieval": copies}
    if about["dampings"]:
        found["damping"] = "; ".join(f"{each['what']}: {_stable(each)}" for each in about["dampings"]) + looked
    if seeds:
        found["seeds"] = f"{_stable(seeds)}; {about['seeds_note']}{looked}"
    if about["lds"]:
        found["lds"] = about["lds"]
    found["Batches"] = f"rows one at a time differ from rows in batches by {about['batch']:.1e} of the largest score"
    found["Precision"] = (
        f"the stored scores differ from those in float32 at full rank by {about['precision']:.1e} of the largest, "
        f"rank correlation {about['precision_correlation']:.3f}"
    )
    if (update := about.get("update")) is not None:
        found["Update"] = f"training moved the weights by {update:.2g} of their length: scores are slopes at its end"
    return found


def _flags(about: Mapping[str, Any]) -> list[str]:
    """What a reader of the scores has to know."""
    ranks, signs, found = about["ranks"], about["signs"], []
    if ranks.count(1) < len(ranks):
        others = ", ".join(map(str, ranks))
        found.append(f"a copy of the question does not come first (ranks {others}): long or odd rows win; try --norm relatif")
    if not all(signs):
        wrong = f"{len(signs) - sum(signs)} copies of {len(signs)} questions"
        found.append(f"{wrong} have the wrong sign: raises and lowers can't be told apart")
    for each in [*about["dampings"], *([about["seeds"]] if about["seeds"] else [])]:
        between = f"between {each['what']} and the scores"
        if each["overlap"] < LOW_OVERLAP:
            found.append(f"top-{each['top']} overlap {each['overlap']:.2f} {between}: do not trust the order [WHENCE-19]")
        elif each["correlation"] < LOW_CORRELATION:
            found.append(f"rank correlation {each['correlation']:.2f} {between} [WHENCE-19]")
    if about["batch"] > LARGE_DIFFERENCE:
        found.append(f"a row's score depends on what it is batched with: by {about['batch']:.1e} of the largest score")
    if about["precision"] > LARGE_ERROR:
        found.append(
            f"the stored scores differ from exact ones by {about['precision']:.1e} of the largest: a low rank or precision, or "
            f"other factors, damping or rows than they were made with"
        )
    return found


def _stable(found: Mapping[str, Any]) -> str:
    lowest = f"rank correlation {found['correlation']:.2f} (lowest {found['lowest']:.2f})"
    return f"{lowest}, top-{found['top']} overlap {found['overlap']:.2f}"


class _Checker:
    """One set of scores under examination."""

    def __init__(
        self,
        scores: Scores,
        model: nn.Module,
        task: Task,
        rows: Any,
        curvature: Curvature,
        damping: float | None,
        queries: Any,
        sample: int,
        asked: int,
        seed: int,
    ):
        if scores.about.get("normalised"):
            raise UsageError("Normalised scores can't be checked.", fix="check the scores as they were made")
        self.scores, self.curvature, self.rows, self.seed = scores, curvature, read(rows), seed
        self.point = Point(model, task, self.rows)
        names = list(identify(self.rows)[0])
        if names != scores.example_ids:
            raise UsageError(
                "These are not the rows that were scored.",
                given=f"{len(names):,} rows, {len(set(names) & set(scores.example_ids)):,} of them scored",
                accepted=f"the {len(scores.example_ids):,} rows of the scores, in their order",
            )
        self.damping, self.absolute = _damping(scores, damping)
        self.draw = np.random.default_rng(seed)
        size = 4 * sum(block.lam_OI.numel() for block in curvature.blocks.values())
        self.chosen = spread(len(scores.queries), max(1, min(asked, BYTES // size)))
        self.every = read(queries) if queries is not None else _asked(scores)
        if len(self.every) != len(scores.queries):
            raise UsageError(
                "These are not the queries that were scored.", given=f"{len(self.every)} for {len(scores.queries)}"
            )
        self.queries = _take(self.every, self.chosen)
        self.raw = scores.raw[self.chosen].astype(np.float64)
        self.drawn, self.places = self._sample(sample)

    def run(self) -> dict[str, Any]:
        """Make all checks."""
        exact = self._score(self._operator(1.0))
        self._refuse_others(exact)
        base = exact.raw.astype(np.float64)
        ranks, signs = self._copies()
        dampings = [] if self.damping is None else [1 / FACTOR, FACTOR]
        seeds, seeds_note = self._seeds(base)
        stored = self.raw[:, self.places]
        return {
            "queries": len(self.chosen),  # asked again, of the rows that are scored again
            "rows": len(self.places),
            "of_rows": self.scores.shape[1],
            "damping": self.damping,  # None where the operator was not an inverse, such as the identity
            "absolute": self.absolute,  # not times the mean eigenvalue
            "ranks": ranks,  # of a copy of each of some queries among all rows; 1 is right
            "signs": signs,  # whether each copy's effect has the sign that it must have
            "dampings": [
                self._stability(f"{times:g}x damping", base, self._score(self._operator(times)).raw) for times in dampings
            ],
            "seeds": seeds,  # with labels drawn again; None where nothing is drawn, or a fit takes too long
            "seeds_note": seeds_note,  # what the other factors were fitted on, or why there are none
            "batch": self._batch(base),
            "precision": _difference(stored, base),  # of the stored scores from those in float32 at full rank
            "precision_correlation": float(spearman(stored, base).min()),  # of the query where it is lowest
        }

    def _operator(self, times: float, curvature: Curvature | None = None) -> Operator:
        """What the scores were made with, with `times` the damping; or the same of another curvature."""
        curvature = curvature or self.curvature
        if self.damping is None:
            return curvature.operator
        if self.absolute:
            return curvature.inverse(absolute=self.damping * times)
        return curvature.inverse(self.damping * times)

    @functools.cached_property
    def again(self) -> Point:
        """The rows that are scored again."""
        return self.point.only(self.places)

    def _score(self, operator: Operator, point: Point | None = None) -> Scores:
        """Scores of the sample, or of other rows, in float32 and at full rank."""
        point = point or self.again
        return score_points(point, point, self.queries, operator, IN_FULL)

    def _sample(self, most: int) -> tuple[np.ndarray, list[int]]:
        """Rows to score again: the first of each query and others at random, and which of them were drawn."""
        sizes = self.scores.examples["tokens"].to_numpy()
        usable = np.flatnonzero(sizes > 0)
        cost = 6 * sum(parameter.numel() for parameter in self.point.model.parameters()) * sizes[usable].mean()
        self.bearable = max(FEWEST, int(FLOPS / cost))
        count = min(len(usable), most, self.bearable)
        if count == len(usable):
            return np.ones(count, dtype=bool), usable.tolist()
        drawn = self.draw.choice(usable, count, replace=False)
        first = np.argsort(-self.raw, axis=1, kind="stable")[:, :TOP]
        places = np.union1d(drawn, first[np.isin(first, usable)])
        return np.isin(places, drawn), places.tolist()

    def _refuse_others(self, exact: Scores) -> None:
        """Raise where the model measures something else for the queries than when they were scored."""
        then, now = (
            table["measured"].to_numpy(dtype=float) for table in (self.scores.queries.iloc[self.chosen], exact.queries)
        )
        if not np.allclose(then, now, rtol=0.02, atol=0.02, equal_nan=True):
            worst = int(np.abs(then - now).argmax())
            raise UsageError(
                "The model or the queries are not those that were scored.",
                given=f"query {self.chosen[worst]} measures {now[worst]:.3f}, and {then[worst]:.3f} when it was scored",
                accepted="the model, task and queries that the scores were made with",
            )

    def _copies(self) -> tuple[list[int], list[bool]]:
        """Rank and sign of a copy of each of some queries, put among all rows."""
        sign = -1.0 if self.scores.about.get("measurement") == "loss" else 1.0
        places, step = spread(len(self.every), COPIES), len(self.chosen)
        ranks, signs = [], []
        for start in range(0, len(places), step):
            some = places[start : start + step]
            queries = _take(self.every, some)
            copies = [  # as rows of the training data
                {key: query[key] for key in query if key not in ("contrast", "span")} if isinstance(query, Mapping) else query
                for query in queries
            ]
            point = self.point.of(copies)
            scored = score_points(point, point, queries, self._operator(1.0), IN_FULL)
            own = sign * np.diag(scored.raw).astype(np.float64)
            above = sign * self.scores.raw[some] > own[:, None] + 1e-3 * np.abs(own[:, None])  # other copies don't compete
            ranks += (above.sum(1) + 1).tolist()
            signs += (own > 0).tolist()
        return ranks, signs

    def _stability(self, what: str, base: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        """How much of the ranking stays when something that should not matter is changed: means over the queries."""
        found = spearman(base[:, self.drawn], other[:, self.drawn])
        top = max(1, min(TOP, base.shape[1] // 4))
        overlaps = [top_overlap(x, y, top) for x, y in zip(base, other, strict=True)]
        return {
            "what": what,
            "correlation": float(found.mean()),  # Spearman's over the rows that were drawn at random
            "lowest": float(found.min()),
            "overlap": float(np.mean(overlaps)),  # share of the first `top` rows that are still among them
            "top": top,
        }

    def _seeds(self, base: np.ndarray) -> tuple[dict[str, Any] | None, str]:
        """Fit again, on other rows and labels, and compare."""
        about, names = self.curvature.about, self._affordable()
        if about["method"] == "identity":
            return None, "nothing is drawn at random"
        if not names:
            return None, "another fit of modules this wide takes longer than a check"
        seed = 1 + int(self.curvature.provenance.get("settings", {}).get("seed", 0))
        count = min(int(about["examples"]), self.bearable)
        usable = np.flatnonzero(self.scores.examples["tokens"].to_numpy() > 0)
        rows = np.sort(np.random.default_rng([self.seed, seed]).choice(usable, min(count, len(usable)), replace=False))
        known = {"method": about["method"], "labels": about["labels"], "modules": tuple(names)}
        again = fit_at(self.point.only(rows.tolist()), Fit().changed(**known, seed=seed, examples="all"))
        whole, other = self._operator(1.0), self._operator(1.0, again)
        part = ""
        if len(other.names) < len(whole.names):
            base = self._score(whole @ Identity(other.names)).raw
            part = f", {len(other.names)} of {len(whole.names)} modules"
        found = self._stability("factors of another seed", base, self._score(other).raw)
        return found, f"fitted again on {many(len(rows), 'row')} with seed {seed}{part}"

    def _affordable(self) -> list[str]:
        """Modules, spread evenly, whose eigenvectors take seconds; all if they do."""
        blocks = self.curvature.blocks
        costs = {name: 25 * sum(side**3 for side in block.lam_OI.shape) for name, block in blocks.items()}
        for count in range(len(blocks), 0, -1):
            names = [list(blocks)[place] for place in spread(len(blocks), count)]
            if sum(costs[name] for name in names) <= EIGH_FLOPS:
                return names
        return []

    def _batch(self, base: np.ndarray) -> float:
        """Score a few rows one at a time."""
        usual = [int(place) for place in np.argsort(-np.abs(base).max(0))[: SINGLES // 2]]
        usual = sorted({*usual, *spread(base.shape[1], SINGLES // 2)})
        alone = self.point.only([self.places[place] for place in usual])
        alone.batch_tokens = 1
        single = self._score(self._operator(1.0), alone).raw
        scale = np.maximum(np.abs(base).max(1, keepdims=True), np.finfo(float).tiny)
        return float((np.abs(single - base[:, usual]) / scale).max())


def _damping(scores: Scores, given: float | None) -> tuple[float | None, bool]:
    """The damping that the scores were made with, and whether it is absolute."""
    label = str(scores.about.get("operator", ""))
    found = re.search(r"inverse with damping ([-+.\de]+)( x mean eigenvalue)?$", label)
    if given is not None:
        return given, bool(found and not found[2])
    return (float(found[1]), not found[2]) if found else (None, False)


def _asked(scores: Scores) -> Rows:
    """The queries that the scores were made for, from their texts."""
    found = []
    for record in scores.queries.to_dict("records"):
        parts = {key: record.get(key) for key in ("prompt", "completion", "contrast", "span")}
        row = {key: value for key, value in parts.items() if isinstance(value, str)}
        if "completion" not in row:
            row = {"text": record["text"]}
        if not record["text"] or row_text(row) != record["text"]:
            raise UsageError(
                "The scores don't hold the whole text of their queries.",
                given=f"query {record['id']}: {str(record['text'])[:80]!r}",
                accepted="queries of text, or of a prompt and a completion",
                fix="give the queries that were scored: quick(..., queries=...)",
            )
        found.append(row)
    return as_rows(found)


def _take(rows: Sequence[Any], places: Sequence[int]) -> Sequence[Any]:
    return rows.take(places) if isinstance(rows, Rows) else [rows[place] for place in places]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of scores `[Q, N]`, relative to the query's largest."""
    scale = np.maximum(np.abs(expected).max(1, keepdims=True), np.finfo(float).tiny)
    return float((np.abs(found - expected) / scale).max())


def _short(value: float) -> str:
    """Two digits without the zero before them, such as .94."""
    return f"{value:.2f}".replace("0.", ".", 1)
