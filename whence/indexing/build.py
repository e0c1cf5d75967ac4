"""Build an index: one pass over the training data, forward and backward, with every gradient coded as it arises."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from whence import dist
from whence.coverage import Coverage, Site
from whence.data.content import content_id
from whence.data.rows import Rows
from whence.engine.autograd import check_rows
from whence.engine.partition import data_chunks, keep
from whence.engine.passes import ByChunk, run_pass
from whence.engine.point import Point, warn_if_thin
from whence.engine.probe import settle_products
from whence.engine.queries import encode_queries
from whence.engine.stream import identify
from whence.errors import TruncatedQueryError, UsageError
from whence.fitting.curvature import Curvature
from whence.indexing.directions import (
    HELD_OUT_BYTES,
    HELD_OUT_KEPT,
    HELD_OUT_RANK,
    KEPT,
    Directions,
    Whitened,
    affordable,
    make_directions,
    numbers,
    open_directions,
    settled,
    settled_held_out,
)
from whence.indexing.index import ADDED, EXAMPLES, MAPS, RECALL, ROWS, Index, added_to, open_index
from whence.indexing.rows import LandmarkRows, ProjectedRows
from whence.operators import BlockDiagonal
from whence.operators.projection import in_eigenbasis, random_projection
from whence.precision import multiplying
from whence.progress import note
from whence.settings import Index as Settings
from whence.store.digest import fingerprint_code, plain
from whence.store.fingerprint import fingerprint_operator
from whence.store.manifest import Folder, within
from whence.store.memory import Memory, work
from whence.store.scores import describe_rows, texts_bytes
from whence.tasks.base import Task

if TYPE_CHECKING:
    import pandas

DAMPING = 0.1
"""Of the inverse that projected gradients are whitened with, relative to each module's mean eigenvalue; it decides noise."""

DIM = 16

HELD_OUT = 16
"""Questions like the landmarks that recall is measured with."""

MOST = 1024
"""Landmarks; the other bytes of a row are signs."""

SCALES = 8
"""Bytes of a row beside its codes and signs: a scale for each."""


def build_index(
    model: nn.Module,
    task: Task,
    data: Any,
    settings: Settings = Settings(),
    *,
    curvature: Curvature | None = None,
    landmarks: Any = (),
    n_train: int | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
    **changes: Any,
) -> Index:
    """Code the gradient of every training example's log-likelihood in a few hundred numbers, and keep them.

    `index.search(model, task, queries, operator)` then estimates `score(...)` for any queries without a pass over the data.

    `kind` "landmarks": one half of the `bytes` (in KiB per row) holds the example's influence on landmark questions, by
    `curvature.inverse(damping)`, the other half signs of what these leave of it (`whence.indexing.directions`). Half of the
    questions are `landmarks`, with their answers, as far as there are so many, the others training rows. Those most like what
    will be asked serve best (`whence.run.Run.build_index` lets the model answer some). A few are held out to measure
    `index.recall(k, among)`. Their gradients stay in the folder, those of landmarks at `rank`.

    `kind` "projections": the codes are `dim x dim` numbers per module, by random signs drawn with `seed`; a side of at most
    `dim` inputs or outputs is kept as it is. With `curvature` the gradients are projected in its eigenbasis, whitened, which
    makes searches with its inverse less noisy. They serve any operator.

    `kept` is the format of the rows: int8 with a scale per module or row, float16 with one per row, or float32.
    `precision.scores` is the format that gradients are coded in.

    These are settings (`whence.settings.Index`), given as keywords or as one value; the others are those of `score`.
    `n_train` rows were trained on, if `data` is not all of them: what searches divide by. A killed build resumes after
    the last of its `chunks`, to the same bits.

    Raises UsageError, CoverageError, NumericalError, OutOfMemory, StaleArtifact.
    """
    settings = Settings.of(settings, changes)
    point = Point(model, task, data, batch_tokens=settings.batch_tokens)
    return build_index_at(point, settings, curvature=curvature, landmarks=landmarks, n_train=n_train, out=out, rerun=rerun)


