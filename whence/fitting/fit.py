"""Fit the curvature of a model on a sample of its training data.

Two passes: covariances of every module's inputs and output gradients, whose eigenvectors are the basis; then, for
methods that measure them, the eigenvalues in that basis. Each pass is cut into groups of modules and chunks of
examples (`whence.engine.partition`), and the sums are saved after a chunk now and then: a killed fit resumes from there, to
the same bits.
"""

from __future__ import annotations

import bisect
import itertools
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whence import dist
from whence.coverage import WIDE, Coverage, Site
from whence.engine.autograd import check_rows, labels_drawn
from whence.engine.partition import SAVE_SECONDS, data_chunks, keep, module_groups, release_memory
from whence.engine.passes import ByClock, run_pass
from whence.engine.point import Point, warn_if_thin
from whence.engine.probe import agreement, probe, probe_rows, settle_products
from whence.engine.sinks import Sums
from whence.engine.stream import Examples, Objective, drawn_likelihood, likelihood
from whence.errors import CoverageError, NumericalError, UsageError, WhenceWarning
from whence.fitting.covariance import Covariance, decompose, kronecker_eigenvalues, levelled, null_spaces, rotations
from whence.fitting.curvature import Curvature, load_curvature
from whence.fitting.eigenvalues import Eigenvalues
from whence.fitting.files import most_bytes
from whence.fitting.methods import Method, method_named
from whence.operators.eigen import EigenBlock
from whence.precision import multiplying
from whence.progress import note, stage
from whence.settings import AtLeastZero, Fit, valid
from whence.store.compact import compact, expand
from whence.store.digest import fingerprint_code
from whence.store.manifest import Folder
from whence.store.memory import Memory, work
from whence.tasks.base import Task
from whence.tasks.tokens import beginning

ENOUGH_ROWS, ENOUGH_POSITIONS, ENOUGH_PER_COLUMN = 128, 2**15, 16
"""The sample of either pass unless the user says: at least so many rows, positions, and positions per column of the widest
covariance. docs/speed.md shows how scores converge."""

SMALLEST = 16
"""Examples that `until` starts with, at least."""


def fit(
    model: nn.Module,
    task: Task,
    data: Any,
    settings: Fit = Fit(),
    *,
    out: str | Path | None = None,
    save_every: float = SAVE_SECONDS,
    rerun: bool = False,
    **changes: Any,
) -> Curvature:
    """Fit the curvature of `model` on training data.

    `method` is identity, diagonal, kfac, ekfac or shampoo (with corrected eigenvalues). `modules` selects what is
    tracked (default: what the task says, `"mlp"` for language models): mlp, attention, all, trained, lora, last-K, globs.
    `examples` and `eigenvalue_examples` are the sample sizes of the two passes: a number, "all", or by default enough
    (see `ENOUGH_ROWS`), so that the cost of a fit does not grow with the data; with `disjoint` (default: where there
    is enough data) the second pass reads other examples than the first, and nothing is read twice. `until` starts with
    a small sample and doubles it until the scores of a few rows correlate so well with those of half the sample.
    `labels` are drawn from the model (true Fisher) or the data's own (empirical Fisher); `draws` of them for each example
    make less noise where there are few examples, and cost as many passes. `largest_factor` splits wider
    covariances into diagonal blocks. `precision` says in which formats to multiply.

    `groups` of modules are fitted one after the other (less memory, one more pass each). With `out` the factors are
    kept in that folder, and a later call goes on where a killed one stopped, or returns what is finished; the sums are
    saved after those of the `chunks` of the data that end `save_every` seconds or more after the last time. A folder
    made from anything else is refused (StaleArtifact) unless `rerun` moves it aside.

    All of these are settings (`whence.settings.Fit`), given as keywords or as one value.

    Raises CoverageError, UsageError, NumericalError, OutOfMemory, StaleArtifact.
    """
    settings = Fit.of(settings, changes)
    point = Point(model, task, data, batch_tokens=settings.batch_tokens)
    return fit_at(point, settings, out=out, save_every=save_every, rerun=rerun)


