"""Retrieve, then score: exact gradients only for rows that cheap rankings find, and an audit of what they leave out.

    index = whence.build_index(model, task, train, curvature=curvature, out="runs/a/index")
    operator = curvature.inverse()
    scores = whence.score_candidates(model, task, queries, train, operator, "index:2%+bm25:1%", index=index, audit="10%")

The index is a one-off; a question then costs a scan of it and the gradients of the candidates, instead of a pass over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from whence import dist
from whence.engine.point import Point
from whence.engine.queries import encode_queries
from whence.engine.stream import identify, read
from whence.errors import StaleArtifact, UsageError
from whence.filter.bm25 import bm25_scores
from whence.filter.candidates import Amount, Candidates, Wanted, choose, read_candidates
from whence.filter.tfidf import tfidf_scores
from whence.indexing.index import Index
from whence.indexing.landmarks import Landmarks
from whence.linalg.audit import CONFIDENCE, Stratum, best_bound, recall_bound
from whence.methods.base import Request, recipes, request_scores
from whence.operators import Operator
from whence.scoring.score import score_points
from whence.settings import Score
from whence.store.digest import fingerprint_code, fingerprint_sources
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder
from whence.store.memory import work
from whence.store.scores import Scores, open_scores
from whence.tasks.base import Task

DEPTHS = (10, 100)
"""The `k` of recall@k that an audit bounds."""

NEAR = 2
"""The rest is audited in two strata: this many times the candidates that came next, and what is behind them."""


def score_candidates(
    model: nn.Module,
    task: Task,
    queries: Any,
    train: Any,
    operator: Operator,
    candidates: str,
    settings: Score = Score(),
    *,
    at_most: str | int | None = None,
    audit: str | int | None = None,
    index: Index | None = None,
    landmarks: Landmarks | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
    **changes: Any,
) -> Scores:
    """Scores, as `whence.score` gives them, of only those rows that `candidates` finds, such as "index:1%+bm25:100".

    Each query's best rows by each ranking are scored for all queries, at most `at_most` of them. Rankings are "bm25" and
    "tfidf" (words), "index" (estimates of an `index` of the same rows), "landmarks" (of scores of other questions about them),
    both also with "-lowest" for the rows that lower, "norm" (of the index' rows), and the methods of `whence methods ls`.
    `n_train` stays that of all rows.

    `audit` more rows (a number or a share) are drawn at random from the rest and scored as well: `about["candidates"]` then
    holds lower confidence bounds (95 %, for each query by itself) on recall@10 and recall@100 of the candidates against the
    scores of all rows by this operator. What else is there to say of the choice is there too.

    Raises UsageError, StaleArtifact where the index is of other rows, and what `whence.score` raises.
    """
    settings, rows = Score.of(settings, changes), dist.from_first(read(train))
    asked = _Asked(model, task, queries, rows, operator, settings, index, landmarks)
    wanted = read_candidates(candidates, list(dict.fromkeys([*RANKINGS, *recipes()])))
    most = None if at_most is None else Amount.read(at_most, "at_most")
    sample = None if audit is None else Amount.read(audit, "audit")
    if settings.aggregate:
        raise UsageError("Candidates are found for each query and row by itself", accepted="no aggregate")

    def provenance() -> dict[str, Any]:
        found: dict[str, Any] = {"candidates": candidates, "at_most": most and most.text, "audit": sample and sample.text}
        if index is not None:
            found["index"] = index.provenance or index.about
        if landmarks is not None:
            found["landmarks"] = landmarks.provenance or landmarks.scores.about
        return {**asked.provenance(), **found}

    with work(out, provenance, rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            return open_scores(folder.path)
        chosen = dist.from_first(choose({want.retriever: asked.ranking(want.retriever) for want in wanted}, wanted, most))
        drawn = draw_audit(chosen, sample.of(len(rows)), settings.seed) if sample else []
        scores = asked.score(np.sort(np.concatenate([chosen.rows, *(rows for _, rows in drawn)])), folder)
        about = _about(chosen, wanted, candidates) | {"audit": _audit(scores, asked, chosen, drawn) if drawn else None}
        scores = replace(scores, about={**scores.about, "candidates": about})
        if isinstance(folder, Folder):
            folder.discard(PART)
            dist.on_first(scores.save, folder)
        return scores


PART = "candidates"
"""Where the scores are while they are made."""


@dataclass(frozen=True)
class _Asked:
    """What is asked of which rows."""

    model: nn.Module
    task: Task
    queries: Any
    rows: Sequence[Any]
    operator: Operator
    settings: Score
    index: Index | None
    landmarks: Landmarks | None

    @cached_property
    def point(self) -> Point:
        """With all rows, which are encoded only where somebody needs them."""
        return Point(self.model, self.task, self.rows, batch_tokens=self.settings.batch_tokens)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return identify(self.rows)[0]

    @cached_property
    def searched(self) -> Scores:
        """The estimates of the index."""
        if self.index is None:
            raise UsageError("There is no index to rank by", fix="--index FOLDER (Python: index=whence.open_index(FOLDER))")
        return self._estimates(self.index, list(self.index.examples["id"]))

    @cached_property
    def sounded(self) -> Scores:
        """The estimates of the landmarks."""
        if self.landmarks is None:
            raise UsageError(
                "There are no landmarks to rank by",
                accepted="scores of other questions about the same rows, by the same operator",
                fix="--landmarks FOLDER (Python: landmarks=whence.indexing.landmarks.open_landmarks(FOLDER))",
            )
        return self._estimates(self.landmarks, self.landmarks.scores.example_ids)

    def _estimates(self, source: Index | Landmarks, ids: Sequence[str]) -> Scores:
        if list(ids) != list(self.ids):
            kind = type(source).__name__.lower()
            raise StaleArtifact(
                f"The {kind} {'is' if kind == 'index' else 'are'} of other rows.",
                given=f"{len(self.rows):,} rows, {len(ids):,} in the {kind}",
                fix="give the data that they were made from, read with the same options",
            )
        tokens = self.settings.batch_tokens
        return source.search(self.model, self.task, self.queries, self.operator, batch_tokens=tokens)

    def provenance(self) -> dict[str, Any]:
        """What decides the scores of any rows."""
        task = {key: value for key, value in self.point.settings.items() if key != "measurement"}
        return {
            "stage": "score",
            "model": self.point.fingerprint,
            "data": {"fingerprint": identify(self.rows)[1], "examples": len(self.rows)},
            "queries": encode_queries(self.task, self.queries, self.model).fingerprint,
            "task": {**task, **self.point.settings},
            "operator": fingerprint_operator(self.operator),
            "settings": self.settings.deciding(),
            "code": f"{fingerprint_code()} {fingerprint_sources(('filter', 'funnel'))}",
        }

    def ranking(self, name: str) -> np.ndarray:
        """What rows are ranked by, `[Q, N]`."""
        if name in RANKINGS:
            return RANKINGS[name](self)
        recipe = recipes()[name]
        return request_scores(recipe, Request(self.point, self.queries, self.settings), recipe.settings()).values

    def score(self, chosen: np.ndarray, folder: Any) -> Scores:
        """The exact scores of some of the rows."""
        known = self.index.n_train if self.index else self.landmarks.scores.n_train if self.landmarks else None
        n_train = self.settings.n_train or known or len(self.point.examples.usable)
        out = folder.path / PART if isinstance(folder, Folder) else None
        settings = self.settings.changed(n_train=n_train)
        return score_points(self.point, self.point, self.queries, self.operator, settings, rows=chosen.tolist(), out=out)


def _found(scores: Scores) -> np.ndarray:
    """Scores by words; a row without any is not found."""
    return np.where(scores.raw > 0, scores.raw, -np.inf)


RANKINGS: Mapping[str, Callable[[_Asked], np.ndarray]] = {
    "bm25": lambda asked: _found(bm25_scores(asked.queries, asked.rows)),
    "tfidf": lambda asked: _found(tfidf_scores(asked.queries, asked.rows)),
    "index": lambda asked: asked.searched.raw,
    "index-lowest": lambda asked: -asked.searched.raw,
    "landmarks": lambda asked: asked.sounded.raw,
    "landmarks-lowest": lambda asked: -asked.sounded.raw,
    "norm": lambda asked: asked.searched.norms["gradient"][None],
}


def draw_audit(chosen: Candidates, count: int, seed: int) -> list[tuple[Stratum, np.ndarray]]:
    """Rows of the rest to audit: an equal share of both strata, at least one of each."""
    rest, draw = chosen.rest, np.random.default_rng([seed, len(chosen.depth_N)])
    found = []
    for rows in (rest[: NEAR * len(chosen.rows)], rest[NEAR * len(chosen.rows) :]):
        size = min(len(rows), max(1, round(count * len(rows) / len(rest)))) if len(rows) else 0
        found.append((Stratum(len(rows), size), draw.choice(rows, size, replace=False) if size else rows))
    return found


def _about(chosen: Candidates, wanted: Sequence[Wanted], text: str) -> dict[str, Any]:
    """What the choice was, in numbers."""
    return {
        "text": text,
        "of": len(chosen.depth_N),
        "scored": len(chosen.rows),
        "left_out": len(chosen.depth_N) - len(chosen.rows),
        "by": {want.retriever: {"asked": want.amount.text, "rows": chosen.named[want.retriever]} for want in wanted},
    }


def _audit(scores: Scores, asked: _Asked, chosen: Candidates, drawn: Sequence[tuple[Stratum, np.ndarray]]) -> dict[str, Any]:
    """Lower bounds on recall@k for each query, and what they could have been with this sample had nothing been missed."""
    place = {name: column for column, name in enumerate(scores.example_ids)}

    def raw_of(rows: np.ndarray) -> np.ndarray:
        return scores.raw[:, [place[asked.ids[row]] for row in rows]]

    strata, inside = [stratum for stratum, _ in drawn], raw_of(chosen.rows)
    samples = [raw_of(rows) for _, rows in drawn]
    recall = {}
    for k in DEPTHS:
        if k < len(asked.rows):
            each = [recall_bound(inside[q], [sample[q] for sample in samples], strata, k) for q in range(len(inside))]
            recall[str(k)] = {"at_least": each, "at_best": best_bound(strata, k)}
    return {
        "rows": sum(stratum.drawn for stratum in strata),
        "strata": [{"rows": stratum.size, "drawn": stratum.drawn} for stratum in strata],
        "seed": asked.settings.seed,
        "confidence": CONFIDENCE,
        "reference": scores.about["operator"],
        "recall": recall,
    }
