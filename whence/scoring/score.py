"""Score training examples against queries: one pass over the queries, one over the training data.

The queries' gradients are multiplied with the operator and stay on the device; then every training example's gradient
meets all of them as it arises in the backward pass, and is forgotten. The scores of each chunk of the data are saved
when it is done: a killed run resumes from there, to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence import dist
from whence.engine.autograd import check_queries, check_rows
from whence.engine.partition import data_chunks
from whence.engine.passes import ByChunk, Unsaved, run_pass
from whence.engine.point import Point, shared_sites
from whence.engine.probe import settle_products
from whence.engine.queries import Preconditioned, Queries, encode_queries, precondition
from whence.engine.sinks import Total
from whence.gradients import Dense, Gradients, dot
from whence.operators import Identity, Operator
from whence.precision import EXACT, Precision, kept_as, multiplying
from whence.progress import note
from whence.scoring.checks import check_choices, check_operator, check_scores
from whence.scoring.results import tabulated
from whence.scoring.sinks import Columns, Quantity, products, products_at, token_products
from whence.settings import Score
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
from whence.store.scores import Scores, describe_rows, open_scores, texts_bytes
from whence.tasks.base import Task

FULL_RANK_BYTES = 4 * 2**30
"""Memory up to which `rank="auto"` keeps the queries at full rank."""

AUTO_RANK = 64


def score(
    model: nn.Module,
    task: Task,
    queries: Any,
    train: Any,
    operator: Operator,
    settings: Score = Score(),
    *,
    rows: Sequence[int | str] | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
    **changes: Any,
) -> Scores:
    """Score every training example against every query.

    The score is `grad m(query)^T operator grad log p(example)`, with the operator usually
    `curvature.inverse(damping=0.1)`; divided by `n_train` (default: the examples of `train` that have a loss) it is
    the slope of the measurement at these weights, in nats per copy of the example for log-probabilities: positive raises.

    `per` "token" or "module" keeps these parts too; `aggregate` "queries" adds the queries up to one, "examples" the
    training examples. `rank` compresses the queries' gradients (None: full; "auto": full if they fit in 4 GiB), and
    `rescore=k` computes each query's k highest and k lowest scores again, at full rank and in float32. `norms`
    computes what `scores.normalised("cosine")` and `("relatif")` need.

    All of these are settings (`whence.settings.Score`), given as keywords or as one value. `rows` are the only training
    examples to score, by number or id, such as those that a search in an index found; `n_train` stays that of all.

    With `out` the scores are kept in that folder; see `fit` for resuming and refusing.

    Raises UsageError, NumericalError, DegenerateScores, OutOfMemory, StaleArtifact.
    """
    settings = Score.of(settings, changes)
    point = Point(model, task, train, batch_tokens=settings.batch_tokens)
    return score_points(point, point, queries, operator, settings, rows=rows, out=out, rerun=rerun)


def score_points(
    at: Point,
    of: Point,
    queries: Any,
    operator: Operator | None = None,
    settings: Score = Score(),
    *,
    names: Mapping[str, str] | None = None,
    rows: Sequence[int | str] | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
) -> Scores:
    """Score the rows of one point against queries asked at another: `grad_at m(query)^T operator grad_of log p(row)`.

    Modules of the two models belong together by name; `names` says what a module of `at` is called in `of` where that
    differs. What only one of them has is left out, and said. Without an operator this is the gradient dot product. The rest
    is that of `score`, which is this for one point.
    """
    settings = Score.of(settings, {})
    operator = Identity() if operator is None else operator
    check_operator(operator)
    asked = encode_queries(at.task, queries, at.model)
    if rows is not None:
        settings = settings.changed(n_train=settings.n_train or len(of.examples.usable))
        at, of = (of.only(rows),) * 2 if at is of else (at, of.only(rows))
    run = _Score(at, of, operator, names or {})
    check_choices(settings, operator)
    if not operator.blockwise:  # it may run the model and solve for something, which rounded products would not let converge
        if settings.products == "bfloat16":
            note(f"multiplying in float32, which {operator.label} needs")
        settings = settings.changed(products="float32")
    rank = run.rank(len(asked), settings.rank)
    settings = settings.changed(rank=rank or "full", chunks=settings.chunks if out else 1)
    with work(out, lambda: run.provenance("score", settings, asked.fingerprint), rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            return _finished(folder)
        folder.warn_if_no_room(run.most_bytes(settings, len(asked)))
        if settings.check:
            check_rows(folder, of, run.rows)
            check_queries(folder, at, run.read, asked)
        with run.multiplying(folder, settings.precision):
            kept = kept_as(settings.precision.operands("scores", at.dtype), at.device)
            prepared = run.prepare(asked, settings, rank, kept)
            if "examples" in settings.aggregate:
                raw, parts = run.total(prepared, settings.precision), {}
            else:
                parts = run.columns(run.quantities(prepared.gradients, settings), settings, folder)
                raw = parts.pop("raw") if "raw" in parts else _sum_modules(parts)
        with run.multiplying(folder, EXACT):
            exact = run.rescore(raw, asked, settings) if settings.rescore else None
        check_scores(raw, of.examples.ids)
        return run.finish(folder, raw, settings, asked, prepared, parts, exact)


def self_influence(
    model: nn.Module,
    task: Task,
    train: Any,
    operator: Operator,
    settings: Score = Score(),
    *,
    out: str | Path | None = None,
    rerun: bool = False,
    **changes: Any,
) -> Scores:
    """The influence of every training example on its own log-likelihood, `grad log p(z)^T operator grad log p(z)`, `[1, N]`.

    High values mark examples that the model could only learn from themselves: rare, mislabelled or memorised ones. The operator
    has to act on each module by itself (`Operator.blockwise`).
    """
    settings = Score.of(settings, changes)
    point = Point(model, task, train, batch_tokens=settings.batch_tokens)
    return self_influence_at(point, operator, settings, out=out, rerun=rerun)


def self_influence_at(
    point: Point, operator: Operator, settings: Score = Score(), *, out: str | Path | None = None, rerun: bool = False
) -> Scores:
    """The influence of a point's rows on themselves; see `self_influence`."""
    check_operator(operator)
    kept = {"precision": settings.precision, "n_train": settings.n_train, "check": settings.check}
    settings = Score().changed(rank="full", chunks=settings.chunks if out else 1, **kept)
    check_choices(settings.changed(norms=("relatif",)), operator)
    run = _Score(point, point, operator, {})
    with work(out, lambda: run.provenance("self-influence", settings, ""), rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            return _finished(folder)
        folder.warn_if_no_room(run.most_bytes(settings, 1))
        if settings.check:
            check_rows(folder, point, run.rows)
        with run.multiplying(folder, settings.precision):
            parts = run.columns({"raw": run.self_products()}, settings, folder)
        return run.finish(folder, parts["raw"].reshape(1, -1), settings)


class _Score:
    """One scoring run at work: what its stages have in common.

    `sites` are the tracked modules of `at`; `read` are those whose gradients the operator takes of queries: these, or more.
    """

    def __init__(self, at: Point, of: Point, operator: Operator, names: Mapping[str, str]):
        self.at, self.of, self.operator = at, of, operator
        shared = shared_sites(at, of, operator.names, names)
        self.sites = {name: site for name, site in at.cover(operator.names or None).sites.items() if name in shared}
        beyond = set(operator.reads) - set(operator.names)
        reads = at.cover(operator.reads).sites if beyond else {}
        self.read = {name: site for name, site in reads.items() if name in beyond} | self.sites
        self.rows = {site.name: site for site in shared.values()}
        """The same modules of `of`."""
        self.names = {site.name: name for name, site in shared.items()}
        """What a module of `of` is called in `at`."""
        self.products = ""

    def rank(self, queries: int, rank: int | str) -> int | None:
        """The rank that "auto" stands for; None for "full"."""
        if rank != "auto":
            return None if rank == "full" else int(rank)
        size = queries * sum(site.shape[0] * site.shape[1] for site in self.read.values()) * 4
        if size <= FULL_RANK_BYTES:
            return None
        note(f"{queries} query gradients would take {size / 2**30:.0f} GiB: kept at rank {AUTO_RANK} (rank=None for full)")
        return AUTO_RANK

    def most_bytes(self, settings: Score, queries: int) -> int:
        """Bytes in the folder at most: all numbers twice, as chunks and put together, and the texts of the rows."""
        if "examples" in settings.aggregate:
            return 0
        train, asked = self.of.examples, 1 if "queries" in settings.aggregate else queries
        each = asked * (1 + len(self.rows) if settings.per == "module" else 1) + len(settings.norms)
        tokens = asked * sum(train.sizes) if settings.per == "token" else 0
        exact = asked * len(train) if settings.rescore else 0
        return 2 * self.of.sums.itemsize * (each * len(train) + tokens) + exact + texts_bytes(train.rows)

    def provenance(self, name: str, settings: Score, queries: str) -> dict[str, Any]:
        """What decides the scores; `queries` is the fingerprint of what is asked."""
        rows = self.of.provenance()
        elsewhere = {} if self.at is self.of else {"at": self.at.fingerprint, "names": self.names, "rows": rows["task"]}
        return {
            "stage": name,
            **rows,
            **elsewhere,
            "queries": queries,
            "task": self.at.settings,
            "operator": fingerprint_operator(self.operator),
            "settings": settings.deciding(),
            "code": fingerprint_code(),
        }

    @contextlib.contextmanager
    def multiplying(self, folder: Folder | Memory, precision: Precision) -> Iterator[None]:
        """Take products as `precision` says; `products` remembers how."""
        operator = self.operator if self.at is self.of else None
        given = (folder, precision, self.of, self.rows, self.of.examples.usable, operator)
        products = dist.on_first(settle_products, *given)
        self.products = self.products or products
        with multiplying(products, self.of.device):
            yield

    def prepare(
        self, asked: Queries, settings: Score, rank: int | None, kept: torch.dtype, name: str = "queries"
    ) -> Preconditioned:
        """The queries' gradients, multiplied with the operator, under the names that modules have in `of`."""
        how: dict[str, Any] = {"rank": rank, "kept": kept, "seed": settings.seed, "together": "queries" in settings.aggregate}
        found = precondition(self.at, asked, self.read, self.operator, name=name, **how)
        there = {here: name for name, here in self.names.items()}
        gradients = {there[name]: each.to(self.of.device) for name, each in found.gradients.items() if name in there}
        return replace(found, gradients=gradients)

    def quantities(self, queries: Gradients, settings: Score) -> dict[str, Quantity]:
        """What to add up over the modules for every training example."""
        quantities: dict[str, Quantity] = {}
        if settings.per == "module":
            quantities |= {f"module/{name}": products_at(queries, name) for name in queries}
        else:
            quantities["raw"] = products(queries)
        if settings.per == "token":
            quantities["tokens"] = token_products(queries)
        if "cosine" in settings.norms:
            quantities["norm/gradient"] = Identity().streaming(self.of.like).quadratic
        if "relatif" in settings.norms:
            quantities["norm/self"] = self.self_products()
        return quantities

    def self_products(self) -> Quantity:
        """`<g, operator g>`: an example's influence on itself, `[B]`."""
        streaming = self.operator.streaming(self.of.like)
        return lambda name, gradient, readers: streaming.quadratic(self.names[name], gradient, readers)

    def columns(self, quantities: Mapping[str, Quantity], settings: Score, folder: Folder | Memory) -> dict[str, np.ndarray]:
        """Every quantity for all training examples, `[..., N]` ("tokens": `[Q, all positions]`); chunk by chunk."""
        train = self.of.examples
        saved = ByChunk(data_chunks(train.usable, train.sizes, settings.chunks), folder, "chunk")
        return self._assembled(self._sent(quantities, "score", saved, saved.result))

    def _sent(self, quantities: Mapping[str, Quantity], name: str, saved: Unsaved, result: Any) -> dict[str, Tensor]:
        """What the quantities come to for the examples of these chunks."""
        sink = Columns(self.of.task, quantities, self.of.examples.sizes)
        run_pass(self.of, self.rows, self.of.examples, self.of.likelihood, sink, name, saved)
        return result(sink)

    def _assembled(self, found: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The columns in the order of the examples; examples without a loss have zeros."""
        indices, lengths = found["indices"], torch.tensor(self.of.examples.sizes)
        starts = lengths.cumsum(0) - lengths
        result = {}
        for key, columns in found.items():
            if key == "indices":
                continue
            places, count = indices, len(lengths)
            if key == "tokens":
                places = torch.cat([torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in indices.tolist()])
                count = int(lengths.sum())
            result[key] = columns.new_zeros((*columns.shape[:-1], count)).index_copy_(-1, places, columns).numpy()
        return result

    def total(self, prepared: Preconditioned, precision: Precision) -> np.ndarray:
        """Scores of the whole training data taken together, `[Q, 1]`."""
        of = self.of
        sink = Total(precision.operands("scores", of.dtype), of.sums, of.device)
        run_pass(of, self.rows, of.examples, of.likelihood, sink, "score", Unsaved(of.examples.usable))
        queries = {name: gradient.to(of.sums) for name, gradient in prepared.gradients.items()}
        sums = {name: Dense(sink.totals[name].unsqueeze(0)) for name in self.rows if name in sink.totals}
        return dot(queries, sums).cpu().numpy()

    def rescore(self, raw: np.ndarray, asked: Queries, settings: Score) -> np.ndarray:
        """Compute each query's highest and lowest scores again, at full rank and in float32, in place; says which."""
        exact = np.zeros(raw.shape, dtype=bool)
        order = np.argsort(raw, axis=1, kind="stable")  # the same on every machine of a run
        ends = np.concatenate([order[:, : settings.rescore], order[:, -settings.rescore :]], axis=1)
        np.put_along_axis(exact, ends, True, axis=1)
        usable = np.zeros(raw.shape[1], dtype=bool)
        usable[self.of.examples.usable] = True
        exact &= usable
        per_query = sum(site.shape[0] * site.shape[1] for site in self.read.values()) * 4
        step = max(1, FULL_RANK_BYTES // per_query)
        for start in range(0, len(asked), step):
            rows = slice(start, start + step)
            prepared = self.prepare(asked.take(rows), settings, None, self.at.sums, "queries at full rank")
            saved = ByChunk([np.flatnonzero(exact[rows].any(0)).tolist()], Memory(), "rescore")
            found = self._sent({"raw": products(prepared.gradients)}, "rescore", saved, saved.result)
            again = np.zeros_like(raw[rows])
            again[:, found["indices"].numpy()] = found["raw"].numpy()
            raw[rows] = np.where(exact[rows], again, raw[rows])
        return exact

    def finish(
        self,
        folder: Folder | Memory,
        raw: np.ndarray,
        settings: Score,
        asked: Queries | None = None,
        prepared: Preconditioned | None = None,
        parts: Mapping[str, np.ndarray] | None = None,
        exact: np.ndarray | None = None,
    ) -> Scores:
        """The scores with everything that goes with them, kept in the folder; without queries those of the rows themselves."""
        about = {
            "operator": self.operator.label,
            "rank": None if settings.rank == "full" else settings.rank,
            "products": self.products,
            "modules": len(self.sites),
            "rescored": settings.rescore,
            **self.operator.about,
        }
        train, parts = self.of.examples, parts or {}
        if asked is None or prepared is None:
            table = {"id": ["self"], "text": [""]} | dict.fromkeys(("measured", "norm", "energy"), torch.full((1,), torch.nan))
        else:
            together = {"id": ["all"], "text": [f"{len(asked)} queries added up"]}
            together |= {"contrast": ["their contrasts"]} if any(asked.table["contrast"]) else {}
            table = {**(together if "queries" in settings.aggregate else asked.table), **prepared.columns()}
        norms = {"self": parts["norm/self"]} if "norm/self" in parts else {}
        if "norm/gradient" in parts:
            norms = {"gradient": np.sqrt(parts["norm/gradient"]), **norms}
        result = tabulated(
            raw,
            self.at,
            self.of,
            table,
            about,
            n_train=settings.n_train,
            norms=norms,
            modules={key.removeprefix("module/"): value for key, value in parts.items() if key.startswith("module/")},
            tokens=parts.get("tokens"),
            exact=exact,
        )
        if "examples" in settings.aggregate:
            result = replace(result, examples=describe_rows([{}], ["all"], [sum(train.sizes)], None))
        if settings.per == "token" and self.of.task.predicted_tokens(train.items[0]) is not None:
            known: dict[str, str] = {}  # a token is one string, however often it occurs
            every = (self.of.task.predicted_tokens(item) or () for item in train.items)
            result.examples["pieces"] = [[known.setdefault(piece, piece) for piece in pieces] for pieces in every]
        if isinstance(folder, Folder):
            dist.on_first(result.save, folder)
        return result


def _finished(folder: Folder) -> Scores:
    note(f"{folder.path} is finished and unchanged: nothing to compute")
    return open_scores(folder.path)


def _sum_modules(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    values = [each for key, each in parts.items() if key.startswith("module/")]
    return np.sum(values, axis=0, dtype=values[0].dtype)
