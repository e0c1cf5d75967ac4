"""Whether shorter products, or a larger sample, change a few rows' influence on each other.

The probe is the matrix of `<g_i, operator g_j>` over a few rows' gradients `g`: the scores of these rows, asked about by
each other. It takes one batch, and keeps no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whence.capture import Capture
from whence.coverage import Site
from whence.engine.point import Point
from whence.engine.stream import Examples, Sink, stream
from whence.gradients import Gradient, dot_module
from whence.operators.base import Operator
from whence.precision import Precision, Products, has_units, kept_as, multiplying
from whence.progress import note
from whence.store.manifest import Folder
from whence.store.memory import Memory

ROWS, POSITIONS, BYTES = 8, 1024, 2**30
"""At most so many rows, and about so many positions and bytes of one module's gradients."""

WORTH = 16
"""Work that is less than so many probes is not worth one."""

FLOPS = 1e11
"""Work that takes a second or two anyway."""

ERROR, PEARSON = 0.05, 0.999
"""What shorter products may do to the probe: its relative error, and the correlation of any row with the exact one."""


@dataclass(frozen=True)
class Agreement:
    """How well two matrices of scores agree: relative error (Frobenius), and the lowest Pearson correlation of their rows."""

    error: float
    pearson: float


def agreement(found: Tensor, expected: Tensor) -> Agreement:
    """Compare scores `[Q, N]`; of a square probe the diagonal, an example's score for itself, stays out of the correlation."""
    found, expected = found.double(), expected.double()
    error = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if len(found) == found.shape[1]:
        aside = ~torch.eye(len(found), dtype=torch.bool)
        found, expected = (scores[aside].view(len(scores), -1) for scores in (found, expected))
    pairs = torch.stack([found, expected], dim=1)
    pairs = pairs - pairs.mean(-1, keepdim=True)
    products = pairs @ pairs.mT
    scale = (products[:, 0, 0] * products[:, 1, 1]).sqrt()
    return Agreement(error, float(torch.where(scale > 0, products[:, 0, 1] / scale, 1.0).min()))


class _Gram(Sink):
    """Adds up the modules' `<g_i, operator g_j>`, `[B, B]`; without a blockwise operator `<g_i, g_j>`."""

    def __init__(self, operator: Operator | None, like: Tensor):
        self.streaming = operator.streaming(like) if operator and operator.blockwise else None
        self.dtype, self.total = like.dtype, torch.zeros(())

    def receive(self, name: str, gradient: Gradient, readers: tuple[str, ...]) -> None:
        dtype = kept_as(self.dtype, gradient.device) if self.streaming else self.dtype
        formed = gradient.to(dtype).dense()  # met by so many others that all but the shortest rows are cheaper formed
        applied = self.streaming.apply(name, gradient, readers).dense().to(dtype) if self.streaming else formed
        self.total = self.total + dot_module(applied, formed).cpu().double()


def probe_rows(examples: Examples, sites: Mapping[str, Site], indices: Sequence[int]) -> list[int]:
    """A few of the examples, spread evenly over the given ones: two at least, if there are."""
    most = min(ROWS, max(2, BYTES // (4 * max(math.prod(site.shape) for site in sites.values()))))
    step = max(1, len(indices) // most)
    rows, positions = [], 0
    for index in list(indices)[::step][:most]:
        positions += examples.sizes[index]
        if len(rows) >= 2 and positions > POSITIONS:
            break
        rows.append(index)
    return rows


def worth_probing(model: nn.Module, device: torch.device, positions: float, probed: float) -> bool:
    """Whether work over so many positions is worth a probe over `probed` of them, and the device gains by shorter products."""
    flops = 6 * positions * sum(parameter.numel() for parameter in model.parameters())
    large = positions >= WORTH * probed and flops >= FLOPS
    return large and next(model.parameters()).dtype != torch.float64 and has_units(device)


def probe(point: Point, sites: Mapping[str, Site], rows: Sequence[int], operator: Operator | None) -> Tensor:
    """`<g_i, operator g_j>` of the rows' log-likelihood gradients, `[B, B]`; without a blockwise operator `<g_i, g_j>`."""
    sink = _Gram(operator, point.like)
    with Capture(point.model, dict(sites)) as capture:
        stream(capture, point.task, point.examples.items, [list(rows)], point.likelihood, sink, lambda positions: None)
    return sink.total


def settle_products(
    folder: Folder | Memory,
    precision: Precision,
    point: Point,
    sites: Mapping[str, Site],
    indices: Sequence[int],
    operator: Operator | None = None,
) -> Products:
    """The format of products that "auto" stands for when these rows are worked through; the folder remembers it."""
    if precision.products != "auto":
        return precision.products
    if not folder.has_json("products.json"):
        folder.write_json("products.json", _choose_products(point, sites, indices, operator))
    return folder.read_json("products.json")


def _choose_products(point: Point, sites: Mapping[str, Site], indices: Sequence[int], operator: Operator | None) -> Products:
    sizes, rows = point.examples.sizes, probe_rows(point.examples, sites, indices)
    positions, probed = (sum(sizes[index] for index in chosen) for chosen in (indices, rows))
    if not worth_probing(point.model, point.device, positions, probed):
        return "float32"

    def under(products: Products) -> Tensor:
        with multiplying(products, point.device):
            return probe(point, sites, rows, operator)

    found = agreement(under("bfloat16"), under("float32"))
    said = f"moves the scores of {len(rows)} rows by {found.error:.1%}, correlation {found.pearson:.4f} or more"
    if found.error <= ERROR and found.pearson >= PEARSON:
        note(f"multiplying in bfloat16, which {said}; everything kept is float32 (products='float32' for all in float32)")
        return "bfloat16"
    note(f"multiplying in float32, since bfloat16 {said}")
    return "float32"
