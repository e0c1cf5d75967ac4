"""What a stretch of training does to weights that it began with, and to a pull that lasts all along: functions of curvature.

Gradient descent on a loss of curvature `h`, for so long that the learning rates sum to `T`, leaves `e^(-T h)` of what was there
before, and `(1 - e^(-T h)) / h` of a constant pull (gradient flow; Bae et al. 2024, section 3). Both are functions of
`x = T h + T w`, `w` being weight decay; in the metric of Adam, whose steps are divided by `sqrt(v)`, `h / sqrt(v)` is in the
place of `h`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.engine.point import Point
from whence.methods.adam import adam_metric
from whence.operators import BlockDiagonal, EigenBlock
from whence.train.replay import History, Snapshot


@dataclass(frozen=True)
class Course:
    """Steps in a row. `rates` is the sum of their learning rates, lengthened by momentum.

    A row's loss, of which curvature is, is `loss_scale` times as large as what was descended of it. `metric` is what Adam's
    steps are divided by, weight for weight; none for SGD.
    """

    rates: float
    loss_scale: float = 1.0
    weight_decay: float = 0.0
    metric: BlockDiagonal | None = None

    @classmethod
    def of(cls, training: History, rates: float, checkpoints: Sequence[Snapshot], point: Point, names: Sequence[str]) -> Course:
        """Steps of a training whose learning rates sum to `rates`, with Adam's metric of the checkpoints, their mean.

        Raises UsageError for an optimizer that is not known, or where Adam's second moments are missing.
        """
        descent = training.descent()
        rule, metric = descent.optimizer, None
        if rule.kind == "adamw":
            metric = mean_metric([adam_metric(point, names, each, rule.eps, rule.betas[1]) for each in checkpoints])
        return cls(rates / (1 - rule.momentum), training.loss_scale, descent.weight_decay, metric)

    def pull(self, name: str, block: EigenBlock) -> tuple[Tensor, Tensor]:
        """`T / (loss_scale sqrt(v))` and `x` at a module, `[O, I]` each in the basis of its curvature, which is `block`."""
        d_OI = torch.ones_like(block.lam_OI) if self.metric is None else block.diagonal_of(self.metric.blocks[name].lam_OI)
        pull_OI = self.rates / (self.loss_scale * d_OI)
        return pull_OI, pull_OI * block.lam_OI.clamp(min=0) + self.rates * self.weight_decay


def mean_metric(metrics: Sequence[BlockDiagonal]) -> BlockDiagonal:
    """The mean of what steps are divided by."""
    blocks = {name: torch.stack([each.blocks[name].lam_OI for each in metrics]).mean(0) for name in metrics[0].names}
    return BlockDiagonal({name: EigenBlock(None, None, lam_OI) for name, lam_OI in blocks.items()}, metrics[0].label)
