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

from whence.engine.products import Weights
from whence.errors import UsageError
from whence.fitting.curvature import Curvature
from whence.methods.base import Request
from whence.operators import BlockDiagonal, EigenBlock, Identity, Operator
from whence.settings import AtLeastZero, Section, setting
from whence.train.record import Training


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


def damping_of_training(request: Request) -> Damping:
    """That of the training which the request was given.

    Its loss is a mean over tokens, of gradients that are clipped: where a row's loss, as curvature has it, is `c` times as
    large on average, the damping is, too. Raises UsageError without a training, or for an optimizer of which none is known.
    """
    training = request.training
    if training is None:
        raise UsageError(
            "The damping of the training needs the training",
            accepted="a folder that whence train made",
            fix="--training FOLDER (Python: training=read_training(FOLDER)), or a number as damping",
        )
    chosen = training.about["settings"]
    options = {**chosen["arguments"], **_options(chosen["arguments"].get("optim_args"))}
    lengthened, given = loss_scale(training), {"rates": training.learning_rates, "weight_decay": chosen["weight_decay"]}
    if chosen["optimizer"] == "sgd":
        return Damping(lengthened * stopped_early(**given, momentum=float(options.get("momentum", 0.0))), request.names)
    if chosen["optimizer"].startswith("adamw_torch"):
        metric = adam_metric(request, float(options.get("adam_beta2", 0.999)), float(options.get("adam_epsilon", 1e-8)))
        return Damping(lengthened * stopped_early(**given), request.names, metric)
    raise UsageError(
        "It is not known how the training's optimizer damps",
        given=chosen["optimizer"],
        accepted="sgd, adamw_torch, adamw_torch_fused",
        fix="give the damping as a number",
    )


def stopped_early(rates: Sequence[float] | np.ndarray, weight_decay: float = 0.0, momentum: float = 0.0) -> float:
    """`1 / sum of learning rates + weight decay`, a rate with momentum counting `1 / (1 - momentum)` times."""
    return (1 - momentum) / float(np.sum(rates)) + weight_decay


def loss_scale(training: Training) -> float:
    """How many times as large a row's loss is as what was descended of it: its tokens in the loss, over what clipping left."""
    about, clip = training.about, training.about["settings"]["max_grad_norm"]
    norms = [row["grad_norm"] for row in training.metrics if row.get("grad_norm")]
    kept = float(np.mean([min(1.0, clip / norm) for norm in norms])) if clip and norms else 1.0
    return about["tokens"]["in_loss_per_epoch"] / about["rows"]["train"] / kept


def adam_metric(request: Request, beta2: float, epsilon: float) -> BlockDiagonal:
    """`diag(sqrt(v) + epsilon)` of each module, `v` being the second moments at the last checkpoint, their bias corrected.

    Raises UsageError where a module's weights have none.
    """
    checkpoint = (request.training.checkpoints or [None])[-1] if request.training else None
    moments = checkpoint.second_moments() if checkpoint else {}
    weights = Weights(request.point.model, request.point.cover(request.names).sites)
    if checkpoint is None or (missing := sorted(weights.values.keys() - moments.keys())):
        raise UsageError(
            "Adam's second moments are missing, which its damping is made of",
            given=f"no checkpoint in {request.training.path if request.training else ''}" if checkpoint is None else missing[0],
            accepted="modules that were trained, and a training that kept its last checkpoint",
            fix="choose modules (modules='trained'), or give the damping as a number",
        )
    corrected = 1 - beta2**checkpoint.step
    root = {name: ((moments[name].to(value) / corrected).sqrt() + epsilon)[None] for name, value in weights.values.items()}
    blocks = {name: EigenBlock(None, None, d_1OI[0].to(request.point.like)) for name, d_1OI in weights.gather(root).items()}
    return BlockDiagonal(blocks, "metric of Adam")


def _options(text: str | None) -> dict[str, Any]:
    """The Trainer's `optim_args`, "momentum=0.9"."""
    return dict(pair.split("=") for pair in text.replace(" ", "").split(",")) if text else {}
