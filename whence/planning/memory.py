"""What a stage takes in memory, term by term.

    peak = libraries + tensors + heap

`tensors` is what the engine itself held in a rehearsal. The other two terms were measured (docs/plan.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from whence.planning.rehearsal import Rehearsed
from whence.precision import Products


@dataclass(frozen=True)
class Overheads:
    """What a process takes beside its tensors."""

    process: int
    """Bytes of Python with torch and transformers before there is a model, or of a GPU's context."""
    libraries: int
    """Bytes of code and buffers that the first pass brings in."""
    tables: int
    """The same for the tables that go with scores."""
    short: int
    """The same for products that round their operands."""
    kept_by_heap: float
    """Of the small blocks that a batch takes and gives back, the share that the allocator does not give back in turn."""


OVERHEADS = {
    "cpu": Overheads(400_000_000, 20_000_000, 76_000_000, 30_000_000, 0.75),
    "cuda": Overheads(500_000_000, 100_000_000, 0, 0, 0.1),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage at its peak, without the model: the engine's tensors and what comes on top."""

    libraries: int
    tensors: int
    heap: int
    comes: int
    """Of the tensors, those that come and go with a batch."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.libraries + self.tensors + self.heap


def overheads(device: str) -> Overheads:
    """Those of the kind of device."""
    return OVERHEADS["cuda" if device.startswith("cuda") else "cpu"]


def of_stage(name: str, seen: Rehearsed, device: str, products: Products) -> Memory:
    """The memory of a stage that was rehearsed."""
    over = overheads(device)
    returned = max(0, seen.peak.small - seen.kept.small)
    comes = max(0, seen.peak.all - seen.kept.all)
    libraries = over.libraries + over.tables * (name == "score") + over.short * (products == "bfloat16")
    return Memory(libraries, seen.peak.all, round(over.kept_by_heap * returned), comes)