def fit_at(
    point: Point,
    settings: Fit = Fit(),
    *,
    out: str | Path | None = None,
    save_every: float = SAVE_SECONDS,
    rerun: bool = False,
) -> Curvature:
    """Fit the curvature of a point's model on its rows; see `fit`."""
    save_every = valid(AtLeastZero, save_every, "save_every")
    if settings.draws > 1 and settings.labels == "data":
        raise UsageError(
            "There is only one label of the data's own to an example",
            given=f"draws={settings.draws}, labels='data'",
            accepted="1 or more draws with labels='model', 1 with labels='data'",
        )
    if not out:
        settings = settings.changed(chunks=1)
    coverage = point.cover(settings.modules)
    note(str(coverage))
    warn_if_thin(coverage)
    _warn_of_wide_modules(settings, coverage)

    def made_from() -> dict[str, Any]:
        chosen = {**settings.deciding(), "modules": sorted(coverage.sites)}
        return {"stage": "fit", **point.provenance(), "settings": chosen, "code": fingerprint_code()}

    with work(out, made_from, rerun=rerun) as folder:
        if isinstance(folder, Folder) and folder.finished:
            note(f"{folder.path} is finished and unchanged: nothing to compute")
            return load_curvature(folder, folder.manifest["about"])
        folder.warn_if_no_room(most_bytes(coverage.sites, settings, point.sums.itemsize))
        if settings.check:
            check_rows(folder, point, coverage.sites)
        if settings.labels == "model" and labels_drawn(point, coverage.sites, settings.check) == "data":
            settings = settings.changed(labels="data", draws=1)
        run = _Fit(point, coverage, settings, folder, save_every)
        about = run.grow(settings.until) if settings.until else run.fit(run.samples())
        folder.finish({"about": about})
        return load_curvature(folder, about)


