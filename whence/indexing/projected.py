"""Projected gradients: one pass over a point's rows, after which a method is a formula on a few numbers per module.

    small = project_gradients(point, queries, random_projection(shapes, 16, seed=0))
    inverse = curvature_of(small.second_moments()).inverse(damping=0.1)
    raw_QN = small.columns(lambda rows: dot(inverse @ small.queries, rows))

Gradients of a block are `[n, 1, P]`, in float64; a block is a module, or all of them side by side.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whence import dist
from whence.coverage import Site
from whence.engine.autograd import check_queries, check_rows, labels_drawn
from whence.engine.partition import SAVE_SECONDS, data_chunks, keep
from whence.engine.passes import ByChunk, ByClock, run_pass
from whence.engine.point import Point
from whence.engine.probe import settle_products
from whence.engine.queries import Preconditioned, Queries, encode_queries, precondition
from whence.engine.sinks import Sums
from whence.engine.stream import drawn_likelihood
from whence.errors import UsageError
from whence.gradients import Dense, Gradient, Gradients
from whence.indexing.rows import ProjectedRows, projected_width
from whence.linalg.eigh import eigh
from whence.linalg.rotation import Rotation
from whence.operators import BlockDiagonal, EigenBlock, Operator
from whence.precision import multiplying
from whence.progress import note, stage
from whence.scoring.checks import check_scores
from whence.scoring.results import tabulated
from whence.settings import Score
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
from whence.store.scores import Scores
from whence.tasks.base import Batch, Task

ROWS = "rows"

BLOCK_BYTES = 64 * 2**20
"""Memory for the rows that are read at a time, in float64."""

WIDEST = 20_000
"""Numbers of a block: its matrix takes 3 GiB, and an hour or so to decompose."""


@dataclass(frozen=True)
class Projected:
    """Projected gradients of all rows, kept in shards, and those of the queries; `blocks` says where in a row each block is."""

    point: Point
    asked: Queries
    found: Preconditioned
    """What is known of the queries besides."""
    names: Sequence[str]
    """The modules, in the order that they have in a row."""
    blocks: Mapping[str, slice]
    folder: Folder | Memory
    shards: Sequence[str]

    @property
    def queries(self) -> Gradients:
        """Of the queries' measurements, `[Q, 1, P]`."""
        return self._blocks(torch.cat([self.found.gradients[name].dense().w_BOI.flatten(1) for name in self.names], 1))

    def rows(self, name: str) -> Iterator[tuple[Tensor, Gradients]]:
        """Numbers of rows, and their gradients, some at a time; `name` is the stage that is reported."""
        with stage(name, len(self.point.examples.usable), "rows") as advance:
            for shard in map(self.folder.load, self.shards):
                step = max(1, BLOCK_BYTES // (8 * shard["codes"].shape[1]))
                for indices, codes in zip(shard["indices"].split(step), shard["codes"].split(step), strict=True):
                    yield indices, self._blocks(codes)
                    advance(len(indices))

    def columns(self, function: Callable[[Gradients], Tensor], name: str = "products") -> Tensor:
        """What the function makes of the rows' gradients, `[..., n]`, for all of them: `[..., N]`, zero without a loss."""
        parts = [(indices, function(rows).cpu()) for indices, rows in self.rows(name)]
        indices, values = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], -1)
        return values.new_zeros((*values.shape[:-1], len(self.point.examples))).index_copy_(-1, indices, values)

    def second_moments(self) -> dict[str, Tensor]:
        """Mean over the rows of `g g^T` at each block, `[P, P]`."""
        sums: dict[str, Tensor] = {}
        for _, rows in self.rows("gram"):
            for name, gram_PP in grams(rows).items():
                sums[name] = sums[name].add_(gram_PP) if name in sums else gram_PP
        return {name: total / len(self.point.examples.usable) for name, total in sums.items()}

    def doubts(self) -> Tensor:
        """Of rows whose margins were differentiated: how far their labels are from certain, `[N]`."""
        shards = [self.folder.load(name) for name in self.shards]
        indices, values = (torch.cat([shard[key] for shard in shards]) for key in ("indices", "doubt"))
        return values.new_zeros(len(self.point.examples)).index_copy_(0, indices, values).double()

    def scores(self, raw_QN: Tensor, operator: str, unit: str | None = None, n_train: int | None = None) -> Scores:
        """Numbers made from these gradients as scores, called `operator`; a `unit` where it isn't nats per copy."""
        raw = raw_QN.float().numpy()
        check_scores(raw, self.point.examples.ids)
        about = {
            "operator": operator,
            "modules": len(self.names),
            "projected": max(place.stop for place in self.blocks.values()),
        }
        table = {**self.asked.table, **self.found.columns()}
        return tabulated(raw, self.point, self.point, table, about, n_train=n_train).named(operator, unit)

    def _blocks(self, rows_nD: Tensor) -> Gradients:
        rows_nD = rows_nD.to(self.point.device, torch.float64)
        return {name: Dense(rows_nD[:, place].unsqueeze(1)) for name, place in self.blocks.items()}


