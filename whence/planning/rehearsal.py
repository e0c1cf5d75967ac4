"""The engine at work on tensors that have shapes and no numbers: what it would hold in memory and multiply, doing neither."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from whence.planning.calls import Calls
from whence.planning.machine import Machine, assumed
from whence.progress import Silent, Stage, report_to
from whence.tasks.base import Task

Result = TypeVar("Result")


SMALL = 32 * 2**20
"""Bytes up to which the C library may take a block from its heap, and then keep it (M_MMAP_THRESHOLD_MAX)."""


class Held(NamedTuple):
    """Bytes of tensors held at one moment, and of those in blocks below `SMALL`."""

    all: int = 0
    small: int = 0


class Rehearsed(NamedTuple):
    """What a stage holds at most and at its end, the FLOPs of its kernels, and their seconds on the machine rehearsed for."""

    peak: Held
    kept: Held
    flops: float
    seconds: float

    def without(self, size: int) -> Rehearsed:
        """The same with `size` bytes fewer, of large blocks that are held throughout."""
        peak, kept = (held._replace(all=held.all - size) for held in (self.peak, self.kept))
        return self._replace(peak=peak, kept=kept)

    def beyond(self, other: Rehearsed, steps: float) -> Rehearsed:
        """Where the line through this and the other is that many of their distances further on."""

        def further(a: float, b: float) -> float:
            return b + steps * (b - a)

        peak, kept = (Held(*map(round, map(further, a, b))) for a, b in ((self.peak, other.peak), (self.kept, other.kept)))
        return Rehearsed(peak, kept, further(self.flops, other.flops), further(self.seconds, other.seconds))


class Live(TorchDispatchMode):
    """Counts the bytes of the storages alive on the device, `now` and `peak`, but for those of `given` tensors; and all work.

    Asked for a number, a tensor without one says 1 or True: so does a mask of what counts, or a test that all is finite.
    """

    def __init__(self, mode: FakeTensorMode, device: str, given: Sequence[Tensor], machine: Machine):
        super().__init__()
        self._device = torch.device(device)
        self._call = Calls(mode)
        self.now = self.peak = Held()
        self.flops = self.seconds = 0.0
        self.machine = machine
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype == torch.bool or 1
        if func is torch.ops.prim.device.default:  # asked more often than all else together
            return args[0].fake_device
        result, call = self._call(func, args, kwargs := kwargs or {})
        made = [self._see(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        if any(made) or func._schema.is_mutable:  # not for views, nor for questions about a tensor
            kernel = call.work(func, args, kwargs, result)
            self.flops += kernel.flops
            self.seconds += self.machine.seconds(kernel)
        return result

    def _see(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        self._known[key] = size = storage.nbytes() if tensor.device.type == self._device.type else 0
        self._change(size)
        if self.now.all > self.peak.all:
            self.peak = self.now
        weakref.finalize(storage, lambda: self._change(-self._known.pop(key)))
        return True

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
    """All stages asked for are done."""


class _Stages(Silent):
    """Notes what each stage holds and does; ends the run after the stage called `last`."""

    def __init__(self, live: Live, last: str):
        self.live, self.last = live, last
        self.seen: dict[str, Rehearsed] = {}

    def begin(self, stage: Stage) -> None:
        self.live.peak = self.live.now
        self.flops, self.seconds = self.live.flops, self.live.seconds

    def end(self, stage: Stage) -> None:
        live = self.live
        self.seen[stage.name] = Rehearsed(live.peak, live.now, live.flops - self.flops, live.seconds - self.seconds)
        if stage.name == self.last:
            raise _Enough


class Rehearsal:
    """A model and a task to run the engine with; what one run returns, the next may use."""

    def __init__(self, model: nn.Module, task: Task, device: str):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model, self.task = _shadow(model, self.mode, device), _outside(task)
        self.live = Live(self.mode, device, [*self.model.parameters(), *self.model.buffers()], assumed(device))

    def run(
        self, work: Callable[[nn.Module, Task], Result], machine: Machine | None = None, last: str = ""
    ) -> tuple[dict[str, Rehearsed], Result | None]:
        """What each stage of `work(model, task)` holds and does, by its name, and what it returned.

        It ends after the stage called `last`, and then returns nothing. The model itself is not counted.
        """
        stages, result = _Stages(self.live, last), None
        self.live.machine = machine or self.live.machine
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
