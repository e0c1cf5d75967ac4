"""The one loop over examples: collate, forward, backward, and every gradient to a sink while the backward pass runs."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from whence.capture import Capture
from whence.data import Rows, as_rows, content_id
from whence.data.containers import sequence_of
from whence.data.rows import numbered
from whence.errors import NumericalError, UsageError
from whence.gradients import Gradient
from whence.tasks.base import Batch, Task

Owner = Callable[[str], int | None]
"""The process that keeps what has that name; None for all of them."""


def everybody(name: str) -> None:
    """All processes keep it."""


Objective = Callable[[nn.Module, Batch, Sequence[int]], Tensor]
"""One number per example of the batch, `[B]`, whose sum's gradients are streamed; the integers are the examples' indices."""


class Sink:
    """Receives the gradients of one batch after the other, and holds what becomes of them.

    `state` and `load` take that out and put it back, `merge` brings together what several processes hold
    (`whence.engine.passes` calls all three). The default ignores everything.
    """

    inputs: Mapping[str, Tensor] = {}
    """Matrices that `Capture` multiplies the sites' inputs with on the way forward, so that only the products need be kept."""

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """A batch of the examples `indices` comes."""

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """The site `name` has its gradients; `readers` are the sites that read the same input."""

    def end(self) -> None:
        """The batch is complete."""

    def state(self, rows: Collection[int] | None = None) -> dict[str, Tensor]:
        """What it holds; of sinks that file something for each example, only that of these examples."""
        return {}

    def load(self, state: Mapping[str, Tensor], owner: Owner = everybody) -> None:
        """Go back to a state; an empty one is the beginning."""

    def merge(self, owner: Owner = everybody) -> None:
        """Of several processes: hand each part to the process that `owner` gives it to (None: to all)."""


@dataclass(frozen=True)
class Examples:
    """Encoded examples with stable ids; `rows` are what they were made from, `sizes` their positions (0: no loss)."""

    items: Sequence[Any]
    ids: tuple[str, ...]
    rows: Sequence[Any]
    sizes: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def usable(self) -> list[int]:
        """Indices of the examples that have a loss; the others have no gradient."""
        return [index for index, size in enumerate(self.sizes) if size]

    def some_usable(self) -> list[int]:
        """The same. Raises UsageError where there are none."""
        if not self.usable:
            raise UsageError("No example has anything in the loss", given=f"{len(self)} examples", code=6)
        return self.usable

    def items_of(self, batch: Sequence[int]) -> Sequence[int]:
        """The places in `items` of these examples: their own."""
        return batch

    def take(self, indices: Sequence[int]) -> Examples:
        """Some of the examples, in this order."""
        rows = self.rows.take(indices) if isinstance(self.rows, Rows) else [self.rows[index] for index in indices]
        ids, sizes = tuple(self.ids[index] for index in indices), tuple(self.sizes[index] for index in indices)
        fingerprint = hashlib.blake2b("\n".join([self.fingerprint, *ids]).encode(), digest_size=16).hexdigest()
        return Examples([self.items[index] for index in indices], ids, rows, sizes, fingerprint)

    def repeated(self, times: int) -> Examples:
        """All examples so many times, one after the other; each time other labels are drawn for them."""
        ids = self.ids + tuple(f"{name}@{number}" for number in range(2, times + 1) for name in self.ids)
        return replace(self, items=[*self.items] * times, ids=ids, sizes=self.sizes * times) if times > 1 else self


def encode(task: Task, data: Any, model: nn.Module | None = None) -> Examples:
    """Read, encode and name the examples of `data`: rows of text, a path, or any sequence of tensors.

    With the `model` that they are for, the task sees whether they suit it.
    """
    rows = read(data)
    ids, fingerprint = identify(rows)
    if not len(rows):
        raise UsageError("The data has no examples", given=repr(data)[:80], accepted="one example or more")
    items = task.encode(rows)
    if model is not None:
        task.examine(model, items, ids)
    return Examples(items, ids, rows, sizes_of(task, items), fingerprint)


def sizes_of(task: Task, items: Sequence[Any]) -> tuple[int, ...]:
    """Positions of each item; raises UsageError where the task gives something else than whole numbers from 0."""
    sizes = tuple(task.size(item) for item in items)
    for number, size in enumerate(sizes):
        if not hasattr(size, "__index__") or int(size) < 0:
            raise UsageError(
                f"{type(task).__name__}.size(item) must give the number of an item's positions",
                given=f"{size!r} for item {number}",
                accepted="an integer from 0 (0: the item has no loss)",
            )
    return tuple(map(operator.index, sizes))


def identify(rows: Sequence[Any]) -> tuple[tuple[str, ...], str]:
    """An id of each row that stays the same wherever it stands, and one fingerprint of all rows in their order."""
    if isinstance(rows, Rows):
        return rows.ids, rows.fingerprint
    ids = tuple(numbered(content_id(row) for row in rows))
    return ids, hashlib.blake2b("\n".join(ids).encode(), digest_size=16).hexdigest()


def read(data: Any) -> Sequence[Any]:
    """Rows of text where the data is text (or where it lies), else the sequence itself."""
    if isinstance(data, Rows | str | Path):
        return as_rows(data)
    data = sequence_of(data)
    first = data[0] if len(data) else None
    is_text = isinstance(first, str) or (
        isinstance(first, Mapping) and any(isinstance(value, str | list) for value in first.values())
    )
    return as_rows(data) if is_text else data


