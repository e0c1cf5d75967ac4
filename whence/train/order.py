"""Which rows are in which step: decided by the seed before training begins, so that it can be recorded and resumed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from whence.errors import UsageError
from whence.settings import Train


@dataclass(frozen=True)
class Order:
    """`rows` rows in batches of `batch_size`, `accumulation` of which make a step, reshuffled each epoch."""

    rows: int
    batch_size: int
    accumulation: int
    drop_last: bool
    steps: int
    """Of the whole training."""
    seed: int

    @classmethod
    def of(cls, settings: Train, rows: int, seed: int) -> Order:
        """The order for `rows` rows; raises UsageError where a batch is never full."""
        if settings.drop_last and rows < settings.batch_size:
            raise UsageError(
                "Not one batch is full, and incomplete ones are left out.",
                given=f"{rows:,} rows to train on, batch_size={settings.batch_size}, drop_last=True",
                fix=f"batch_size={rows} (--batch-size {rows}), or drop_last=False (--no-drop-last)",
            )
        order = cls(rows, settings.batch_size, settings.gradient_accumulation, settings.drop_last, 0, seed)
        steps = settings.max_steps or math.ceil(settings.epochs * order.steps_per_epoch)
        return cls(rows, settings.batch_size, settings.gradient_accumulation, settings.drop_last, steps, seed)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that the rows make."""
        return self.rows // self.batch_size if self.drop_last else math.ceil(self.rows / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Updates of the weights; the last one of an epoch may have fewer batches."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def epochs(self) -> float:
        """Epochs that the steps make, the last one perhaps in part."""
        return self.steps / self.steps_per_epoch

    def epoch(self, number: int) -> list[int]:
        """Positions of all rows in the order of one epoch."""
        return list(_shuffled(self.rows, self.seed, number))

    def batches(self, number: int) -> list[list[int]]:
        """The batches of one epoch."""
        rows = self.epoch(number)
        return [rows[start * self.batch_size :][: self.batch_size] for start in range(self.batches_per_epoch)]

    def by_step(self) -> Iterator[list[int]]:
        """Positions of the rows of each step, in order."""
        left = self.steps
        for epoch in itertools.count():
            batches = self.batches(epoch)
            for start in range(0, len(batches), self.accumulation):
                if left == 0:
                    return
                left -= 1
                yield [row for batch in batches[start : start + self.accumulation] for row in batch]


@functools.lru_cache(maxsize=2)
def _shuffled(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The same on every machine and for every version of the libraries above torch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())
