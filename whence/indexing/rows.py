"""Rows of an index: influences on landmarks, or projected gradients, in few bits and with scales of their own."""

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
from whence.gradients import Dense, Gradient, chunks, dot_module
from whence.indexing.directions import Directions, Whitened
from whence.linalg.scan import sign_bits
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


class CodedRows(Table):
    """Files a row of numbers for each example, compressed."""

    axis = 0

    def __init__(self, sizes: Sequence[int], kept: Kept, like: Tensor):
        super().__init__()
        self.sizes = sizes
        self.kept: Kept = kept
        self.like = like

    def joined(self, states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Several states as one, the longest example first: the same files whatever number of processes made them."""
        parts = [state for state in states if state]
        found = super().joined(parts)
        if len(parts) < 2:  # in this order already
            return found
        places = found["indices"].tolist()
        order = sorted(range(len(places)), key=lambda row: (-self.sizes[places[row]], places[row]))
        return {key: tensor[order] for key, tensor in found.items()}

    def file_rows(self, rows_BD: Tensor, widths: Sequence[int], **more: Tensor) -> None:
        """File the rows of the examples `_now`, with what `more` there is of each. Raises NumericalError."""
        found = {key: tensor.cpu() for key, tensor in (compress(rows_BD, self.kept, widths) | more).items()}
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

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        """Start the batch's rows."""
        self._now = indices


class LandmarkRows(CodedRows):
    """Codes each row by its influence on landmarks, `[B, J]` in int8, and by signs of the projection of what they leave of it.

    With them are filed its norm and its exact influence on the questions held out, "exact" `[B, H]`.
    """

    def __init__(self, directions: Directions, whitened: Whitened, sizes: Sequence[int], like: Tensor):
        super().__init__(sizes, "int8", like)
        self.directions, self.whitened = directions, whitened.to(like)
        kinds = (directions.single, directions.held_out)
        self.landmarks, self.held_out = ({name: each.to(like) for name, each in kind.items()} for kind in kinds)

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        super().begin(indices, batch)
        self._sums: dict[str, Tensor] = {}

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        """Add the module's part."""
        block, parts = self.whitened.inverse.blocks[name], []
        for part in chunks(gradient.to(self.like.dtype), 3 * block.lam_OI.numel()) or [gradient]:
            w_BOI = block.rotate(part).w_BOI
            x = Dense(w_BOI * block.lam_OI.sqrt())
            found = {"square": w_BOI.square().sum((1, 2)), "landmarks": dot_module(self.landmarks[name], x).T}
            if self.held_out:
                found["exact"] = dot_module(self.held_out[name], x).T
            parts.append(found | {"sketch": self.directions.sketch_module(name, x.w_BOI.flatten(1))})
        for key in parts[0]:
            part = torch.cat([found[key] for found in parts])
            self._sums[key] = self._sums[key] + part if key in self._sums else part

    def end(self) -> None:
        """File the rows."""
        if not self._sums:
            for name, block in self.whitened.inverse.blocks.items():
                self.receive(name, Dense(block.lam_OI.new_zeros(len(self._now), *block.lam_OI.shape)), (name,))
        k_BJ = self._sums["landmarks"] * self.directions.scale_J.to(self.like)
        _, rest_BK = self.directions.rest(k_BJ, self._sums["sketch"])
        signs = {"signs": sign_bits(rest_BK.cpu()), "size": rest_BK.abs().mean(1).float()}
        exact = {"exact": self._sums["exact"].float()} if self.held_out else {}
        self.file_rows(k_BJ, [k_BJ.shape[1]], norm=self._sums["square"].sqrt().float(), **signs, **exact)


class ProjectedRows(CodedRows):
    """Projects the gradients of each batch into rows `[B, D]` while the backward pass runs, and files them compressed.

    Raises NumericalError where a gradient is not finite.
    """

    def __init__(
        self,
        projection: Operator,
        sites: Mapping[str, Site],
        sizes: Sequence[int],
        kept: Kept,
        operands: torch.dtype,
        like: Tensor,
    ):
        super().__init__(sizes, kept, like)
        self.streaming = projection.streaming(like.to(operands))
        self.inputs = self.streaming.ahead(name for name, site in sites.items() if site.reads_columns)
        self.widths = {name: projected_width(self.streaming, name, sites[name], like) for name in projection.names}
        """Numbers that each module has in a row."""

    def begin(self, indices: Sequence[int], batch: Batch) -> None:
        super().begin(indices, batch)
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
        self.file_rows(rows_BD, list(self.widths.values()))
