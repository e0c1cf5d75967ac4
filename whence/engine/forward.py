"""Passes without a backward pass: numbers of every example that need no gradient, and what a model's head reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture import inputs_of
from whence.engine.partition import Tell, data_chunks
from whence.engine.passes import ByChunk, share_out
from whence.engine.point import Point
from whence.engine.queries import Queries
from whence.engine.sinks import Table
from whence.engine.stream import Examples, device_of, prepared
from whence.errors import NumericalError, UsageError
from whence.store.memory import work
from whence.tasks.base import Batch, Task
from whence.tasks.forward import in_mode, unwrapped

Values = Callable[[nn.Module, Batch], Tensor]
"""Numbers of each example of a batch, `[..., B]`."""

CHUNKS = 8
"""Parts of the examples after which what was found is saved."""


def values_of(point: Point, examples: Examples, of: Values, name: str, out: Path | None = None) -> Tensor:
    """`of(model, batch)` of all examples, `[..., N]` in the order of the examples; those without a loss have zeros.

    The work is cut, shared out and saved as that of `run_pass` is; `name` is the stage that is reported, and `out` a folder
    from which a killed run resumes. Raises NumericalError where a number is not finite, UsageError, OutOfMemory.
    """
    sink = Table()

    def send(batches: list[list[int]], tell: Tell) -> None:
        for indices, chosen, batch in prepared(point.task, examples.items, batches, device_of(point.model)):
            with torch.no_grad():
                sink.file("values", of(point.model, batch).detach().cpu())
            sink.indices += indices
            tell(sum(point.task.size(item) for item in chosen))

    with work(out, lambda: {"stage": name, **point.provenance()}) as folder:
        saved = ByChunk(data_chunks(examples.usable, examples.sizes, CHUNKS if out else 1), folder, name)
        with in_mode(point.model, training=False):
            share_out(point, examples, send, sink, name, saved)
        found = saved.result(sink)
    values, places = found["values"], found["indices"]
    if broken := places[~torch.isfinite(values.reshape(-1, len(places))).all(0)].tolist():
        raise NumericalError(
            f"What the model gives for {len(broken)} of {len(places)} examples is not finite",
            given=", ".join(examples.ids[place] for place in sorted(broken)[:5]),
            fix="look at these rows (whence data preview); if it is all of them, at the weights, or use --dtype float32",
        )
    return values.new_zeros((*values.shape[:-1], len(examples))).index_copy_(-1, places, values)


def losses_of(point: Point, name: str = "losses", out: Path | None = None) -> Tensor:
    """The loss of every row, `[N]` in nats."""
    return values_of(point, point.examples, point.task.losses, name, out).double()


def measured_of(point: Point, queries: Queries, name: str = "measurements") -> Tensor:
    """What is measured of every query, `[Q]`."""
    sizes = tuple(point.task.size(item) for item in queries.items)
    ids = tuple(queries.ids[owner] for owner in queries.owners)
    items = Examples(queries.items, ids, queries.items, sizes, queries.fingerprint)
    weights = torch.tensor(queries.weights, dtype=torch.float64)
    weighted = weights * values_of(point, items, point.task.measurements, name).double()
    return weighted.new_zeros(len(queries)).index_add_(0, torch.tensor(queries.owners), weighted)


def hidden_states(task: Task, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the model's head reads, `[B, T, I]` in float32 or better, and which positions are real, bool `[B, T]`.

    Of a language model that is the last hidden state; a head that reads one vector per example has T of 1.
    """
    with inputs_of(head_of(model)) as seen:
        examples = len(task.losses(model, batch))
    if not seen or seen[-1].ndim < 2 or len(seen[-1]) != examples:
        raise UsageError(
            f"What the head of {type(model).__name__} reads can't be told apart by example",
            given=f"shape {tuple(seen[-1].shape)} for {examples} examples" if seen else "a head that is not called",
            accepted="[examples, width] or [examples, positions, width]",
        )
    h_BTI = seen[-1].reshape(examples, -1, seen[-1].shape[-1])
    real_BT, positions = torch.ones(h_BTI.shape[:2], dtype=torch.bool, device=h_BTI.device), task.positions(batch)
    if positions is not None and positions.shape == real_BT.shape:
        real_BT = positions.bool().to(h_BTI.device)
    return h_BTI.to(torch.promote_types(h_BTI.dtype, torch.float32)), real_BT


def hidden_of(point: Point, queries: Queries) -> list[Tensor]:
    """The hidden states `[T, I]` of each query, of a contrast those of the answer itself."""
    found = []
    with in_mode(point.model, training=False), torch.no_grad():
        for (item, _), *_ in queries.weighted:
            ((_, _, batch),) = prepared(point.task, [item], [[0]], device_of(point.model))
            h_BTI, real_BT = hidden_states(point.task, point.model, batch)
            found.append(h_BTI[0, real_BT[0]])
    return found


def head_of(model: nn.Module) -> nn.Module:
    """The module that makes a model's output from its hidden states: its output embeddings, else its last linear layer."""
    head: Any = getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    layers: Sequence[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if head is None and not layers:
        raise UsageError(
            f"{type(model).__name__} has no head whose input could stand for an example",
            accepted="a model with a linear layer",
        )
    return layers[-1] if head is None else head
