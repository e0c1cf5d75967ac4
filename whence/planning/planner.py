"""Puts a plan together: lengths of the data, a rehearsal for the memory, the cost function for the time."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import psutil
import torch
from torch import nn

from whence import cost
from whence.coverage import Coverage, Site
from whence.engine.partition import batch_positions, module_groups
from whence.engine.point import cover_default
from whence.engine.probe import probe_rows, worth_probing
from whence.engine.stream import read
from whence.fitting import Curvature, fit
from whence.fitting.fit import FitSettings
from whence.fitting.fit import Sample as SampleSize
from whence.fitting.methods import method_named
from whence.planning import duration, files, machine, work
from whence.planning.blank import blank_model
from whence.planning.hints import hints
from whence.planning.memory import of_stage, overheads
from whence.planning.network import network, readers
from whence.planning.plan import Plan, Settings, Stage
from whence.planning.rehearsal import Held, Rehearsal, Rehearsed
from whence.precision import Precision, Products, multiplying
from whence.scoring import score
from whence.scoring.score import AUTO_RANK, FULL_RANK_BYTES
from whence.tasks.base import Task

SVD_SLOWDOWN = 2
"""How much slower the decompositions of a low-rank approximation run than products (measured on a CPU)."""


def plan(
    model: str | os.PathLike | nn.Module,
    task: Task,
    data: Any,
    *,
    queries: Any = 16,
    memory: int | None = None,
    disk: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    calibrate: bool = True,
    method: str = "ekfac",
    modules: str | Sequence[str] | None = None,
    examples: SampleSize = None,
    eigenvalue_examples: SampleSize = None,
    disjoint: bool | None = None,
    labels: Literal["model", "data"] = "model",
    draws: int = 1,
    seed: int = 0,
    largest_factor: int | None = None,
    precision: Precision = Precision(),
    batch_tokens: int | None = None,
    groups: int = 1,
    chunks: int = 8,
    rank: int | None | Literal["auto"] = "auto",
    where: str | os.PathLike = ".",
) -> Plan:
    """Tell the memory, disk and time of `fit` and `score` with these settings, before anything is spent.

    `model` is a hub id or folder, of which only the config is read, or a model, with or without weights (`meta`).
    `queries` are queries, or how many there will be. `memory` and `disk` are budgets in bytes, `memory` of the whole
    process; with a budget for memory that the settings exceed, others are searched that keep to it (batches, groups,
    rank), and DoesNotFit is raised where there are none. `calibrate` measures this machine for a few seconds, and runs a
    few real batches of a model that has its weights. `where` is the folder whose disk is meant.
    """
    from whence.planning.budget import fitting

    blank = blank_model(os.fspath(model), dtype) if not isinstance(model, nn.Module) else model
    settings = Settings(
        FitSettings(
            method=method,
            modules=modules,
            examples=examples,
            eigenvalue_examples=eigenvalue_examples,
            disjoint=disjoint,
            labels=labels,
            draws=draws,
            seed=seed,
            largest_factor=largest_factor,
            precision=precision,
            groups=groups,
            chunks=chunks,
        ),
        batch_tokens,
        rank,
    )
    method_named(method)
    planner = Planner(blank, task, data, queries, device, calibrate)
    planner.free = {
        "memory": memory if memory is not None else _free_memory(planner.device, planner),
        "disk": disk if disk is not None else shutil.disk_usage(where).free,
    }
    return planner.evaluate(settings) if memory is None else fitting(planner, settings)


def _free_memory(device: str, planner: Planner) -> int:
    """Bytes that this process could have: what is free, and what it has already."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


