"""Build an index: one pass over the training data, forward and backward, with every gradient projected as it arises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence import dist
from whence.capture import Capture
from whence.coverage import Coverage, cover
from whence.data.rows import Rows
from whence.engine.partition import batch_positions, data_chunks, run_chunk
from whence.engine.probe import settle_products
from whence.engine.stream import Examples, encode, likelihood, stream
from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.fitting.fit import cover_default
from whence.indexing.index import EXAMPLES, MAPS, Index, open_index, rows_name
from whence.indexing.projection import in_eigenbasis, random_projection
from whence.indexing.rows import FORMATS, Kept, ProjectedRows
from whence.precision import Precision, Products, multiplying
from whence.progress import note, stage
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint, fingerprint_tensors
from whence.store.manifest import Folder
from whence.store.memory import Memory, claim
from whence.store.scores import describe_rows
from whence.tasks.base import Task

DAMPING = 0.1
"""Of the inverse that gradients are whitened with, relative to each module's mean eigenvalue; it decides the noise alone."""


@dataclass(frozen=True)
class IndexSettings:
    """What decides the rows; see `build_index`."""

    dim: int = 16
    seed: int = 0
    kept: Kept = "int8"
    precision: Precision = Precision()
    chunks: int = 8


def build_index(
    model: nn.Module,
    task: Task,
    data: Any,
    *,
    dim: int = 16,
    modules: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    kept: Kept = "int8",
    precision: Precision = Precision(),
    batch_tokens: int | None = None,
    chunks: int = 8,
    curvature: Curvature | None = None,
    rerun: bool = False,
) -> Index:
    """Project the gradient of every training example's log-likelihood to `dim x dim` numbers per module, and keep them.

    `index.search(model, task, queries)` then estimates `score(...)` for any queries without a pass over the data. The
    projections are random signs drawn with `seed`; a side of at most `dim` inputs or outputs is kept as it is. With
    `curvature` the gradients are projected in its eigenbasis, whitened, which makes searches with its inverse less
    noisy. `kept` is the format of the rows: int8 with a scale per module, float16 with one per row, or float32.
    `precision.scores` is the format that gradients are projected in.

    The other settings are those of `score`; a killed build goes on from the last of its `chunks`, to the same bits.

    Raises UsageError, CoverageError, NumericalError, OutOfMemory, StaleArtifact.
    """
    dist.only_one_process("building an index")
    if dim < 1 or kept not in FORMATS:
        raise UsageError("No such index", given=f"dim={dim}, kept={kept!r}", accepted=f"dim of 1 or more; {', '.join(FORMATS)}")
    settings = IndexSettings(dim, seed, kept, precision, chunks if out else 1)
    coverage = _cover(model, task, modules, curvature)
    note(str(coverage))
    examples = encode(task, data)
    if not examples.usable:
        raise UsageError("No example has anything in the loss", given=f"{len(examples)} examples", code=6)
    work = _Build(model, task, examples, coverage, settings, curvature)
    folder = claim(out, work.provenance, rerun=rerun)
    try:
        if isinstance(folder, Folder) and folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to compute")
            return open_index(folder.path)
        pieces = data_chunks(examples.usable, examples.sizes, settings.chunks)
        products = work.write_rows(folder, pieces, batch_positions(batch_tokens, work.device))
        return work.finish(folder, {"chunks": len(pieces), "products": products})
    finally:
        folder.close()


def _cover(model: nn.Module, task: Task, modules: str | Sequence[str] | None, curvature: Curvature | None) -> Coverage:
    """What is tracked: with a curvature, what it was fitted on unless the user says."""
    if curvature is None:
        return cover_default(model, task, modules)
    coverage = cover(model, list(curvature.blocks) if modules is None else modules)
    if unknown := [name for name in coverage.sites if name not in curvature.blocks]:
        raise UsageError(
            "The curvature was not fitted on all modules of the index",
            given=", ".join(unknown[:5]),
            accepted="modules of the curvature",
            fix="leave modules=None, or fit with the same modules",
        )
    return coverage