def build_index_at(
    point: Point,
    settings: Settings = Settings(),
    *,
    curvature: Curvature | None = None,
    landmarks: Any = (),
    n_train: int | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
) -> Index:
    """Code every row of a point for `Index.search`; see `build_index`."""
    settings = _decided(settings, curvature)
    if not out:
        settings = settings.changed(chunks=1)
    coverage = _cover(point, settings.modules, curvature)
    note(str(coverage))
    warn_if_thin(coverage)
    examples, usable = point.examples, point.examples.some_usable()
    asked = dist.from_first(landmarks if settings.kind == "landmarks" else ())

    def provenance() -> dict[str, Any]:
        return {
            "stage": "index",
            **point.provenance(),
            "curvature": fingerprint_operator(curvature.operator) if curvature else None,
            **({"landmarks": identify(asked)[1]} if len(asked) else {}),
            "settings": {**settings.deciding(), "modules": sorted(coverage.sites)},
            "code": fingerprint_code(),
        }

    with work(out, provenance, rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to compute")
            return open_index(folder.path)
        if settings.check:
            check_rows(folder, point, coverage.sites)
        saved = ByChunk(data_chunks(usable, examples.sizes, settings.chunks), folder, ROWS)
        if settings.kind == "landmarks":
            assert curvature is not None
            operator = operator_of(curvature, settings)
            own = _write_landmarks(folder, saved, point, coverage.sites, settings, operator, asked)
        else:
            own = _write_rows(folder, saved, point, coverage.sites, settings, curvature)
        table = _described(point)
        about = {
            "kind": settings.kind,
            **own,
            "seed": settings.seed,
            "kept": settings.kept,
            "chunks": len(saved.chunks),
            "curvature": curvature.operator.label if curvature else None,
            "rows": len(examples),
            "examples": len(usable),
            "positions": sum(examples.sizes),
            **({"n_train": n_train} if n_train else {}),
            "share": coverage.share,
            "coverage": str(coverage),
            "modules": {name: list(site.shape) for name, site in coverage.sites.items()},
        }
        index = Index(folder, table, about)
        if settings.kind == "landmarks":
            folder.write_json(RECALL, index.measure())
        if isinstance(folder, Folder):
            folder.save_table(EXAMPLES, table)
        folder.finish({"about": about})
        return index


def _decided(settings: Settings, curvature: Curvature | None) -> Settings:
    """The settings with the kind that they leave open. Raises UsageError where the curvature is none for it."""
    if curvature is not None and not isinstance(curvature, Curvature):
        raise UsageError(
            f"The curvature can't be a {type(curvature).__name__}.",
            accepted="what whence.fit or whence.open_factors returned, without .inverse(...), which belongs to searches",
            fix="curvature=whence.open_factors(FOLDER)",
        )
    kind = kind_of(settings, curvature is not None)
    if kind == "landmarks" and curvature is None:
        raise UsageError(
            "Influence on landmarks needs factors.",
            accepted="factors of the same model",
            fix="--factors FOLDER (curvature=whence.open_factors(FOLDER)), or --kind projections",
        )
    return settings.changed(kind=kind, dim=(settings.dim or DIM) if kind == "projections" else None)


def add_rows(
    path: str | Path,
    model: nn.Module,
    task: Task,
    data: Any,
    curvature: Curvature,
    *,
    n_train: int | None = None,
    chunks: int = 8,
    batch_tokens: int | None = None,
) -> Index:
    """Add training rows to a finished index of landmarks: the same codes as if they had been there from the start.

    They lie in a folder of their own in that of the index, whose files stay as they are, and recall is measured anew. A killed
    call resumes; rows that were added already are not added again. `n_train` rows were trained on (default: those of the index
    and these).

    Raises StaleArtifact for another model or other factors, UsageError for an index of projections, and what `build_index`
    raises.
    """
    index, home = open_index(path), Folder.open(within(path, "index"))
    if index.kind != "landmarks":
        raise UsageError("Rows are added to an index of landmarks.", given="projections", fix="build it again, with all rows")
    operator = index.check_operator(curvature.inverse(index.about["damping"]))
    index.check(model, task)
    point = Point(model, task, data, batch_tokens=batch_tokens)
    examples, sites = point.examples, point.cover(list(index.about["modules"])).sites
    usable = examples.some_usable()

    def provenance() -> dict[str, Any]:
        own = {"index": home.identity, "n_train": n_train, "chunks": chunks}
        return {"stage": "rows of an index", **own, **point.provenance(), "code": fingerprint_code()}

    earlier = added_to(home)
    for part in earlier:
        if Folder.open(part).provenance["data"] == plain(point.provenance()["data"]):
            note(f"{part} has these rows: nothing to add")
            return index
    if doubled := sorted(set(examples.ids) & set(index.examples["id"])):
        raise UsageError(
            f"{len(doubled):,} of the rows are in the index.", given=", ".join(doubled[:5]), fix="add new rows alone"
        )
    with work(home.path / f"{ADDED}-{len(earlier):04d}", provenance) as folder:
        assert isinstance(folder, Folder)
        saved = ByChunk(data_chunks(usable, examples.sizes, chunks), folder, ROWS)
        codes = len(usable) * Layout(*(index.about[part] for part in Layout._fields)).row_bytes
        folder.warn_if_no_room(codes + texts_bytes(examples.rows))
        directions = open_directions(home, index.about["signs"], index.about["seed"])
        with multiplying(index.about["products"], point.device):
            code_rows(saved, point, sites, directions, operator)
        about = {
            "chunks": len(saved.chunks),
            "rows": len(examples),
            "examples": len(usable),
            "positions": sum(examples.sizes),
            "n_train": n_train or index.n_train + len(usable),
        }
        folder.save_table(EXAMPLES, _described(point))
        folder.write_json(RECALL, index.with_rows(folder, about).measure())
        folder.finish({"about": about})
    return open_index(path)


def _described(point: Point) -> pandas.DataFrame:
    """The table of the rows."""
    examples = point.examples
    copies = examples.rows.copies if isinstance(examples.rows, Rows) else None
    return describe_rows(examples.rows, examples.ids, examples.sizes, copies)


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
    sites: Mapping[str, Site],
    settings: Settings,
    curvature: Curvature | None,
) -> dict[str, Any]:
    """Write the rows that are not there yet, and what queries need to meet them; returns what there is to say of them."""
    precision = settings.precision
    inverse = curvature.inverse(DAMPING) if curvature else None
    products = dist.on_first(settle_products, folder, precision, point, sites, point.examples.usable, inverse)
    maps = 8 * (settings.dim or DIM) * sum(sum(site.shape) for site in sites.values()) if curvature else 0
    texts, usable = texts_bytes(point.examples.rows), len(point.examples.usable)
    folder.warn_if_no_room(rows_bytes(usable, sites.values(), settings) + maps + texts)
    projection = random_projection({name: site.shape for name, site in sites.items()}, settings.dim or DIM, settings.seed)
    if isinstance(inverse, BlockDiagonal):
        projection, queries = in_eigenbasis(projection, inverse)
        keep(folder, MAPS, {f"{side}/{n}": m for side in ("out", "into") for n, m in getattr(queries, side).items()})
    operands, sizes = precision.operands("scores", point.dtype), point.examples.sizes
    sink = ProjectedRows(projection, sites, sizes, settings.kept, operands, point.like)
    with multiplying(products, point.device):
        run_pass(point, sites, point.examples, point.likelihood, sink, "index", saved)
    return {"dim": settings.dim, "products": products}


