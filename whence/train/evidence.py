"""Does a model know its training data at all? Cheap evidence, before anything expensive is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from whence.data.rows import Rows
from whence.engine.partition import batch_positions, run_chunk
from whence.engine.stream import to_device
from whence.errors import EmptyLossError
from whence.tasks.base import Task
from whence.tasks.causal_lm import CausalLM
from whence.tasks.tokens import Tokens

MARGIN = 0.02
"""Share of the loss by which random weights may prefer one order of the tokens."""


@dataclass(frozen=True)
class Evidence:
    """Losses per token, in nats, of rows, and of the same rows with their tokens exchanged."""

    loss: float
    shuffled: float

    @property
    def learnt(self) -> bool:
        """Whether the rows as they are have a lower loss by more than chance."""
        return self.loss < (1 - MARGIN) * self.shuffled


@torch.no_grad()
def evidence_of_training(
    model: nn.Module, task: CausalLM, rows: Rows, *, examples: int = 64, batch_tokens: int = 4096, seed: int = 0
) -> Evidence:
    """Compare the loss of up to `examples` rows with the loss after their tokens in the loss were exchanged among all of them.

    A model that has learnt anything from text prefers the real rows by far; random weights differ by chance.
    It is run as it is: in evaluation mode, if that is how it was loaded.
    """
    step = max(1, len(rows) // examples)
    sample = rows.take(range(0, len(rows), step))[:examples]
    tokens = task.tokenize(sample)
    task.examine(model, tokens, sample.ids)
    items = [item for item in tokens if task.size(item)]
    if not items:
        raise EmptyLossError("No row has a token in the loss.", given=f"{min(len(rows), examples)} rows looked at")
    real = row_losses(model, task, items, batch_tokens)
    exchanged = row_losses(model, task, _exchanged(items, seed), batch_tokens)
    tokens = sum(task.predictions(item) for item in items)
    return Evidence(float(real.sum() / tokens), float(exchanged.sum() / tokens))


def _exchanged(items: Sequence[Tokens], seed: int) -> list[Tokens]:
    """The items with the tokens in the loss redistributed among all of them."""
    pool = np.concatenate([item.ids[item.in_loss] for item in items])
    np.random.default_rng(seed).shuffle(pool)
    dealt, start = [], 0
    for item in items:
        ids, count = item.ids.copy(), int(item.in_loss.sum())
        ids[item.in_loss] = pool[start : start + count]
        dealt.append(replace(item, ids=ids))
        start += count
    return dealt


def row_losses(
    model: nn.Module,
    task: Task,
    items: Sequence[Any],
    batch_tokens: int | None,
    precision: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    advance: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """Each row's loss in nats, float64 `[N]`, of the model as it is; the rows are batched by length."""
    device, losses = next(model.parameters()).device, np.zeros(len(items))

    def run(batches: list[list[int]]) -> None:
        for batch in batches:
            inputs = to_device(task.collate([items[index] for index in batch]), device)
            with precision():
                losses[batch] = task.losses(model, inputs).float().cpu().numpy()
            advance(len(batch))

    positions = batch_positions(batch_tokens, device)
    run_chunk(range(len(items)), [task.size(item) for item in items], positions, run, lambda: None)
    return losses
