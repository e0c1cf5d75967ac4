"""A small deterministic trainer: the same model, rows and settings give the same weights, bit for bit.

For models that fit on a CPU and train in seconds. Larger ones are fine-tuned with the Hugging Face Trainer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from whence.engine.stream import encode, to_device
from whence.progress import stage
from whence.tasks.base import Task
from whence.tasks.forward import in_mode


@dataclass(frozen=True)
class Training:
    """Settings of AdamW with a linear warm-up and a cosine decay to zero."""

    epochs: int = 20
    batch_size: int = 32
    """Rows per step."""
    learning_rate: float = 3e-3
    """At the end of the warm-up."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.1
    """Of matrices; vectors (biases, norms) are not decayed."""
    seed: int = 0
    """Of the order of the rows."""


def train(
    model: nn.Module,
    task: Task,
    data: Any,
    training: Training = Training(),
    *,
    copies: Mapping[int, float] | None = None,
    name: str = "train",
) -> list[float]:
    """Train `model` in place on the rows of `data`; returns each epoch's mean loss in nats per row.

    `copies` counts the loss of some rows other than once: 2 for one more copy, 0 for none. The order of the rows, what
    stands in which batch and the number of steps stay as they are. `name` is what progress calls it.

    The objective is the one whose influence is measured: the mean over rows of a row's summed loss. Tensors on the CPU
    are computed by one thread, because sums over several differ with the number of cores.
    """
    examples = encode(task, data, model)
    items = [examples.items[index] for index in examples.usable]
    counts = torch.tensor([(copies or {}).get(index, 1.0) for index in examples.usable])
    sizes = [task.size(item) for item in items]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(training.seed)
    steps = training.epochs * math.ceil(len(items) / training.batch_size)
    matrices, vectors = ([p for p in model.parameters() if p.requires_grad and (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)
    schedule = LambdaLR(optimizer, lambda step: warm_cosine(step / steps, training.warmup))
    epochs = []
    with in_mode(model, training=True), one_thread(), stage(name, training.epochs, unit="epochs") as advance:
        for _ in range(training.epochs):
            total = 0.0
            for batch in shuffled_batches(sizes, training.batch_size, generator):
                losses = task.losses(model, to_device(task.collate([items[index] for index in batch]), device))
                losses = losses * counts[batch].to(losses)
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                schedule.step()
                total += losses.sum().item()
            epochs.append(total / len(items))
            advance(1)
    return epochs


def warm_cosine(progress: float, warmup: float) -> float:
    """Share of the full learning rate after a share `progress` of the steps: up linearly, down along a cosine."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def shuffled_batches(sizes: Sequence[int], batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Batches of indices in random order, each of items of like size, so that hardly anything is padded."""
    order = torch.randperm(len(sizes), generator=generator).tolist()
    order.sort(key=lambda index: sizes[index])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums over several differ with the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