def _write_landmarks(
    folder: Folder | Memory,
    saved: ByChunk,
    point: Point,
    sites: Mapping[str, Site],
    settings: Settings,
    operator: BlockDiagonal,
    given: Sequence[Any],
) -> dict[str, Any]:
    """Write the rows that are not there yet, and the landmarks; returns what there is to say of them."""
    products = dist.on_first(settle_products, folder, settings.precision, point, sites, point.examples.usable, operator)
    usable, most = [point.rows[place] for place in point.examples.usable], most_questions(settings)
    asked = encode_queries(
        point.task, dist.from_first(landmark_questions(point.task, usable, given, most, settings.seed)), point.model
    )
    found = layout(settings, len(asked), sites)
    if len(asked) < most:
        note(f"{found.landmarks:,} landmarks instead of {most - HELD_OUT:,}: there are no more rows and questions")
    if found.held_out < (wanted := held_out(len(asked))):
        fewer = f"recall is measured with {found.held_out} questions instead of {wanted}"
        note(f"{fewer}: more would take over {HELD_OUT_BYTES / 2**30:.1f} GiB at rank {HELD_OUT_RANK}")
    codes, texts = len(usable) * found.row_bytes, texts_bytes(point.examples.rows)
    folder.warn_if_no_room(codes + found.questions_bytes(settings.rank, sites) + texts)
    with multiplying("float32", point.device):
        directions = make_directions(
            folder, point, sites, asked, found.landmarks, found.held_out, operator, found.signs, settings.rank, settings.seed
        )
    with multiplying(products, point.device):
        code_rows(saved, point, sites, directions, operator)
    return {
        "bytes": int(1024 * settings.bytes),
        **found._asdict(),
        "rank": settled(settings.rank, found.landmarks, sites),
        "held_out_rank": settled_held_out(settings.rank, found.held_out, sites),
        "damping": settings.damping,
        "operator": fingerprint_operator(operator),
        "products": products,
    }


