"""What an index of landmarks will take, as `whence index build` makes it: answers, gradients of questions, codes of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whence.coverage import Site
from whence.engine.passes import ByChunk
from whence.engine.point import Point
from whence.engine.queries import encode_queries, precondition
from whence.generation import ANSWER_TOKENS, OWN_QUESTIONS, can_answer, prompts_like
from whence.gradients import Dense, Factored, Gradient
from whence.indexing.build import Layout, code_rows, landmark_questions, layout, most_questions
from whence.indexing.directions import HELD_OUT_KEPT, KEPT, Directions, Whitened, numbers, settled, settled_held_out
from whence.indexing.index import DEPTHS, ROWS
from whence.linalg.project import Sparse, place_dtype
from whence.operators import BlockDiagonal
from whence.planning import files
from whence.planning.work import Data
from whence.precision import Products, multiplying
from whence.progress import stage
from whence.settings import Generate, Index
from whence.store.memory import Memory
from whence.store.scores import row_text
from whence.tasks.base import Task
from whence.tasks.questions import with_answer

BATCH = Generate().batch_size

MEASURED_BYTES = 7 * 8
"""Of each row and question held out, while recall is measured: seven matrices of numbers in float64."""


@dataclass(frozen=True)
class Landmarks:
    """The landmarks of an index: how many there will be, of what size."""

    settings: Index
    sites: Mapping[str, Site]
    asked: Data
    """The questions, with stand-ins for the answers of the model."""
    prompts: int
    """How many of them the model answers first."""

    @classmethod
    def of(cls, model: nn.Module, task: Task, data: Data, settings: Index, sites: Mapping[str, Site]) -> Landmarks:
        """Those of these rows."""
        rows = [data.examples.rows[place] for place in data.examples.usable]
        own = _own_questions(task, rows) if can_answer(model, task) else []
        asked = encode_queries(task, landmark_questions(task, rows, own, most_questions(settings), settings.seed))
        return cls(settings, sites, Data(asked, len(asked)), len(own))

    @functools.cached_property
    def layout(self) -> Layout:
        """What a row's codes are made of."""
        return layout(self.settings, self.asked.total, self.sites)

    @functools.cached_property
    def rank(self) -> int | None:
        """Of the landmarks' gradients; None for all of them."""
        return settled(self.settings.rank, self.layout.landmarks, self.sites)

    @functools.cached_property
    def held_out_rank(self) -> int | None:
        """Of the gradients of questions held out; None for all of them."""
        return settled_held_out(self.settings.rank, self.layout.held_out, self.sites)

    def __str__(self) -> str:
        size, low = int(1024 * self.settings.bytes), f" at rank {self.rank}" if self.rank else ""
        held_out = f"; {self.layout.held_out} questions held out at rank {self.held_out_rank}" if self.held_out_rank else ""
        return f"{size:,} bytes a row: {self.layout.landmarks:,} landmarks{low}, {self.layout.signs:,} signs{held_out}"

    @property
    def question_bytes(self) -> int:
        """Bytes of the gradients of a landmark."""
        return numbers(self.sites, self.rank) * KEPT.itemsize

    @property
    def questions_bytes(self) -> int:
        """Bytes of the gradients of all questions."""
        return self.layout.questions_bytes(self.settings.rank, self.sites)

    def disk(self, data: Data) -> int:
        """Bytes of the folder."""
        places = self.layout.held_out * min(DEPTHS[-1], data.usable) * (2 + len(str(data.usable)))
        names = files.PER_MODULE * len(self.sites) // 2
        rows = data.usable * self.layout.row_bytes + files.of_texts(data)
        return rows + self.questions_bytes + places + files.MANIFESTS + names

    def measuring_bytes(self, rows: int) -> int:
        """Bytes held when recall is measured, beside the directions: all rows, and what scans say of them."""
        return rows * (self.layout.row_bytes + MEASURED_BYTES * self.layout.held_out)

    @property
    def answer_steps(self) -> int:
        """How often the model says one more token of a batch of answers."""
        return math.ceil(self.prompts / BATCH) * ANSWER_TOKENS

    def answer(self, model: nn.Module) -> None:
        """Rehearse such a step, as stage "questions"."""
        with stage("questions", BATCH), torch.no_grad():
            model(input_ids=torch.zeros(BATCH, 1, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)

    def ask(self, model: nn.Module, task: Task, questions: Sequence[Any], operator: BlockDiagonal, batch_tokens: int) -> None:
        """Rehearse the gradients of some questions, as stage "landmarks"."""
        point, asked = Point(model, task, batch_tokens=batch_tokens), encode_queries(task, questions)
        with multiplying("float32", point.device):
            sites = point.cover(list(self.sites)).sites  # of the model that is rehearsed with
            precondition(point, asked, sites, Whitened(operator), rank=self.rank, kept=KEPT, name="landmarks")

    def code(
        self, model: nn.Module, task: Task, rows: Sequence[Any], operator: BlockDiagonal, batch_tokens: int, products: Products
    ) -> None:
        """Rehearse what the landmarks are to one another, as stage "gram", and a pass over some rows, as stage "index"."""
        point = Point(model, task, rows, batch_tokens=batch_tokens)
        directions = self._blank()
        with multiplying("float32", point.device), stage("gram", 1):
            _ = directions.inverse_JJ, directions.sketched
        saved = ByChunk([range(len(rows))], Memory(), ROWS)
        with multiplying(products, point.device):
            code_rows(saved, point, point.cover(list(self.sites)).sites, directions, operator)

    def _blank(self) -> Directions:
        """The questions' gradients as they are read from the folder, without numbers."""
        landmarks, signs, held_out = self.layout

        def blank(count: int, rank: int | None, kept: torch.dtype) -> dict[str, Gradient]:
            parts = {n: [torch.empty(count, *each, dtype=kept) for each in _shapes(s, rank)] for n, s in self.sites.items()}
            return {name: Dense(*each) if len(each) == 1 else Factored(*each) for name, each in parts.items()}

        spared = blank(held_out, self.held_out_rank, HELD_OUT_KEPT) if held_out else {}
        return Directions(blank(landmarks, self.rank, KEPT), spared, signs, 0, _blank_sparse)


def _shapes(site: Site, rank: int | None) -> list[tuple[int, int]]:
    """Of the matrices that a question's gradient is kept as."""
    n_out, n_in = site.shape
    if rank is None or rank * (n_out + n_in) >= n_out * n_in:
        return [(n_out, n_in)]
    return [(rank, n_out), (rank, n_in)]


def _blank_sparse(width: int, dim: int, key: str) -> Sparse:
    """One whose numbers are not drawn: that would take longer than all else rehearsed."""
    padded = -(-width // dim) * dim
    return Sparse(torch.empty(1, padded, dtype=place_dtype(padded)), torch.empty(1, padded, dtype=torch.int8), dim)


def _own_questions(task: Any, rows: Sequence[Any]) -> list[Any]:
    """Prompts that the model will answer, with as many tokens of a row instead."""
    tokens = task.tokenizer(row_text(rows[len(rows) // 2]), add_special_tokens=False)["input_ids"][:ANSWER_TOKENS]
    answer = " " + task.tokenizer.decode(tokens).strip()
    return [with_answer(prompt, answer) for prompt in prompts_like(rows, OWN_QUESTIONS)]
