"""A sink whose whole state is sums, so that it can be saved, restored and continued without a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from whence.stream import Sink
from whence.tasks.base import Batch


class Accumulator(Sink):
    """Named sums over the examples seen; `examples` counts them."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.sums: dict[str, Tensor] = {}
        self.restore({})

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Count the examples."""
        self.sums["examples"] += len(indices)

    def sum_of(self, name: str, *shape: int) -> Tensor:
        """The sum of that name, zero at first."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return self.sums[name]

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go back to saved sums, or with none of them to the beginning."""
        self.sums = {"examples": torch.zeros((), dtype=torch.float64)}
        self.sums |= {
            name: tensor.to(self.device if tensor.ndim else "cpu") for name, tensor in sums.items() if name != "chunks"
        }
