"""Tensors that travel between processes together, end to end in one: many small ones cost many waits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PARCEL = 2**25
"""Bytes up to which tensors travel together."""

Kind = tuple[tuple[int, ...], Any, str]
"""Shape, dtype and type of device of a tensor."""


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    """The kind of each tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype, tensor.device.type) for name, tensor in tensors.items()}


def parcels_of(kinds: Mapping[str, Kind], owners: Mapping[str, int | None] | None = None) -> list[list[str]]:
    """The names in groups that travel as one tensor: of one dtype, device and owner, and not too large; the same everywhere."""
    parcels: list[list[str]] = []
    last, room = None, 0
    order = {name: (str(owners and owners[name]), str(dtype), where) for name, (_, dtype, where) in kinds.items()}
    for name in sorted(kinds, key=lambda name: (order[name], name)):
        size = math.prod(kinds[name][0]) * kinds[name][1].itemsize
        if order[name] != last or size > room:
            parcels.append([])
            last, room = order[name], PARCEL
        parcels[-1].append(name)
        room -= size
    return parcels


def pack(parcel: Sequence[str], tensors: Mapping[str, Tensor], kinds: Mapping[str, Kind]) -> Tensor:
    """The tensors end to end, with zeros for those that this process lacks; a single one as it is."""
    import torch

    parts = []
    for name in parcel:
        shape, dtype, where = kinds[name]
        parts.append((tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype, device=where)).reshape(-1))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def unpack(packed: Tensor, parcel: Sequence[str], kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    """The tensors of a parcel by name."""
    shapes = [kinds[name][0] for name in parcel]
    parts = packed.split([math.prod(shape) for shape in shapes])
    return {name: part.view(shape) for name, part, shape in zip(parcel, parts, shapes, strict=True)}
