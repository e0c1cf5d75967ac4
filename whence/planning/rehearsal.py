"""The engine at work on tensors that have shapes and no numbers: what it would hold in memory, without holding it."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from whence.progress import Stage, report_to
from whence.tasks.base import Task

Result = TypeVar("Result")


SMALL = 32 * 2**20
"""Bytes up to which the C library may take a block from its heap, and then keep it (M_MMAP_THRESHOLD_MAX)."""


@dataclass(frozen=True)
class Held:
    """Bytes of tensors held at one moment, and of those in blocks below `SMALL`."""

    all: int = 0
    small: int = 0


@dataclass(frozen=True)
class Rehearsed:
    """What a stage holds at most, and at its end."""

    peak: Held
    kept: Held


class Live(TorchDispatchMode):
    """Counts the bytes of the storages alive; `now` and `peak`, without those of `given` tensors.

    Asked for a number, a tensor without one says 1 or True: so does a mask of what counts, or a test that all is finite.
    """

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.now = self.peak = Held()
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size = storage.nbytes()
            self._change(size)
            if self.now.all > self.peak.all:
                self.peak = self.now
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._change(-self._known.pop(key))

    def _change(self, size: int) -> None:
        self.now = Held(self.now.all + size, self.now.small + size * (abs(size) < SMALL))


class _Numbers(TorchFunctionMode):
    """Answers where tensors leave torch as `Live` answers for a single number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], FakeTensor):
            ones = np.ones(tuple(args[0].shape), str(args[0].dtype).removeprefix("torch."))
            return ones if func is Tensor.numpy else ones.tolist()
        return func(*args, **(kwargs or {}))


class _Enough(Exception):
    """All stages asked for are through."""


class _Stages:
    """Notes what each stage holds; ends the run after the stage called `last`."""

    def __init__(self, live: Live, last: str):
        self.live, self.last = live, last
        self.seen: dict[str, Rehearsed] = {}

    def begin(self, stage: Stage) -> None:
        self.live.peak = self.live.now

    def advance(self, stage: Stage) -> None:
        pass

    def end(self, stage: Stage) -> None:
        before, now = self.seen.get(stage.name), Rehearsed(self.live.peak, self.live.now)
        self.seen[stage.name] = now if before is None or now.peak.all > before.peak.all else before
        if stage.name == self.last:
            raise _Enough

    def note(self, text: str) -> None:
        pass


class Rehearsal:
    """A model and a task to run the engine with; what one run returns, the next may use."""

    def __init__(self, model: nn.Module, task: Task, device: str):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model, self.task = _shadow(model, self.mode, device), _outside(task)
        self.live = Live([*self.model.parameters(), *self.model.buffers()])

    def run(self, work: Callable[[nn.Module, Task], Result], last: str = "") -> tuple[dict[str, Rehearsed], Result | None]:
        """What each stage of `work(model, task)` holds, by its name, and what it returned.

        It ends after the stage called `last`, and then returns nothing. The model itself is not counted.
        """
        stages, result = _Stages(self.live, last), None
        with warnings.catch_warnings(), self.mode, self.live, _Numbers(), report_to(stages), contextlib.suppress(_Enough):
            warnings.simplefilter("ignore")
            result = work(self.model, self.task)
        return stages.seen, result


def _shadow(model: nn.Module, mode: FakeTensorMode, device: str) -> nn.Module:
    """A copy of the model whose weights take no memory, on the device that is planned for."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            same = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            memo[id(tensor)] = same
    return copy.deepcopy(model, memo).eval()


def _outside(task: Task) -> Task:
    """The same task, whose batches are made of numbers."""
    same = copy.copy(task)

    def collate(items: Sequence[Any]) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return task.collate(items)

    same.collate = collate  # type: ignore[method-assign]
    return same
