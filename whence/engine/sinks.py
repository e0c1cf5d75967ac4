"""The two kinds of sink that passes can save and continue: sums over all examples, and something filed for each example."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from whence import dist
from whence.engine.stream import Owner, Sink, everybody
from whence.gradients import Factored, Gradient
from whence.linalg.aligned import aligned, zeros
from whence.tasks.base import Batch


class Sums(Sink):
    """Named sums over the examples seen, in the format `dtype`; `examples` counts them.

    Of several processes each sums up its own examples. `merge` adds these sums to those of all processes, each of which one
    process keeps: the same sums, in the same order, whenever they are saved.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.sums: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Forget what came since the last `merge`."""
        self.sums = {"examples": torch.zeros((), dtype=torch.float64)}

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

    def state(self, rows: Collection[int] | None = None) -> dict[str, Tensor]:
        """The sums; of several processes those merged so far, on the first."""
        return dist.merged(self.totals)

    @property
    def totals(self) -> dict[str, Tensor]:
        """The sums that this process keeps: all of them where it is on its own, else those merged so far that are its own."""
        return self.kept if dist.world() > 1 else self.sums

    def load(self, state: Mapping[str, Tensor], owner: Owner = everybody) -> None:
        """Go back to saved sums, or with none of them to the beginning; of several processes to those that this one keeps."""
        self.restart()
        sums = {
            name: aligned(tensor.to(self.device if tensor.ndim else "cpu"))
            for name, tensor in state.items()
            if self._home(name, owner) in (None, dist.rank())
        }
        if dist.world() > 1:
            self.kept = sums
        else:
            self.sums |= sums

    def merge(self, owner: Owner = everybody) -> None:
        """Hand the sums to the processes that keep them, and begin with new ones."""
        if dist.world() == 1:
            return
        for name, part in dist.add_up(self.sums, lambda name: self._home(name, owner)).items():
            self.kept[name] = self.kept[name].add_(part) if name in self.kept else part
        self.restart()

    def _home(self, name: str, owner: Owner) -> int | None:
        return None if name == "examples" else owner(self.keeper(name))


class Total(Sums):
    """The sum of all examples' gradients per module, `[O, I]`, which never forms one example's matrix."""

    def __init__(self, operands: torch.dtype, dtype: torch.dtype, device: torch.device):
        super().__init__(dtype, device)
        self.operands = operands

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add the module's part."""
        gradient = gradient.to(self.operands)
        if isinstance(gradient, Factored):
            part = gradient.g_BRO.flatten(0, 1).T @ gradient.a_BRI.flatten(0, 1)
        else:
            part = gradient.w_BOI.sum(0)
        part = part.to(self.dtype)
        self.sums[name] = self.sums[name] + part if name in self.sums else part


class Table(Sink):
    """Files tensors by example: those in `filed[key]` have one for each of `indices`, batch after batch."""

    axis = -1
    """Where the examples are in the tensors of a state."""
    ragged: tuple[str, ...] = ()
    """Keys of tensors whose last axis differs in length: they stand one after the other there, without an axis of examples."""

    def __init__(self) -> None:
        self.load({})

    def load(self, state: Mapping[str, Tensor], owner: Owner = everybody) -> None:
        """Forget what was filed; only the empty state can be loaded."""
        assert not state, "what is filed is saved chunk by chunk, and not loaded again"
        self.indices: list[int] = []
        self.filed: dict[str, list[Tensor]] = {}
        self.lengths: dict[str, list[int]] = {}

    def file(self, key: str, batch: Tensor) -> None:
        """File a tensor with an axis for the examples of the batch."""
        self.filed.setdefault(key, []).append(batch)

    def file_ragged(self, key: str, tensors: Sequence[Tensor]) -> None:
        """File a tensor for each example of the batch, of its own length."""
        self.filed.setdefault(key, []).append(torch.cat(list(tensors), -1))
        self.lengths.setdefault(key, []).extend(tensor.shape[-1] for tensor in tensors)

    def state(self, rows: Collection[int] | None = None) -> dict[str, Tensor]:
        """`indices [n]` of those examples of `rows` that came, and what was filed for them; nothing where none came."""
        wanted = None if rows is None else set(rows)
        places = [place for place, index in enumerate(self.indices) if wanted is None or index in wanted]
        if not places:
            return {}
        found = {"indices": torch.tensor([self.indices[place] for place in places])}
        for key, batches in self.filed.items():
            axis = self._axis_of(key)
            found[key] = torch.cat(batches, axis)
            if len(places) == len(self.indices):
                continue
            chosen = torch.tensor(places)
            if key in self.ragged:
                lengths = torch.tensor(self.lengths[key])
                starts = lengths.cumsum(0) - lengths
                chosen = torch.cat([torch.arange(int(starts[place]), int(starts[place] + lengths[place])) for place in places])
            found[key] = found[key].index_select(axis, chosen)
        return found

    def joined(self, states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Several states as one, such as those of all processes."""
        parts = [state for state in states if state]
        if len(parts) < 2:
            return dict(parts[0]) if parts else {}
        return {key: torch.cat([part[key] for part in parts], self._axis_of(key)) for key in parts[0]}

    def _axis_of(self, key: str) -> int:
        return 0 if key == "indices" else -1 if key in self.ragged else self.axis