def project_gradients(
    point: Point,
    queries: Any,
    projection: Operator,
    settings: Score = Score(),
    *,
    of_rows: Operator | None = None,
    margins: bool = False,
    joint: bool = False,
    out: str | Path | None = None,
) -> Projected:
    """Project the gradients of all rows, which are kept in `out`, and those of the queries.

    `of_rows` is what rows are projected with where that is another operator. `margins`: the rows are differentiated by their
    log-odds instead of their log-likelihood. `joint` makes one block of all modules. A killed pass resumes after the last of
    its chunks, to the same bits.

    Raises UsageError where the second moments of a block would be too large, and what `whence.score` raises.
    """
    of_rows = of_rows or projection
    asked, sites, examples = (
        encode_queries(point.task, queries, point.model),
        point.cover(projection.names).sites,
        point.examples,
    )

    def provenance() -> dict[str, Any]:
        made = {"operator": fingerprint_operator(of_rows), "margins": margins}
        return {"stage": "project", **point.provenance(), **made, "settings": settings.deciding(), "code": fingerprint_code()}

    with work(out, provenance) as folder:
        operands = settings.precision.operands("scores", point.dtype)
        kind = functools.partial(MarginRows, point.task) if margins else ProjectedRows
        sink = kind(of_rows, sites, examples.sizes, "float32", operands, point.like)
        blocks = _blocks_of(sink.widths, len(examples.usable), joint)
        saved = ByChunk(data_chunks(examples.usable, examples.sizes, settings.chunks if out else 1), folder, ROWS)
        finished = isinstance(folder, Folder) and folder.finished
        if settings.check and not finished:
            check_rows(folder, point, sites)
            check_queries(folder, point, sites, asked)
        products = dist.on_first(settle_products, folder, settings.precision, point, sites, examples.usable)
        with multiplying(products, point.device):
            if not finished:
                objective = sink.objective if isinstance(sink, MarginRows) else point.likelihood
                run_pass(point, sites, examples, objective, sink, "project", saved)
                folder.finish()
            found = precondition(point, asked, sites, projection)
    return Projected(point, asked, found, tuple(sink.widths), blocks, folder, saved.shards)


def drawn_second_moments(
    point: Point, projection: Operator, settings: Score = Score(), *, out: str | Path | None = None
) -> dict[str, Tensor]:
    """Mean of `g g^T` at each module, `[P, P]`, `g` being projected gradients of labels that are drawn from the model.

    That is the true Fisher matrix; nothing is kept of the rows. Where the task draws no labels it is that of the data's own,
    which is said. A killed pass resumes, to the same bits.
    """
    sites, examples = point.cover(projection.names).sites, point.examples

    def provenance() -> dict[str, Any]:
        made = {"operator": fingerprint_operator(projection), "settings": settings.deciding(), "code": fingerprint_code()}
        return {"stage": "second moments", **point.provenance(), **made}

    with work(out, provenance) as folder:
        if not (isinstance(folder, Folder) and folder.finished):
            drawn = labels_drawn(point, sites, settings.check) == "model"
            objective = drawn_likelihood(point.task, examples, f"{settings.seed}:projected") if drawn else point.likelihood
            sink = SecondMoments(projection, sites, point.like.to(torch.float64))
            chunks = data_chunks(examples.usable, examples.sizes, settings.chunks if out else 1)
            saved = ByClock(chunks, folder, "sums", save_every=SAVE_SECONDS)
            products = dist.on_first(settle_products, folder, settings.precision, point, sites, examples.usable)
            with multiplying(products, point.device):
                run_pass(point, sites, examples, objective, sink, "second moments", saved)
            keep(folder, "moments", {name: sum_PP for name, sum_PP in sink.state().items() if name in sink.widths})
            folder.finish()
        sums = folder.load("moments", point.device)
    return {name: sums[name] / len(examples.usable) for name in projection.names}


