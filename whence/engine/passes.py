"""The one pass over examples: chunk by chunk, in batches that fit in memory, saved as it goes, shared out over the processes.

    run_pass(point, sites, point.examples, point.likelihood, sink, "covariance", ByClock(chunks, folder, "work", save_every=60))

What is saved, and when, is one of three things: `Unsaved`, `ByClock` for sums, `ByChunk` for what is filed by example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from whence import dist
from whence.capture import Capture
from whence.coverage import Site
from whence.data.batches import plan_batches
from whence.engine.partition import SaveTimer, Tell, keep, next_round, run_share
from whence.engine.sinks import Sums, Table
from whence.engine.stream import Examples, Objective, Owner, Sink, everybody, stream
from whence.progress import stage
from whence.store.manifest import Folder
from whence.store.memory import Memory

if TYPE_CHECKING:
    from whence.engine.point import Point


def run_pass(
    point: Point,
    sites: Mapping[str, Site],
    examples: Examples,
    objective: Objective,
    sink: Sink,
    name: str,
    saved: Unsaved,
    most: int | None = None,
) -> None:
    """Send the gradients of the chunks that are left to the sink; see `share_out`, which this is for gradients."""
    with Capture(point.model, dict(sites), sink.inputs) as capture:

        def send(batches: list[list[int]], tell: Tell) -> None:
            cut = [batch[start:][:most] for batch in batches for start in range(0, len(batch), most or len(batch))]
            stream(capture, point.task, examples.items, [examples.items_of(batch) for batch in cut], objective, sink, tell)

        share_out(point, examples, send, sink, name, saved, most)


def share_out(
    point: Point,
    examples: Examples,
    send: Callable[[list[list[int]], Tell], None],
    sink: Sink,
    name: str,
    saved: Unsaved,
    most: int | None = None,
) -> None:
    """Let `send` work through the chunks that are left, batch by batch, for the sink; `name` is the stage that is reported.

    Batches have `point.batch_tokens` positions and `most` examples at most. One that does not fit in memory is halved, and so
    are those after it. Of several processes each does its share, and the sink merges what they hold. Raises OutOfMemory,
    UsageError, NumericalError.
    """
    sizes = examples.sizes
    again: list[list[int]] = []
    saved.begin(sink)
    total = sum(sizes[index] for chunk in saved.chunks for index in chunk)
    behind = total - sum(sizes[index] for number in saved.left for index in saved.chunks[number])
    with stage(name, total, "tokens", done=behind) as advance:

        def work(batches: list[list[int]], tell: Tell) -> None:
            largest = max(len(batch) * max(sizes[index] for index in batch) for batch in batches)
            for chunk in again:  # in batches no larger than those of the chunk that fits now
                planned = plan_batches([sizes[index] for index in chunk], largest)
                send([[chunk[place] for place in batch] for batch in planned], tell)
            send(batches, tell)
            again.clear()

        def undo() -> None:
            again[:] = saved.undo(sink)

        while saved.left:
            left = [saved.chunks[number] for number in saved.left]
            numbers = saved.left[: next_round(left, sizes, point.batch_tokens)]
            now = [saved.chunks[number] for number in numbers]
            point.batch_tokens = run_share(now, sizes, point.batch_tokens, work, undo, advance, most)
            saved.done(sink, numbers)


class Unsaved:
    """All examples in one chunk, of which nothing is saved. `left` are the numbers of the chunks to come."""

    def __init__(self, *chunks: Sequence[int]):
        self.chunks = [list(chunk) for chunk in chunks]
        self.left = list(range(len(self.chunks)))

    def begin(self, sink: Sink) -> None:
        """Put back what an earlier run saved."""
        sink.load({})

    def undo(self, sink: Sink) -> list[list[int]]:
        """Go back to what was saved or merged last; returns the chunks since then, which have to be done again."""
        sink.load({})
        return []

    def done(self, sink: Sink, numbers: Sequence[int]) -> None:
        """These chunks are complete."""
        self.left = self.left[len(numbers) :]
        sink.merge()


class ByClock(Unsaved):
    """For sums: the whole state as one shard, after a chunk that ends `save_every` seconds or more after the last time."""

    def __init__(
        self,
        chunks: Sequence[Sequence[int]],
        folder: Folder | Memory,
        name: str,
        *,
        save_every: float,
        owner: Owner = everybody,
    ):
        super().__init__(*chunks)
        self.folder, self.name, self.owner, self.timer = folder, name, owner, SaveTimer(save_every)
        self.kept = 0

    def begin(self, sink: Sums) -> None:
        state = self._state()
        self.kept = int(state.pop("chunks", 0))
        self.left = self.left[self.kept :]
        sink.load(state, self.owner)

    def undo(self, sink: Sums) -> list[list[int]]:
        if dist.world() > 1:
            sink.restart()
            return []
        state = self._state()
        state.pop("chunks", None)
        sink.load(state)
        return self.chunks[self.kept : self.left[0]]

    def done(self, sink: Sums, numbers: Sequence[int]) -> None:
        self.left = self.left[len(numbers) :]
        sink.merge(self.owner)
        if dist.from_first(self.timer.due) and self.left:
            with self.timer:
                self.kept = self.left[0]
                self.folder.save(self.name, sink.state() | {"chunks": torch.tensor(self.kept)})

    def _state(self) -> dict[str, Tensor]:
        return self.folder.load(self.name) if self.folder.has(self.name) else {}


class ByChunk(Unsaved):
    """For what is filed by example: a shard for each chunk, `shards` in their order, after which the sink forgets it."""

    def __init__(self, chunks: Sequence[Sequence[int]], folder: Folder | Memory, name: str):
        super().__init__(*chunks)
        self.folder, self.shards = folder, [f"{name}-{number:04d}" for number in range(len(chunks))]

    def begin(self, sink: Table) -> None:
        self.left = [number for number in self.left if not self.folder.has(self.shards[number])]
        sink.load({})

    def done(self, sink: Table, numbers: Sequence[int]) -> None:
        self.left = self.left[len(numbers) :]
        for number in numbers:
            keep(self.folder, self.shards[number], sink.joined(dist.to_first(sink.state(self.chunks[number]))))
        sink.load({})

    def result(self, sink: Table) -> dict[str, Tensor]:
        """What was filed for all examples."""
        return sink.joined(self.folder.load(name) for name in self.shards)
