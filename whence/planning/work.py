"""What there is to do: how many examples of which lengths, and the batches that they go through the model in."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whence.data.batches import plan_batches
from whence.engine.partition import data_chunks
from whence.engine.stream import Examples, encode, read
from whence.errors import UsageError
from whence.fitting.fit import draw_samples
from whence.settings import Fit
from whence.store.scores import row_text
from whence.tasks.base import Task

TRIED = 20
"""Rows tried as stand-ins for queries."""

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


Shape = tuple[int, int]
"""Of a batch: its examples, and the positions of the longest."""


@dataclass(frozen=True)
class Pass:
    """One pass over `examples` examples: how often a batch of each shape comes up, and a row as long as its longest."""

    examples: int
    batches: Mapping[Shape, float]
    row_of: Mapping[Shape, Any]
    roughly: bool = False
    """Whether seconds may follow from the largest batch alone."""

    @property
    def largest(self) -> Shape:
        """The batch of the most positions."""
        return max(self.batches, key=lambda shape: (shape[0] * shape[1], shape[1]))

    @property
    def rehearsed(self) -> tuple[Shape, ...]:
        """The batches from which the whole pass follows: the largest and, where not all are as long, a second (not roughly).

        What an example takes has parts that are constant, linear and (attention) quadratic in its length `t`. Summed over
        all examples, the line through two lengths `s` and `u` is right about the first two. The last it misses by
        `E[t^2] - (s + u) E[t] + s u`: `u` is chosen to make that 0 (Gauss-Radau quadrature), or as small as can be.
        """
        if self.roughly:
            return (self.largest,)
        length = self.largest[1]
        mean, square = self._mean(1), self._mean(2)
        others = [shape for shape in self.batches if shape[1] != length]
        second = sorted(others, key=lambda shape: abs(square - (length + shape[1]) * mean + length * shape[1]))
        return self.largest, *second[:1]

    def rows_of(self, shape: Shape) -> list[Any]:
        """Rows that make a batch of this shape; of the largest, on which memory depends, two batches if there are two."""
        twice = shape == self.largest and sum(self.batches.values()) > 1
        return [self.row_of[shape]] * (shape[0] * (2 if twice else 1))

    def total(self, each: Mapping[int, float]) -> float:
        """A sum over all examples, from what an example takes of one length (then in proportion) or of two."""
        mean, ((first, taken), *second) = self._mean(1), each.items()
        for other, less in second:
            return self.examples * (taken + (less - taken) * (mean - first) / (other - first))
        return self.examples * taken * mean / first

    def _mean(self, power: int) -> float:
        """The mean over the examples of a power of their length, with what fills up their batches."""
        return sum(often * count * length**power for (count, length), often in self.batches.items()) / self.examples


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


def samples(data: Data, settings: Fit, widest: int) -> tuple[Sample, Sample]:
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


def one_pass(data: Data, sample: Sample, batch_tokens: int, chunks: int, roughly: bool = False) -> Pass:
    """The batches of a pass over the sample."""
    sizes, scale = data.examples.sizes, sample.size / len(sample.indices)
    batches: Counter[Shape] = Counter()
    row_of: dict[Shape, Any] = {}
    for chunk in data_chunks(sample.indices, sizes, max(1, round(chunks / scale))):
        for batch in plan_batches([sizes[index] for index in chunk], batch_tokens):
            longest = chunk[batch[0]]
            batches[shape := (len(batch), sizes[longest])] += 1
            row_of[shape] = data.examples.rows[longest]
    return Pass(sample.size, {shape: count * scale for shape, count in batches.items()}, row_of, roughly)


def sample_queries(task: Task, data: Data, count: int) -> list[Any]:
    """Stand-ins for queries that don't exist yet: rows of the data of middling length, asked about as a whole.

    Where the middling ones would be refused as queries, since their end is cut off, the beginning of one stands in.
    """
    order = sorted(data.examples.usable, key=lambda index: data.examples.sizes[index])
    middle = len(order) // 2
    nearest = sorted(range(len(order)), key=lambda place: abs(place - middle))[:TRIED]
    for row in (_as_query(data.examples.rows[order[place]]) for place in nearest):
        with contextlib.suppress(UsageError):
            task.encode_queries([row])
            return [row] * count
    text = row_text(data.examples.rows[order[middle]])
    return [{"prompt": "", "completion": text[: getattr(task, "max_length", len(text)) // 2]}] * count


def _as_query(row: Any) -> Any:
    """A text is asked about as a completion of nothing."""
    text = isinstance(row, dict) and "text" in row and "completion" not in row
    return {"prompt": "", "completion": row["text"]} if text else row