def draws(task: Task, item: Any, identity: str, seed: str) -> Tensor:
    """Uniform numbers that decide the item's drawn labels: a function of the example and the seed, not of the batch."""
    key = hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(np.asarray(generator.random(task.noise_shape(item))))


def likelihood(task: Task, examples: Examples) -> Objective:
    """The log-likelihood of each example's own labels, in nats: what training raises."""
    return lambda model, batch, indices: -one_for_each(task.losses(model, batch), len(indices), task)


def drawn_likelihood(task: Task, examples: Examples, seed: str) -> Objective:
    """The log-likelihood of labels drawn from the model, whose gradients' covariance is the true Fisher matrix."""

    def objective(model: nn.Module, batch: Batch, indices: Sequence[int]) -> Tensor:
        items = [examples.items[index] for index in indices]
        noise = [draws(task, item, examples.ids[index], seed) for item, index in zip(items, indices, strict=True)]
        losses = task.losses(model, batch, task.collate_noise(items, noise).to(device_of(model)))
        return -one_for_each(losses, len(indices), task)

    return objective


def stream(
    capture: Capture,
    task: Task,
    items: Sequence[Any],
    batches: Sequence[Sequence[int]],
    objective: Objective,
    sink: Sink,
    advance: Callable[[int], None],
) -> None:
    """Run every batch through the model and back, each tracked site's gradients going to `sink` as they arise.

    `advance` is told the positions done. Raises UsageError where the objective is not one number per example, NumericalError
    where it is not finite.
    """
    values_seen: list[Tensor] = []
    for indices, chosen, batch in prepared(task, items, batches, device_of(capture.model)):
        capture.begin(len(chosen), _row_counts(batch, len(chosen)))
        with torch.enable_grad():
            values = one_for_each(objective(capture.model, batch, indices), len(chosen), task)
            total = values.sum()
        sink.begin(indices, batch)
        capture.backward(total, sink.receive)
        sink.end()
        values_seen.append(values.detach())
        advance(sum(task.size(item) for item in chosen))
    _refuse_infinite(torch.cat(values_seen), [index for indices in batches for index in indices])


def one_for_each(values: Any, examples: int, task: Task) -> Tensor:
    """What a task's losses or measurements returned; raises UsageError unless that is one number per example."""
    if not isinstance(values, Tensor) or values.shape != (examples,) or not values.is_floating_point():
        shape = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        given = f"{values.dtype}, {shape}" if isinstance(values, Tensor) and not values.is_floating_point() else shape
        squeezed = isinstance(values, Tensor) and values.shape == (examples, 1)
        raise UsageError(
            f"{type(task).__name__} must give one number per example",
            given=f"{given} for {examples} examples",
            accepted=f"a tensor of shape ({examples},)",
            fix="end it with .squeeze(1)" if squeezed else "sum or take the mean over all dimensions but the first",
        )
    return values


def prepared(
    task: Task, items: Sequence[Any], batches: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[Sequence[int], list[Any], Batch]]:
    """The batches, each collated and on its way to the device while the one before is worked on."""

    def prepare(indices: Sequence[int]) -> tuple[Sequence[int], list[Any], Batch]:
        chosen = [items[index] for index in indices]
        return indices, chosen, to_device(task.collate(chosen), device)

    if len(batches) == 1:  # nothing to be ahead of
        yield prepare(batches[0])
        return
    with ThreadPoolExecutor(1, "collate") as ahead:
        coming = None
        for indices in [*batches, None]:
            ready, coming = coming, None if indices is None else ahead.submit(prepare, indices)
            if ready is not None:
                yield ready.result()


def _refuse_infinite(values: Tensor, indices: Sequence[int]) -> None:
    """Raise where an example's objective is NaN or infinite; asked once for all batches, not to wait for the device at each."""
    finite = torch.isfinite(values).tolist()
    broken = sorted(index for index, is_finite in zip(indices, finite, strict=True) if not is_finite)
    if broken:
        raise NumericalError(
            f"The loss of {len(broken)} of {len(indices)} examples is not finite",
            given=f"row {', '.join(map(str, broken[:5]))}{' ...' if len(broken) > 5 else ''}, counted from 0",
            fix="look at these rows (whence data preview); if it is all of them, at the weights, or use --dtype float32",
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; copies to a GPU go on in the background, from memory that allows it.

    Raises UsageError for a batch that is no mapping.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)

    if not isinstance(batch, Mapping):
        raise UsageError(
            "collate must give a mapping of names to tensors.",
            given=f"a {type(batch).__name__}",
            accepted='a dict such as {"inputs": ..., "targets": ...}, which losses and measurements read',
        )
    return {key: move(value) for key, value in batch.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first weight is."""
    return next(model.parameters()).device


def _row_counts(batch: Batch, examples: int) -> frozenset[int]:
    """Rows that a flattened input can have: one per example, or one per position of one of the batch's tensors."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim >= 1 and len(value) == examples]
    return frozenset([examples, *(value.shape[0] * value.shape[1] for value in tensors if value.ndim >= 2)])
