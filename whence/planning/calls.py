"""Calls of torch's operators with tensors that have shapes and no numbers, each worked out once.

Torch takes a third of a millisecond to find what such a call returns, and the layers of a model make the same calls over and
over: planning a model of 8B took more than ten minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from whence.planning.machine import Kernel, kernel_of

PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
"""Types of arguments that say by their value what they ask for."""


KNOWN = 50_000
"""Calls that are remembered at most, some kilobytes each."""

_known: dict[Any, Call] = {}


class Calls:
    """Calls operators under a mode; one that was called with the same shapes before, under any, is not asked again."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode

    def __call__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Call]:
        """What the operator returns, and the call as others like it are remembered."""
        tensors: list[FakeTensor] = []
        try:
            described = torch.get_default_dtype(), _described((args, *kwargs.items()), tensors)
        except _MoreToIt:
            return func(*args, **kwargs), Call()
        if call := _known.get((func, described)):
            return call.again(self._mode, tensors), call
        result, call = func(*args, **kwargs), Call()
        try:
            if described[1] == _described((args, *kwargs.items()), []):  # resized, they are as after another call
                call.returned, call.several = _returned(result, tensors)
                if len(_known) == KNOWN:
                    _known.clear()
                _known[func, described] = call
        except _MoreToIt:
            pass
        return result, call


@dataclass(slots=True, eq=False)
class Call:
    """What calls of an operator with arguments of the same shapes have in common."""

    returned: Sequence[_Returned | None] = ()
    several: type[list[Any]] | type[tuple[Any, ...]] | None = None
    """What the results come in, if not alone."""
    kernel: Kernel | None = None

    def work(self, func: Any, args: Any, kwargs: Any, result: Any) -> Kernel:
        """What the operator does."""
        self.kernel = self.kernel or kernel_of(func, args, kwargs, result)
        return self.kernel

    def again(self, mode: FakeTensorMode, tensors: Sequence[FakeTensor]) -> Any:
        """What it returns for these tensors."""
        made = [each and each.made(mode, tensors) for each in self.returned]
        return self.several(made) if self.several else made[0]


class _Returned(NamedTuple):
    """A tensor that a call returns: an argument itself or, with a shape, a view of one; of no argument, a new one."""

    argument: int | None
    shape: Sequence[int] | None = None
    stride: Sequence[int] = ()
    offset: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def made(self, mode: FakeTensorMode, tensors: Sequence[FakeTensor]) -> Tensor:
        of = None if self.argument is None else tensors[self.argument]
        if self.shape is None:
            assert of is not None
            return of
        with in_kernel_invocation_manager(mode):
            if of is None:
                bare = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            else:
                bare = torch.as_strided(of, self.shape, self.stride, self.offset)
        return FakeTensor(mode, bare, self.device)


class _MoreToIt(Exception):
    """A value that shapes don't say all about."""


def _described(value: Any, tensors: list[FakeTensor]) -> Any:
    """What of an argument decides what is returned; the tensors in it are put into the list. Raises _MoreToIt."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value  # 1, 1.0 and True are equal
    if kind is tuple or kind is list:
        return kind, *[_described(each, tensors) for each in value]
    storage = _plain(value).untyped_storage()
    alike = [(each is value, each.untyped_storage()._cdata == storage._cdata) for each in tensors]  # may be what is returned
    tensors.append(value)
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device, storage.nbytes(), *alike


def _returned(result: Any, tensors: Sequence[FakeTensor]) -> tuple[list[_Returned | None], Any]:
    """What an operator returned for these arguments, and what the results came in, if not alone. Raises _MoreToIt."""
    several = type(result) if isinstance(result, list | tuple) else None
    results: Sequence[Any] = result if several else [result]
    arguments = {id(tensor): number for number, tensor in enumerate(tensors)}
    storages = {tensor.untyped_storage()._cdata: number for number, tensor in enumerate(tensors)}
    found: list[_Returned | None] = []
    for each in results:
        if each is None:
            found.append(None)
        elif id(each) in arguments:
            found.append(_Returned(arguments[id(each)]))
        else:
            storage, of = _plain(each).untyped_storage(), storages.get(each.untyped_storage()._cdata)
            if of is None:
                storages[storage._cdata] = len(tensors)  # another result in it would be refused
            elif of == len(tensors) or tensors[of].dtype != each.dtype:
                raise _MoreToIt
            if of is None and (each.storage_offset() or storage.nbytes() != _extent(each)):
                raise _MoreToIt
            found.append(_Returned(of, each.shape, each.stride(), each.storage_offset(), each.dtype, each.fake_device))
    return found, several


def _plain(value: Any) -> FakeTensor:
    """The value, if it is a tensor without numbers, one after the other in memory or with gaps. Raises _MoreToIt."""
    if not isinstance(value, FakeTensor) or value.constant is not None or value.layout is not torch.strided:
        raise _MoreToIt
    if value.dtype.is_complex:  # which may be conjugated
        raise _MoreToIt
    return value


def _extent(tensor: Tensor) -> int:
    """Bytes from its first number to its last."""
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + steps) * tensor.element_size() if tensor.numel() else 0
