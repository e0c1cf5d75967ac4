"""A finished index and its search: the queries' gradients, projected the same way, against every row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.capture import Capture
from whence.coverage import Site, cover
from whence.engine.partition import batch_positions
from whence.engine.stream import read
from whence.errors import StaleArtifact, TokenizerMismatch, UsageError
from whence.indexing.projection import Projection, random_projection
from whence.indexing.queries import project_queries
from whence.indexing.rows import expand
from whence.operators.base import Operator
from whence.precision import multiplying
from whence.progress import stage
from whence.scoring.checks import check_scores
from whence.store.fingerprint import fingerprint
from whence.store.manifest import Folder, differences
from whence.store.memory import Memory
from whence.store.scores import Scores, describe_queries
from whence.tasks.base import Task

if TYPE_CHECKING:
    import pandas

MAPS, EXAMPLES = "query-projection", "examples.parquet"
BLOCK_BYTES = 64 * 2**20
"""Memory for the rows that a search holds at a time."""


def rows_name(number: int) -> str:
    """The shard with the rows of a chunk."""
    return f"rows-{number:04d}"


class Index:
    """Projected gradients of all training examples, read block by block from where they lie."""

    def __init__(self, folder: Folder | Memory, examples: pandas.DataFrame, about: dict[str, Any]):
        self.examples = examples
        """One row per training example: id, source, copies, tokens, text."""
        self.about = about
        """How it was built: dim, seed, format of the rows, modules, share of the parameters, examples and positions."""
        self._folder = folder
        self._widths = [math.prod(min(side, about["dim"]) for side in shape) for shape in about["modules"].values()]

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

        Shards are memory-mapped. Examples that have no loss have no row.
        """
        for number in range(self.about["chunks"]):
            shard = self._folder.load(rows_name(number))
            step = max(1, BLOCK_BYTES // (like.element_size() * shard["codes"].shape[1]))
            for start in range(0, len(shard["indices"]), step):
                part = {key: tensor[start : start + step] for key, tensor in shard.items()}
                yield part["indices"], expand(part["codes"], part["scale"], self._widths, like), part["norm"]

    def search(
        self, model: nn.Module, task: Task, queries: Any, operator: Operator | None = None, *, batch_tokens: int | None = None
    ) -> Scores:
        """Estimate what `whence.score(model, task, queries, data, operator)` gives, without a pass over the data.

        `raw` is the inner product of the projected gradients: an unbiased estimate of `grad m(query)^T operator grad log
        p(example)`, with None for the gradient dot product. `.top(query, k)` ranks, `.normalised("cosine")` divides by
        the norms of both rows. The operator is usually `curvature.inverse(damping=0.1)` and acts on the queries alone.

        Raises StaleArtifact or TokenizerMismatch where model or task are not those of the index, UsageError.
        """
        self.check(model, task)
        rows = read(queries)
        if not len(rows):
            raise UsageError("There are no queries", accepted="one query or more")
        weighted = task.encode_queries(rows)
        like = torch.empty(0, dtype=torch.float32, device=next(model.parameters()).device)
        sites = self._sites(model, operator)
        total = sum(task.size(item) for query in weighted for item, _ in query)
        with (
            multiplying("float32", like.device),
            Capture(model, sites) as capture,
            stage("queries", total, "tokens") as advance,
        ):
            rows_QD, measured = project_queries(
                capture,
                task,
                weighted,
                self._query_projection(),
                operator.to(like) if operator else None,
                like=like,
                batch_tokens=batch_positions(batch_tokens, like.device),
                advance=advance,
            )
        raw, norms = self._scan(rows_QD)
        check_scores(raw, list(self.examples["id"]))
        return self._scores(raw, norms, rows_QD, measured, describe_queries(rows, task, weighted), task, operator)

    def check(self, model: nn.Module, task: Task) -> None:
        """Raise StaleArtifact unless this was built from `model`, TokenizerMismatch unless `task` reads text as then."""
        if not self.provenance:
            return
        if changes := differences({"model": self.provenance["model"]}, {"model": fingerprint(model)}):
            raise StaleArtifact(
                "The index was built from another model.",
                given=("\n" + " " * 11).join(changes),
                accepted="the model that it was built from, in the same number format",
                fix="build an index of this model",
            )
        then, now = self.provenance["task"], task.settings()
        if changes := [key for key in ("tokenizer", "chat_template") if then.get(key) != now.get(key)]:
            raise TokenizerMismatch(
                f"The index was built from text read with another {' and '.join(changes).replace('_', ' ')}.",
                accepted="the tokenizer and chat template that the model was trained with, for index and queries alike",
                fix="give the task of the index, or build it again",
            )

    def _sites(self, model: nn.Module, operator: Operator | None) -> dict[str, Site]:
        """The modules of the index in the model, on all of which the operator must act."""
        shapes = {name: tuple(shape) for name, shape in self.about["modules"].items()}
        sites = cover(model, list(shapes)).sites
        if {name: site.shape for name, site in sites.items()} != shapes:
            raise StaleArtifact("The index was built from a model with other modules.", given=", ".join(list(shapes)[:5]))
        if operator is not None and (missing := shapes.keys() - set(operator.names)):
            raise UsageError(
                "The operator does not act on all modules of the index",
                given=", ".join(sorted(missing)[:5]),
                fix="build the index of the modules that the curvature was fitted on (curvature=...)",
            )
        return sites

    def _query_projection(self) -> Projection:
        if self._folder.has(MAPS):
            maps = self._folder.load(MAPS)
            sides = ({name: maps[f"{side}/{name}"] for name in self.about["modules"]} for side in ("out", "into"))
            return Projection(*sides)
        shapes = {name: (n_out, n_in) for name, (n_out, n_in) in self.about["modules"].items()}
        return random_projection(shapes, self.about["dim"], self.about["seed"])

    def _scan(self, rows_QD: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Inner products with every row, `[Q, N]`, and the rows' norms `[N]`; zero for examples without a loss."""
        raw, norms = np.zeros((len(rows_QD), len(self)), dtype=np.float32), np.zeros(len(self), dtype=np.float32)
        for indices, rows_nD, norm in self.blocks(rows_QD):
            raw[:, indices.numpy()] = (rows_QD @ rows_nD.T).cpu().numpy()
            norms[indices.numpy()] = norm.numpy()
        return raw, norms

    def _scores(
        self,
        raw: np.ndarray,
        norms: np.ndarray,
        rows_QD: Tensor,
        measured: Tensor,
        asked: dict[str, list[Any]],
        task: Task,
        operator: Operator | None,
    ) -> Scores:
        import pandas

        measurement = task.settings().get("measurement", "logprob")
        about = {
            "unit": "nats per copy" if measurement in ("logprob", "loss") else f"{measurement} per copy",
            "measurement": measurement,
            "operator": "identity" if operator is None else operator.label,
            "projected": self.about["dim"],
            "modules": len(self.about["modules"]),
        }
        columns = {**asked, "measured": measured, "norm": rows_QD.norm(dim=1).cpu(), "energy": float("nan")}
        return Scores(
            raw=raw,
            n_train=self.about["examples"],
            examples=self.examples,
            queries=pandas.DataFrame(columns),
            about=about,
            norms={"gradient": norms},
        )


def open_index(path: str | Path) -> Index:
    """Open a finished index in its folder; StaleArtifact where it is unfinished or damaged."""
    import pandas

    folder = Folder.open(path)
    return Index(folder, pandas.read_parquet(folder.path / EXAMPLES), folder.manifest["about"])
