"""Adam's metric: what its second moments make of a gradient, as a training left them."""

from __future__ import annotations

from collections.abc import Sequence

from whence.engine.point import Point
from whence.engine.products import Weights
from whence.errors import UsageError
from whence.operators import BlockDiagonal, EigenBlock
from whence.train.replay import Snapshot


def adam_metric(
    point: Point, modules: Sequence[str], checkpoint: Snapshot, epsilon: float = 1e-8, beta2: float | None = None
) -> BlockDiagonal:
    """`diag(sqrt(v) + epsilon)`, `v` being the optimizer's mean of squared gradients of each weight at the checkpoint.

    With `beta2` it is corrected for its beginning at zero, a factor that is the same for all weights. Raises UsageError where
    there are none.
    """
    weights, moments = Weights(point.model, point.cover(modules).sites), checkpoint.second_moments()
    if missing := sorted(weights.values.keys() - moments.keys()):
        raise UsageError(
            f"The checkpoint has no second moments of {missing[0]}",
            given=f"step {checkpoint.step}, second moments of {len(moments)} weights",
            accepted="checkpoints of a training with AdamW that moved the tracked modules",
            fix="whence train ... --optimizer adamw_torch_fused, and the same --modules",
        )
    corrected = 1 - beta2**checkpoint.step if beta2 is not None else 1.0
    roots = {name: (moments[name].to(point.like) / corrected).sqrt() + epsilon for name in weights.values}
    gathered = weights.gather({name: root.unsqueeze(0) for name, root in roots.items()})
    blocks = {name: EigenBlock(None, None, w_KOI[0]) for name, w_KOI in gathered.items()}
    return BlockDiagonal(blocks, f"metric of Adam after step {checkpoint.step}")
