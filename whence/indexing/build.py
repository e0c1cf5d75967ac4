"""Build an index: one pass over the training data, forward and backward, with every gradient projected as it arises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from whence import dist
from whence.coverage import Coverage
from whence.data.rows import Rows
from whence.engine.autograd import check_rows
from whence.engine.partition import data_chunks, keep
from whence.engine.passes import ByChunk, run_pass
from whence.engine.point import Point, warn_if_thin
from whence.engine.probe import settle_products
from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.indexing.index import EXAMPLES, MAPS, ROWS, Index, open_index
from whence.indexing.rows import ProjectedRows
from whence.operators import BlockDiagonal
from whence.operators.projection import in_eigenbasis, random_projection
from whence.precision import Products, multiplying
from whence.progress import note
from whence.settings import Index as Settings
from whence.store.digest import fingerprint_code
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
from whence.store.scores import describe_rows
from whence.tasks.base import Task

DAMPING = 0.1
"""Of the inverse that gradients are whitened with, relative to each module's mean eigenvalue; it decides the noise alone."""


def build_index(
    model: nn.Module,
    task: Task,
    data: Any,
    settings: Settings = Settings(),
    *,
    curvature: Curvature | None = None,
    n_train: int | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
    **changes: Any,
) -> Index:
    """Project the gradient of every training example's log-likelihood to `dim x dim` numbers per module, and keep them.

    `index.search(model, task, queries)` then estimates `score(...)` for any queries without a pass over the data. The
    projections are random signs drawn with `seed`; a side of at most `dim` inputs or outputs is kept as it is. With
    `curvature` the gradients are projected in its eigenbasis, whitened, which makes searches with its inverse less
    noisy. `kept` is the format of the rows: int8 with a scale per module, float16 with one per row, or float32.
    `precision.scores` is the format that gradients are projected in.

    These are settings (`whence.settings.Index`), given as keywords or as one value; the others are those of `score`.
    `n_train` rows were trained on, if `data` is not all of them: what searches divide by. A killed build resumes after
    the last of its `chunks`, to the same bits.

    Raises UsageError, CoverageError, NumericalError, OutOfMemory, StaleArtifact.
    """
    settings = Settings.of(settings, changes)
    if curvature is not None and not isinstance(curvature, Curvature):
        raise UsageError(
            f"The curvature can't be a {type(curvature).__name__}.",
            accepted="what whence.fit or whence.open_factors returned, without .inverse(...), which belongs to searches",
            fix="curvature=whence.open_factors(FOLDER)",
        )
    if not out:
        settings = settings.changed(chunks=1)
    point = Point(model, task, data, batch_tokens=settings.batch_tokens)
    coverage = _cover(point, settings.modules, curvature)
    note(str(coverage))
    warn_if_thin(coverage)
    examples = point.examples
    if not examples.usable:
        raise UsageError("No example has anything in the loss", given=f"{len(examples)} examples", code=6)

    def provenance() -> dict[str, Any]:
        return {
            "stage": "index",
            **point.provenance(),
            "curvature": fingerprint_operator(curvature.operator) if curvature else None,
            "settings": {**settings.deciding(), "modules": sorted(coverage.sites)},
            "code": fingerprint_code(),
        }

    with work(out, provenance, rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to compute")
            return open_index(folder.path)
        if settings.check:
            check_rows(folder, point, coverage.sites)
        saved = ByChunk(data_chunks(examples.usable, examples.sizes, settings.chunks), folder, ROWS)
        products = _write_rows(folder, saved, point, coverage, settings, curvature)
        copies = examples.rows.copies if isinstance(examples.rows, Rows) else None
        table = describe_rows(examples.rows, examples.ids, examples.sizes, copies)
        about = {
            "dim": settings.dim,
            "seed": settings.seed,
            "kept": settings.kept,
            "chunks": len(saved.chunks),
            "products": products,
            "curvature": curvature.operator.label if curvature else None,
            "examples": len(examples.usable),
            "positions": sum(examples.sizes),
            **({"n_train": n_train} if n_train else {}),
            "share": coverage.share,
            "coverage": str(coverage),
            "modules": {name: list(site.shape) for name, site in coverage.sites.items()},
        }
        if isinstance(folder, Folder):
            folder.save_table(EXAMPLES, table)
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
    settings: Settings,
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
    operands, sizes = precision.operands("scores", point.dtype), point.examples.sizes
    sink = ProjectedRows(projection, sites, sizes, settings.kept, operands, point.like)
    with multiplying(products, point.device):
        run_pass(point, sites, point.examples, point.likelihood, sink, "index", saved)
    return products
