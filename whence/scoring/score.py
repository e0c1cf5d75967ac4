"""Score training examples against queries: one pass over the queries, one over the training data.

The queries' gradients are multiplied with the operator and stay on the device; then every training example's gradient
meets all of them as it arises in the backward pass, and is forgotten. The scores of each chunk of the data are saved
when it is done: a killed run goes on from there, to the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from whence import dist
from whence.capture import Capture
from whence.coverage import Site, cover
from whence.data.rows import Rows
from whence.engine.partition import batch_positions, data_chunks, keep, next_round, run_share
from whence.engine.probe import settle_products
from whence.engine.stream import Examples, encode, identify, likelihood, read, stream
from whence.errors import NumericalError, UsageError
from whence.gradients import Dense, Gradients, Per, dot
from whence.operators.base import Operator
from whence.precision import EXACT, Precision, kept_as, multiplying
from whence.progress import note, stage
from whence.scoring.checks import check_choices, check_scores
from whence.scoring.queries import Preconditioned, precondition
from whence.scoring.sinks import (
    Columns,
    Quantity,
    Total,
    products,
    products_at,
    self_products,
    squared_norms,
    token_products,
)
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint, fingerprint_tensors
from whence.store.manifest import Folder
from whence.store.memory import Memory, claim
from whence.store.scores import Scores, describe_queries, describe_rows
from whence.tasks.base import Task

FULL_RANK_BYTES = 4 * 2**30
"""Memory up to which `rank="auto"` keeps the queries at full rank."""

AUTO_RANK = 64


@dataclass(frozen=True)
class ScoreSettings:
    """What decides the scores; see `score`."""

    per: Per = "example"
    aggregate: tuple[str, ...] = ()
    rank: int | None = None
    rescore: int = 0
    norms: tuple[str, ...] = ()
    seed: int = 0
    n_train: int | None = None
    precision: Precision = Precision()
    chunks: int = 8


def score(
    model: nn.Module,
    task: Task,
    queries: Any,
    train: Any,
    operator: Operator,
    *,
    out: str | Path | None = None,
    per: Per = "example",
    aggregate: str | Sequence[str] = (),
    rank: int | None | Literal["auto"] = "auto",
    rescore: int = 0,
    norms: Sequence[str] = (),
    seed: int = 0,
    n_train: int | None = None,
    precision: Precision = Precision(),
    batch_tokens: int | None = None,
    chunks: int = 8,
    rerun: bool = False,
) -> Scores:
    """Score every training example against every query.

    The score is `grad m(query)^T operator grad log p(example)`, with the operator usually
    `curvature.inverse(damping=0.1)`; divided by `n_train` (default: the examples of `train` that have a loss) it is
    the effect of one more copy of the example, in nats for log-probabilities: positive raises.

    `per` "token" or "module" keeps these parts too; `aggregate` "queries" adds the queries up to one, "examples" the
    training examples. `rank` compresses the queries' gradients (None: full; "auto": full if they fit in 4 GiB), and
    `rescore=k` computes each query's k highest and k lowest scores again, at full rank and in float32. `norms`
    computes what `scores.normalised("cosine")` and `("relatif")` need.

    With `out` the scores are kept in that folder; see `fit` for resuming and refusing.

    Raises UsageError, NumericalError, DegenerateScores, OutOfMemory, StaleArtifact.
    """
    query_rows = dist.from_first(read(queries))
    if not len(query_rows):
        raise UsageError("There are no queries", accepted="one query or more")
    work = _Score(model, task, encode(task, train), operator, batch_tokens)
    weighted = task.encode_queries(query_rows)
    kinds = (aggregate,) if isinstance(aggregate, str) else tuple(aggregate)
    check_choices(per, kinds, norms, rescore)
    chosen = work.rank(len(weighted), rank)
    settings = ScoreSettings(per, kinds, chosen, rescore, tuple(norms), seed, n_train, precision, chunks if out else 1)
    asked = describe_queries(query_rows, task, weighted)
    folder = work.claim(out, "score", settings, identify(query_rows)[1], rerun)
    try:
        if isinstance(folder, Folder) and folder.finished:
            return _finished(folder)
        with work.multiplying(folder, precision):
            kept = kept_as(precision.operands("scores", work.dtype), work.device)
            prepared = work.prepare(weighted, settings, chosen, kept, work.sums)
            if "examples" in kinds:
                raw, extra = work.total(prepared, precision), {}
            else:
                quantities = _quantities(prepared.gradients, operator.to(work.like), settings, work.sums)
                extra = work.columns(quantities, settings, folder)
                raw = extra.pop("raw") if "raw" in extra else _sum_modules(extra)
        with work.multiplying(folder, EXACT):
            exact = work.rescore(raw, weighted, settings) if rescore else None
        check_scores(raw, work.train.ids)
        result = work.result(raw, extra, prepared, asked, settings, exact)
        if isinstance(folder, Folder):
            dist.on_first(result.save, folder)
        return result
    finally:
        folder.close()


def self_influence(
    model: nn.Module,
    task: Task,
    train: Any,
    operator: Operator,
    *,
    out: str | Path | None = None,
    precision: Precision = Precision(),
    batch_tokens: int | None = None,
    chunks: int = 8,
    rerun: bool = False,
) -> Scores:
    """The influence of every training example on its own log-likelihood, `grad log p(z)^T operator grad log p(z)`, `[1, N]`.

    High values mark examples that the model could only learn from themselves: rare, mislabelled or memorised ones.
    """
    work = _Score(model, task, encode(task, train), operator, batch_tokens)
    settings = ScoreSettings(precision=precision, chunks=chunks if out else 1)
    folder = work.claim(out, "self-influence", settings, "", rerun)
    try:
        if isinstance(folder, Folder) and folder.finished:
            return _finished(folder)
        with work.multiplying(folder, precision):
            extra = work.columns({"raw": self_products(operator.to(work.like))}, settings, folder)
        asked = {"id": ["self"], "text": [""]}
        nothing = Preconditioned({}, *[torch.full((1,), float("nan"))] * 3)
        result = work.result(extra["raw"].reshape(1, -1), {}, nothing, asked, settings, None)
        if isinstance(folder, Folder):
            dist.on_first(result.save, folder)
        return result
    finally:
        folder.close()


class _Score:
    """One scoring run at work: what its stages have in common."""

    def __init__(self, model: nn.Module, task: Task, train: Examples, operator: Operator, batch_tokens: int | None):
        self.model, self.task, self.train, self.operator = model, task, train, operator
        self.sites: dict[str, Site] = cover(model, list(operator.names)).sites
        first = next(model.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.sums = torch.promote_types(self.dtype, torch.float32)
        self.like = torch.empty(0, dtype=self.sums, device=self.device)
        self.batch_tokens = batch_positions(batch_tokens, self.device)
        self.products = ""

    def rank(self, queries: int, rank: int | None | Literal["auto"]) -> int | None:
        """The rank that "auto" stands for."""
        if rank != "auto":
            return None if rank is None or rank < 0 else rank
        size = queries * sum(site.shape[0] * site.shape[1] for site in self.sites.values()) * 4
        if size <= FULL_RANK_BYTES:
            return None
        note(f"{queries} query gradients would take {size / 2**30:.0f} GiB: kept at rank {AUTO_RANK} (rank=None for full)")
        return AUTO_RANK

    def claim(self, out: str | Path | None, name: str, settings: ScoreSettings, queries: str, rerun: bool) -> Folder | Memory:
        """The folder for the result, or memory where the user wants none."""

        def provenance() -> dict[str, Any]:
            return {
                "stage": name,
                "model": fingerprint(self.model),
                "data": {"fingerprint": self.train.fingerprint, "examples": len(self.train)},
                "queries": queries,
                "task": self.task.settings(),
                "operator": {"label": self.operator.label, "eigenvalues": fingerprint_tensors(self.operator.tensors())},
                "settings": {**vars(settings), "precision": settings.precision.settings()},
                "code": fingerprint_code(),
            }

        return claim(out, provenance, rerun=rerun)

    @contextlib.contextmanager
    def multiplying(self, folder: Folder | Memory, precision: Precision) -> Iterator[None]:
        """Take products as `precision` says; `products` remembers how."""
        train = self.train
        given = (self.model, self.task, train, self.sites, train.usable, self.operator.to(self.like))
        products = dist.on_first(settle_products, folder, precision, *given)
        self.products = self.products or products
        with multiplying(products, self.device):
            yield

    def prepare(
        self,
        weighted: Sequence[Sequence[tuple[Any, float]]],
        settings: ScoreSettings,
        rank: int | None,
        kept: torch.dtype,
        dtype: torch.dtype,
        name: str = "queries",
    ) -> Preconditioned:
        """The queries' gradients, multiplied with the operator."""
        total = sum(self.task.size(item) for query in weighted for item, _ in query)
        with Capture(self.model, self.sites) as capture, stage(name, total, "tokens") as advance:
            prepared = precondition(
                capture,
                self.task,
                weighted,
                self.operator.to(self.like),
                rank=rank,
                dtype=dtype,
                kept=kept,
                batch_tokens=self.batch_tokens,
                seed=settings.seed,
                together="queries" in settings.aggregate,
                advance=advance,
            )
        if not bool(torch.isfinite(prepared.norms).all()):
            raise NumericalError("A query's gradient is not finite", fix="look at the query's text, or use float32")
        return prepared

    def columns(
        self, quantities: Mapping[str, Quantity], settings: ScoreSettings, folder: Folder | Memory
    ) -> dict[str, np.ndarray]:
        """Every quantity for all training examples, `[..., N]` ("tokens": `[Q, all positions]`); chunk by chunk."""
        sizes = self.train.sizes
        pieces = data_chunks(self.train.usable, sizes, settings.chunks)
        names = [f"chunk-{number:04d}" for number in range(len(pieces))]
        done = [folder.has(name) for name in names]
        total, behind = sum(sizes), sum(sizes[i] for piece, ready in zip(pieces, done, strict=True) if ready for i in piece)
        with Capture(self.model, self.sites) as capture, stage("score", total, "tokens", done=behind) as advance:
            left = [number for number, ready in enumerate(done) if not ready]
            while left:
                count = next_round([pieces[number] for number in left], sizes, self.batch_tokens)
                now, left = left[:count], left[count:]
                sink = self._stream(capture, [pieces[number] for number in now], quantities, advance)
                for number in now:
                    keep(folder, names[number], _on_first(sink.tensors(pieces[number])))
        found = [folder.load(name) for name in names]
        return {key: self._assemble(key, found) for key in found[0] if key != "indices"}

    def _stream(
        self,
        capture: Capture,
        chunks: Sequence[Sequence[int]],
        quantities: Mapping[str, Quantity],
        advance: Callable[[int], None],
    ) -> Columns:
        """The quantities of the chunks' examples; of several processes each has those of its share."""
        sink = Columns(self.task, quantities)
        self._send(capture, chunks, sink, advance)
        return sink

    def _send(
        self, capture: Capture, chunks: Sequence[Sequence[int]], sink: Columns | Total, advance: Callable[[int], None]
    ) -> None:
        """Send the gradients of these training examples to the sinks of all processes, each its share."""
        train = self.train
        objective = likelihood(self.task, train)

        def run(batches: list[list[int]], tell: Callable[[int], None]) -> None:
            stream(capture, self.task, train.items, batches, objective, sink, tell)

        self.batch_tokens = run_share(chunks, train.sizes, self.batch_tokens, run, sink.restart, advance)

    def _assemble(self, key: str, found: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
        """Put the chunks' columns in the order of the examples; examples without a loss have zeros."""
        indices = torch.cat([chunk["indices"] for chunk in found])
        columns = torch.cat([chunk[key] for chunk in found], dim=-1)
        if key != "tokens":
            result = columns.new_zeros((*columns.shape[:-1], len(self.train)))
            result[..., indices] = columns
            return result.numpy()
        lengths = torch.tensor(self.train.sizes)
        starts = lengths.cumsum(0) - lengths
        places = [torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in indices.tolist()]
        result = columns.new_zeros((columns.shape[0], int(lengths.sum())))
        result[:, torch.cat(places)] = columns
        return result.numpy()

    def total(self, prepared: Preconditioned, precision: Precision) -> np.ndarray:
        """Scores of the whole training data taken together, `[Q, 1]`."""
        sink = Total(precision.operands("scores", self.dtype), self.sums)
        with Capture(self.model, self.sites) as capture, stage("score", sum(self.train.sizes), "tokens") as advance:
            self._send(capture, [self.train.usable], sink, advance)
        queries = {name: gradient.to(self.sums) for name, gradient in prepared.gradients.items()}
        sums = dist.add_up(sink.sums)
        return dot(queries, {name: Dense(w_OI.unsqueeze(0)) for name, w_OI in sums.items()}).cpu().numpy()

    def rescore(self, raw: np.ndarray, weighted: Sequence[Sequence[tuple[Any, float]]], settings: ScoreSettings) -> np.ndarray:
        """Compute each query's highest and lowest scores again, at full rank and in float32, in place; says which."""
        exact = np.zeros(raw.shape, dtype=bool)
        order = np.argsort(raw, axis=1, kind="stable")  # the same on every machine of a run
        ends = np.concatenate([order[:, : settings.rescore], order[:, -settings.rescore :]], axis=1)
        np.put_along_axis(exact, ends, True, axis=1)
        usable = np.zeros(raw.shape[1], dtype=bool)
        usable[self.train.usable] = True
        exact &= usable
        per_query = sum(site.shape[0] * site.shape[1] for site in self.sites.values()) * 4
        step = max(1, FULL_RANK_BYTES // per_query)
        for start in range(0, len(weighted), step):
            rows = slice(start, start + step)
            prepared = self.prepare(weighted[rows], settings, None, self.sums, self.sums, "queries at full rank")
            chosen = np.flatnonzero(exact[rows].any(0)).tolist()
            total = sum(self.train.sizes[index] for index in chosen)
            with Capture(self.model, self.sites) as capture, stage("rescore", total, "tokens") as advance:
                sink = self._stream(capture, [chosen], {"raw": products(prepared.gradients)}, advance)
            found = dist.to_all(_on_first(sink.tensors(chosen)))
            again = np.zeros_like(raw[rows])
            again[:, found["indices"].numpy()] = found["raw"].numpy()
            raw[rows] = np.where(exact[rows], again, raw[rows])
        return exact

    def result(
        self,
        raw: np.ndarray,
        extra: Mapping[str, np.ndarray],
        prepared: Preconditioned,
        asked: Mapping[str, list[Any]],
        settings: ScoreSettings,
        exact: np.ndarray | None,
    ) -> Scores:
        """The scores with everything that goes with them."""
        import pandas

        together = {"id": ["all"], "text": [f"{len(asked['id'])} queries added up"]}
        columns = together if "queries" in settings.aggregate else asked
        queries = pandas.DataFrame(
            {**columns, "measured": prepared.measured, "norm": prepared.norms, "energy": prepared.energy}
        )
        rows, train = self.train.rows, self.train
        if "examples" in settings.aggregate:
            examples = describe_rows([{}], ["all"], [sum(train.sizes)], None)
        else:
            examples = describe_rows(rows, train.ids, train.sizes, rows.copies if isinstance(rows, Rows) else None)
        if settings.per == "token" and (pieces := [self.task.predicted_tokens(item) for item in train.items])[0] is not None:
            examples["pieces"] = pieces
        measurement = self.task.settings().get("measurement", "logprob")
        about = {
            "unit": "nats per copy" if measurement in ("logprob", "loss") else f"{measurement} per copy",
            "measurement": measurement,
            "operator": self.operator.label,
            "rank": settings.rank,
            "products": self.products,
            "modules": len(self.sites),
            "rescored": settings.rescore,
        }
        root = {"gradient": np.sqrt(extra["norm/gradient"])} if "norm/gradient" in extra else {}
        return Scores(
            raw=raw,
            n_train=settings.n_train or len(train.usable),
            examples=examples,
            queries=queries,
            about=about,
            norms={**root, **({"self": extra["norm/self"]} if "norm/self" in extra else {})},
            modules={key.removeprefix("module/"): value for key, value in extra.items() if key.startswith("module/")},
            tokens=extra.get("tokens"),
            exact=exact,
        )


def _on_first(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns that the processes have, side by side on the first; nothing on the others."""
    parts = [part for part in dist.to_first(columns) if part]
    if len(parts) < 2:
        return parts[0] if parts else {}
    return {key: torch.cat([part[key] for part in parts], dim=-1) for key in parts[0]}


def _finished(folder: Folder) -> Scores:
    from whence.store.scores import open_scores

    note(f"{folder.path} is finished and unchanged: nothing to compute")
    return open_scores(folder.path)


def _quantities(queries: Gradients, operator: Operator, settings: ScoreSettings, dtype: torch.dtype) -> dict[str, Quantity]:
    """What to add up over the modules for every training example."""
    quantities: dict[str, Quantity] = {}
    if settings.per == "module":
        quantities |= {f"module/{name}": products_at(queries, name) for name in queries}
    else:
        quantities["raw"] = products(queries)
    if settings.per == "token":
        quantities["tokens"] = token_products(queries)
    if "cosine" in settings.norms:
        quantities["norm/gradient"] = squared_norms(dtype)
    if "relatif" in settings.norms:
        quantities["norm/self"] = self_products(operator)
    return quantities


def _sum_modules(extra: Mapping[str, np.ndarray]) -> np.ndarray:
    parts = [values for key, values in extra.items() if key.startswith("module/")]
    return np.sum(parts, axis=0, dtype=parts[0].dtype)
