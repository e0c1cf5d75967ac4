"""Adam's metric: what its second moments make of a gradient, as a training left them."""

from __future__ import annotations

from collections.abc import Sequence

from whence.engine.point import Point
from whence.engine.products import Weights
from whence.errors import UsageError
from whence.operators import BlockDiagonal, EigenBlock
from whence.train.replay import Snapshot


def adam_scales(point: Point, modules: Sequence[str], checkpoint: Snapshot, epsilon: float = 1e-8) -> BlockDiagonal:
    """`1 / (sqrt(v) + epsilon)` of each weight, `v` being the optimizer's mean of squared gradients at the checkpoint.

    Not corrected for its beginning at zero, which is one factor for all. Raises UsageError where there are none.
    """
    weights, moments = Weights(point.model, point.cover(modules).sites), checkpoint.second_moments()
    if missing := sorted(weights.values.keys() - moments.keys()):
        raise UsageError(
            f"The checkpoint has no second moments of {missing[0]}",
            given=f"step {checkpoint.step}, second moments of {len(moments)} weights",
            accepted="checkpoints of a training with AdamW that moved the tracked modules",
            fix="whence train ... --optimizer adamw_torch_fused, and the same --modules",
        )
    scales = {name: 1 / (moments[name].to(point.like).sqrt() + epsilon) for name in weights.values}
    gathered = weights.gather({name: scale.unsqueeze(0) for name, scale in scales.items()})
    blocks = {name: EigenBlock(None, None, w_KOI[0]) for name, w_KOI in gathered.items()}
    return BlockDiagonal(blocks, f"Adam's metric after step {checkpoint.step}")
