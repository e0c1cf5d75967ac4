"""What is added to a curvature matrix before it is inverted: a share of its mean eigenvalue, or what the training damped with.

Gradient descent with rates `eta_t` and weight decay `w` that stops early leaves directions of small curvature unfitted, about
as far as a damping of `1 / sum_t eta_t + w` does; in the metric of Adam, whose steps are divided by `sqrt(v)`, a damping of
`diag(sqrt(v))` times that (Bae et al. 2024). Along a direction of curvature `h`, with `T = sum_t eta_t`, `(1 - e^(-T h)) / h`
and `1 / (h + 1 / T)` agree at both ends, and differ by 30 % at most, where `T h` is 1.8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.linalg.descent import Optimizer
from whence.methods.adam import adam_metric
from whence.methods.base import Request
from whence.operators import BlockDiagonal, Identity, Operator
from whence.settings import AtLeastZero, Section, setting
from whence.train.replay import History


class Damped(Section):
    """How much is added to a curvature matrix before it is inverted."""

    damping: AtLeastZero | Literal["training"] = setting(
        0.1,
        "Damping, in units of the mean eigenvalue (each module's, where modules are inverted one by one); training: that of "
        "the training, 1 / sum of learning rates + weight decay, in the metric of Adam where Adam trained.",
    )
    absolute_damping: AtLeastZero | None = setting(None, "The same damping for all weights as a number, instead of `damping`.")

    @property
    def of_training(self) -> bool:
        """Whether it is that of the training."""
        return self.absolute_damping is None and self.damping == "training"

    @property
    def relative(self) -> float:
        """In units of the mean eigenvalue; 0 where it is something else."""
        return 0.0 if isinstance(self.damping, str) else self.damping


@dataclass(frozen=True)
class Damping:
    """`factor` times the identity on the modules `names`, or times a metric: a positive number for each weight.

    Where it is `relative`, it is that many times a mean eigenvalue, which has to be said (`at`) before it is used.
    """

    factor: float
    names: tuple[str, ...]
    metric: BlockDiagonal | None = None
    relative: bool = False

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"damping {self.factor:g}{' x mean eigenvalue' * self.relative}{' in the metric of Adam' * bool(self.metric)}"

    def identity(self) -> Any:
        """What tells it from another, as that of an operator does."""
        return {"damping": self.factor, "relative": self.relative, "metric": self.metric.identity() if self.metric else None}

    def at(self, mean: Callable[[], float]) -> Damping:
        """As a number, where the mean eigenvalue is what `mean` gives; it is asked only where it matters."""
        return Damping(self.factor * mean(), self.names) if self.relative else self

    @property
    def operator(self) -> Operator:
        """Itself, to be added to a matrix."""
        assert not self.relative
        return self.factor * (self.metric or Identity(self.names))

    @property
    def mean(self) -> float:
        """Over all weights."""
        blocks = self.metric.blocks.values() if self.metric else ()
        return self.factor * float(torch.cat([block.lam_OI.flatten() for block in blocks]).mean()) if blocks else self.factor

    @property
    def root(self) -> Operator:
        """`metric^(-1/2)`: between two of these a matrix has the damping `factor` times the identity."""
        return self.metric.apply(torch.rsqrt, "to the power -1/2") if self.metric else Identity(self.names)

    def inverse(self, curvature: Curvature) -> Operator:
        """`(curvature + damping)^-1`, in the curvature's own bases; see `BlockDiagonal.plus`."""
        if self.metric is None:
            return curvature.inverse(absolute=self.factor)
        assert isinstance(curvature.operator, BlockDiagonal)
        scaled = self.metric.apply(lambda lam_OI: self.factor * lam_OI, f"times {self.factor:g}")
        return curvature.operator.plus(scaled).inverse(absolute=0.0)

    def times(self, factor: float) -> Damping:
        """So many times as much."""
        return Damping(factor * self.factor, self.names, self.metric)


def damping_of(request: Request, settings: Damped) -> Damping:
    """The damping that the settings ask for."""
    if settings.absolute_damping is not None:
        return Damping(settings.absolute_damping, request.names)
    if settings.of_training:
        return damping_of_training(request)
    return Damping(settings.relative, request.names, relative=True)


def damped_inverse(request: Request, settings: Damped, curvature: Curvature) -> Operator:
    """`(curvature + damping)^-1` of factors; a number as damping is in units of each module's own mean eigenvalue.

    The damping of a training with Adam, a number for each weight, is taken on the diagonal of the factors' bases
    (`BlockDiagonal.plus`): exact where the factors have none, as "diagonal".
    """
    if settings.of_training:
        return damping_of_training(request).inverse(curvature)
    return curvature.inverse(settings.relative, absolute=settings.absolute_damping)


def damping_of_training(request: Request) -> Damping:
    """That of the training which the request was given.

    Where a row's loss, of which the curvature is, is larger than what was descended of it (`loss_scale`), so is the damping.
    Raises UsageError without a training, or for an optimizer of which it is not known.
    """
    training = request.training
    if training is None:
        raise UsageError(
            "The damping of the training needs the training",
            accepted="a folder that whence train made",
            fix="--training FOLDER (Python: training=read_training(FOLDER)), or a number as damping",
        )
    descent = training.descent()
    optimizer = descent.optimizer
    factor = training.loss_scale * stopped_early(training.learning_rates, descent.weight_decay, optimizer.momentum)
    return Damping(factor, request.names, metric_of(request, training, optimizer) if optimizer.kind == "adamw" else None)


def stopped_early(rates: Sequence[float] | np.ndarray, weight_decay: float = 0.0, momentum: float = 0.0) -> float:
    """`1 / sum of learning rates + weight decay`, a rate with momentum counting `1 / (1 - momentum)` times."""
    return (1 - momentum) / float(np.sum(rates)) + weight_decay


def metric_of(request: Request, training: History, optimizer: Optimizer) -> BlockDiagonal:
    """Adam's metric at the last checkpoint, its second moments' bias corrected. Raises UsageError where there is none."""
    if not training.checkpoints:
        raise UsageError(
            "Adam's second moments are missing, which its damping is made of",
            given="no checkpoint was kept",
            accepted="a training that kept its last checkpoint",
            fix="whence train ... --keep 1 or more, or give the damping as a number",
        )
    return adam_metric(request.point, request.names, training.checkpoints[-1], optimizer.eps, optimizer.betas[1])
