"""Gradients of one pass, kept for a second pass over the same ones, so that the model does not have to make them again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from whence.engine.stream import Sink
from whence.gradients import Factored, Gradient
from whence.tasks.base import Batch

KEPT_BYTES = 160 * 2**20
"""Bound on what is kept: about what a batch of a small model takes anyway, and too little for a batch of a large one."""

Chunk = Sequence[int]
Recorded = list[tuple[Sequence[int], list[tuple[str, Gradient, tuple[str, ...]]]]]
"""The batches of a chunk: the examples, and what a sink received of them."""


class Recorder(Sink):
    """Hands everything on to a sink, and keeps the gradients of the last chunks of a pass, as many as `limit` has room for.

    The last ones, since a second pass that begins with them can let go of them one by one: nothing is held while the
    others run. The first chunk shows what a position takes.
    """

    def __init__(self, limit: int = KEPT_BYTES):
        self.limit = limit
        self.kept: dict[tuple[int, ...], Recorded] = {}
        self._per_position: float | None = None
        self._batches: Recorded | None = None
        self._seen: dict[int, int] = {}

    def watch(self, sink: Sink, chunks: Sequence[Chunk], sizes: Sequence[int]) -> None:
        """Keep what this sink receives of these chunks."""
        self.sink, self.chunks = sink, [tuple(chunk) for chunk in chunks]
        self.positions = [sum(sizes[index] for index in chunk) for chunk in chunks]

    def start(self, place: int) -> None:
        """The chunk of that number comes."""
        self._seen = {}
        self._batches = [] if self._per_position is None or self._fits_from(place) else None

    def finish(self, place: int) -> None:
        """The chunk is complete."""
        batches, self._batches = self._batches, None
        if batches is not None:
            self._per_position = max(self._per_position or 0.0, sum(self._seen.values()) / self.positions[place])
            if self._fits_from(place):
                self.kept[self.chunks[place]] = batches

    def stop(self) -> None:
        """There is no room: let go of everything, and keep nothing more."""
        self.kept.clear()
        self._batches, self._per_position = None, math.inf

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """A batch comes."""
        self.sink.begin(indices, batch)
        if self._batches is not None:
            self._batches.append((indices, []))

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Keep the gradient, if there is room, and hand it on."""
        if self._batches is not None:
            self._batches[-1][1].append((name, gradient, readers))
            parts = [gradient.g_BRO, gradient.a_BRI] if isinstance(gradient, Factored) else [gradient.w_BOI]
            storages = [part.untyped_storage() for part in parts]
            self._seen |= {storage._cdata: storage.nbytes() for storage in storages}  # modules may share an input
            if sum(self._seen.values()) > self.limit:
                self.stop()
        self.sink.receive(name, gradient, readers)

    def end(self) -> None:
        """The batch is complete."""
        self.sink.end()

    def replay(self, chunk: Chunk, sink: Sink) -> bool:
        """Hand a chunk's gradients to another sink, and forget them; whether they were kept."""
        batches = self.kept.pop(tuple(chunk), None)
        for indices, gradients in batches or ():
            sink.begin(indices, {})
            while gradients:
                sink.receive(*gradients.pop(0))
            sink.end()
        return batches is not None

    def _fits_from(self, place: int) -> bool:
        """Whether there is room for this chunk and all that come after it."""
        assert self._per_position is not None
        return self._per_position * sum(self.positions[place:]) <= self.limit