def grams(gradients: Gradients) -> dict[str, Tensor]:
    """Sum of `g g^T` at each block, `[P, P]`."""
    rows = {name: gradient.dense().w_BOI.flatten(1) for name, gradient in gradients.items()}
    return {name: g_nP.T @ g_nP for name, g_nP in rows.items()}


def curvature_of(moments: Mapping[str, Tensor], label: str = "second moments of projected gradients") -> BlockDiagonal:
    """Matrices `[P, P]` of blocks as an operator on their gradients; eigenvalues that are rounding errors are zero."""
    blocks = {}
    for name, moment_PP in moments.items():
        lam_P, q_PP = eigh(moment_PP, f"the projected gradients of {name}")
        noise = lam_P.max() * len(lam_P) * torch.finfo(lam_P.dtype).eps
        blocks[name] = EigenBlock(None, Rotation((q_PP,)), torch.where(lam_P > noise, lam_P, 0.0).unsqueeze(0))
    return BlockDiagonal(blocks, label)


class SecondMoments(Sums):
    """Sums of `g g^T` of projected gradients, `[P, P]`, in the format of `like`."""

    def __init__(self, projection: Operator, sites: Mapping[str, Site], like: Tensor):
        self.streaming = projection.streaming(like)
        self.inputs = self.streaming.ahead(name for name, site in sites.items() if site.reads_columns)
        super().__init__(like.dtype, like.device)
        self.widths = {name: projected_width(self.streaming, name, sites[name], like) for name in projection.names}

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add the module's part."""
        g_BP = self.streaming.apply(name, gradient, readers).dense().w_BOI.flatten(1)
        self.sum_of(name, *2 * (self.widths[name],)).addmm_(g_BP.T, g_BP)


class MarginRows(ProjectedRows):
    """Rows of the margins' gradients, with how far each row's labels are from certain, "doubt" `[n]`."""

    def __init__(self, task: Task, *given: Any):
        super().__init__(*given)
        self.task = task

    def objective(self, model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        """The margins of a batch."""
        margins, self._doubt = self.task.margins(model, batch)
        return margins

    def end(self) -> None:
        super().end()
        self.file("doubt", self._doubt.float().cpu())


def _blocks_of(widths: Mapping[str, int], rows: int, joint: bool) -> dict[str, slice]:
    """Where in a row each block is; how large all rows are is said. Raises UsageError for a block that is too wide."""
    stops = list(itertools.accumulate(widths.values()))
    note(f"projected gradients: {rows:,} rows x {stops[-1]:,} numbers, {rows * stops[-1] * 4 / 2**20:,.1f} MiB")
    places = {name: slice(stop - width, stop) for (name, width), stop in zip(widths.items(), stops, strict=True)}
    blocks = {"all modules": slice(0, stops[-1])} if joint else places
    name, widest = max(((name, place.stop - place.start) for name, place in blocks.items()), key=lambda pair: pair[1])
    if widest > WIDEST:
        raise UsageError(
            f"The second moments of {name} would take {widest**2 * 8 / 2**30:.0f} GiB",
            given=f"{widest:,} numbers",
            accepted=f"at most {WIDEST:,}",
            fix="a smaller dim" + (", or a matrix for each module (gram='module')" if joint else ""),
        )
    return blocks
