"""How a pass over the data is cut: groups of modules bound the memory, chunks of examples bound what a kill can cost."""

from __future__ import annotations

import ctypes
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from whence import dist
from whence.coverage import Site
from whence.data.batches import plan_batches
from whence.errors import OutOfMemory
from whence.progress import note
from whence.shortage import is_out_of_memory
from whence.store.manifest import Folder
from whence.store.memory import Memory

Tell = Callable[[int], None]
"""Is told how many positions are done."""

HALVINGS = 3
"""How often a batch that does not fit is halved before giving up."""


BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Positions per batch unless the user says: enough to keep the device busy."""


BALANCE = 4
"""Batches per process, at least, after which processes wait for each other."""


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


def next_round(chunks: Sequence[Sequence[int]], sizes: Sequence[int], batch_tokens: int) -> int:
    """How many of the chunks to share out among the processes (`whence.dist`) at a time; alone always one.

    As many as have `BALANCE` batches for each process, so that none waits long for the others.
    """
    if dist.world() == 1:
        return 1
    batches = itertools.accumulate(len(plan_batches([sizes[index] for index in chunk], batch_tokens)) for chunk in chunks)
    return next((count for count, planned in enumerate(batches, 1) if planned >= BALANCE * dist.world()), len(chunks))


def run_share(
    chunks: Sequence[Sequence[int]],
    sizes: Sequence[int],
    batch_tokens: int,
    run: Callable[[list[list[int]], Tell], None],
    undo: Callable[[], None],
    advance: Tell,
    most: int | None = None,
) -> int:
    """Run what falls to this process of the chunks' batches (of at most `most` examples), as `run_chunk` does.

    The batches are those that one process alone would make, so that each example's numbers are the same to the last
    bit. `run` gets them, and what to tell of the positions done: each process stands for all of them. Where one process
    fails, all fail alike; where one needs smaller batches, all take smaller ones from then on.
    """
    total, told = sum(sizes[index] for chunk in chunks for index in chunk), 0

    def tell(positions: int) -> None:
        nonlocal told
        known = min(positions * dist.world(), total - told)
        told += known
        advance(known)

    if dist.world() == 1:
        (chunk,) = chunks
        return run_chunk(chunk, sizes, batch_tokens, lambda batches: run(batches, advance), undo)
    planned = [batch for chunk in chunks for batch in _planned(chunk, sizes, batch_tokens)]
    mine = dist.share([batch[start:][:most] for batch in planned for start in range(0, len(batch), most or len(batch))])
    with dist.agreeing():
        if mine:
            chunk = [index for batch in mine for index in batch]
            batch_tokens = run_chunk(chunk, sizes, batch_tokens, lambda batches: run(batches, tell), undo, mine)
    advance(total - told)
    return min(dist.from_all(batch_tokens))


def run_chunk(
    chunk: Sequence[int],
    sizes: Sequence[int],
    batch_tokens: int,
    run: Callable[[list[list[int]]], None],
    undo: Callable[[], None],
    batches: Sequence[Sequence[int]] | None = None,
) -> int:
    """Run the chunk's batches; where one does not fit in memory, `undo` the chunk and run it again with half the batch.

    Returns the batch size that fitted, in positions. Raises OutOfMemory after `HALVINGS` halvings, or where single
    examples don't fit.
    """
    longest = max(sizes[index] for index in chunk)
    for _ in range(HALVINGS + 1):
        batches = batches or _planned(chunk, sizes, batch_tokens)
        try:
            run([list(batch) for batch in batches])
            return batch_tokens
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        undo()
        release_memory()
        if all(len(batch) == 1 for batch in batches):
            break
        batch_tokens = max(longest, min(batch_tokens, max(longest * len(batch) for batch in batches)) // 2)
        batches = None
        note(f"out of memory: batches halved to {batch_tokens} positions")
    raise OutOfMemory(
        "A batch does not fit in memory",
        given=f"batches of {batch_tokens} positions, the longest example has {longest}; {reason}",
        fix="shorter examples (--max-length), fewer modules (--modules last-8), or more module groups (--groups 4)",
    )


def _planned(chunk: Sequence[int], sizes: Sequence[int], batch_tokens: int) -> list[list[int]]:
    return [[chunk[place] for place in batch] for batch in plan_batches([sizes[index] for index in chunk], batch_tokens)]


def keep(folder: Folder | Memory, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Save the tensors, which of several processes the first has, where all can load them."""
    folder.save(name, dist.to_all(tensors) if isinstance(folder, Memory) else tensors)


def release_memory() -> None:
    """Give back what allocators hold and nothing uses: after a pass its pieces are too small for large matrices."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # only glibc has it
    if trim:
        trim(0)
