"""What there is to do: how many examples of which lengths, and the batches that they go through the model in."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from whence.data.batches import plan_batches
from whence.engine.partition import data_chunks
from whence.engine.stream import Examples, encode, read
from whence.fitting.fit import FitSettings, draw_samples
from whence.tasks.base import Task

TOKENISED = 20_000
"""Rows that are tokenised to learn the lengths; of longer data, a sample."""


@dataclass(frozen=True)
class Data:
    """The examples that were tokenised, and how many there are of the data for each of them."""

    examples: Examples
    total: int

    @property
    def scale(self) -> float:
        """Examples of the data per example that was tokenised."""
        return self.total / len(self.examples)

    @property
    def usable(self) -> int:
        """Examples that have a loss."""
        return round(len(self.examples.usable) * self.scale)

    @property
    def tokens(self) -> int:
        """Positions of the whole data."""
        return round(sum(self.examples.sizes) * self.scale)


@dataclass(frozen=True)
class Pass:
    """One pass over `examples` examples: how often a batch of (examples, positions of the longest) comes up."""

    examples: int
    batches: dict[tuple[int, int], float]
    longest: int
    """Index of an example as long as the longest of the largest batch."""

    @property
    def largest(self) -> tuple[int, int]:
        """The batch of the most positions: its examples, and the length of its longest."""
        return max(self.batches, key=lambda batch: (batch[0] * batch[1], batch[1]))


def read_data(task: Task, data: Any) -> Data:
    """Tokenise the data, or a sample of it where it is long."""
    rows = read(data)
    if len(rows) <= TOKENISED:
        return Data(encode(task, rows), len(rows))
    chosen = sorted(random.Random(0).sample(range(len(rows)), TOKENISED))
    return Data(encode(task, [rows[index] for index in chosen]), len(rows))


@dataclass(frozen=True)
class Sample:
    """Examples of the data, by the indices of those tokenised that stand for `size` of them."""

    indices: Sequence[int]
    size: int


def samples(data: Data, settings: FitSettings, widest: int) -> tuple[Sample, Sample]:
    """The examples of the pass for the covariances and of that for the eigenvalues, as `fit` draws them."""
    if data.scale == 1:
        first, second = draw_samples(data.examples, settings, widest)
        return Sample(first, len(first) * settings.draws), Sample(second, len(second) * settings.draws)
    count, usable = data.usable, data.examples.usable
    sizes = [data.examples.sizes[index] for index in random.Random(0).choices(usable, k=count)]
    stand_in = Examples(range(count), tuple(map(str, range(count))), range(count), tuple(sizes), "")
    first, second = draw_samples(stand_in, settings, widest)
    return _stand_for(data, len(first) * settings.draws), _stand_for(data, len(second) * settings.draws)


def everything(data: Data) -> Sample:
    """All examples that have a loss."""
    return Sample(data.examples.usable, data.usable)


def _stand_for(data: Data, size: int) -> Sample:
    usable = data.examples.usable
    return Sample(usable if size >= len(usable) else sorted(random.Random(0).sample(usable, size)), size)


def one_pass(data: Data, sample: Sample, batch_tokens: int, chunks: int) -> Pass:
    """The batches of a pass over the sample."""
    sizes, scale = data.examples.sizes, sample.size / len(sample.indices)
    batches: Counter[tuple[int, int]] = Counter()
    index_of: dict[tuple[int, int], int] = {}
    for chunk in data_chunks(sample.indices, sizes, max(1, round(chunks / scale))):
        for batch in plan_batches([sizes[index] for index in chunk], batch_tokens):
            shape = (len(batch), sizes[chunk[batch[0]]])
            batches[shape] += 1
            index_of[shape] = chunk[batch[0]]
    made = Pass(sample.size, {shape: count * scale for shape, count in batches.items()}, 0)
    return replace(made, longest=index_of[made.largest])


def twice_the_largest(data: Data, planned: Pass) -> tuple[list[Any], int]:
    """Rows that make the pass's largest batch, two times over if there is more than one batch, and their `batch_tokens`."""
    count, length = planned.largest
    times = 2 if sum(planned.batches.values()) > 1 else 1
    return [data.examples.rows[planned.longest]] * (times * count), count * length


def sample_queries(data: Data, count: int) -> list[Any]:
    """Stand-ins for queries that nobody has yet: rows of the data of middling length, asked about as a whole."""
    order = sorted(data.examples.usable, key=lambda index: data.examples.sizes[index])
    row = data.examples.rows[order[len(order) // 2]]
    if isinstance(row, dict) and set(row) >= {"text"} and "completion" not in row:
        row = {"prompt": "", "completion": row["text"]}
    return [row] * count


def query_sizes(task: Task, weighted: Sequence[Sequence[tuple[Any, float]]]) -> list[int]:
    """Positions of each query."""
    return [sum(task.size(item) for item, _ in query) for query in weighted]


def batches_of(sizes: Sequence[int], batch_tokens: int) -> dict[tuple[int, int], float]:
    """Batches of examples of these sizes, counted by shape."""
    made = plan_batches(sizes, batch_tokens)
    return dict(Counter((len(batch), math.ceil(sizes[batch[0]])) for batch in made))
