"""SOURCE: the training unrolled in a few segments, in each of which curvature and gradients are taken for constant.

Bae et al. 2024, "Training data attribution via approximate unrolled differentiation". In a segment of `K` steps with rates
`eta`, the weights answer to a row like a spring that is pulled: with curvature `h`, `r = (1 - e^(-eta K h)) / h` of the pull is
left at the segment's end, and of what was there before, `S = e^(-eta K h)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Literal

import numpy as np
import torch

from whence.fitting.mean import mean_curvature
from whence.linalg.descent import caught_up
from whence.methods.base import Recipe, Request
from whence.methods.course import Course
from whence.operators import BlockDiagonal, Identity, Operator
from whence.scoring.score import score_points
from whence.settings import Count, Section, setting
from whence.store.scores import Scores
from whence.train.replay import Snapshot


class Segmented(Section):
    """How the training is cut, and what curvature is in each piece."""

    segments: Count = setting(3, "Pieces of the training, each of as many checkpoints; at most one for each checkpoint.")
    curvature: Literal["ekfac", "kfac", "shampoo", "diagonal"] = setting("ekfac", "How curvature is approximated.")


@dataclass(frozen=True)
class Segment:
    """Checkpoints in a row, and the sum of the learning rates of the steps since the segment before (`eta K`)."""

    checkpoints: Sequence[Snapshot]
    rates: float


def source(request: Request, settings: Segmented) -> Scores:
    """`1/N grad m(q)^T sum_l (prod_{l' > l} S_l') r_l`, the mean of `r_l` over the checkpoints of segment l (section 3).

    `m` is measured by the model, rows are differentiated at each checkpoint. Values are nats per copy: with one segment and
    endless steps they are those of influence without damping, with few steps gradient dot times the sum of the rates.
    """
    assert request.training is not None
    pieces = cut(request.kept_checkpoints(), request.training.learning_rates, settings.segments)
    fitted = {
        checkpoint.step: request.fitted(settings.curvature, f"factors-{checkpoint.step}", point=point)
        for checkpoint, point in request.checkpoints()
    }
    operators: dict[int, Operator] = {}
    later: Operator = Identity(request.names)
    for piece in reversed(pieces):
        curvature = mean_curvature([fitted[checkpoint.step] for checkpoint in piece.checkpoints])
        pulled, kept = answer(request, piece, curvature)
        share = 1 / len(piece.checkpoints)
        operators |= {checkpoint.step: share * (pulled @ later) for checkpoint in piece.checkpoints}
        later = kept @ later
    at, chosen = request.point, request.settings
    parts = (
        score_points(at, of, request.queries, operators[each.step], chosen, out=request.place(f"checkpoint-{each.step}"))
        for each, of in request.checkpoints()
    )
    return reduce(add, parts).named(f"SOURCE, {len(pieces)} segments of {len(fitted)} checkpoints, {settings.curvature}")


def cut(checkpoints: Sequence[Snapshot], rates: np.ndarray, count: int) -> list[Segment]:
    """Segments of about as many checkpoints each, the last up to the end of the training."""
    parts = np.array_split(np.arange(len(checkpoints)), min(count, len(checkpoints)))
    ends = [checkpoints[part[-1]].step for part in parts[:-1]] + [len(rates)]
    starts = [0, *ends[:-1]]
    return [
        Segment([checkpoints[number] for number in part], float(rates[start:end].sum()))
        for part, start, end in zip(parts, starts, ends, strict=True)
    ]


def answer(request: Request, segment: Segment, curvature: BlockDiagonal) -> tuple[BlockDiagonal, BlockDiagonal]:
    """`r` and `S` of a segment, in the bases of its curvature."""
    assert request.training is not None
    course = Course.of(request.training, segment.rates, segment.checkpoints, request.point, request.names)
    pulled, kept = dict(curvature.blocks), dict(curvature.blocks)
    for name, block in curvature.blocks.items():
        pull_OI, x_OI = course.pull(name, block)
        pulled[name] = replace(block, lam_OI=pull_OI * caught_up(x_OI))
        kept[name] = replace(block, lam_OI=torch.exp(-x_OI))
    return BlockDiagonal(pulled, f"answer to {curvature.label}"), BlockDiagonal(kept, f"what lasts through {curvature.label}")


RECIPES = (
    Recipe(
        "source",
        "SOURCE",
        "Bae et al. 2024, section 3",
        source,
        Segmented,
        needs=("training",),
        price="factors and a pass over the rows for each checkpoint",
    ),
)
