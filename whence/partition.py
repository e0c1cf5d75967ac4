"""How a pass over the data is cut: groups of modules bound the memory, chunks of examples bound what a kill can cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from whence.coverage import Site
from whence.data.batches import plan_batches
from whence.errors import OutOfMemory
from whence.progress import note

HALVINGS = 3
"""How often a batch that does not fit is halved before giving up."""


BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Positions per batch unless the user says: enough to keep the device busy."""


SAVE_SECONDS = 60.0
"""Seconds of work that a kill may cost."""


class SaveTimer:
    """Says when to save: `every` so many seconds of work, and never so often that saving takes a twentieth of the time."""

    def __init__(self, every: float):
        self.every, self.cost, self.since = every, 0.0, time.monotonic()

    @property
    def due(self) -> bool:
        """Whether to save now."""
        return time.monotonic() - self.since >= max(self.every, 20 * self.cost)

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *raised: object) -> None:
        self.cost = time.monotonic() - self.since if self.every else 0.0
        self.since = time.monotonic()


def batch_positions(asked: int | None, device: torch.device) -> int:
    """Positions per batch on the device."""
    return asked or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])


def module_groups(sites: Mapping[str, Site], count: int) -> list[list[str]]:
    """Split the sites, in the model's order, into at most `count` groups whose factors take about equal memory.

    Sites of one parent stay together, since they may read the same input (q/k/v, gate/up) and then share its covariance.
    """
    families: dict[str, list[str]] = {}
    for name in sites:
        parent, _, own = name.rpartition(".")
        families.setdefault(name if own.isdigit() or not parent else parent, []).append(name)
    costs = [sum(sites[name].shape[0] ** 2 + sites[name].shape[1] ** 2 for name in family) for family in families.values()]
    total, spent, groups = sum(costs), 0, [[] for _ in range(count)]
    for family, cost in zip(families.values(), costs, strict=True):
        groups[min(count - 1, (spent + cost // 2) * count // total)] += family
        spent += cost
    return [group for group in groups if group]


def data_chunks(indices: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Split the examples, longest first, into at most `count` chunks of about equal positions."""
    order = sorted(indices, key=lambda index: (-sizes[index], index))
    total, spent, chunks = sum(sizes[index] for index in order), 0, [[] for _ in range(count)]
    for index in order:
        chunks[min(count - 1, spent * count // max(1, total))].append(index)
        spent += sizes[index]
    return [chunk for chunk in chunks if chunk]


def run_chunk(
    chunk: Sequence[int],
    sizes: Sequence[int],
    batch_tokens: int,
    run: Callable[[list[list[int]]], None],
    undo: Callable[[], None],
) -> int:
    """Run the chunk's batches; where one does not fit in memory, `undo` the chunk and run it again with half the batch.

    Returns the batch size that fitted, in positions. Raises OutOfMemory after `HALVINGS` halvings, or where single
    examples don't fit.
    """
    longest = max(sizes[index] for index in chunk)
    for _ in range(HALVINGS + 1):
        batches = plan_batches([sizes[index] for index in chunk], batch_tokens)
        try:
            run([[chunk[place] for place in batch] for batch in batches])
            return batch_tokens
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        undo()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if all(len(batch) == 1 for batch in batches):
            break
        batch_tokens = max(longest, min(batch_tokens, max(longest * len(batch) for batch in batches)) // 2)
        note(f"out of memory: batches halved to {batch_tokens} positions")
    raise OutOfMemory(
        "A batch does not fit in memory",
        given=f"batches of {batch_tokens} positions, the longest example has {longest}; {reason}",
        fix="shorter examples (--max-length), fewer modules (--modules last-8), or more module groups (--groups 4)",
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
