"""A sink whose whole state is sums, so that it can be saved, restored and continued without a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from whence import dist
from whence.engine.stream import Sink
from whence.linalg.aligned import aligned, zeros
from whence.tasks.base import Batch


class Accumulator(Sink):
    """Named sums over the examples seen; `examples` counts them.

    Of several processes (`whence.dist`) each sums up its own examples. `collect` adds these sums to those of all
    processes, each of which one process keeps: the same sums, in the same order, whenever they are saved. With `finish`
    they are this one's `sums`.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.sums: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.restore({})

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Count the examples."""
        self.sums["examples"] += len(indices)

    def sum_of(self, name: str, *shape: int) -> Tensor:
        """The sum of that name, zero at first."""
        if name not in self.sums:
            self.sums[name] = zeros(*shape, dtype=self.dtype, device=self.device)
        return self.sums[name]

    def keeper(self, name: str) -> str:
        """The site that a sum belongs to."""
        return name

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go back to saved sums, or with none of them to the beginning."""
        self.sums = {"examples": torch.zeros((), dtype=torch.float64)}
        self.sums |= {
            name: aligned(tensor.to(self.device if tensor.ndim else "cpu")) for name, tensor in sums.items() if name != "chunks"
        }

    def resume(self, sums: Mapping[str, Tensor], owner: Callable[[str], int | None]) -> None:
        """Go on from saved sums over all processes."""
        self.restore({name: tensor for name, tensor in sums.items() if owner(name) in (None, dist.rank())})
        if dist.world() > 1:
            self.kept = self.sums
            self.restore({})

    def collect(self, owner: Callable[[str], int | None]) -> None:
        """Hand the sums to the processes that `owner` gives them to (None: to all), and begin with new ones."""
        for name, part in dist.add_up(self.sums, owner).items():
            self.kept[name] = self.kept[name].add_(part) if name in self.kept else part
        self.restore({})

    def finish(self) -> None:
        """Take the sums that this process keeps for its own."""
        self.sums, self.kept = self.kept, {}