class Planner:
    """Evaluates settings for one model, data set and machine."""

    def __init__(self, model: nn.Module, task: Task, data: Any, queries: Any, device: str | None, calibrate: bool):
        self.model, self.task, self.calibrate = model, task, calibrate
        first = next(model.parameters())
        self.has_weights = not first.is_meta
        self.device = str(device or (first.device if self.has_weights else "cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = first.dtype
        self.data = work.read_data(task, data)
        self.queries = work.sample_queries(self.data, queries) if isinstance(queries, int) else list(read(queries))
        self.weighted = task.encode_queries(self.queries)
        self.name = getattr(model, "name_or_path", "") or type(model).__name__
        self.free = {"memory": 0, "disk": 0}
        self._slower: dict[Products, float] = {}
        self._fits: dict[Any, tuple[Rehearsal, dict[str, Rehearsed], Curvature]] = {}
        self._scores: dict[Any, dict[str, Rehearsed]] = {}

    def _settled(self, precision: Precision, sites: Mapping[str, Site], sample: work.Sample) -> Precision:
        """With the format of products that "auto" stands for over the sample, if the probe allows it: only weights can tell."""
        if precision.products != "auto":
            return precision
        examples = self.data.examples
        positions, probed = (
            sum(examples.sizes[index] for index in chosen)
            for chosen in (sample.indices, probe_rows(examples, sites, sample.indices))
        )
        positions *= sample.size / len(sample.indices)
        short = worth_probing(self.model, torch.device(self.device), positions, probed)
        return replace(precision, products="bfloat16" if short else "float32")

    def _machine(self, products: Products) -> machine.Machine:
        with multiplying(products, torch.device(self.device)):
            return machine.measured(self.device, self.dtype, products) if self.calibrate else machine.assumed(self.device)

    def evaluate(self, settings: Settings) -> Plan:
        """The plan for these settings."""
        fit_settings = settings.fit
        coverage = cover_default(self.model, self.task, fit_settings.modules)
        tokens = batch_positions(settings.batch_tokens, torch.device(self.device))
        widest = max(max(site.shape) for site in coverage.sites.values())
        first, second = work.samples(self.data, fit_settings, widest)
        of = {"covariance": first, "eigenvalues": second, "score": work.everything(self.data)}
        once = replace(first, size=first.size // fit_settings.draws)
        precision = self._settled(fit_settings.precision, coverage.sites, of["score"])
        fit_settings = replace(fit_settings, precision=self._settled(fit_settings.precision, coverage.sites, once))
        passes = {name: work.one_pass(self.data, sample, tokens, fit_settings.chunks) for name, sample in of.items()}
        rank = self._rank(coverage, settings.rank)
        groups = module_groups(coverage.sites, fit_settings.groups)
        rehearsal, seen, curvature = self._rehearse_fit(fit_settings, passes["covariance"], list(coverage.sites))
        scoring = self._rehearse_score(rehearsal, precision, passes["score"], curvature, rank, tokens)
        if len(groups) > 1:
            heaviest = max(groups, key=lambda names: sum(_squares(coverage.sites[name].shape) for name in names))
            _, seen, _ = self._rehearse_fit(fit_settings, passes["covariance"], heaviest)
        seen = seen | scoring
        factors = files.of_factors(curvature)
        products: dict[str, Products] = {"fit": fit_settings.precision.products, "score": precision.products}
        seconds = self._seconds(coverage, curvature, passes, products, len(groups), rank, tokens)
        scores = files.of_scores(self.data, self.queries)
        written = {"eigenvectors": factors["bases"], "eigenvalues": factors["eigenvalues"] + files.MANIFESTS, "score": scores}
        if "eigenvalues" not in seen:  # the method has no such pass: its eigenvalues come with the vectors
            written["eigenvectors" if "eigenvectors" in seen else "score"] += factors["eigenvalues"] + files.MANIFESTS
        if "eigenvectors" in written:
            written["eigenvectors"] += files.PER_MODULE * len(coverage.sites)
        stages = tuple(
            Stage(
                name,
                seconds.get(name, 0.0),
                of_stage(name, held, self.device, products["score" if name in scoring else "fit"]),
                written.get(name, 0),
                self._note(name, seen, rank, products["fit"]),
            )
            for name, held in seen.items()
        )
        sums = seen["covariance"].kept.all if "covariance" in seen else 0
        over = overheads(self.device)
        size = sum(tensor.nbytes for tensor in {id(p): p for p in [*self.model.parameters(), *self.model.buffers()]}.values())
        return Plan(
            model={
                "name": self.name,
                "kind": type(self.model).__name__,
                "parameters": coverage.parameters,
                "format": str(self.dtype).removeprefix("torch."),
                "bytes": size,
                "process": over.process,
                "families": len(module_groups(coverage.sites, len(coverage.sites))),
                "layers": len({found.group(1) for name in coverage.sites if (found := re.search(r"\.(\d+)(\.|$)", name))}),
                "widest": widest,
            },
            data={
                "rows": self.data.total,
                "tokenised": len(self.data.examples),
                "tokens": self.data.tokens,
                "fitted": first.size,
                "measured": second.size if "eigenvalues" in seen else 0,
                "queries": len(self.queries),
                "rank": rank,
                "products": products,
            },
            coverage=str(coverage),
            device=self.device,
            settings=settings,
            stages=stages,
            disk_peak=sum(stage.disk for stage in stages) + 2 * sums,
            sure="batches" if self._slower else "rates" if self.calibrate else "assumed",
            free=self.free,
            choices=self._choices(coverage, curvature, passes["score"].largest[1], rank),
            hints=hints(coverage, settings, 4),
        )

    def _rehearse_fit(
        self, settings: FitSettings, planned: work.Pass, names: list[str]
    ) -> tuple[Rehearsal, dict[str, Rehearsed], Curvature]:
        rows, batch_tokens = work.twice_the_largest(self.data, planned)
        alike = replace(settings, modules=tuple(names), groups=1)
        key = (repr(alike), len(rows), batch_tokens)
        if key in self._fits:
            return self._fits[key]
        rehearsal = Rehearsal(self.model, self.task, self.device)
        seen, curvature = rehearsal.run(
            lambda model, task: fit(
                model,
                task,
                rows,
                method=settings.method,
                modules=names,
                labels=settings.labels,
                seed=settings.seed,
                largest_factor=settings.largest_factor,
                precision=settings.precision,
                batch_tokens=batch_tokens,
            )
        )
        assert curvature is not None
        self._fits[key] = rehearsal, seen, curvature
        return rehearsal, seen, curvature

    def _rehearse_score(
        self,
        rehearsal: Rehearsal,
        precision: Precision,
        planned: work.Pass,
        curvature: Curvature,
        rank: int | None,
        tokens: int,
    ) -> dict[str, Rehearsed]:
        """The stages of scoring; with many queries from what fewer take, since each takes as much as the next."""
        rows, batch_tokens = work.twice_the_largest(self.data, planned)
        key = (id(curvature), repr(precision), rank, tokens, len(rows), batch_tokens)
        if key in self._scores:
            return self._scores[key]
        _, operator = rehearsal.run(lambda model, task: curvature.inverse(0.1))
        assert operator is not None
        together = max(1, tokens // max(work.query_sizes(self.task, self.weighted)))
        several = [count for count in (together, 2 * together) if count < len(self.queries)]
        counts = several if len(several) == 2 else [len(self.queries)]

        def run(count: int, at_once: int, last: str) -> dict[str, Rehearsed]:
            return rehearsal.run(
                lambda model, task: score(
                    model,
                    task,
                    self.queries[:count],
                    rows,
                    operator,
                    rank=rank,
                    precision=precision,
                    batch_tokens=at_once,
                ),
                last=last,
            )[0]

        found = [run(count, batch_tokens, "score") | run(count, tokens, "queries") for count in counts]
        if len(found) > 1:
            steps = (len(self.queries) - counts[1]) / (counts[1] - counts[0])
            found[0] = {name: _beyond(found[0][name], found[1][name], steps) for name in found[0]}
        self._scores[key] = found[0]
        return found[0]

    def _rank(self, coverage: Coverage, rank: int | None | Literal["auto"]) -> int | None:
        """The rank that "auto" stands for, as in `score`."""
        if rank != "auto":
            return rank
        size = len(self.queries) * sum(site.shape[0] * site.shape[1] for site in coverage.sites.values()) * 4
        return None if size <= FULL_RANK_BYTES else AUTO_RANK

    def _seconds(
        self,
        coverage: Coverage,
        curvature: Curvature,
        passes: dict[str, work.Pass],
        products: Mapping[str, Products],
        groups: int,
        rank: int | None,
        tokens: int,
    ) -> dict[str, float]:
        """Seconds of each stage, `products` of "fit" and of "score" in that format."""
        net = network(self.model, coverage, readers(curvature))
        width = duration.typical_width(net)
        asked = work.batches_of(work.query_sizes(self.task, self.weighted), tokens)
        parts: dict[str, tuple[str, duration.Batches, Callable[[int, int], cost.Work]]] = {
            "covariance": ("fit", passes["covariance"].batches, lambda b, t: cost.covariance_pass(net, b, t)),
            "eigenvalues": ("fit", passes["eigenvalues"].batches, lambda b, t: cost.eigenvalue_pass(net, b, t)),
            "queries": ("score", asked, lambda b, t: cost.query_pass(net, b, t)),
            "score": ("score", passes["score"].batches, lambda b, t: cost.score_pass(net, b, t, len(self.queries), rank)),
        }
        found = {"eigenvectors": duration.eigen_seconds(self._machine(products["fit"]), net)}
        for name, (command, batches, each) in parts.items():
            rates = self._machine(products[command])
            seconds = duration.pass_seconds(rates, batches, width, each)
            if command == "fit":
                seconds += (groups - 1) * duration.floor_seconds(rates, net, batches)
            found[name] = self._slowdown(net, coverage, passes["score"], products[command]) * seconds
        if rank is not None:
            flops = sum(24 * w.n_out * w.n_in * (rank + 10) * w.count for w in net.tracked) * len(self.queries)
            found["queries"] += SVD_SLOWDOWN * flops / self._machine(products["score"]).rate(width)
        return found

    def _slowdown(self, net: cost.Network, coverage: Coverage, planned: work.Pass, products: Products) -> float:
        """How much longer real batches take than predicted; 1 where there are none to run."""
        if not (self.has_weights and self.calibrate):
            return 1.0
        if products not in self._slower:
            from whence.planning.batches import floor_of

            rows = [self.data.examples.rows[planned.longest]] * min(4, planned.largest[0])
            batch = {(len(rows), planned.largest[1]): 1.0}
            predicted = duration.floor_seconds(self._machine(products), net, batch)
            with multiplying(products, torch.device(self.device)):
                self._slower[products] = floor_of(self.model, self.task, coverage.sites, rows) / predicted
        return self._slower[products]

    def _choices(
        self, coverage: Coverage, curvature: Curvature, tokens: int, rank: int | None
    ) -> dict[str, tuple[tuple[str, cost.Choice], ...]]:
        """For each kind of tracked weight what `cost` chooses, for the longest examples."""
        net = network(self.model, coverage, readers(curvature))
        found = {}
        for w in net.tracked:
            summands, queries = w.summands(tokens), len(self.queries)
            kind = f"{w.count} x [{w.n_out}, {w.n_in}]" + (f", input shared by {w.shared}" if w.shared > 1 else "")
            found[kind] = (
                ("covariance", cost.covariance(summands, w.n_in)),
                ("rotation", cost.rotation(summands, w.n_out, w.n_in, w.has_out, True, w.shared)),
                ("product", cost.product(queries, rank, summands, w.n_out, w.n_in)),
                ("queries", cost.query_storage(queries, rank or AUTO_RANK, summands, w.n_out, w.n_in)),
            )
        return found

    def _note(self, name: str, seen: dict[str, Rehearsed], rank: int | None, fitted: Products) -> str:
        kept = f"{seen[name].kept.all / 1e9:.2g} GB of sums" if seen[name].kept.all >= 1e8 else ""
        notes = {
            "covariance": kept,
            "eigenvectors": f"{'float64' if fitted == 'float32' else 'float32'}, one matrix at a time",
            "queries": f"{len(self.queries)} queries, {'full rank' if rank is None else f'rank {rank}'}",
        }
        return notes.get(name, "")


def _squares(shape: tuple[int, int]) -> int:
    return shape[0] ** 2 + shape[1] ** 2


def _beyond(first: Rehearsed, second: Rehearsed, steps: float) -> Rehearsed:
    """Where the line through both is after so many more steps."""

    def held(a: Held, b: Held) -> Held:
        return Held(round(b.all + steps * (b.all - a.all)), round(b.small + steps * (b.small - a.small)))

    return Rehearsed(held(first.peak, second.peak), held(first.kept, second.kept))