def code_rows(saved: ByChunk, point: Point, sites: Mapping[str, Site], directions: Directions, operator: BlockDiagonal) -> None:
    """Code the rows that are not there yet."""
    sink = LandmarkRows(directions, Whitened(operator), point.examples.sizes, point.like)
    run_pass(point, sites, point.examples, point.likelihood, sink, "index", saved)


def kind_of(settings: Settings, factors: bool) -> Literal["landmarks", "projections"]:
    """What its codes are; where nothing is said, landmarks if there are factors."""
    return settings.kind or ("landmarks" if factors and settings.dim is None else "projections")


def operator_of(curvature: Curvature, settings: Settings) -> BlockDiagonal:
    """The operator in whose coordinates landmarks are. Raises UsageError where there are no such coordinates."""
    operator = curvature.inverse(settings.damping)
    if not isinstance(operator, BlockDiagonal):
        raise UsageError(f"There are no landmarks by {operator.label}.", fix="--kind projections (kind='projections')")
    return operator


class Layout(NamedTuple):
    """What the codes of a row are made of, and how many questions are held out beside the landmarks."""

    landmarks: int
    signs: int
    held_out: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's codes, signs and scales, its norm and place, and its influence on the questions held out."""
        return self.landmarks + self.signs // 8 + 4 * (self.held_out + 3) + 8

    def questions_bytes(self, rank: int | str, sites: Mapping[str, Site]) -> int:
        """Bytes of the gradients of all questions; `rank` is that of the settings."""
        whole = numbers(sites, settled(rank, self.landmarks, sites)) * KEPT.itemsize
        held_out = numbers(sites, settled_held_out(rank, self.held_out, sites)) * HELD_OUT_KEPT.itemsize
        return self.landmarks * whole + self.held_out * held_out


def layout(settings: Settings, questions: int, sites: Mapping[str, Site]) -> Layout:
    """That of an index with this many different questions."""
    spared = held_out(questions)
    landmarks = questions - spared
    signs = 64 * ((int(1024 * settings.bytes) - SCALES - landmarks) // 8)
    return Layout(landmarks, signs, affordable(settings.rank, spared, sites))


def rows_bytes(rows: int, sites: Collection[Site], settings: Settings) -> int:
    """Bytes of the rows of an index of projections: their numbers, their scales, a norm and a place."""
    widths = [min(side, settings.dim or DIM) for site in sites for side in site.shape]
    codes = sum(out * into for out, into in zip(widths[::2], widths[1::2], strict=True))
    each, scales = {"int8": (1, len(sites)), "float16": (2, 1), "float32": (4, 1)}[settings.kept]
    return rows * (each * codes + 4 * scales + 4 + 8)


def most_questions(settings: Settings) -> int:
    """Landmarks for these bytes, and those held out."""
    return shares(int(1024 * settings.bytes) - SCALES)[0] + HELD_OUT


def shares(size: int) -> tuple[int, int]:
    """How many of a row's bytes are for landmarks, and how many for signs, which scans read eight at a time."""
    landmarks = min(MOST, size - size // 16 * 8)
    return landmarks, (size - landmarks) // 8 * 8


def landmark_questions(task: Task, rows: Sequence[Any], given: Sequence[Any], count: int, seed: int) -> list[Any]:
    """So many different questions: half of them given, if there are so many, and training rows that fit.

    The order is random, but the last `held_out(...)` are given ones, at most half of these: rows, and what is asked like them,
    are found more easily than what people ask.
    """
    draw, found = random.Random(seed), dict[str, Any]()

    def take(some: Sequence[Any], most: int) -> int:
        for row in draw.sample(some, len(some)):
            if len(found) < most and (fitting := _fitting(task, row)) is not None:
                found.setdefault(content_id(fitting), fitting)
        return len(found)

    asked = take(list(given), count // 2)
    take(rows, count)
    questions = list(found.values())
    last = min(held_out(len(questions)), asked // 2)
    return [*draw.sample(questions[last:], len(questions) - last), *questions[:last]]


def held_out(questions: int) -> int:
    """How many of so many questions recall is measured with: of few a quarter."""
    return min(HELD_OUT, questions // 4)


def _fitting(task: Task, row: Any) -> Any:
    """The row as a question; a text that is too long is cut in half until it fits, any other row that is too long is none."""
    while True:
        with contextlib.suppress(TruncatedQueryError):
            task.encode_queries([row])
            return row
        if not isinstance(row, Mapping) or "text" not in row or len(row["text"]) < 2:
            return None
        row = {**row, "text": row["text"][: len(row["text"]) // 2]}
