"""How a fitted curvature is: what its eigenvalues say about rank, conditioning and numerical trouble."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.errors import NumericalError, UsageError
from whence.fitting.covariance import Sides
from whence.fitting.curvature import Curvature
from whence.fitting.methods import METHODS
from whence.linalg.rotation import Rotation
from whence.store.plain import plain

FEW_ROWS = 32
"""Rows below which measured eigenvalues are too noisy not to say so."""

PART = 2**22
"""Eigenvalues that are summed at a time in float64."""


@dataclass(frozen=True)
class Side:
    """One covariance's eigenvalues, in numbers, without damping."""

    width: int
    largest: float
    smallest: float
    rank: int
    """Eigenvalues above zero, to working precision: `eps * sqrt(width) * largest`."""
    condition: float
    """`largest / smallest`; infinite where the covariance is singular to working precision."""
    samples: int
    """Positions (or examples) that the covariance is a mean over."""
    columns: int
    """Of its widest block; with fewer samples than that it can't have full rank."""
    not_finite: int

    @property
    def per_column(self) -> float:
        """Samples per column."""
        return self.samples / self.columns


@dataclass(frozen=True)
class Health:
    """One module's eigenvalues, in numbers; `d` is the damping times their mean. All NaN where one of them is not finite."""

    module: str
    shape: tuple[int, int]
    mean: float
    largest: float
    condition: float
    """`(largest + d) / (smallest + d)`: by how much the damped inverse stretches one direction more than another."""
    effective_rank: float
    """`sum lambda / (lambda + d)`: how many of the `O * I` directions the damping leaves to the data."""
    zero: float
    """Share of eigenvalues that are zero to working precision."""
    negative: int
    not_finite: int
    smallest: float = math.nan
    d: float = math.nan
    inputs: Side | None = None
    """The activation covariance; None where its eigenvalues were not kept, or the method has none."""
    outputs: Side | None = None
    """The gradient covariance."""
    warnings: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether the numbers can be used: finite, not negative, and not all zero."""
        return not self.negative and not self.not_finite and self.mean > 0

    @property
    def relative_rank(self) -> float:
        """Effective rank as a share of all directions."""
        return self.effective_rank / (self.shape[0] * self.shape[1])

    def as_json(self) -> dict[str, Any]:
        """As JSON values; what is not finite becomes null, and `not_finite`, `rank` and `warnings` say why."""
        values = dataclasses.asdict(self) | {"relative_rank": self.relative_rank, "sound": self.sound}
        for key, side in (("inputs", self.inputs), ("outputs", self.outputs)):
            values[key] = side and dataclasses.asdict(side) | {"per_column": side.per_column}
        return plain(values)


def health(curvature: Curvature, damping: float = 0.1) -> list[Health]:
    """Examine every module, with the damping relative to its mean eigenvalue."""
    found = []
    rows = curvature.about.get("eigenvalue_examples", FEW_ROWS)
    few = rows < FEW_ROWS and METHODS[curvature.about["method"]].eigenvalues == "measured"
    for name, block in curvature.blocks.items():
        entry = _examine(name, block.lam_OI, damping)
        kept = curvature.sides.get(name)
        if kept:
            inputs, outputs = _side(kept.in_I, block.q_I, kept.in_count), _side(kept.out_O, block.q_O, kept.out_count)
            entry = dataclasses.replace(entry, inputs=inputs, outputs=outputs)
        said = [*_warnings(entry, kept)]
        if few:  # of `n` normal ones a mean of squares has a relative error of `sqrt(2 / n)`
            said.append(f"each eigenvalue is a mean over few rows ({rows}): off by {math.sqrt(2 / rows):.0%} or more")
        found.append(dataclasses.replace(entry, warnings=tuple(said)))
    return found


def concentration(lam_OI: Tensor, shares: Sequence[float] = (0.9, 0.95, 0.99)) -> dict[float, int]:
    """How many of the largest eigenvalues hold each share of their sum; none where all are zero.

    Raises NumericalError where an eigenvalue is NaN or infinite.
    """
    refuse_infinite(lam_OI, "the module")
    cumulative = lam_OI.flatten().sort(descending=True).values.cumsum(0, dtype=torch.float64)
    return {share: holding(cumulative, share) for share in shares}


def holding(cumulative: Tensor | np.ndarray, share: float) -> int:
    """How many terms of a descending sequence reach the share of its sum, given its cumulative sums."""
    total = cumulative[-1]
    return int((cumulative < share * total).sum()) + 1 if total > 0 else 0


def refuse_infinite(values: Tensor, where: str) -> None:
    """Raise NumericalError where an eigenvalue is NaN or infinite."""
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        raise NumericalError(
            f"The eigenvalues of {where} are not finite",
            given=f"{broken:,} of {values.numel():,} are NaN or infinite",
            fix="look for rows with a huge or undefined loss (whence data preview), and fit again, in float32",
        )


def layer_number(module: str) -> int | None:
    """The number of the layer that a module is in: the first one in its name."""
    found = re.search(r"\.(\d+)(\.|$)", module)
    return int(found.group(1)) if found else None


def choose_modules(names: Iterable[str], layer: int | None = None, patterns: Sequence[str] = ()) -> list[str]:
    """The modules of a layer, or those that match a name or glob, or by default those of the last layer (all, without layers).

    Raises UsageError where a pattern or the layer matches nothing, saying what there is.
    """
    names = list(names)
    if layer is not None and patterns:
        raise UsageError("Both a layer and modules were named.", accepted="one of them")
    if patterns:
        for pattern in patterns:
            if not fnmatch.filter(names, pattern) and pattern not in names:
                raise UsageError(f"The factors have no module {pattern!r}.", accepted=", ".join(names))
        return [name for name in names if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    numbers = {name: number for name in names if (number := layer_number(name)) is not None}
    if layer is None:
        return [name for name in names if numbers.get(name) == max(numbers.values())] if numbers else names
    chosen = [name for name in names if numbers.get(name) == layer]
    if not chosen:
        there = sorted(set(numbers.values()))
        raise UsageError(
            f"The factors have no module in layer {layer}.",
            accepted=f"layers {', '.join(map(str, there))}" if there else "no layer: these modules have no numbers",
        )
    return chosen


def rank_words(value: float) -> str:
    """Write an effective rank."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def condition_words(value: float) -> str:
    """Write a condition number."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def _examine(name: str, lam_OI: Tensor, damping: float) -> Health:
    shape, broken = (lam_OI.shape[0], lam_OI.shape[1]), int((~torch.isfinite(lam_OI)).sum())
    negative = int((lam_OI < 0).sum())
    if broken:
        return Health(name, shape, math.nan, math.nan, math.nan, math.nan, math.nan, negative, broken)
    mean, largest, smallest = lam_OI.mean(dtype=torch.float64).item(), lam_OI.max().item(), lam_OI.min().item()
    d = damping * mean
    parts = (part.double() for part in lam_OI.flatten().split(PART))
    return Health(
        module=name,
        shape=shape,
        mean=mean,
        largest=largest,
        condition=_ratio(largest + d, smallest + d),
        effective_rank=sum((part / (part + d)).nan_to_num().sum().item() for part in parts),
        zero=(lam_OI <= torch.finfo(lam_OI.dtype).eps * largest).sum().item() / lam_OI.numel(),
        negative=negative,
        not_finite=0,
        smallest=smallest,
        d=d,
    )


def _side(values: Tensor, basis: Rotation | None, samples: int) -> Side:
    width, columns = len(values), max(len(block) for block in basis.blocks) if basis else 1
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        return Side(width, math.nan, math.nan, 0, math.nan, samples, columns, broken)
    largest, smallest = values.max().item(), values.min().item()
    rank = int((values > torch.finfo(values.dtype).eps * math.sqrt(width) * largest).sum())
    condition = _ratio(largest, smallest) if rank == width else math.inf
    return Side(width, largest, smallest, rank, condition, samples, columns, 0)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf if a else math.nan


def _warnings(found: Health, kept: Sides | None) -> Iterable[str]:
    """What a reader should know before trusting the module."""
    if found.not_finite:
        yield f"{found.not_finite:,} eigenvalues are NaN or infinite: nothing made with this module means anything"
    elif found.mean == 0:
        yield "all eigenvalues are zero: the sample had no gradient here"
    if found.negative:
        yield f"{found.negative:,} eigenvalues are negative, which no mean of squares is"
    if not kept:
        return
    unit = "rows" if kept.by_example else "positions"
    for what, side, other in (("input", found.inputs, found.outputs), ("gradient", found.outputs, found.inputs)):
        if side is None or other is None:
            continue
        per_sample = other.width if kept.by_example else 1
        if side.not_finite:
            yield f"{side.not_finite:,} eigenvalues of the {what} covariance are NaN or infinite"
        elif side.samples * per_sample < side.columns:
            yield f"fewer {unit} ({side.samples:,}) than columns ({side.columns:,}): rank-deficient {what} covariance"
        elif side.rank < side.width:
            yield f"{what} covariance has rank {side.rank:,} of {side.width:,}"
