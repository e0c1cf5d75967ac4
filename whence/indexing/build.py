"""Build an index: one pass over the training data, forward and backward, with every gradient projected as it arises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from whence import dist
from whence.coverage import Coverage
from whence.data.rows import Rows
from whence.engine.partition import data_chunks, keep
from whence.engine.passes import ByChunk, run_pass
from whence.engine.point import Point
from whence.engine.probe import settle_products
from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.indexing.index import EXAMPLES, MAPS, ROWS, Index, open_index
from whence.indexing.rows import FORMATS, Kept, ProjectedRows
from whence.operators import BlockDiagonal
from whence.operators.projection import in_eigenbasis, random_projection
from whence.precision import Precision, Products, multiplying
from whence.progress import note
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
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

    The other settings are those of `score`; a killed build resumes after the last of its `chunks`, to the same bits.

    Raises UsageError, CoverageError, NumericalError, OutOfMemory, StaleArtifact.
    """
    if dim < 1 or kept not in FORMATS:
        raise UsageError("No such index", given=f"dim={dim}, kept={kept!r}", accepted=f"dim of 1 or more; {', '.join(FORMATS)}")
    settings = IndexSettings(dim, seed, kept, precision, chunks if out else 1)
    point = Point(model, task, data, batch_tokens=batch_tokens)
    coverage = _cover(point, modules, curvature)
    note(str(coverage))
    examples = point.examples
    if not examples.usable:
        raise UsageError("No example has anything in the loss", given=f"{len(examples)} examples", code=6)

    def provenance() -> dict[str, Any]:
        return {
            "stage": "index",
            **point.provenance(),
            "curvature": fingerprint_operator(curvature.operator) if curvature else None,
            "settings": {**vars(settings), "precision": precision.settings(), "modules": sorted(coverage.sites)},
            "code": fingerprint_code(),
        }

    with work(out, provenance, rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to compute")
            return open_index(folder.path)
        saved = ByChunk(data_chunks(examples.usable, examples.sizes, settings.chunks), folder, ROWS)
        products = _write_rows(folder, saved, point, coverage, settings, curvature)
        copies = examples.rows.copies if isinstance(examples.rows, Rows) else None
        table = describe_rows(examples.rows, examples.ids, examples.sizes, copies)
        about = {
            "dim": dim,
            "seed": seed,
            "kept": kept,
            "chunks": len(saved.chunks),
            "products": products,
            "curvature": curvature.operator.label if curvature else None,
            "examples": len(examples.usable),
            "positions": sum(examples.sizes),
            "share": coverage.share,
            "coverage": str(coverage),
            "modules": {name: list(site.shape) for name, site in coverage.sites.items()},
        }
        if isinstance(folder, Folder):
            dist.on_first(table.to_parquet, folder.path / EXAMPLES, index=False)
        folder.finish({"about": about})
        return Index(folder, table, about)


def _cover(point: Point, modules: str | Sequence[str] | None, curvature: Curvature | None) -> Coverage:
    """What is tracked: with a curvature, what it was fitted on unless the user says."""
    if curvature is None:
        return point.cover(modules)
    coverage = point.cover(curvature.operator.names if modules is None else modules)
    if unknown := [name for name in coverage.sites if name not in curvature.operator.names]:
        raise UsageError(
            "The curvature was not fitted on all modules of the index",
            given=", ".join(unknown[:5]),
            accepted="modules of the curvature",
            fix="omit modules, or fit with the same modules",
        )
    return coverage


def _write_rows(
    folder: Folder | Memory,
    saved: ByChunk,
    point: Point,
    coverage: Coverage,
    settings: IndexSettings,
    curvature: Curvature | None,
) -> Products:
    """Write the rows that are not there yet, and what queries need to meet them; returns what products were taken in."""
    precision, sites = settings.precision, coverage.sites
    inverse = curvature.inverse(DAMPING) if curvature else None
    products = dist.on_first(settle_products, folder, precision, point, sites, point.examples.usable, inverse)
    projection = random_projection({name: site.shape for name, site in sites.items()}, settings.dim, settings.seed)
    if isinstance(inverse, BlockDiagonal):
        projection, queries = in_eigenbasis(projection, inverse)
        keep(folder, MAPS, {f"{side}/{n}": m for side in ("out", "into") for n, m in getattr(queries, side).items()})
    sink = ProjectedRows(projection, sites, settings.kept, precision.operands("scores", point.dtype), point.like)
    with multiplying(products, point.device):
        run_pass(point, sites, point.examples, point.likelihood, sink, "index", saved)
    return products
