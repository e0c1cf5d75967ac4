"""A finished index and its search: what the queries are in the terms of its codes, against every row."""

from __future__ import annotations

import functools
import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.coverage import Site
from whence.engine.point import Point
from whence.engine.queries import Queries, encode_queries, precondition, refuse_infinite
from whence.errors import StaleArtifact, TokenizerMismatch, UsageError
from whence.indexing.directions import AT_A_TIME, Directions, Whitened, open_directions
from whence.indexing.rows import expand
from whence.linalg.scan import Kernel, Questions, scan
from whence.operators import BlockDiagonal, Operator, Projection
from whence.operators.projection import random_projection
from whence.precision import multiplying
from whence.progress import note
from whence.scoring.checks import check_operator, check_scores
from whence.scoring.results import measured
from whence.settings import Count, valid
from whence.store.fingerprint import Glance, fingerprint_operator
from whence.store.intact import MANIFEST
from whence.store.manifest import Folder, differences, refuse_other_kind, within
from whence.store.memory import Memory
from whence.store.scores import Scores
from whence.tasks.base import Task

if TYPE_CHECKING:
    import pandas

MAPS, ROWS, EXAMPLES, RECALL = "query-projection", "rows", "examples.parquet", "recall.json"
SCANNED = ("codes", "scale", "signs", "size")
ADDED = "added"
"""Rows that came later lie in folders of this name with a number, in that of the index."""
WEIGHT = 0.5
"""Of what signs say, where no question was held out to measure it."""

COMPILED_BYTES = 2**28
"""From this size on, scans are compiled where numba is installed: importing it takes longer than scanning less without."""

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
"""Of what signs say; without bias they would count pi / 2."""
DEPTHS = (10, 100)

BLOCK_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}
"""Memory for the rows that a search holds at a time: what stays in a core's cache, or keeps a GPU busy."""