@dataclass(frozen=True)
class _Build:
    """One build at work: what its steps have in common."""

    model: nn.Module
    task: Task
    examples: Examples
    coverage: Coverage
    settings: IndexSettings
    curvature: Curvature | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def write_rows(self, folder: Folder | Memory, pieces: Sequence[Sequence[int]], positions: int) -> Products:
        """One pass over the pieces that are not there yet, in batches of so many positions; what products were taken in."""
        sizes, objective = self.examples.sizes, likelihood(self.task, self.examples)
        done = [folder.has(rows_name(number)) for number in range(len(pieces))]
        behind = sum(sizes[i] for piece, ready in zip(pieces, done, strict=True) if ready for i in piece)
        sink = self._sink(folder)

        def run(batches: list[list[int]]) -> None:
            stream(capture, self.task, self.examples.items, batches, objective, sink, advance)

        products = self._products(folder)
        with (
            multiplying(products, self.device),
            Capture(self.model, self.coverage.sites, sink.inputs) as capture,
            stage("index", sum(sizes), "tokens", done=behind) as advance,
        ):
            for number, piece in enumerate(pieces):
                if not done[number]:
                    sink.restart()
                    positions = run_chunk(piece, sizes, positions, run, sink.restart)
                    folder.save(rows_name(number), sink.tensors())
        return products

    def _products(self, folder: Folder | Memory) -> Products:
        """What products are taken in; "auto" is settled once, and the folder remembers it."""
        like = torch.empty(0, dtype=self.settings.precision.sums(next(self.model.parameters()).dtype), device=self.device)
        operator = self.curvature.inverse(DAMPING).to(like) if self.curvature else None
        given = (self.model, self.task, self.examples, self.coverage.sites, self.examples.usable, operator)
        return settle_products(folder, self.settings.precision, *given)

    def _sink(self, folder: Folder | Memory) -> ProjectedRows:
        """The sink; with a curvature, the projection that queries will need is saved."""
        shapes = {name: site.shape for name, site in self.coverage.sites.items()}
        projection = random_projection(shapes, self.settings.dim, self.settings.seed)
        if self.curvature is not None:
            projection, queries = in_eigenbasis(projection, self.curvature.inverse(DAMPING))
            folder.save(MAPS, {f"{side}/{n}": m for side in ("out", "into") for n, m in getattr(queries, side).items()})
        dtype = next(self.model.parameters()).dtype
        operands = self.settings.precision.operands("scores", dtype)
        sums = self.settings.precision.sums(dtype)
        return ProjectedRows(projection, self.coverage.sites, self.settings.kept, operands, sums, self.device)

    def finish(self, folder: Folder | Memory, done: dict[str, Any]) -> Index:
        """Write what goes with the rows, and mark the folder as complete."""
        rows, examples, settings = self.examples.rows, self.examples, self.settings
        table = describe_rows(rows, examples.ids, examples.sizes, rows.copies if isinstance(rows, Rows) else None)
        about = {
            "dim": settings.dim,
            "seed": settings.seed,
            "kept": settings.kept,
            **done,
            "curvature": self.curvature.operator.label if self.curvature else None,
            "examples": len(examples.usable),
            "positions": sum(examples.sizes),
            "share": self.coverage.share,
            "coverage": str(self.coverage),
            "modules": {name: list(site.shape) for name, site in self.coverage.sites.items()},
        }
        if isinstance(folder, Folder):
            table.to_parquet(folder.path / EXAMPLES, index=False)
        folder.finish({"about": about})
        return Index(folder, table, about)

    def provenance(self) -> dict[str, Any]:
        """What decides the rows."""
        settings = {**vars(self.settings), "precision": self.settings.precision.settings()}
        return {
            "stage": "index",
            "model": fingerprint(self.model),
            "data": {"fingerprint": self.examples.fingerprint, "examples": len(self.examples)},
            "task": {key: value for key, value in self.task.settings().items() if key != "measurement"},
            "curvature": fingerprint_tensors(self.curvature.operator.tensors()) if self.curvature else None,
            "settings": {**settings, "modules": sorted(self.coverage.sites)},
            "code": fingerprint_code(),
        }