class _Fit:
    """One fit at work: what its passes have in common."""

    def __init__(
        self, point: Point, coverage: Coverage, settings: Fit, folder: Folder | Memory, save_every: float = SAVE_SECONDS
    ):
        self.point, self.coverage, self.settings = point, coverage, settings
        self.folder, self.save_every = folder, save_every
        self.drawn = point.examples.repeated(settings.draws)
        self.method: Method = method_named(settings.method)
        self.operands = settings.precision.operands("statistics", point.dtype)
        self.without_gradient: list[str] = []

    def fit(self, samples: tuple[list[int], list[int]]) -> dict[str, Any]:
        """Fit every group of modules on the samples; returns what the factors are made of."""
        settings, first, examples = self.settings, samples[0], self.point.examples
        given = (self.folder, settings.precision, self.point, self.coverage.sites, first)
        products = dist.on_first(settle_products, *given)
        self.without_gradient = []
        if self.method.eigenvalues != "one":
            with multiplying(products, self.point.device):
                for number, names in enumerate(module_groups(self.coverage.sites, settings.groups)):
                    self.fit_group(number, names, samples)
        coverage = self.coverage.without(self.without_gradient)
        return {
            "method": settings.method,
            "labels": settings.labels,
            "draws": settings.draws,
            "rows": len(examples.usable),
            "examples": len(first),
            "eigenvalue_examples": len(samples[1]),
            "positions": sum(examples.sizes[index] for index in first),
            "products": products,
            "share": coverage.share,
            "coverage": str(coverage),
            "modules": {name: list(site.shape) for name, site in coverage.sites.items()},
            "without_gradient": self.without_gradient,
            "begins": beginning(examples.items[examples.usable[0]]),
        }

    def samples(self, size: int | None = None) -> tuple[list[int], list[int]]:
        """The examples of the two passes, drawn with the seed; `size` overrides the settings."""
        settings = self.settings
        if size is not None:
            settings = settings.changed(examples=size, eigenvalue_examples=None)
        return draw_samples(self.point.examples, settings, max(max(site.shape) for site in self.coverage.sites.values()))

    def grow(self, until: float) -> dict[str, Any]:
        """Fit on a small sample and double it until the scores of a few rows stop moving; keeps the last factors."""
        folder, usable, sites = self.folder, self.point.examples.usable, self.coverage.sites
        rows = probe_rows(self.point.examples, sites, usable)
        size, before, history = max(SMALLEST, len(self.samples()[0]) // 8), None, {}
        while True:
            size = min(size, len(usable))
            part, seen = f"sample-{size}", f"probe-{size}"
            if not folder.has(seen):
                child = folder.child(part)
                about = _Fit(self.point, self.coverage, self.settings, child, self.save_every).fit(self.samples(size))
                folder.write_json(f"{seen}.json", about)
                keep(folder, seen, {"scores": probe(self.point, sites, rows, load_curvature(child, about).inverse())})
            scores = folder.load(seen)["scores"]
            if before is not None:
                folder.discard(f"sample-{before[0]}")
                history[size] = agreement(before[1], scores).pearson
                note(f"{size:,} examples: scores of {len(rows)} rows correlate {history[size]:.4f} with those of fewer")
            if size == len(usable) or history.get(size, 0.0) >= until:
                break
            before, size = (size, scores), 2 * size
        folder.adopt(part)
        return folder.read_json(f"{seen}.json") | {"correlation": {str(count): value for count, value in history.items()}}

    def fit_group(self, number: int, names: Sequence[str], samples: tuple[list[int], list[int]]) -> None:
        """Fit the blocks of one group of modules and save them, unless that is done."""
        done = f"eigenvalues-{number:02d}"
        sites = {name: self.coverage.sites[name] for name in names}
        if not self.folder.has(done):
            keep(self.folder, done, compact(self._eigenvalues(number, sites, samples)))
        self.folder.drop(f"work-covariance-{number:02d}")
        self.folder.drop(f"work-eigenvalues-{number:02d}")
        fitted = self.folder.load(done)
        missing = [name for name in names if name not in fitted]
        if missing:
            self.without_gradient += missing
            note(f"{len(missing)} modules never had a gradient and are left out: {', '.join(missing[:5])}")

    def _eigenvalues(self, number: int, sites: dict[str, Site], samples: tuple[list[int], list[int]]) -> dict[str, Tensor]:
        """The blocks' eigenvalues `[O, I]`, after whatever passes the method needs; on the first process."""
        nulls: dict[str, tuple[list[slice], list[slice]]] = {}
        if self.method.basis == "identity":
            blocks = {name: EigenBlock(None, None, torch.empty(site.shape)) for name, site in sites.items()}
        else:
            blocks, nulls = self._basis(number, sites, samples[0])
        if self.method.eigenvalues == "product":
            return {name: block.lam_OI for name, block in blocks.items()}
        sink = Eigenvalues(blocks, operands=self.operands, sums=self.point.sums, device=self.point.device)
        self._accumulate("eigenvalues", number, sites, samples[1], sink)
        with dist.agreeing():
            self._refuse_infinite(sink.totals)
        count = sink.totals["examples"].item()
        means = {name: sink.totals[name] / count for name in _reached(sites, sink.totals)}
        return dist.merged({name: levelled(lam_OI, *nulls.get(name, ((), ()))) for name, lam_OI in means.items()})

    def _basis(
        self, number: int, sites: dict[str, Site], sample: list[int]
    ) -> tuple[dict[str, EigenBlock], dict[str, tuple[list[slice], list[slice]]]]:
        """The eigenbases of the covariances, with the eigenvalues of K-FAC; and where each side has none."""
        basis, inputs = f"basis-{number:02d}", f"inputs-{number:02d}.json"
        if not self.folder.has(basis):
            by = "kfac" if self.method.basis == "kfac" else "shampoo"
            formats = {"operands": self.operands, "sums": self.point.sums, "device": self.point.device}
            sink = Covariance(sites, by, **formats, largest=self.settings.largest_factor)
            self._accumulate("covariance", number, sites, sample, sink)
            self.folder.write_json(inputs, sink.groups)
            sums = sink.totals
            counts = {name: sums[key] for name in sink.groups if (key := f"out_count/{name}") in sums}
            reached = _reached(sites, counts)
            release_memory()
            with stage("eigenvectors", len(reached), "modules") as advance, dist.agreeing():
                bases = {"examples": sums["examples"]}
                for name in reached:
                    bases |= compact(decompose(sums, name, sink.groups[name], bases))
                    advance(1)
            keep(self.folder, basis, dist.merged(bases))
            del bases  # what comes next takes as much again
        bases = {name: part.to(self.point.device) for name, part in expand(self.folder.load(basis)).items()}
        groups = self.folder.read_json(inputs)
        sides, blocks, nulls = rotations(bases), {}, {}
        for name in sites:
            if f"out_values/{name}" in bases:
                group = groups[name]
                lam_OI = kronecker_eigenvalues(bases, name, group)
                blocks[name] = EigenBlock(sides.get(f"out/{name}"), sides.get(f"in/{group}"), lam_OI)
                nulls[name] = null_spaces(bases, "out", name, lam_OI.shape[1]), null_spaces(bases, "in", group, lam_OI.shape[0])
        return blocks, nulls

    def _accumulate(self, what: str, number: int, sites: dict[str, Site], sample: list[int], sink: Sums) -> None:
        """Run one pass over the sample, every example once for each draw of its labels."""
        sample = [index + draw * len(self.point.examples) for index in sample for draw in range(self.settings.draws)]
        chunks = data_chunks(sample, self.drawn.sizes, self.settings.chunks)
        homes = {name: home for home, part in enumerate(module_groups(sites, dist.world())) for name in part}
        name = f"work-{what}-{number:02d}"
        saved = ByClock(chunks, self.folder, name, save_every=self.save_every, owner=homes.__getitem__)
        run_pass(self.point, sites, self.drawn, self._objective(what), sink, what, saved)

    def _objective(self, what: str) -> Objective:
        if self.settings.labels == "data":
            return likelihood(self.point.task, self.drawn)
        return drawn_likelihood(self.point.task, self.drawn, f"{self.settings.seed}:{what}")

    def _refuse_infinite(self, sums: Mapping[str, Tensor]) -> None:
        broken = [name for name, total in sums.items() if not bool(torch.isfinite(total).all())]
        if broken:
            raise NumericalError(
                f"The gradients of {broken[0]} are not finite",
                given=f"NaN or infinity in {len(broken)} of {len(sums) - 1} modules",
                fix="look for rows with a huge or undefined loss (whence data preview), or fit in float32",
            )


def _reached(sites: dict[str, Site], sums: Mapping[str, Tensor]) -> list[str]:
    """The sites whose gradient was not always zero, as it is for an expert that no token visits; raises where there is none.

    Of several processes each gives those whose sums it has.
    """
    reached = [name for name in sites if name in sums and bool(sums[name].any())]
    if not dist.names_of_all(reached):
        raise CoverageError("No tracked module has a gradient", given=", ".join(list(sites)[:5]), code=16)
    return reached


def draw_samples(examples: Examples, settings: Fit, widest: int) -> tuple[list[int], list[int]]:
    """The examples of the two passes, drawn with the seed; `widest` is the width of the widest covariance."""
    order = sorted(examples.some_usable(), key=lambda index: examples.ids[index])  # the sample is of contents, not of places
    random.Random(settings.seed).shuffle(order)
    enough = _enough([examples.sizes[index] for index in order], widest)

    def count(size: Any, otherwise: int) -> int:
        return otherwise if size is None else len(order) if size == "all" else min(size, len(order))

    first = count(settings.examples, enough)
    second = count(settings.eigenvalue_examples, first)
    if settings.disjoint and settings.examples is None:  # make room
        first = min(first, (len(order) + 1) // 2)
    if settings.disjoint and settings.eigenvalue_examples is None:
        second = min(first, len(order) - first)
    apart = settings.disjoint or (settings.disjoint is None and first + second <= len(order))
    rest = order[first:] if apart else order
    if not rest:
        raise UsageError(
            "The two samples can't be disjoint: the first takes all examples",
            given=f"examples={settings.examples} of {len(order)}",
            fix=f"examples={len(order) // 2}",
        )
    return sorted(order[:first]), sorted(rest[:second])


def _enough(sizes: Sequence[int], widest: int) -> int:
    """The first so many examples that are enough for either pass."""
    wanted = max(ENOUGH_POSITIONS, ENOUGH_PER_COLUMN * widest)
    positions = list(itertools.accumulate(sizes))
    return min(len(sizes), max(ENOUGH_ROWS, bisect.bisect_left(positions, wanted) + 1))


def _warn_of_wide_modules(settings: Fit, coverage: Coverage) -> None:
    wide = [name for name, site in coverage.sites.items() if max(site.shape) > WIDE and not site.layer.one_hot]
    if wide and settings.method in ("kfac", "ekfac", "shampoo") and settings.largest_factor is None:
        size = max(max(coverage.sites[name].shape) for name in wide)
        warnings.warn(
            f"{wide[0]} is {size} wide: its covariance takes {size**2 * 4 / 2**30:.0f} GiB [WHENCE-18]; "
            f"leave it out, or split it with largest_factor=8192",
            WhenceWarning,
            stacklevel=3,
        )
