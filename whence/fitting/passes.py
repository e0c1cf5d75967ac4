"""One pass of a fit: the gradients of a sample to a sink, whose sums are saved now and then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from whence import dist
from whence.capture import Capture
from whence.data.batches import plan_batches
from whence.engine.partition import SaveTimer, next_round, run_share
from whence.engine.stream import Examples, Objective, Sink, stream
from whence.fitting.accumulator import Accumulator
from whence.fitting.covariance import Covariance
from whence.fitting.replay import Recorder
from whence.store.manifest import Folder
from whence.store.memory import Memory
from whence.store.part import Part
from whence.tasks.base import Task


class Pass:
    """The chunks of a sample, one after the other; what an earlier run saved under `name` is skipped, to the same bits.

    `homes` are the processes that keep the modules' sums: of several each ends with those of its own. `recorder` keeps
    gradients for a pass that goes through the chunks backwards, and to which it comes as `replayed`. The input groups that
    a covariance finds are written to `inputs`.
    """

    def __init__(
        self,
        task: Task,
        examples: Examples,
        objective: Objective,
        chunks: Sequence[list[int]],
        sink: Accumulator,
        homes: Mapping[str, int],
        *,
        folder: Folder | Memory | Part,
        name: str,
        inputs: str = "",
        save_every: float,
        recorder: Recorder | None = None,
        replayed: Recorder | None = None,
    ):
        self.task, self.items, self.sizes, self.objective = task, examples.items, examples.sizes, objective
        self.chunks, self.sink, self.homes = chunks, sink, homes
        self.folder, self.name, self.inputs, self.timer = folder, name, inputs, SaveTimer(save_every)
        self.recorder, self.replayed = recorder, replayed
        self.receiver: Sink = sink
        if recorder:
            recorder.watch(sink, chunks, self.sizes)
            self.receiver = recorder
        self.several = dist.world() > 1
        state = self._saved()
        self.place = self.kept = int(state.get("chunks", 0))
        if self.place and isinstance(sink, Covariance):
            sink.groups = folder.read_json(inputs)
        sink.resume(state, self._owner)
        self._again: list[list[int]] = []

    @property
    def done(self) -> int:
        """Positions of the chunks that are complete."""
        return sum(map(self._positions, self.chunks[: self.place]))

    def run(self, capture: Capture, tokens: int, advance: Callable[[int], None]) -> int:
        """Work through what is left in batches of `tokens` positions; returns how many there was memory for."""
        self._capture = capture
        while self.place < len(self.chunks):
            tokens = self._round(tokens, advance)
            if isinstance(self.sink, Covariance):
                for found in dist.from_all(self.sink.groups):
                    self.sink.join(found)
                self.folder.write_json(self.inputs, self.sink.groups)
            if self.several:
                self.sink.collect(self._owner)
                self.kept = self.place
            if dist.from_first(self.timer.due) and self.place < len(self.chunks):
                self._save()
        if self.several:
            self.sink.finish()
        return tokens

    def _round(self, tokens: int, advance: Callable[[int], None]) -> int:
        """The next chunk, or of several processes as many as can share them."""
        count = next_round(self.chunks[self.place :], self.sizes, tokens)
        given = self.chunks[self.place : self.place + count]
        if self.replayed and self.replayed.replay(given[0], self.sink):
            advance(self._positions(given[0]))
        else:
            if self.recorder:
                self.recorder.start(self.place)
            tokens = run_share(given, self.sizes, tokens, self._work, self._undo, advance)
            if self.recorder:
                self.recorder.finish(self.place)
        self.place += count
        return tokens

    def _work(self, batches: Sequence[Sequence[int]], tell: Callable[[int], None]) -> None:
        """Work through the batches, after what has to be done again in batches no larger."""
        given = (self.objective, self.receiver, tell)
        largest = max(len(batch) * max(self.sizes[index] for index in batch) for batch in batches)
        for chunk in self._again:
            planned = plan_batches([self.sizes[index] for index in chunk], largest)
            stream(self._capture, self.task, self.items, [[chunk[i] for i in batch] for batch in planned], *given)
        stream(self._capture, self.task, self.items, batches, *given)
        self._again.clear()

    def _undo(self) -> None:
        """Go back to what was saved, or of several processes to what was collected."""
        self.sink.restore({} if self.several else self._saved())
        self._again[:] = self.chunks[self.kept : self.place]
        if self.recorder:
            self.recorder.stop()

    def _saved(self) -> dict[str, Tensor]:
        """The sums saved last; none before the first chunk."""
        return self.folder.load(self.name) if self.folder.has(self.name) else {}

    def _save(self) -> None:
        with self.timer:
            sums = dist.merged(self.sink.kept) if self.several else self.sink.sums
            self.folder.save(self.name, sums | {"chunks": torch.tensor(self.place)})
        self.kept = self.place

    def _owner(self, name: str) -> int | None:
        """The process that keeps the sum; all count the examples."""
        return None if name in ("examples", "chunks") else self.homes[self.sink.keeper(name)]

    def _positions(self, chunk: Sequence[int]) -> int:
        return sum(self.sizes[index] for index in chunk)