class Index:
    """Codes of all training examples, read block by block from where they lie.

    They are influences on landmark questions, or projected gradients (`about["kind"]`).
    """

    def __init__(
        self,
        folder: Folder | Memory,
        examples: pandas.DataFrame,
        about: dict[str, Any],
        built: Mapping[str, Any] | None = None,
        added: Sequence[tuple[Folder, Mapping[str, Any]]] = (),
    ):
        self.examples = examples
        """One row per training example: id, source, copies, tokens, text."""
        self.about = about
        """How it was built: kind, seed, format of the rows, modules, share of the parameters, examples and positions."""
        self._folder, self._built, self._added = folder, built or about, added
        """Where it is and how it was built, and the same of rows that were added since."""
        self._asked: tuple[Point, Glance, dict[str, Any]] | None = None
        """The model and the task that were searched with last, and what they looked like."""
        self.seconds: dict[str, float] = {}
        """What the gradients of the last search's queries took, and the scan."""
        self._resident: tuple[torch.device, list[dict[str, Tensor]]] | None = None
        """A GPU that searches took place on, and the shards as they are there."""
        self._operator: Operator | None = None
        """The one that was last found to be that of the landmarks."""
        shapes, dim = about["modules"].values(), about.get("dim", 0)
        self.widths = (
            [about["landmarks"]] if "landmarks" in about else [math.prod(min(n, dim) for n in each) for each in shapes]
        )

    @property
    def kind(self) -> str:
        """Of its codes: "landmarks" or "projections"."""
        return self.about.get("kind", "projections")

    @property
    def n_train(self) -> int:
        """The rows that the model was trained on."""
        return self.about.get("n_train", self.about["examples"])

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        codes = (
            f"{self.about['landmarks']:,} landmarks, {self.about['signs']:,} signs"
            if self.kind == "landmarks"
            else f"dim={self.about['dim']}"
        )
        return f"Index({len(self)} examples, {len(self.about['modules'])} modules, {codes})"

    @property
    def provenance(self) -> dict[str, Any]:
        """Fingerprints of what it was built from (model, data, task, settings, code), if it is in a folder."""
        return self._folder.provenance if isinstance(self._folder, Folder) else {}

    def blocks(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Examples' indices `[n]`, rows `[n, D]` and norms `[n]`, block by block; `like` gives format and device of the rows.

        Rows stay in memory as they are on disk. Examples that have no loss have no row.
        """
        size = BLOCK_BYTES.get(like.device.type, BLOCK_BYTES["cpu"])
        for shard in self._shards:
            step = max(1, size // (like.element_size() * shard["codes"].shape[1]))
            for start in range(0, len(shard["indices"]), step):
                part = {key: tensor[start : start + step] for key, tensor in shard.items()}
                yield part["indices"], expand(part["codes"], part["scale"], self.widths, like), part["norm"]

    @functools.cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        found, before = [], 0
        for folder, about in [(self._folder, self._built), *self._added]:
            parts = [folder.load(f"{ROWS}-{number:04d}") for number in range(about["chunks"])]
            found += [part | {"indices": part["indices"] + before} for part in parts] if before else parts
            before += about.get("rows", 0)
        return found

    def with_rows(self, folder: Folder, about: Mapping[str, Any]) -> Index:
        """The index with the rows in a folder of their own."""
        import pandas

        table = pandas.concat([self.examples, folder.read_table(EXAMPLES)], ignore_index=True)
        sums = {key: self.about[key] + about[key] for key in ("rows", "examples", "positions")}
        both = self.about | sums | {"n_train": about["n_train"]}
        return Index(self._folder, table, both, self._built, [*self._added, (folder, about)])

    @functools.cached_property
    def _directions(self) -> Directions:
        return open_directions(self._folder, self.about["signs"], self.about["seed"])

    @functools.cached_property
    def measured(self) -> dict[str, Any]:
        """What the questions held out say of a scan.

        "places" `[H, 100]`, or fewer rows: where it puts those that exact scores put first, from 0; "weight": what signs count.
        Of projections nothing is known.
        """
        folder = self._added[-1][0] if self._added else self._folder
        return folder.read_json(RECALL) if self.kind == "landmarks" else {"places": [], "weight": 0.0}

    def recall(self, k: int, among: int) -> float:
        """Share of a question's `k` best rows that are among the first `among` of the scan: mean of the questions held out."""
        places = np.array(self.measured["places"])
        return float((places[:, :k] < among).mean()) if places.size else float("nan")

    def measure(self, best: int = 100) -> dict[str, Any]:
        """Scan for the questions held out, and compare with their exact scores, which were filed with the codes."""
        directions = self._directions
        if not directions.held_out:
            return {"places": [], "weight": WEIGHT}
        along_HN, rest_HN = (part.astype(np.float64) for part in self.scan_parts(*directions.coded(directions.held_out)))
        exact_HN = np.zeros_like(along_HN)
        for shard in self._shards:
            exact_HN[:, shard["indices"].numpy()] = shard["exact"].numpy().T
        weight = weight_of_signs(exact_HN, along_HN, rest_HN)
        rows_HK = np.argsort(-exact_HN, axis=1, kind="stable")[:, :best]
        places_HN = np.argsort(np.argsort(-(along_HN + weight * rest_HN), axis=1, kind="stable"), axis=1)
        return {"places": np.take_along_axis(places_HN, rows_HK, 1).tolist(), "weight": weight}

    @functools.cached_property
    def _ids(self) -> list[str]:
        return list(self.examples["id"])

    @functools.cached_property
    def _queries(self) -> Projection:
        """What projects the queries."""
        if self._folder.has(MAPS):
            maps = self._folder.load(MAPS)
            out, into = ({name: maps[f"{side}/{name}"] for name in self.about["modules"]} for side in ("out", "into"))
            return Projection(out, into)
        shapes = {name: (n_out, n_in) for name, (n_out, n_in) in self.about["modules"].items()}
        return random_projection(shapes, self.about["dim"], self.about["seed"])

    def search(
        self, model: nn.Module, task: Task, queries: Any, operator: Operator | None = None, *, batch_tokens: int | None = None
    ) -> Scores:
        """Estimate what `whence.score(model, task, queries, data, operator)` gives, without a pass over the data.

        `raw` estimates `grad m(query)^T operator grad log p(example)`. With landmarks, the operator is the one that the index
        was built with. With projections it is any, or None for the gradient dot product; `raw` is then the inner product of
        the projected gradients, which is right on average. `.top(query, k)` ranks, `.normalised("cosine")` divides by the norms
        of both sides.

        The model is hashed at the first search, and again only where it seems to have changed.

        Raises StaleArtifact or TokenizerMismatch where model or task are not those of the index, UsageError.
        """
        if operator is not None:
            check_operator(operator)
        point = self.check(model, task)
        if batch_tokens is not None:
            point.batch_tokens = valid(Count, batch_tokens, "batch_tokens")
        asked = encode_queries(task, queries, model)
        with multiplying("float32", point.device):
            raw, norms, columns = self._search(point, asked, operator)
        check_scores(raw, self._ids)
        about = {
            "operator": "identity" if operator is None else operator.label,
            **({"landmarks": self.about["landmarks"]} if self.kind == "landmarks" else {"projected": self.about["dim"]}),
            "modules": len(self.about["modules"]),
        }
        return Scores(
            raw=raw,
            n_train=self.n_train,
            examples=self.examples,
            queries={**asked.table, **columns},
            about={**measured(point), **about},
            norms={"gradient": norms},
        )

    def _search(self, point: Point, asked: Queries, operator: Operator | None) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Scores `[Q, N]`, norms of the rows, and what is known of the queries."""
        if self.kind == "landmarks":
            return self._search_landmarks(point, asked, self.check_operator(operator))
        mapped = self._queries if operator is None else self._queries @ operator
        found = precondition(point, asked, self._sites(point, operator), mapped)
        rows_QD = torch.cat([found.gradients[name].dense().w_BOI.flatten(1) for name in self.about["modules"]], 1).float()
        norms_Q = torch.linalg.vector_norm(rows_QD, dim=1).cpu()
        refuse_infinite(norms_Q)
        return *self.scan(rows_QD), {"measured": found.measured, "norm": norms_Q, "energy": float("nan")}

    def _search_landmarks(
        self, point: Point, asked: Queries, operator: BlockDiagonal
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        raw, parts, whitened = np.zeros((len(asked), len(self)), np.float32), [], Whitened(operator.to(point.like))
        sites, self.seconds = self._sites(point, operator), {"query": 0.0, "scan": 0.0}
        for start in range(0, len(asked), AT_A_TIME):
            began = time.perf_counter()
            found = precondition(point, asked.take(slice(start, start + AT_A_TIME)), sites, whitened)
            parts.append(found.columns() | {"measured": found.measured})
            refuse_infinite(parts[-1]["norm"])
            host = {name: gradient.to("cpu") for name, gradient in found.gradients.items()}
            coded = self._directions.coded(host)
            known = time.perf_counter()
            along, rest = self.scan_parts(*coded, point.device)
            raw[start : start + len(along)] = along + np.float32(self.measured["weight"]) * rest
            self.seconds["query"] += known - began
            self.seconds["scan"] += time.perf_counter() - known
        norms = np.zeros(len(self), np.float32)
        for shard in self._shards:
            norms[shard["indices"].numpy()] = shard["norm"].numpy()
        joined = {key: torch.cat([part[key] for part in parts]) for key in ("measured", "norm")}
        return raw, norms, joined | {"energy": float("nan")}

    def scan_parts(
        self, along_QJ: Tensor, rest_QK: Tensor, device: torch.device | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the landmarks say of every row, `[Q, N]`, and what the signs say of the rest; computed on a CPU or a GPU."""
        found, questions = np.zeros((2, len(along_QJ), len(self)), np.float32), Questions.of(along_QJ, rest_QK)
        if device is not None and device.type == "cuda":
            questions, shards, kernel = questions.to(device), self._shards_on(device), None
        else:
            shards, kernel = self._shards, self._kernel
        for shard in shards:
            scan(shard, questions, shard["indices"].numpy(), found[0], found[1], kernel)
        return found[0], found[1]

    @functools.cached_property
    def scanned_bytes(self) -> int:
        """What a scan reads."""
        return sum(shard[key].nbytes for shard in self._shards for key in SCANNED)

    @functools.cached_property
    def _kernel(self) -> Kernel | None:
        """What scans this index on a CPU, if it is large and numba is installed."""
        if self.scanned_bytes < COMPILED_BYTES:
            return None
        if importlib.util.find_spec("numba") is None:
            note("an index of this size is scanned several times as fast with numba: pip install 'whence[scan]'")
            return None
        from whence.linalg.compiled import scan_rows

        return scan_rows

    def _shards_on(self, device: torch.device) -> list[dict[str, Tensor]]:
        """The shards with what is scanned on a GPU, if half of its free memory holds it; it stays there."""
        if self._resident is None or self._resident[0] != device:
            fits = 2 * self.scanned_bytes <= torch.cuda.mem_get_info(device)[0]
            moved = [shard | {key: shard[key].to(device) for key in SCANNED if fits} for shard in self._shards]
            self._resident = device, moved
        return self._resident[1]

    def check_operator(self, operator: Operator | None) -> BlockDiagonal:
        """Raise StaleArtifact unless it is the operator in whose coordinates the landmarks are."""
        if isinstance(operator, BlockDiagonal) and operator is self._operator:
            return operator
        built = self.about["operator"]
        if not isinstance(operator, BlockDiagonal) or fingerprint_operator(operator) != built:
            raise StaleArtifact(
                "The landmarks of the index are those of another operator.",
                given="none" if operator is None else operator.label,
                accepted=f"{built['label']}, of the same factors",
                fix="search with its factors (--factors FOLDER) and damping, or build one for any operator: --kind projections",
            )
        self._operator = operator
        return operator

    def check(self, model: nn.Module, task: Task) -> Point:
        """Raise StaleArtifact unless this was built from `model`, TokenizerMismatch unless `task` reads text as then.

        Returns both as a point to ask. Asked again of the same, it looks at where the weights are, how often they were written
        to, and at a few of them, instead of hashing them all.
        """
        settings = {name: id(value) for name, value in vars(task).items()}
        if self._asked is not None:
            point, seen, then = self._asked
            if (point.model, point.task, then) == (model, task, settings) and seen.still_holds(model):
                return point
        point, seen = Point(model, task), Glance(model)
        if self.provenance:
            self._compare(self.provenance, point)
        self._asked = point, seen, settings
        return point

    def _compare(self, built: Mapping[str, Any], point: Point) -> None:
        if changes := differences({"model": built["model"]}, {"model": point.fingerprint}):
            raise StaleArtifact(
                "The index was built from another model.",
                given=("\n" + " " * 11).join(changes),
                accepted="the model that it was built from, in the same dtype",
                fix="build an index of this model",
            )
        if changes := [key for key in ("tokenizer", "chat_template") if built["task"].get(key) != point.settings.get(key)]:
            raise TokenizerMismatch(
                f"The index was built from text read with another {' and '.join(changes).replace('_', ' ')}.",
                accepted="the tokenizer and chat template that the model was trained with, for index and queries alike",
                fix="give the task of the index, or build it again",
            )

    def _sites(self, point: Point, operator: Operator | None) -> dict[str, Site]:
        """The modules of the index in the model, on all of which the operator must act."""
        shapes = {name: tuple(shape) for name, shape in self.about["modules"].items()}
        sites = point.cover(list(shapes)).sites
        if {name: site.shape for name, site in sites.items()} != shapes:
            raise StaleArtifact("The index was built from a model with other modules.", given=", ".join(list(shapes)[:5]))
        if operator is not None and operator.names and (missing := shapes.keys() - set(operator.names)):
            raise UsageError(
                "The operator does not act on all modules of the index",
                given=", ".join(sorted(missing)[:5]),
                fix="build the index of the modules that the curvature was fitted on (curvature=...)",
            )
        return sites

    def scan(self, rows_QD: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Inner products with every row, `[Q, N]`, and the rows' norms `[N]`; zero for examples without a loss."""
        raw, norms = np.zeros((len(rows_QD), len(self)), dtype=np.float32), np.zeros(len(self), dtype=np.float32)
        for indices, rows_nD, norm in self.blocks(rows_QD):
            raw[:, indices.numpy()] = (rows_QD @ rows_nD.T).cpu().numpy()
            norms[indices.numpy()] = norm.numpy()
        return raw, norms


def weight_of_signs(exact_HN: np.ndarray, along_HN: np.ndarray, rest_HN: np.ndarray) -> float:
    """By which of the `WEIGHTS` a scan's best 2 % hold most of the best 10 and 100 rows.

    Least squares would let the few questions decide that resemble a row, whose scores are a hundred times as large, and noise
    drown the others.
    """
    count = exact_HN.shape[1]
    among = min(count, max(DEPTHS[0], count // 50))
    best_HK = np.argsort(-exact_HN, axis=1, kind="stable")[:, : DEPTHS[1]]

    def recalled(weight: float) -> float:
        estimates_HN = along_HN + weight * rest_HN
        bound_H1 = np.partition(estimates_HN, count - among, axis=1)[:, count - among, None]
        inside_HK = np.take_along_axis(estimates_HN, best_HK, 1) >= bound_H1
        return float(inside_HK[:, : DEPTHS[0]].mean() + inside_HK.mean())

    return max(WEIGHTS, key=recalled)


def open_index(path: str | Path) -> Index:
    """Open a finished index, with the rows that were added to it; StaleArtifact where it is unfinished or damaged."""
    folder = Folder.open(within(path, "index"))
    about = folder.manifest.get("about", {})
    refuse_other_kind(folder, "dim" in about or "landmarks" in about, "index", "whence index build")
    index = Index(folder, folder.read_table(EXAMPLES), about)
    for part in map(Folder.open, added_to(folder)):
        index = index.with_rows(part, part.manifest["about"])
    return index


def added_to(folder: Folder) -> list[Path]:
    """The finished folders of rows that were added, in their order."""
    return sorted(manifest.parent for manifest in folder.path.glob(f"{ADDED}-*/{MANIFEST}"))
