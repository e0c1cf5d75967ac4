"""whence itself, and the floor that nothing can be faster than."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import whence
from benchmarks.peers import DAMPING, PROJECTION
from benchmarks.workloads import WORKLOADS, Workload, load, text
from whence.data.batches import plan_batches
from whence.engine.partition import batch_positions
from whence.engine.point import Point
from whence.engine.queries import encode_queries, precondition
from whence.operators.base import Operator
from whence.planning.rehearsal import Rehearsal
from whence.tasks.tokens import Tokens

EXACT: dict[str, Any] = {
    "method": "ekfac",
    "labels": "data",
    "examples": "all",
    "disjoint": False,
    "precision": whence.Precision(products="float32"),
}
"""What the peers do too: all data in both passes, the data's own labels, float32, nothing saved on the way."""


class Whence:
    """The public functions on token ids."""

    cannot = {} if hasattr(whence, "build_index") else {"index": "whence.build_index is not there yet"}

    def __init__(self, workload: Workload, folder: Path, out: Path):
        from transformers import AutoTokenizer

        self.workload, self.out = workload, out
        self.model = load(folder)
        self.task = TokenIds(AutoTokenizer.from_pretrained(folder), max_length=workload.length)
        self.train, self.queries = ([{"input_ids": row} for row in workload.sequences(part)] for part in ("train", "queries"))

    def run(self, phase: str) -> np.ndarray | None:
        return {
            "fit": self.fit,
            "query": self.query,
            "score": self.score,
            "self": self.self_influence,
            "index": self.index,
            "floor": self.floor,
        }[phase]()

    def fit(self) -> None:
        whence.fit(self.model, self.task, self.train, modules=self.workload.modules, out=self.out / "fit", **EXACT)

    def query(self) -> None:
        preconditioned(self.model, self.task, self.queries, self._operator())

    def score(self) -> np.ndarray:
        given = (self.model, self.task, self.queries, self.train, self._operator())
        return whence.score(*given, precision=EXACT["precision"], out=self.out / "score").raw

    def self_influence(self) -> np.ndarray:
        given = (self.model, self.task, self.train, self._operator())
        return whence.self_influence(*given, precision=EXACT["precision"], out=self.out / "self").raw[0]

    def index(self) -> None:
        modules, out = self.workload.modules, self.out / "index"
        whence.build_index(self.model, self.task, self.train, dim=PROJECTION, modules=modules, chunks=1, out=out)  # pyright: ignore

    def flops(self, phase: str) -> float:
        """What a phase multiplies, counted without numbers; eigendecompositions twice: float64 runs at half the rate."""
        train, to = self.train, {"precision": EXACT["precision"]}
        rehearsal, operator = self._rehearsed
        phases: dict[str, Callable[[Any, Any], Any]] = {
            "fit": lambda model, task: whence.fit(model, task, train, modules=self.workload.modules, **EXACT),
            "floor": lambda model, task: self.floor(model),
            "query": lambda model, task: preconditioned(model, task, self.queries, operator),
            "score": lambda model, task: whence.score(model, task, self.queries, train, operator, **to),
            "self": lambda model, task: whence.self_influence(model, task, train, operator, **to),
            "index": lambda model, task: whence.build_index(  # pyright: ignore
                model, task, train, dim=PROJECTION, modules=self.workload.modules, chunks=1, **to
            ),
        }
        if phase not in phases:
            return 0.0
        before = rehearsal.live.flops
        stages, _ = rehearsal.run(phases[phase], last="score")  # what comes after looks at the scores
        solved = stages["eigenvectors"].flops if "eigenvectors" in stages else 0.0
        return rehearsal.live.flops - before + solved

    @functools.cached_property
    def _rehearsed(self) -> tuple[Rehearsal, Operator]:
        """A model without numbers, and an operator that was fitted with it."""
        rehearsal = Rehearsal(self.model, self.task, "cpu")
        few = {**EXACT, "modules": self.workload.modules}
        _, operator = rehearsal.run(lambda model, task: whence.fit(model, task, self.train[:2], **few).inverse(DAMPING))
        assert operator is not None
        return rehearsal, operator

    def floor(self, model: Any = None) -> None:
        """Forward, and backward without any weight's gradient."""
        model = model or self.model
        model.requires_grad_(False)
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
        rows = [torch.as_tensor(row["input_ids"]) for row in self.train]
        for indices in plan_batches([len(row) - 1 for row in rows], batch_positions(None, model.device)):
            chosen = [rows[index] for index in indices]
            inputs = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in chosen], batch_first=True)
            labels = torch.nn.utils.rnn.pad_sequence([row[1:] for row in chosen], batch_first=True, padding_value=-100)
            logits = model(input_ids=inputs, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
        hook.remove()

    def _operator(self) -> Operator:
        return whence.open_factors(self.out / "fit").inverse(damping=DAMPING)


class TokenIds(whence.CausalLM):
    """Language modelling on rows that are token ids already."""

    def tokenize(self, rows: Sequence[Any]) -> list[Tokens]:
        return [self._tokens(row["input_ids"]) for row in rows]

    def encode(self, rows: Sequence[Any]) -> list[Tokens]:
        return self.tokenize(rows)

    def encode_queries(self, rows: Sequence[Any]) -> list[list[tuple[Tokens, float]]]:
        return [[(tokens, 1.0)] for tokens in self.tokenize(rows)]

    def _tokens(self, ids: np.ndarray) -> Tokens:
        count = len(ids)
        return Tokens(ids, np.arange(count) > 0, np.zeros(count, np.int32), text="", length=count, needed=count)


def preconditioned(model: Any, task: whence.Task, queries: Sequence[Any], operator: Operator) -> Any:
    """The query side of a scoring run alone: `whence.score` does the same before it looks at the training data."""
    point = Point(model, task)
    return precondition(point, encode_queries(task, queries), point.cover(list(operator.names)).sites, operator)


def first_score(folder: Path, out: Path, workload: Workload) -> np.ndarray:
    """The shortest way from a model and data to scores `[Q, N]`, with nothing set but the labels.

    These say what is asked, not how it is computed: with labels drawn from the model the scores would be others.
    """
    model, tokenizer = whence.load_model(str(folder))
    train, queries = ([{"text": text(row)} for row in workload.sequences(part)] for part in ("train", "queries"))
    task = whence.CausalLM(tokenizer)
    curvature = whence.fit(model, task, train, labels="data")
    return whence.score(model, task, queries, train, curvature.inverse()).raw


if __name__ == "__main__":
    print("imported", time.process_time(), flush=True)
    scores = first_score(Path(sys.argv[1]), Path(sys.argv[2]), WORKLOADS[sys.argv[3]])
    print("scored", time.process_time(), scores[0, 0], flush=True)
    np.save(sys.argv[4], scores)
