"""A finished index and its search: the queries' gradients, projected the same way, against every row."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.coverage import Site
from whence.engine.point import Point
from whence.engine.queries import encode_queries, precondition, refuse_infinite
from whence.errors import StaleArtifact, TokenizerMismatch, UsageError
from whence.indexing.rows import expand
from whence.operators import Operator, Projection
from whence.operators.projection import random_projection
from whence.precision import multiplying
from whence.scoring.checks import check_operator, check_scores
from whence.scoring.results import measured
from whence.settings import Count, valid
from whence.store.fingerprint import Glance
from whence.store.manifest import Folder, differences, refuse_other_kind, within
from whence.store.memory import Memory
from whence.store.scores import Scores
from whence.tasks.base import Task

if TYPE_CHECKING:
    import pandas

MAPS, ROWS, EXAMPLES = "query-projection", "rows", "examples.parquet"
BLOCK_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}
"""Memory for the rows that a search holds at a time: what stays in a core's cache, or keeps a GPU busy."""


class Index:
    """Projected gradients of all training examples, read block by block from where they lie."""

    def __init__(self, folder: Folder | Memory, examples: pandas.DataFrame, about: dict[str, Any]):
        self.examples = examples
        """One row per training example: id, source, copies, tokens, text."""
        self.about = about
        """How it was built: dim, seed, format of the rows, modules, share of the parameters, examples and positions."""
        self._folder = folder
        self._asked: tuple[Point, Glance, dict[str, Any]] | None = None
        """The model and the task that were searched with last, and what they looked like."""
        self.widths = [math.prod(min(side, about["dim"]) for side in shape) for shape in about["modules"].values()]

    @property
    def n_train(self) -> int:
        """The rows that the model was trained on."""
        return self.about.get("n_train", self.about["examples"])

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        return f"Index({len(self)} examples, {len(self.about['modules'])} modules, dim={self.about['dim']})"

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
        return [self._folder.load(f"{ROWS}-{number:04d}") for number in range(self.about["chunks"])]

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

        `raw` is the inner product of the projected gradients: an unbiased estimate of `grad m(query)^T operator grad log
        p(example)`, with None for the gradient dot product. `.top(query, k)` ranks, `.normalised("cosine")` divides by
        the norms of both rows. The operator is usually `curvature.inverse(damping=0.1)` and acts on the queries alone.

        The model is hashed at the first search, and again only where it seems to have changed.

        Raises StaleArtifact or TokenizerMismatch where model or task are not those of the index, UsageError.
        """
        if operator is not None:
            check_operator(operator)
        point = self.check(model, task)
        if batch_tokens is not None:
            point.batch_tokens = valid(Count, batch_tokens, "batch_tokens")
        asked = encode_queries(task, queries, model)
        mapped = self._queries if operator is None else self._queries @ operator
        with multiplying("float32", point.device):
            found = precondition(point, asked, self._sites(point, operator), mapped)
        rows_QD = torch.cat([found.gradients[name].dense().w_BOI.flatten(1) for name in self.about["modules"]], 1).float()
        norms_Q = torch.linalg.vector_norm(rows_QD, dim=1).cpu()
        refuse_infinite(norms_Q)
        raw, norms = self.scan(rows_QD)
        check_scores(raw, self._ids)
        columns = {"measured": found.measured, "norm": norms_Q, "energy": float("nan")}
        about = {
            "operator": "identity" if operator is None else operator.label,
            "projected": self.about["dim"],
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


def open_index(path: str | Path) -> Index:
    """Open a finished index in its folder; StaleArtifact where it is unfinished or damaged."""
    folder = Folder.open(within(path, "index"))
    refuse_other_kind(folder, "dim" in folder.manifest.get("about", {}), "index", "whence index build")
    return Index(folder, folder.read_table(EXAMPLES), folder.manifest["about"])
