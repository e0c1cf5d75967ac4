"""Puts a plan together: lengths of the data, and a rehearsal on this machine's rates for memory and time."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import psutil
import torch
from torch import nn

from whence import cost
from whence.capture import Capture
from whence.coverage import Site, cover
from whence.engine.partition import batch_positions, module_groups
from whence.engine.point import cover_default
from whence.engine.probe import probe_rows, worth_probing
from whence.engine.stream import Sink, encode, likelihood, read, stream
from whence.errors import UsageError
from whence.fitting import Curvature, fit
from whence.gradients import Dense
from whence.indexing import build_index
from whence.indexing.build import DIM, kind_of, operator_of, rows_bytes
from whence.operators.eigen import SHARE
from whence.planning import files, work
from whence.planning.blank import blank_model
from whence.planning.budget import fitting
from whence.planning.hints import hints
from whence.planning.landmarks import Landmarks
from whence.planning.machine import Machine, assumed, measured
from whence.planning.plan import Memory, Plan, Settings, Stage
from whence.planning.rehearsal import Rehearsal, Rehearsed
from whence.planning.scoring import ask, score_rows
from whence.precision import Precision, Products, multiplying
from whence.progress import note, stage
from whence.scoring.score import AUTO_RANK, FULL_RANK_BYTES
from whence.settings import Amount, Count, Fit, Index, valid
from whence.show.numbers import many
from whence.tasks.base import Task
from whence.tasks.forward import borrowed


def plan(
    model: str | os.PathLike | nn.Module,
    task: Task,
    data: Any,
    settings: Fit = Fit(),
    *,
    queries: Any = 16,
    memory: int | None = None,
    disk: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    calibrate: bool = True,
    rank: int | None | Literal["auto"] = "auto",
    index: Index | None = None,
    where: str | os.PathLike = ".",
    **changes: Any,
) -> Plan:
    """Estimate memory, disk and time of `fit`, whose settings these are, and `score`, before anything is spent.

    `model` is a hub id or folder, of which only the config is read, or a model, with or without weights (`meta`).
    `queries` are queries, or how many there will be. `memory` and `disk` are budgets in bytes, `memory` of the whole
    process; with a budget for memory that the settings exceed, others that fit are searched for (batches, groups,
    rank), and DoesNotFit is raised where there are none. `calibrate` measures this machine for a few seconds, and runs a
    few real batches of a model that has its weights. With `index`, building an index with these settings is a stage too.
    `where` is the folder whose disk is meant. A GPU may be planned for that is not here (`device="cuda"` with `memory`).
    """
    settings = Fit.of(settings, changes)
    memory, disk = _budget("memory", memory), _budget("disk", disk)
    rank = valid(Count | Literal["auto"] | None, rank, "rank")
    queries = valid(Count, queries, "queries") if isinstance(queries, int | float) else queries
    asked = Settings(settings, rank)
    blank = blank_model(os.fspath(model), dtype, device=device) if not isinstance(model, nn.Module) else borrowed(model)
    planner = Planner(blank, task, data, queries, device, calibrate, index)
    if not planner.is_here:
        note("there is no GPU here: its memory is rehearsed with the kernels of a CPU, its time with rates assumed of one")
    if memory is not None:
        free = memory
    elif not planner.is_here:
        raise UsageError(
            "There is no GPU here to ask how much memory it has.",
            given=planner.device,
            accepted="the memory of the one that is planned for",
            fix="--memory 80GB (memory=80 * 10**9)",
        )
    elif planner.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(planner.device)[0] + torch.cuda.memory_allocated(planner.device)
    else:
        free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    planner.free = {"memory": free}
    if disk is not None or planner.is_here:
        planner.free["disk"] = shutil.disk_usage(where).free if disk is None else disk
    if memory is None:
        return planner.evaluate(asked)
    tokens = batch_positions(settings.batch_tokens, torch.device(planner.device))
    return fitting(planner.evaluate, asked, max(planner.data.examples.sizes), tokens)


def _budget(name: str, size: int | None) -> int | None:
    """The limit in bytes; raises UsageError for what is meant in GB."""
    size = valid(Amount | None, size, name)
    if size is not None and size < 10**3:
        raise UsageError(f"{name}={size} is {size} bytes.", accepted="bytes", fix=f"{name}={size} * 10**9, in GB")
    return size


Result = TypeVar("Result")

Stages = dict[str, Rehearsed]
"""The stages of `fit` or of `score` by name, rehearsed on some batch."""


class Planner:
    """A model, its data and a machine, to evaluate settings for; what was rehearsed once is remembered."""

    def __init__(
        self, model: nn.Module, task: Task, data: Any, queries: Any, device: str | None, calibrate: bool, index: Index | None
    ):
        self.model, self.task, self.index = model, task, index
        first = next(model.parameters())
        self.dtype, self.has_weights = first.dtype, not first.is_meta
        self.device = str(device or (first.device if self.has_weights else "cuda" if torch.cuda.is_available() else "cpu"))
        self.is_here = not self.device.startswith("cuda") or torch.cuda.is_available()
        self.calibrate = calibrate and self.is_here
        self.data = work.read_data(task, data)
        self.queries = work.sample_queries(task, self.data, queries) if isinstance(queries, int) else list(read(queries))
        self.free: dict[str, int] = {"memory": 0}
        self.slower: dict[Products, float] = {}
        """How much longer real batches take than rehearsed ones; nothing where there are none to run."""
        self.fits: dict[Any, tuple[Rehearsal, Stages, Curvature]] = {}
        self.scores: dict[Any, dict[work.Shape, Stages]] = {}
        self.indices: dict[Any, Stages] = {}
        self.questions: dict[tuple[str, ...], Landmarks] = {}
        self.coded: dict[Any, tuple[Stages, dict[work.Shape, Stages], dict[work.Shape, Stages]]] = {}

    def evaluate(self, settings: Settings, roughly: bool = False) -> Plan:
        """The plan for these settings; roughly, its memory is the same, and its seconds follow from one batch of each pass."""
        evaluation = _Evaluation(self, settings, roughly)
        with stage("plan", evaluation.rehearsals, "batches") as evaluation.advance:
            return evaluation.plan()

    def landmarks(self, index: Index, sites: Mapping[str, Site]) -> Landmarks:
        """Those of an index with these settings; settings of fit and score change nothing about them."""
        key = tuple(sites)
        if key not in self.questions:
            self.questions[key] = Landmarks.of(self.model, self.task, self.data, index, sites)
        return self.questions[key]

    def machine(self, products: Products) -> Machine:
        """Its rates where products are taken in this format."""
        with multiplying(products, torch.device(self.device)):
            return measured(self.device, self.dtype, products) if self.calibrate else assumed(self.device)


class _Evaluation:
    """Settings with what they mean for the planner's model and data."""

    def __init__(self, planner: Planner, settings: Settings, roughly: bool):
        self.planner, self.settings = planner, settings
        self.advance: Callable[[int], None] = lambda batches: None
        self.coverage = cover_default(planner.model, planner.task, settings.fit.modules)
        self.sites, self.device = self.coverage.sites, torch.device(planner.device)
        self.names = list(self.sites)
        self.tokens = batch_positions(settings.batch_tokens, self.device)
        self.widest = max(max(site.shape) for site in self.sites.values())
        first, second = work.samples(planner.data, settings.fit, self.widest)
        of = {"covariance": first, "eigenvalues": second, "score": work.everything(planner.data)}
        self.passes = {
            name: work.one_pass(planner.data, sample, self.tokens, settings.fit.chunks, roughly) for name, sample in of.items()
        }
        once, index = replace(first, size=first.size // settings.fit.draws), planner.index
        self.precision = {"fit": self._settled(once), "score": self._settled(of["score"])}
        self.landmarks: Landmarks | None = None
        if index:
            self.precision["index"] = self._settled(of["score"], index.precision)
            self.passes["index"] = work.one_pass(planner.data, of["score"], self.tokens, index.chunks, roughly)
            landmarks = kind_of(index, factors=True) == "landmarks"
            like_fit = landmarks and index.modules is None
            self.indexed = self.sites if like_fit else cover_default(planner.model, planner.task, index.modules).sites
            if landmarks:
                self.landmarks = planner.landmarks(index, self.indexed)
                every = work.everything(self.landmarks.asked)
                self.passes["landmarks"] = work.one_pass(self.landmarks.asked, every, self.tokens, 1, roughly)
                self.precision["landmarks"] = Precision(products="float32")
        self.products: dict[str, Products] = {command: precision.products for command, precision in self.precision.items()}
        self.groups = module_groups(self.sites, settings.fit.groups)
        longest = max(
            sum(planner.task.size(item) for item, _ in query) for query in planner.task.encode_queries(planner.queries)
        )
        together, count = max(1, self.tokens // longest), len(planner.queries)
        self.counts = [together, 2 * together] if 2 * together < count else [count]
        """Queries that scoring is rehearsed with."""
        self.rank = settings.rank
        if self.rank == "auto":  # as in `score`
            size = len(planner.queries) * sum(math.prod(site.shape) for site in self.sites.values()) * 4
            self.rank = None if size <= FULL_RANK_BYTES else AUTO_RANK

    @property
    def rehearsals(self) -> int:
        """Batches that are rehearsed, or have been."""
        once = [self.passes[name] for name in ("covariance", "index") if name in self.passes]
        scored = len(self.counts) * len(self.passes["score"].rehearsed)
        return sum(len(each.rehearsed) for each in once) + (len(self.groups) > 1) + scored

    def _each(self, shapes: Sequence[work.Shape], rehearse: Callable[[work.Shape], Result]) -> dict[work.Shape, Result]:
        """What comes of batches of these shapes."""
        found: dict[work.Shape, Result] = {}
        for shape in shapes:
            found[shape] = rehearse(shape)
            self.advance(1)
        return found

    def _settled(self, sample: work.Sample, precision: Precision | None = None) -> Precision:
        """With the format of products that "auto" stands for over the sample, if the probe allows it: only weights can tell."""
        precision, examples = precision or self.settings.fit.precision, self.planner.data.examples
        if precision.products != "auto":
            return precision
        positions, probed = (
            sum(examples.sizes[index] for index in chosen)
            for chosen in (sample.indices, probe_rows(examples, self.sites, sample.indices))
        )
        positions *= sample.size / len(sample.indices)
        short = self.planner.is_here and worth_probing(self.planner.model, self.device, positions, probed)
        return replace(precision, products="bfloat16" if short else "float32")

    def plan(self) -> Plan:
        """Rehearse, and put together."""
        planner, sites, data = self.planner, self.sites, self.planner.data
        overheads = OVERHEADS["cuda" if self.device.type == "cuda" else "cpu"]
        fit_pass, score_pass = self.passes["covariance"], self.passes["score"]
        fits = self._each(fit_pass.rehearsed, lambda shape: self._fit(shape, self.names)[1])
        rehearsal, _, curvature = self._fit(fit_pass.largest, self.names)
        scores = self._score(rehearsal, curvature)
        seconds = self._seconds("fit", fit_pass, fits, rehearsal) | self._seconds("score", score_pass, scores, rehearsal)
        if len(self.groups) > 1:
            heaviest = max(self.groups, key=lambda names: sum(side**2 for name in names for side in sites[name].shape))
            fitted = self._each([fit_pass.largest], lambda shape: self._fit(shape, heaviest)[1])[fit_pass.largest]
        else:
            fitted = fits[fit_pass.largest]
        scored, indexed = self._on_a_gpu_elsewhere(scores[score_pass.largest], curvature), {}
        written = self._files(curvature, fitted)
        if self.landmarks:
            indexed, taken = self._index_landmarks(self.landmarks, rehearsal, curvature)
            self.advance(len(self.passes["index"].rehearsed))
            seconds |= taken
            written["index"] = self.landmarks.disk(data)
        elif planner.index:
            index_pass = self.passes["index"]
            built = self._each(
                index_pass.rehearsed, functools.partial(self._index, rehearsal=rehearsal, settings=planner.index)
            )
            seconds |= self._seconds("index", index_pass, built, rehearsal)
            indexed = built[index_pass.largest]
            written["index"] = files.of_index(data, self.indexed.values(), planner.index)
        sums = fitted["covariance"].kept.all if "covariance" in fitted else 0
        notes = self._notes(sums)
        stages = tuple(
            Stage(
                name,
                seconds[name],
                memory_of(
                    name, held, overheads, self.products["index" if name in indexed else "score" if name in scored else "fit"]
                ),
                written.get(name, 0),
                notes.get(name, ""),
            )
            for name, held in (fitted | scored | indexed).items()
        )
        rates = "batches" if planner.slower else "rates"
        tensors = {id(tensor): tensor.nbytes for tensor in [*planner.model.parameters(), *planner.model.buffers()]}
        return Plan(
            model={
                "name": getattr(planner.model, "name_or_path", "") or type(planner.model).__name__,
                "kind": type(planner.model).__name__,
                "parameters": self.coverage.parameters,
                "format": str(planner.dtype).removeprefix("torch."),
                "bytes": sum(tensors.values()),
                "process": overheads.process,
                "families": len(module_groups(sites, len(sites))),
                "layers": len({found.group(1) for name in sites if (found := re.search(r"\.(\d+)(\.|$)", name))}),
                "widest": self.widest,
            },
            data={
                "rows": data.total,
                "tokenised": len(data.examples),
                "tokens": data.tokens,
                "fitted": fit_pass.examples,
                "measured": self.passes["eigenvalues"].examples if "eigenvalues" in fitted else 0,
                "queries": len(planner.queries),
                "rank": self.rank,
                "products": self.products,
            },
            coverage=str(self.coverage),
            device=planner.device,
            settings=self.settings,
            stages=stages,
            disk_peak=sum(stage.disk for stage in stages) + 2 * sums,
            sure=rates if planner.calibrate else "assumed" if planner.is_here else "elsewhere",
            free=planner.free,
            choices=self._choices(curvature),
            hints=hints(self.coverage, self.settings, 4),
            passing=self._passing(rehearsal, curvature),
            factors=files.of_factors_in_memory(curvature),
        )

    def _notes(self, sums: int) -> dict[str, str]:
        """What is said of stages beside their figures; `sums` are the bytes of the covariances."""
        asked, index = many(len(self.planner.queries), "query", "queries"), self.planner.index
        notes = {
            "eigenvectors": f"{'float64' if self.products['fit'] == 'float32' else 'float32'}, one matrix at a time",
            "queries": f"{asked}, {'full rank' if self.rank is None else f'rank {self.rank}'}",
        }
        if self.landmarks:
            notes["index"], notes["questions"] = str(self.landmarks), f"{self.landmarks.prompts} answers of the model"
        elif index:
            notes["index"] = f"{index.dim or DIM} x {index.dim or DIM} {index.kept} of {len(self.indexed)} modules"
        if sums >= 1e8:
            notes["covariance"] = f"{sums / 1e9:.2g} GB of sums"
        return notes

    def _fit(self, shape: work.Shape, names: list[str]) -> tuple[Rehearsal, Stages, Curvature]:
        """Rehearse `fit` of these modules on a batch of this shape."""
        planner, settings, precision = self.planner, self.settings.fit, self.precision["fit"]
        rows = self.passes["covariance"].rows_of(shape)
        key = (repr(settings.changed(modules=tuple(names), groups=1, precision=precision)), shape, len(rows))
        if key not in planner.fits:
            rehearsal = Rehearsal(planner.model, planner.task, planner.device if planner.is_here else "cpu")
            seen, curvature = rehearsal.run(
                lambda model, task: fit(
                    model,
                    task,
                    rows,
                    method=settings.method,
                    modules=names,
                    examples="all",
                    disjoint=False,
                    labels=settings.labels,
                    seed=settings.seed,
                    largest_factor=settings.largest_factor,
                    precision=precision,
                    batch_tokens=math.prod(shape),
                ),
                planner.machine(precision.products),
            )
            assert curvature is not None
            planner.fits[key] = rehearsal, seen, curvature
        return planner.fits[key]

    def _score(self, rehearsal: Rehearsal, curvature: Curvature) -> dict[work.Shape, Stages]:
        """Rehearse scoring a batch of each shape; with many queries from what fewer take: each takes as much as the next."""
        planner, passed, precision = self.planner, self.passes["score"], self.precision["score"]
        rows = {shape: passed.rows_of(shape) for shape in passed.rehearsed}
        key = (id(curvature), repr(precision), self.rank, self.tokens, *((shape, len(some)) for shape, some in rows.items()))
        if key in planner.scores:
            self.advance(len(self.counts) * len(rows))
            return planner.scores[key]
        machine = planner.machine(precision.products)
        _, operator = rehearsal.run(lambda model, task: curvature.inverse(0.1), machine)
        assert operator is not None

        def rehearsed(count: int) -> dict[work.Shape, Stages]:
            given = {"operator": operator, "rank": self.rank, "precision": precision, "batch_tokens": self.tokens}
            asked, queries = rehearsal.run(functools.partial(ask, queries=planner.queries[:count], **given), machine)
            assert queries is not None
            found = {}
            for shape, some in rows.items():
                given = {"rows": some, "queries": queries, "precision": precision, "batch_tokens": math.prod(shape)}
                found[shape] = asked | rehearsal.run(functools.partial(score_rows, **given), machine)[0]
                self.advance(1)
            return found

        found, *second = map(rehearsed, self.counts)
        for more in second:
            steps = (len(planner.queries) - self.counts[1]) / (self.counts[1] - self.counts[0])
            for shape, stages in found.items():
                found[shape] = {name: held.beyond(more[shape][name], steps) for name, held in stages.items()}
        planner.scores[key] = found
        return found

    def _on_a_gpu_elsewhere(self, scored: Stages, curvature: Curvature) -> Stages:
        """For a GPU that is not here, the same without the factors, which stay in the host's memory.

        They are on the GPU while the queries are multiplied with them, one after the other where it has no room for all
        (`BlockDiagonal.streaming`).
        """
        planner = self.planner
        if planner.is_here:
            return scored
        factors = files.of_factors_in_memory(curvature)
        weights = sum(parameter.nbytes for parameter in planner.model.parameters())
        visiting = factors > SHARE * (planner.free["memory"] - weights)
        most = max(sum(tensor.nbytes for tensor in block.tensors) for block in curvature.blocks.values())
        away = {"queries": max(0, factors - most) if visiting else 0, "score": factors}
        return {name: held.without(away.get(name, 0)) for name, held in scored.items()}

    def _passing(self, rehearsal: Rehearsal, curvature: Curvature) -> float:
        """Seconds of the gradients of all queries through an operator with the factors."""
        count, machine = len(self.planner.queries), self.planner.machine(self.products["score"])

        def work(model: nn.Module, task: Task) -> None:
            like, sums = next(model.parameters()), torch.promote_types(self.planner.dtype, torch.float32)
            asked = {name: Dense(like.new_empty(count, *site.shape, dtype=sums)) for name, site in self.sites.items()}
            with stage("passing", count):
                _ = curvature.inverse(0.1) @ asked

        return rehearsal.run(work, machine)[0]["passing"].seconds * self._slower("score", rehearsal)

    def _index(self, shape: work.Shape, rehearsal: Rehearsal, settings: Index) -> Stages:
        """Rehearse building an index of such a batch; what of its rows is held until a chunk is saved comes on top."""
        planner, precision, passed = self.planner, self.precision["index"], self.passes["index"]
        rows = passed.rows_of(shape)
        key = (repr(precision), shape, len(rows), id(rehearsal))
        if key not in planner.indices:
            given = {"precision": precision, "batch_tokens": math.prod(shape), "modules": tuple(self.indexed)}
            work = lambda model, task: build_index(model, task, rows, settings, **given)  # noqa: E731
            seen, _ = rehearsal.run(work, planner.machine(precision.products), "index")
            more = 2 * rows_bytes(passed.examples, self.indexed.values(), settings) // settings.chunks  # filed, and stacked
            held = seen["index"]
            planner.indices[key] = {"index": held._replace(peak=held.peak._replace(all=held.peak.all + more))}
        return planner.indices[key]

    def _index_landmarks(
        self, landmarks: Landmarks, rehearsal: Rehearsal, curvature: Curvature
    ) -> tuple[Stages, dict[str, float]]:
        """Rehearse building an index of landmarks: what its stages hold, and their seconds."""
        planner, asked, coded = self.planner, self.passes["landmarks"], self.passes["index"]
        products = self.products["index"]
        key = (id(curvature), products, asked.rehearsed, coded.rehearsed)
        if key not in planner.coded:
            machine, in_float32 = planner.machine(products), planner.machine("float32")
            _, operator = rehearsal.run(lambda model, task: operator_of(curvature, landmarks.settings), machine)
            assert operator is not None

            def ask(shape: work.Shape) -> Stages:
                given = asked.rows_of(shape), operator, math.prod(shape)
                return rehearsal.run(lambda model, task: landmarks.ask(model, task, *given), in_float32)[0]

            def code(shape: work.Shape) -> Stages:
                given = coded.rows_of(shape), operator, math.prod(shape), products
                return rehearsal.run(lambda model, task: landmarks.code(model, task, *given), machine)[0]

            answered = rehearsal.run(lambda model, task: landmarks.answer(model), in_float32)[0] if landmarks.prompts else {}
            asking, coding = {shape: ask(shape) for shape in asked.rehearsed}, {shape: code(shape) for shape in coded.rehearsed}
            planner.coded[key] = answered, asking, coding
        answered, asking, coding = planner.coded[key]
        once, slower = coding[coded.largest]["gram"], self._slower("landmarks", rehearsal)
        seconds = {name: each.seconds * slower * landmarks.answer_steps for name, each in answered.items()}
        seconds |= self._seconds("landmarks", asked, asking, rehearsal)
        seconds["landmarks"] += once.seconds * slower
        seconds |= self._seconds("index", coded, {shape: {"index": seen["index"]} for shape, seen in coding.items()}, rehearsal)
        gradients, codes = asking[asked.largest]["landmarks"], coding[coded.largest]["index"]
        more = landmarks.questions_bytes - len(asked.rows_of(asked.largest)) * landmarks.question_bytes
        filed = 2 * coded.examples * landmarks.layout.row_bytes // landmarks.settings.chunks  # and stacked
        most = max(codes.peak.all + filed, once.kept.all + landmarks.measuring_bytes(coded.examples))
        held = {
            "landmarks": gradients._replace(peak=gradients.peak._replace(all=gradients.peak.all + more)),
            "index": codes._replace(peak=codes.peak._replace(all=most)),
        }
        return answered | held, seconds

    def _seconds(
        self, command: str, planned: work.Pass, batches: Mapping[work.Shape, Stages], rehearsal: Rehearsal
    ) -> dict[str, float]:
        """Seconds of a command's stages: those of passes over the data from rehearsed batches, the others as rehearsed."""
        found, slower = {}, self._slower(command, rehearsal)
        for name, whole in batches[planned.largest].items():
            found[name] = whole.seconds
            if name in self.passes:
                each = {shape[1]: stages[name].seconds / len(planned.rows_of(shape)) for shape, stages in batches.items()}
                found[name] = self.passes[name].total(each)
                if command == "fit" and len(self.groups) > 1:  # each group takes the model forward and back
                    count, length = planned.largest
                    floor = self._floor(command, rehearsal, planned.rows_of(planned.largest)[:count])
                    found[name] += (len(self.groups) - 1) * self.passes[name].total({length: floor / count})
            if name != "eigenvectors":
                found[name] *= slower
        return found

    def _slower(self, command: str, rehearsal: Rehearsal) -> float:
        """How much longer real batches take than rehearsed ones; 1 where there are none to run."""
        planner, products = self.planner, self.products[command]
        if planner.has_weights and planner.calibrate and products not in planner.slower:
            rows = self.passes["score"].rows_of(self.passes["score"].largest)[:4]
            real = min(forward_and_back(planner.model, planner.task, self.names, rows, products) for _ in range(3))
            planner.slower[products] = real / self._floor(command, rehearsal, rows)
        return planner.slower.get(products, 1.0)

    def _floor(self, command: str, rehearsal: Rehearsal, rows: list[Any]) -> float:
        """Rehearsed seconds of one batch of these rows forward and back."""
        products = self.products[command]
        machine = self.planner.machine(products)
        seen, _ = rehearsal.run(lambda model, task: forward_and_back(model, task, self.names, rows, products), machine)
        return seen["floor"].seconds

    def _files(self, curvature: Curvature, fitted: Stages) -> dict[str, int]:
        """Bytes of files that each stage leaves."""
        factors = files.of_factors(curvature)
        written = {"score": files.of_scores(self.planner.data, self.planner.queries)}
        if "eigenvectors" in fitted:
            written["eigenvectors"] = factors["bases"] + files.PER_MODULE * len(self.sites)
        last = next((name for name in ("eigenvalues", "eigenvectors") if name in fitted), "score")
        written[last] = written.get(last, 0) + factors["eigenvalues"] + files.MANIFESTS
        return written

    def _choices(self, curvature: Curvature) -> dict[str, tuple[tuple[str, cost.Choice], ...]]:
        """For each kind of tracked weight what `cost` chooses, for the longest examples."""
        blocks, queries, tokens = curvature.blocks, len(self.planner.queries), self.passes["score"].largest[1]
        inputs = {name: id(block.q_I.blocks[0] if block.q_I else block) for name, block in blocks.items()}
        readers = Counter(inputs.values())
        kinds: Counter[tuple[int, int, int, bool, int]] = Counter()
        for name in blocks:
            site, shared = self.sites[name], readers[inputs[name]]
            kinds[*site.shape, shared, not site.layer.one_hot, 1 if site.layer.whole else tokens] += 1
        found = {}
        for (n_out, n_in, shared, has_out, summands), count in kinds.items():
            kind = f"{count} x [{n_out}, {n_in}]" + (f", input shared by {shared}" if shared > 1 else "")
            found[kind] = (
                ("covariance", cost.covariance(summands, n_in)),
                ("rotation", cost.rotation(summands, n_out, n_in, has_out, True, shared)),
                ("product", cost.product(queries, self.rank, summands, n_out, n_in)),
                ("queries", cost.query_storage(queries, self.rank or AUTO_RANK, summands, n_out, n_in)),
            )
        return found


def forward_and_back(model: nn.Module, task: Task, names: Sequence[str], rows: Sequence[Any], products: Products) -> float:
    """Seconds of one batch through the model and back, its gradients going nowhere: what every pass pays at least."""
    device, examples = next(model.parameters()).device, encode(task, rows, model)
    sites = cover(model, names).sites
    with multiplying(products, device), Capture(model, sites) as capture, stage("floor", len(rows)):
        began = time.perf_counter()
        stream(capture, task, examples.items, [range(len(rows))], likelihood(task, examples), Sink(), lambda positions: None)
        return time.perf_counter() - began


class Overheads(NamedTuple):
    """Bytes that a process takes beside its tensors (docs/plan.md)."""

    process: int  # Python with torch and transformers before there is a model, or a GPU's context
    libraries: int  # code and buffers that the first pass brings in,
    tables: int  # the tables that go with scores,
    short: int  # and products that round their operands
    kept_by_heap: float  # of the small blocks that a batch takes and gives back, the share that the allocator keeps


OVERHEADS = {
    "cpu": Overheads(400_000_000, 20_000_000, 76_000_000, 30_000_000, 0.75),
    "cuda": Overheads(500_000_000, 100_000_000, 0, 0, 0.1),
}


def memory_of(name: str, seen: Rehearsed, over: Overheads, products: Products) -> Memory:
    """The memory of a stage that was rehearsed."""
    libraries = over.libraries + over.tables * (name == "score") + over.short * (products == "bfloat16")
    heap = round(over.kept_by_heap * max(0, seen.peak.small - seen.kept.small))
    return Memory(libraries, seen.peak.all, heap, comes=max(0, seen.peak.all - seen.kept.all))
