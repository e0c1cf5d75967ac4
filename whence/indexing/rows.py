"""Rows of an index: projected gradients in few bits, with scales of their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from whence.coverage import Site
from whence.engine.sinks import Table
from whence.errors import NumericalError
from whence.gradients import Dense, Gradient
from whence.operators import Operator, Streaming
from whence.tasks.base import Batch

Kept = Literal["int8", "float16", "float32"]
"""Formats that rows are kept in."""


def compress(rows: Tensor, kept: Kept, widths: Sequence[int]) -> dict[str, Tensor]:
    """`codes [n, D]`, their `scale` and the `norm [n]` of rows that hold so many numbers of each module.

    float16 has a scale per row `[n, 1]`, a power of two that brings the largest number below 2^15: nothing overflows, and
    what is 2^29 times smaller still has all its 11 bits. int8 has a scale per row and module `[n, M]`: steps of 1/127 of
    the module's largest number.
    """
    norm = rows.norm(dim=1).float()
    if kept == "float32":
        return {"codes": rows.float(), "scale": torch.ones_like(norm).unsqueeze(1), "norm": norm}
    if kept == "float16":
        largest = rows.abs().amax(1, keepdim=True).clamp(min=TINY)
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 15)
        return {"codes": (rows / scale).half(), "scale": scale.float(), "norm": norm}
    parts = rows.split([count * width for count, width in _runs(widths)], dim=1)
    runs = [part.unflatten(1, run) for part, run in zip(parts, _runs(widths), strict=True)]
    largest = torch.cat([run.abs().amax(2) for run in runs], dim=1)
    scale = (largest.clamp(min=TINY) / 127).float()
    return {"codes": (rows / _spread(scale, widths)).round().to(torch.int8), "scale": scale, "norm": norm}


TINY = 2.0**-100
"""Numbers below this are zero; scales stay in the range of float32."""


def expand(codes: Tensor, scale: Tensor, widths: Sequence[int], like: Tensor) -> Tensor:
    """The rows that `compress` was given, in the format and on the device of `like`."""
    rows, scale = codes.to(like, copy=True), scale.to(like)
    if scale.shape[1] == 1:
        return rows.mul_(scale)
    number = module = 0
    for count, width in _runs(widths):
        part = rows[:, number : number + count * width].unflatten(1, (count, width))
        part.mul_(scale[:, module : module + count].unsqueeze(2))
        number, module = number + count * width, module + count
    return rows


def _spread(scale: Tensor, widths: Sequence[int]) -> Tensor:
    """The scale of every number, or of every row."""
    if scale.shape[1] == 1:
        return scale
    parts = scale.split([count for count, _ in _runs(widths)], dim=1)
    return torch.cat([part.repeat_interleave(width, dim=1) for part, (_, width) in zip(parts, _runs(widths), strict=True)], 1)


def _runs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """`(count, width)` of equal widths in a row: nearly all are."""
    return [(len(list(equal)), width) for width, equal in itertools.groupby(widths)]


def projected_width(projection: Streaming, name: str, site: Site, like: Tensor) -> int:
    """Numbers that a gradient of the module becomes: seen from none of them."""
    return math.prod(projection.apply(name, Dense(like.new_zeros(0, *site.shape)), (name,)).shape[1:])


class ProjectedRows(Table):
    """Projects the gradients of each batch into rows `[B, D]` while the backward pass runs, and files them compressed.

    Raises NumericalError where a gradient is not finite.
    """

    axis = 0

    def __init__(
        self,
        projection: Operator,
        sites: Mapping[str, Site],
        sizes: Sequence[int],
        kept: Kept,
        operands: torch.dtype,
        like: Tensor,
    ):
        super().__init__()
        self.sizes = sizes
        self.kept: Kept = kept
        self.like = like
        self.streaming = projection.streaming(like.to(operands))
        self.inputs = self.streaming.ahead(name for name, site in sites.items() if site.reads_columns)
        self.widths = {name: projected_width(self.streaming, name, sites[name], like) for name in projection.names}
        """Numbers that each module has in a row."""

    def joined(self, states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Several states as one, the longest example first: the same files whatever number of processes made them."""
        parts = [state for state in states if state]
        found = super().joined(parts)
        if len(parts) < 2:  # in this order already
            return found
        places = found["indices"].tolist()
        order = sorted(range(len(places)), key=lambda row: (-self.sizes[places[row]], places[row]))
        return {key: tensor[order] for key, tensor in found.items()}

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Start the batch's rows."""
        self._now = indices
        self._parts: dict[str, Tensor] = {}

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Project the module's gradients."""
        self._parts[name] = self.streaming.apply(name, gradient, readers).dense().w_BOI.flatten(1)

    def end(self) -> None:
        """File the rows; a module that none of the batch reached leaves zeros."""
        for name, width in self.widths.items():
            if name not in self._parts:
                self._parts[name] = self.like.new_zeros(len(self._now), width)
        rows_BD = torch.cat([self._parts.pop(name) for name in self.widths], dim=1)
        found = {key: tensor.cpu() for key, tensor in compress(rows_BD, self.kept, list(self.widths.values())).items()}
        finite = torch.isfinite(found["norm"]).tolist()
        if broken := [index for index, is_finite in zip(self._now, finite, strict=True) if not is_finite]:
            raise NumericalError(
                f"The gradients of {len(broken)} of {len(self._now)} examples of a batch are not finite",
                given=f"row {', '.join(map(str, broken[:5]))}{' ...' if len(broken) > 5 else ''}, counted from 0",
                fix="look at these rows (whence data preview), or use --dtype float32",
            )
        self.indices += self._now
        for key, tensor in found.items():
            self.file(key, tensor)
